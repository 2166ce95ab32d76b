"""The measured tables of the documents on translation pairs are those of the results."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import word_alignment  # noqa: E402


def document(name):
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def test_the_agreement_of_aligners():
    assert word_alignment.alignment_table() in document("pair-objectives.md")
