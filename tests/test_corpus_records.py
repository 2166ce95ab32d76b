from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from distillabse.corpus.records import Record, Sentence, read_records, sentences, write_records
from distillabse.errors import InputError

PAIR = Record("Hello", "en", "Hallo", "de", "a.tsv", "g1")
MONOLINGUAL = Record("Guten Tag ☕", "de", source="b.txt")


def test_records_survive_a_round_trip(tmp_path):
    path = tmp_path / "train.parquet"
    write_records(path, [PAIR, MONOLINGUAL])
    assert read_records(path) == [PAIR, MONOLINGUAL]
    assert pq.read_schema(path).names == ["text", "language", "translation", "translation_language", "source", "group"]


def test_an_empty_split_can_be_written_and_read(tmp_path):
    write_records(tmp_path / "dev.parquet", [])
    assert read_records(tmp_path / "dev.parquet") == []


def test_a_missing_or_damaged_split_names_the_stage_to_run(tmp_path):
    with pytest.raises(InputError, match=r"does not exist.*distillabse corpus"):
        read_records(tmp_path / "train.parquet")
    (tmp_path / "train.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(InputError, match=r"not a split of a corpus.*distillabse corpus"):
        read_records(tmp_path / "train.parquet")
    pq.write_table(pq.read_table(_written(tmp_path)).drop(["group"]), tmp_path / "train.parquet")
    with pytest.raises(InputError, match="not a split of a corpus"):
        read_records(tmp_path / "train.parquet")


def test_sentences_are_distinct_and_in_first_seen_order():
    records = [PAIR, MONOLINGUAL, Record("Hallo", "nl", "Hello", "en")]
    assert sentences(records) == [Sentence("Hello", "en"), Sentence("Hallo", "de"), Sentence("Guten Tag ☕", "de")]


def _written(folder):
    write_records(folder / "whole.parquet", [PAIR])
    return folder / "whole.parquet"
