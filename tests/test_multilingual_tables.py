"""The measured tables of the documents on translation pairs are those of the results."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import mmkd_levels  # noqa: E402
import multilingual  # noqa: E402
import pytest  # noqa: E402
import word_alignment  # noqa: E402


def document(name):
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def test_the_agreement_of_aligners():
    assert word_alignment.alignment_table() in document("pair-objectives.md")


@pytest.mark.parametrize("part", ["tasks_table", "held_out_sentence", "retrieval_table", "curve_table"])
def test_the_student_of_thirty_languages(part):
    assert getattr(multilingual, part)() in document("multilingual.md")


def test_the_levels():
    assert mmkd_levels.levels_table() in document("multilingual.md")


def test_what_the_readme_says_of_it():
    scores = multilingual.read(multilingual.TASKS)
    everyday = [
        f"{100 * multilingual.mean(scores, 'tatoeba', name, 'accuracy', multilingual.EVERYDAY):.0f} %"
        for name in ("student", "teacher", "static-pairs")
    ]
    every = f"{100 * multilingual.mean(scores, 'tatoeba', 'student', 'accuracy', multilingual.LANGUAGES):.0f} %"
    told = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(figure in told for figure in (*everyday, f"{every} over 24 languages"))
    assert f"in {scores['training']['training_seconds'] / 60:.0f} minutes" in told
