from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distillabse.corpus.records import (
    Record,
    Sentence,
    count_records,
    iterate_batches,
    iterate_records,
    read_records,
    sentences,
    to_table,
    training_texts,
    write_records,
    write_tables,
)
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
    hello = Sentence("Hello", "en")
    assert sentences(records) == [hello, Sentence("Hallo", "de", hello), Sentence("Guten Tag ☕", "de")]


def test_rows_are_read_one_by_one(tmp_path):
    path = tmp_path / "train.parquet"
    write_records(path, (Record(f"text {row}", "en", source="s", group=None) for row in range(70_000)))
    assert count_records(path) == 70_000
    rows = iterate_records(path)
    assert next(rows) == Record("text 0", "en", source="s")
    assert sum(1 for _ in rows) == 69_999


def test_training_texts_are_distinct_or_every_side(tmp_path):
    path = tmp_path / "train.parquet"
    write_records(path, [PAIR, MONOLINGUAL, Record("Hallo", "de"), PAIR])
    assert list(training_texts(path, distinct=True)) == ["Hello", "Hallo", "Guten Tag ☕"]
    assert list(training_texts(path, distinct=False)) == ["Hello", "Hallo", "Guten Tag ☕", "Hallo", "Hello", "Hallo"]
    for read in (count_records, lambda path: list(training_texts(path, distinct=False))):
        with pytest.raises(InputError, match=r"does not exist.*distillabse corpus"):
            read(tmp_path / "dev.parquet")


def test_broken_text_in_a_split_is_found(tmp_path):
    table = pq.read_table(_written(tmp_path))
    broken = pa.array([b"\xff"]).view(pa.string())
    pq.write_table(table.set_column(0, table.schema.field(0), broken), tmp_path / "dev.parquet")
    with pytest.raises(InputError, match="not a split of a corpus"):
        read_records(tmp_path / "dev.parquet")


def _written(folder):
    write_records(folder / "whole.parquet", [PAIR])
    return folder / "whole.parquet"


def test_reading_row_by_row_keeps_nothing_of_what_was_read(tmp_path):
    path, random = tmp_path / "train.parquet", np.random.default_rng(0)
    groups = [[Record(random.bytes(400).hex(), "en") for _ in range(1000)] for _ in range(20)]
    write_tables(path, (to_table(group) for group in groups))
    assert path.stat().st_size > 8_000_000
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in iterate_batches(path, 1000)]
    assert len(held) == 20 and max(held) < path.stat().st_size / 2
