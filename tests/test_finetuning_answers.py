"""What counts as the right answer, and how figures are made of it: every expected number is worked out by hand."""

import numpy as np
import pytest

from distillabse.finetuning.answers import answer_scores, mlqa_tokens, squad_tokens
from distillabse.finetuning.scores import compare


def test_articles_punctuation_and_case_do_not_count():
    scores = answer_scores("The old House!", ["old house"], "en")
    assert scores == {"f1": 100, "exact_match": 100, "squad_f1": 100, "squad_exact_match": 100}


def test_f1_is_the_harmonic_mean_of_precision_and_recall_with_repeated_words():
    # predicted: red red cat (3), expected: red cat sat down (4); common: red, cat. P = 2/3, R = 2/4, F1 = 4/7.
    scores = answer_scores("red red cat", ["red cat sat down"], "en")
    assert scores["f1"] == pytest.approx(100 * 4 / 7)
    assert scores["exact_match"] == 0


def test_the_best_of_several_answers_counts():
    scores = answer_scores("308 points", ["the Panthers", "308"], "en")
    assert scores["f1"] == pytest.approx(100 * 2 * 0.5 * 1 / 1.5)
    assert answer_scores("308", ["the Panthers", "308"], "en")["exact_match"] == 100


def test_no_word_in_common_is_no_f1():
    assert answer_scores("a cat", ["dog"], "en") == dict.fromkeys(
        ("f1", "exact_match", "squad_f1", "squad_exact_match"), 0
    )


def test_chinese_characters_are_tokens_of_their_own_only_for_mlqa():
    assert mlqa_tokens("《北京》大学 ABC 12。", "zh") == ["北", "京", "大", "学", "abc", "12"]
    scores = answer_scores("北京大学", ["北京"], "zh")
    # MLQA: 2 of 4 characters and both of 2. SQuAD: one word, another word.
    assert scores["f1"] == pytest.approx(100 * 2 * 0.5 * 1 / 1.5)
    assert scores["squad_f1"] == 0


@pytest.mark.parametrize(
    ("language", "text", "tokens"),
    [
        ("de", "Der Bahnhof des Dorfes", ["bahnhof", "dorfes"]),
        ("es", "¿la casa, una?", ["casa"]),
        ("ar", "الكتاب", ["كتاب"]),
        ("vi", "những con mèo", ["con", "mèo"]),
        ("ru", "«Дом» the", ["дом", "the"]),
    ],
)
def test_every_language_has_its_own_articles(language, text, tokens):
    assert mlqa_tokens(text, language) == tokens


def test_the_squad_script_knows_english_articles_and_ascii_punctuation_alone():
    assert squad_tokens("Der «Bahnhof», the Dorf.", "de") == ["der", "«bahnhof»", "dorf"]


def test_figures_average_and_gap_by_hand():
    languages = np.array(["en", "en", "de", "de", "es", "es"])
    groups = np.array([0, 1, 0, 1, 0, 1])
    teacher = {"accuracy": np.array([100, 100, 100, 0, 0, 0.0])}
    student = [{"accuracy": np.array([100, 0, 0, 0, 100, 0.0])}, {"accuracy": np.array([100, 100, 0, 0, 0, 0.0])}]
    found = compare({"t": [teacher, teacher], "s": student}, languages, groups, ("accuracy",), "en", 200, 0)
    assert found["languages"] == ["en", "de", "es"]
    t, s = found["models"]["t"], found["models"]["s"]
    assert [t["languages"][code]["accuracy"]["mean"] for code in ("en", "de", "es")] == [100, 50, 0]
    assert t["average"]["accuracy"] == 50 and t["transfer_gap"]["accuracy"] == 75
    assert s["languages"]["en"]["accuracy"]["seeds"] == [50, 100]
    assert s["languages"]["en"]["accuracy"]["mean"] == 75
    assert s["languages"]["de"]["accuracy"]["difference"]["mean"] == -50
    assert s["languages"]["es"]["accuracy"]["difference"]["mean"] == 25
    assert s["average"]["accuracy"] == pytest.approx((75 + 0 + 25) / 3)
    assert "difference" not in t["languages"]["en"]["accuracy"]


def test_a_constant_difference_has_an_interval_without_width_though_the_models_have_not():
    languages, groups = np.array(["en"] * 6), np.arange(6)
    first = {"f1": np.array([0, 10, 20, 30, 40, 50.0])}
    second = {"f1": first["f1"] + 7}
    figure = compare({"a": [first], "b": [second]}, languages, groups, ("f1",), "en", 500, 1)["models"]["b"]
    figure = figure["languages"]["en"]["f1"]
    low, high = figure["ci95"]
    assert low < 25 < 39 < high
    assert figure["difference"]["ci95"] == pytest.approx([7, 7])


def test_whole_groups_are_drawn():
    languages, scores = np.array(["en"] * 40), [{"f1": np.repeat([0.0, 100.0], 20)}]
    by_paragraph = compare({"a": scores}, languages, np.repeat([0, 1], 20), ("f1",), "en", 500, 0)
    by_row = compare({"a": scores}, languages, np.arange(40), ("f1",), "en", 500, 0)
    # Of two paragraphs one in four draws has the first twice: the interval is everything. Of 40 rows it is +-16.
    assert by_paragraph["models"]["a"]["languages"]["en"]["f1"]["ci95"] == [0, 100]
    low, high = by_row["models"]["a"]["languages"]["en"]["f1"]["ci95"]
    assert 30 <= low <= 40 and 60 <= high <= 70


def test_one_group_has_no_interval():
    found = compare({"a": [{"f1": np.ones(3)}]}, np.array(["en"] * 3), np.zeros(3, int), ("f1",), "en", 100, 0)
    assert found["models"]["a"]["languages"]["en"]["f1"]["ci95"] is None
