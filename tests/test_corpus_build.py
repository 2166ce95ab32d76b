from __future__ import annotations

import json
from io import StringIO

import pytest
from rich.console import Console

from distillabse.config import CorpusConfig, JobConfig
from distillabse.corpus.build import build_corpus, corpus_stage, counts_table
from distillabse.corpus.records import read_records
from distillabse.errors import InputError
from distillabse.layout import RunFolder


@pytest.fixture
def settings(tmp_path):
    """Two files: 60 pairs of which 10 are duplicates, 2 broken lines; 40 monolingual sentences."""
    names = [first + second for first in "abcdefg" for second in "hijklmnp"][:50]
    pairs = [f"An English sentence {name}.\tEin Satz {name}." for name in names]
    lines = ["en\tde", *pairs, *pairs[:6], *(pair.upper() for pair in pairs[:4]), "ragged", "broken \udcff\tx"]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines), errors="surrogateescape")
    (tmp_path / "fr.txt").write_text("".join(f"Une phrase {'x' * row}.\n" for row in range(40)))
    pair_columns = {"text": "en", "language": "en", "translation": "de", "translation_language": "de"}
    sources = [
        {"kind": "files", "path": str(tmp_path / "pairs.tsv"), **pair_columns},
        {"kind": "files", "path": str(tmp_path / "fr.txt"), "language": "fr"},
    ]
    return {"sources": sources, "split": {"dev": 0.1, "test": 0.2, "max_test": 10}}


def test_every_row_is_counted_once(settings):
    corpus = build_corpus(CorpusConfig(**settings, max_sentences=50, rejected_sample=2), seed=3)
    reasons = {"broken UTF-8": 1, "exact duplicate": 6, "near duplicate": 4, "wrong number of columns": 1}
    pairs, french = corpus.counts["sources"]
    assert (pairs["read"], pairs["kept"], pairs["rejected"]) == (62, 50, reasons)
    assert (french["read"], french["kept"], french["rejected"]) == (40, 40, {})
    assert corpus.counts["duplicates"] == {"exact": 6, "near": 4}
    # 90 rows: 9 for dev, 18 for test of which 8 go back to train, and 71 - 50 rows are beyond the maximum.
    assert corpus.counts["dropped"] == {"rest of held-out groups": 0, "beyond max_sentences": 21}
    assert {name: split["rows"] for name, split in corpus.counts["splits"].items()} == {
        "train": 50,
        "dev": 9,
        "test": 10,
    }
    assert sorted(row.reason for row in corpus.rejected) == sorted([*reasons, "exact duplicate", "near duplicate"])
    for name, split in corpus.counts["splits"].items():
        assert split["rows"] == len(corpus.splits[name])
        assert split["sentences"] == sum(split["languages"].values())
        assert split["languages"]["en"] == split["languages"]["de"]


def test_the_same_seed_gives_the_same_corpus(settings):
    config = CorpusConfig(**settings)
    assert build_corpus(config, seed=3) == build_corpus(config, seed=3)
    assert build_corpus(config, seed=3).splits != build_corpus(config, seed=4).splits


def test_the_stage_writes_the_folder_whole_or_not_at_all(settings, tmp_path):
    corpus = {"corpus": settings, "teacher": {"model": "m"}, "objectives": [{"kind": "cosine"}]}
    config = JobConfig(name="job", output=tmp_path / "runs", **corpus)
    run = RunFolder(config.run_folder)
    corpus_stage(config, run)
    expected = build_corpus(config.corpus, config.seed)
    assert {name: read_records(run.split(name)) for name in expected.splits} == expected.splits
    assert json.loads(run.corpus_counts.read_text()) == expected.counts
    rejected = [json.loads(line) for line in run.rejected.read_text(encoding="utf-8").splitlines()]
    assert [row["sample"] for row in rejected if row["reason"] == "wrong number of columns"] == ["ragged"]
    assert sorted(file.name for file in run.corpus.iterdir()) == [
        "corpus.json",
        "dev.parquet",
        "rejected.jsonl",
        "test.parquet",
        "train.parquet",
    ]

    before = run.split("train").read_bytes()
    (tmp_path / "fr.txt").unlink()
    with pytest.raises(InputError, match=r"fr\.txt"):
        corpus_stage(config, run)
    assert run.split("train").read_bytes() == before


def test_the_table_shows_every_source_and_reason(settings):
    corpus = build_corpus(CorpusConfig(**settings), seed=3)
    console = Console(file=StringIO(), width=300)
    console.print(counts_table(corpus.counts))
    text = console.file.getvalue()
    assert "exact duplicate 6, near duplicate 4" in text
    assert "test 10 rows" in text
    assert "fr.txt" in text
