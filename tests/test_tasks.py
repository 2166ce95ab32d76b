"""Retrieval, similarity and probes, on encoders of a few vectors."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score

from distillabse.errors import InputError
from distillabse.tasks.encoders import RandomVectors, VectorTable
from distillabse.tasks.plots import task_figures
from distillabse.tasks.probe import Probe, macro_f1
from distillabse.tasks.retrieval import Retrieval, credits, ratio_margins
from distillabse.tasks.run import run_tasks
from distillabse.tasks.scores import Bootstrap, mean_score, pearson, spearman
from distillabse.tasks.similarity import ScoredPair, Similarity
from distillabse.tasks.views import task_tables

# Column 0 is near to every row, so that cosines alone are wrong in rows 1 and 2.
COSINES = np.array([[0.9, 0.5, 0.1], [0.85, 0.8, 0.2], [0.7, 0.1, 0.6]], dtype=np.float32)


class Given:
    """An encoder of given vectors; counts what it is asked for."""

    def __init__(self, vectors):
        self.vectors, self.asked = vectors, []

    def encode(self, texts):
        self.asked += texts
        return np.array([self.vectors[text] for text in texts], dtype=np.float32)


class Oracle:
    """Knows what a text means: "de 7" and "en 7" are the same."""

    def __init__(self, dimension=64):
        self.random = RandomVectors(dimension)

    def encode(self, texts):
        return self.random.encode([text.split()[1] for text in texts])


class Constant:
    def encode(self, texts):
        return np.ones((len(texts), 4))


def translations(n=200, languages=("de", "fr")):
    return Retrieval("pairs", {language: [(f"{language} {i}", f"en {i}") for i in range(n)] for language in languages})


def value(result, task, encoder, measure, language=None):
    scores = result["tasks"][task]["encoders"][encoder][measure]
    return (scores["languages"][language] if language else scores["mean"])["value"]


def test_credits_of_cosines_and_margins_by_hand():
    ids = np.arange(3)
    assert credits(COSINES, ids).tolist() == [1, 0, 0]
    assert credits(COSINES.T, ids).tolist() == [1, 1, 1]
    # Means of the two nearest: rows .7, .825, .65; columns .875, .65, .4.
    expected = [
        [0.9 / 0.7875, 0.5 / 0.675, 0.1 / 0.55],
        [0.85 / 0.85, 0.8 / 0.7375, 0.2 / 0.6125],
        [0.7 / 0.7625, 0.1 / 0.65, 0.6 / 0.525],
    ]
    margins = ratio_margins(COSINES, 2)
    np.testing.assert_allclose(margins, expected, rtol=1e-6)
    assert credits(margins, ids).tolist() == [1, 1, 1]
    # More neighbours than there are: all three.
    np.testing.assert_allclose(ratio_margins(COSINES, 4)[0, 0], 0.9 / ((0.5 + 2.45 / 3) / 2), rtol=1e-6)


def test_ties_share_the_credit_and_equal_texts_are_one_candidate():
    ties = np.array([[0.5, 0.5, 0.1], [0.5, 0.5, 0.5], [0.1, 0.2, 0.9]], dtype=np.float32)
    assert credits(ties, np.arange(3)).tolist() == pytest.approx([1 / 2, 1 / 3, 1])
    assert credits(ties, np.array([0, 0, 1])).tolist() == pytest.approx([1, 2 / 3, 1])


def test_a_denominator_that_is_not_positive_keeps_the_sign_of_the_cosine():
    cosines = np.array([[-0.1, -0.9], [-0.9, -0.2]], dtype=np.float32)
    margins = ratio_margins(cosines, 2)
    assert np.isfinite(margins).all() and (margins < 0).all()


def test_an_oracle_finds_every_translation_and_random_vectors_one_in_n():
    result = run_tasks({"oracle": Oracle(), "random": RandomVectors(64), "constant": Constant()}, [translations()])
    for measure in ("accuracy", "accuracy_to_pivot", "accuracy_from_pivot", "margin_accuracy"):
        assert value(result, "pairs", "oracle", measure, "de") == 1
        assert value(result, "pairs", "random", measure) < 0.03
        assert value(result, "pairs", "constant", measure) == pytest.approx(1 / 200)
    assert "mixed_accuracy" not in result["tasks"]["pairs"]["encoders"]["oracle"]


def test_directions_are_not_mixed_up():
    """Two pivot sentences are the same vector to the encoder, so only one direction is ambiguous."""
    x, y = [1.0, 0.0], [0.0, 1.0]
    vectors = Given({"a": x, "b": [0.6, 0.8], "A": x, "B": x, "c": y, "C": y})
    task = Retrieval("three", {"de": [("a", "A"), ("b", "B"), ("c", "C")]}, margin=False)
    result = run_tasks({"given": vectors}, [task])
    # a: A or B, tied; b: nearest C, wrong; c: C. Back: A -> a, B -> a, wrong, C -> c.
    assert value(result, "three", "given", "accuracy_to_pivot") == pytest.approx((0.5 + 0 + 1) / 3)
    assert value(result, "three", "given", "accuracy_from_pivot") == pytest.approx(2 / 3)
    assert value(result, "three", "given", "accuracy") == pytest.approx((1.5 + 2) / 6)
    assert "margin_accuracy" not in result["tasks"]["three"]["encoders"]["given"]


class Monolingual:
    """The oracle in English, and noise in all else: a teacher of one language."""

    def __init__(self, dimension=64):
        self.oracle, self.noise = Oracle(dimension), RandomVectors(dimension, seed=1)

    def encode(self, texts):
        return np.stack([(self.oracle if text.startswith("en") else self.noise).encode([text])[0] for text in texts])


def test_a_student_of_more_languages_finds_the_teachers_english():
    encoders = {"student": Oracle(), "teacher": Monolingual(), "narrow": Oracle(8)}
    result = run_tasks(encoders, [translations()], teacher="teacher")
    assert list(result["encoders"]) == list(result["tasks"]["pairs"]["encoders"]) == ["student", "teacher", "narrow"]
    assert value(result, "pairs", "student", "mixed_accuracy", "fr") == 1
    assert value(result, "pairs", "student", "teacher_cosine_other") == pytest.approx(1, abs=1e-5)
    assert value(result, "pairs", "student", "teacher_cosine_pivot") == pytest.approx(1, abs=1e-5)
    assert value(result, "pairs", "teacher", "accuracy") < 0.05
    assert value(result, "pairs", "teacher", "mixed_accuracy") == value(result, "pairs", "teacher", "accuracy_to_pivot")
    assert abs(value(result, "pairs", "teacher", "teacher_cosine_other")) < 0.05
    assert "mixed_accuracy" not in result["tasks"]["pairs"]["encoders"]["narrow"]


def test_a_narrow_student_is_compared_with_the_projected_teacher():
    matrix = np.linalg.qr(np.random.default_rng(0).standard_normal((64, 16)))[0].astype(np.float32)

    class Narrow(Oracle):
        def encode(self, texts):
            return super().encode(texts) @ matrix

    encoders = {"teacher": Oracle(), "student": Narrow()}
    result = run_tasks(encoders, [translations(50)], teacher="teacher", projection=matrix)
    assert value(result, "pairs", "student", "teacher_cosine_other") == pytest.approx(1, abs=1e-5)
    assert value(result, "pairs", "teacher", "teacher_cosine_other") == pytest.approx(1, abs=1e-5)


def test_every_text_is_encoded_once_over_all_tasks():
    random = RandomVectors(8)
    texts = [f"de {i}" for i in range(20)] + [f"en {i}" for i in range(20)]
    encoder = Given({text: random.encode([text])[0] * 3 for text in texts})
    again = Similarity("again", {"en": [ScoredPair("en 1", "de 1", 1.0), ScoredPair("en 2", "en 3", 0.0)]})
    result = run_tasks({"given": encoder}, [translations(20, ["de"]), again])
    assert sorted(encoder.asked) == sorted(texts)
    assert result["encoders"]["given"]["texts"] == 40
    assert result["encoders"]["given"]["dimension"] == 8


def test_vectors_are_given_unit_length_and_checked():
    table = VectorTable("given", Given({"a": [3.0, 4.0], "b": [0.0, 0.0]}), ["a", "b", "a"])
    np.testing.assert_allclose(table(["b", "a"]), [[0, 0], [0.6, 0.8]])
    with pytest.raises(InputError, match="broken gives vectors that hold NaN"):
        VectorTable("broken", Given({"a": [np.nan, 1.0]}), ["a"])
    with pytest.raises(InputError, match=r"shape \(2,\) for 1 texts"):
        VectorTable("flat", type("Flat", (), {"encode": lambda self, texts: np.ones(2)})(), ["a"])


def test_random_vectors_depend_on_the_text_alone():
    first, second = RandomVectors(16).encode(["a", "b"]), RandomVectors(16).encode(["b", "c", "a"])
    np.testing.assert_array_equal(first, second[[2, 0]])
    assert np.linalg.norm(first, axis=1) == pytest.approx(1)
    assert not np.array_equal(first, RandomVectors(16, seed=1).encode(["a", "b"]))


def scored(language, n=40, seed=0):
    random = np.random.default_rng(seed)
    return [ScoredPair(f"{language} first {i}", f"{language} second {i}", float(s)) for i, s in
            enumerate(random.integers(0, 6, size=n))]  # fmt: skip


def test_correlations_are_scipys_on_every_axis():
    random = np.random.default_rng(0)
    left, right = random.integers(0, 6, (3, 30)).astype(float), random.standard_normal((3, 30))
    for row in range(3):
        assert spearman(left, right)[row] == pytest.approx(spearmanr(left[row], right[row]).statistic)
        assert pearson(left, right)[row] == pytest.approx(pearsonr(left[row], right[row]).statistic)
    assert spearman(np.ones(5), np.arange(5.0)) == 0


def test_similarity_across_languages():
    """The second sentence holds the cosine that the first asks for; both languages agree, up to a sign in one pair."""
    english, german = scored("en"), scored("de")
    vectors = {}
    for language, pairs in (("en", english), ("de", german)):
        for i, pair in enumerate(pairs):
            angle = pair.score if language == "en" or i != 3 else 5 - pair.score
            vectors[pair.first] = [1.0, 0.0]
            vectors[pair.second] = [np.cos((5 - angle) / 4), np.sin((5 - angle) / 4)]
    result = run_tasks({"given": Given(vectors)}, [Similarity("sts", {"de": german, "en": english})])
    gold = np.array([pair.score for pair in german])
    got = np.where(np.arange(40) == 3, 5 - gold, gold)
    assert value(result, "sts", "given", "spearman", "en") == pytest.approx(1)
    assert value(result, "sts", "given", "spearman", "de") == pytest.approx(spearmanr(got, gold).statistic)
    cross = result["tasks"]["sts"]["encoders"]["given"]["cross_spearman"]
    assert set(cross["languages"]) == {"de"}
    assert cross["mean"]["value"] == pytest.approx(spearmanr(got, gold).statistic)


def test_languages_that_are_not_aligned_have_no_figure_across():
    result = run_tasks(
        {"random": RandomVectors(8)}, [Similarity("sts", {"en": scored("en"), "de": scored("de", seed=1)})]
    )
    assert "cross_spearman" not in result["tasks"]["sts"]["encoders"]["random"]


class Classes:
    """Texts are "<language> <class> <number>"; a language it does not know is one point."""

    def __init__(self, *known):
        self.known, self.random = known, RandomVectors(8)

    def encode(self, texts):
        rows = []
        for text in texts:
            language, name, _ = text.split()
            centre = self.random.encode([name if language in self.known else "?"])[0]
            rows.append(centre + 0.05 * self.random.encode([text])[0])
        return np.stack(rows)


def labelled(language, n, names=("spam", "ham")):
    return [(f"{language} {names[i % len(names)]} {i}", names[i % len(names)]) for i in range(n)]


def test_a_probe_on_separable_classes_is_right_and_carries_over_to_a_language_of_the_same_space():
    task = Probe("intents", labelled("en", 40), {"en": labelled("en", 20), "de": labelled("de", 20)})
    encoders = {"both": Classes("en", "de"), "english": Classes("en"), "teacher": Classes("en", "de")}
    result = run_tasks(encoders, [task], teacher="teacher")
    for measure in ("accuracy", "macro_f1", "mixed_accuracy"):
        assert value(result, "intents", "both", measure, "en") == 1
        assert value(result, "intents", "both", measure, "de") == 1
    assert value(result, "intents", "english", "accuracy", "en") == 1
    assert value(result, "intents", "english", "accuracy", "de") == pytest.approx(0.5, abs=0.26)
    assert value(result, "intents", "english", "macro_f1", "de") < 0.8


def test_a_class_without_a_train_row_is_never_right():
    test = [*labelled("en", 10), ("en spam 99", "new"), ("en ham 98", "new")]
    result = run_tasks({"both": Classes("en")}, [Probe("intents", labelled("en", 40), {"en": test})])
    assert value(result, "intents", "both", "accuracy") == pytest.approx(10 / 12)


def test_macro_f1_is_scikit_learns():
    random = np.random.default_rng(0)
    gold, predicted = random.integers(0, 4, (3, 25)), random.integers(0, 3, (3, 25))
    expected = [f1_score(gold[row], predicted[row], average="macro") for row in range(3)]
    np.testing.assert_allclose(macro_f1(gold, predicted, classes=6), expected)
    assert macro_f1(gold[0], predicted[0], classes=6) == pytest.approx(expected[0])


def test_intervals_are_those_of_the_binomial_and_the_mean_of_aligned_rows_is_no_narrower():
    random = np.random.default_rng(0)
    right = (random.random(400) < 0.8).astype(float)
    bootstrap = Bootstrap(2000, 0)
    score = bootstrap.mean(right)
    low, high = score.as_json()["ci95"]
    deviation = 1.96 * np.sqrt(right.mean() * (1 - right.mean()) / 400)
    assert low == pytest.approx(right.mean() - deviation, abs=0.01)
    assert high == pytest.approx(right.mean() + deviation, abs=0.01)
    same, other = bootstrap.mean(right), bootstrap.mean((random.random(400) < 0.8).astype(float))
    assert np.std(mean_score([score, same]).resampled) == pytest.approx(np.std(score.resampled))
    assert np.std(mean_score([score, other]).resampled) == pytest.approx(np.std(score.resampled) / np.sqrt(2), rel=0.1)
    assert mean_score([score, other]).n == 800


def test_what_cannot_be_run_is_an_error():
    with pytest.raises(InputError, match="no tasks to run"):
        run_tasks({"random": RandomVectors(4)}, [])
    with pytest.raises(InputError, match="'teacher' is not among the encoders: random"):
        run_tasks({"random": RandomVectors(4)}, [translations(5)], teacher="teacher")


def test_tables_have_languages_in_rows_and_encoders_in_columns():
    result = run_tasks({"teacher": Oracle(), "random": RandomVectors(64)}, [translations(1000)], teacher="teacher")
    console = Console(width=120, record=True, file=io.StringIO())
    tables = list(task_tables(result))
    assert [table.title.split(": ")[1] for table in tables][:2] == ["accuracy", "accuracy by ratio margin"]
    console.print(tables[0])
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["language", "rows", "teacher", "random"] in lines
    de = next(line for line in lines if line[:1] == ["de"])
    assert de[:4] == ["de", "1,000", "1.000", "1.000..1.000"] and float(de[4]) < 0.01
    assert next(line for line in lines if line[:1] == ["mean"])[1] == "2,000"


def test_figures_have_a_row_for_each_language_and_only_tasks_of_several_have_one():
    encoders = {"teacher": Oracle(), "student": Oracle(), "other": RandomVectors(64)}
    one = Probe("one", labelled("en", 40), {"en": labelled("en", 20)})
    drawn = task_figures(run_tasks(encoders, [translations(20)], teacher="teacher")["tasks"])
    assert set(drawn) == {"task-pairs-accuracy", "task-pairs-mixed_accuracy"}
    for text in (">de<", ">fr<", ">student<", ">other<"):
        assert text in drawn["task-pairs-accuracy"]
    assert task_figures(run_tasks({"both": Classes("en")}, [one])["tasks"]) == {}
