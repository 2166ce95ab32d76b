"""What docs/benchmarks.md says is what the results say, and the arithmetic behind their ranges."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import benchmarks_page  # noqa: E402
from agreement import agreement  # noqa: E402
from augmentation import augmented  # noqa: E402
from open_text import dictionary, fortunes, gcide, usable, wordnet  # noqa: E402
from sittings import ratio_of_sittings, sit, together  # noqa: E402


@pytest.mark.parametrize("marker", list(benchmarks_page.TABLES))
def test_a_table_is_that_of_its_result(marker):
    text = benchmarks_page.PAGE.read_text(encoding="utf-8")
    table = benchmarks_page.shown(marker)
    assert benchmarks_page.with_table(text, marker, table) == text and table in text


def test_the_range_of_two_sittings_by_hand():
    """Logarithms 0 and 2 ln 2: mean ln 2, deviation sqrt(2) ln 2; t of one degree of freedom is 12.706."""
    ratio, (low, high) = ratio_of_sittings([1.0, 4.0])
    half = 12.7062 * math.sqrt(2) * math.log(2)
    assert ratio == pytest.approx(2.0)
    assert [low, high] == pytest.approx([2 * math.exp(-half), 2 * math.exp(half)], rel=1e-3)
    assert ratio_of_sittings([3.0, 3.0, 3.0]) == (pytest.approx(3.0), [pytest.approx(3.0)] * 2)


def test_another_runs_ratio_lies_in_the_range_as_often_as_stated():
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        first, second = np.exp(random.normal(1.0, 0.05, (2, 5)))
        low, high = ratio_of_sittings(first)[1]
        inside += low <= ratio_of_sittings(second)[0] <= high
    assert inside / 2000 == pytest.approx(0.95, abs=0.015)


def test_sittings_are_put_together(monkeypatch):
    answers = iter([2.0, 8.0])

    def measure(engines, texts, config, seed, baselines):
        speedup = next(answers)
        row = {"batch": 4, "p50_ms": speedup, "speedup_vs_teacher_onnx": speedup}
        return {"latency": {"small": [row]}, "cores_used_by_others": speedup / 10, "threads": 1}

    monkeypatch.setattr("distillabse.evaluation.latency.measure", measure)
    found = sit(["engine"], ["text"], None, 0, ["teacher-onnx"], sittings=2)
    (row,) = found["latency"]["small"]
    assert row["speedup_vs_teacher_onnx"] == pytest.approx(4.0) and row["p50_ms"] == 5.0
    assert row["sentences_per_second"] == 800.0 and found["cores_used_by_others"] == 0.8 and found["sittings"] == 2
    assert together([row | {"speedup_vs_teacher_onnx": 3.0}] * 2, ["speedup_vs_teacher_onnx"])["p50_ms"] == 5.0


def table(ratios):
    """A result with one teacher, and a student with these ratios, range +-10 %."""
    rows = [
        {
            "batch": batch,
            "speedup_vs_teacher_onnx": ratio,
            "speedup_vs_teacher_onnx_range95": [0.9 * ratio, 1.1 * ratio],
        }
        for batch, ratio in enumerate(ratios)
    ]
    own = [{"batch": 0, "speedup_vs_teacher_onnx": 1.0, "speedup_vs_teacher_onnx_range95": [1.0, 1.0]}]
    return {"minilm": {"teacher": {"latency": {"teacher-onnx": own}}, "students": {"small": {"latency": rows}}}}


def test_agreement_counts_the_ratios_outside():
    found = agreement(table([2.0, 4.0, 8.0, 16.0]), table([2.1, 4.5, 8.0, 14.5]))
    assert (found["cells"], found["agree"], found["share"]) == (4, 3, 0.75)
    (outside,) = found["outside"]
    assert outside["cell"] == "minilm / small / batch 1 / speedup_vs_teacher_onnx"
    assert (outside["first"], outside["second"]) == (4.0, 4.5)
    assert found["half_widths"]["p50"] == pytest.approx(0.1)


def test_augmented_texts_are_made_of_what_is_given():
    texts, words = ["one two three four", "five six seven"], ["eight", "nine"]
    made = list(augmented(texts, words, 400, seed=1))
    assert made == list(augmented(texts, words, 400, seed=1)) != list(augmented(texts, words, 400, seed=2))
    assert len(made) == 400 and all(text.strip() for text in made)
    assert any("eight" in text for text in made) and any(text.startswith("@user") for text in made)
    assert any("#" in text for text in made) and any("four five" in text for text in made)
    unchanged = sum(text in texts for text in made)
    assert 40 < unchanged < 160


def test_open_text_is_taken_apart(tmp_path):
    (tmp_path / "wordnet").mkdir()
    for part in ("noun", "verb", "adj", "adv"):
        line = f'0 30 v 01 give 0 000 | give a structure to a {part}; "I need to structure my days"; "They had to"  \n'
        (tmp_path / "wordnet" / f"data.{part}").write_text("  1 licence\n" + line)
    assert list(wordnet(tmp_path))[:3] == ["give a structure to a noun", "I need to structure my days", "They had to"]
    import gzip

    (tmp_path / "dictd").mkdir()
    entry = 'Benefit \\Ben"e*fit\\, n. [OE. benefet]\n   1. An act of kindness; a {favor} conferred. So it is.\n'
    for name in ("gcide", "foldoc"):
        with gzip.open(tmp_path / "dictd" / f"{name}.dict.dz", "wt", encoding="utf-8") as file:
            file.write(f"First.\n\n   1. <language> A {{favor}} conferred. It was late.\n\n{entry}")
    assert list(dictionary("foldoc")(tmp_path))[1:3] == ["A favor conferred.", "It was late."]
    assert "So it is." in list(gcide(tmp_path)) and not any("OE." in text for text in gcide(tmp_path))
    (tmp_path / "games/fortunes").mkdir(parents=True)
    (tmp_path / "games/fortunes/art").write_text(
        "It was late.  He left\nearly.\n\t\t-- Somebody\n%\nSecond one here.\n"
    )
    assert list(fortunes(tmp_path)) == ["It was late.", "He left\nearly.".replace("\n", " "), "Second one here."]
    assert list(usable(["  a  short \n line of words ", "tiny", "1234567890 12345", "x" * 301])) == [
        "a short line of words"
    ]
