"""The corpus in memory that does not grow with it.

The first pass partitions the rows on disk, the second drops duplicates and shuffles, one partition after another.

Every row has a 64-bit `key`, a seeded hash of what near duplicates (or exact ones, without that rule) have in common.
Rows are partitioned by the leading bits of their keys and sorted by them, so that duplicates meet, and what comes out
is in an order that is uniformly random and depends on the seed and the texts alone, not on the order of the sources.

Dev and test are held in memory. Which rows are candidates is decided by hash, the same for rows that share a text
wherever possible; of the candidates those with the smallest keys are kept, the others go to train. That alone would
leak, so at the end every train row that shares a text or a group with a row of dev or test is dropped, and so is every
test row that shares one with a row of dev. As the keys of a split of bounded size fit into memory, this is exact.
"""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from distillabse.config import CorpusConfig, SplitConfig
from distillabse.corpus.buckets import Buckets, Limits, blocks
from distillabse.corpus.cleaning import EXACT_DUPLICATE, NEAR_DUPLICATE, duplicate
from distillabse.corpus.hashing import KEYED_SCHEMA, SHARED_KEYS, keyed_table, uniform
from distillabse.corpus.progress import rows_progress
from distillabse.corpus.records import (
    ROWS_PER_WRITE,
    SCHEMA,
    Record,
    Rejected,
    iterate_batches,
    to_records,
    write_tables,
)
from distillabse.corpus.splitting import language_quotas
from distillabse.corpus.tally import Tally, clean_records, split_counts
from distillabse.errors import InputError

SHARING = "sharing a text or group with dev or test"


@dataclass(frozen=True)
class StreamedCorpus:
    """What is known of a corpus on disk.

    Attributes:
        counts: What corpus.json holds. Of train it has `sentences_with_repeats`, as distinct ones would have to be held
            in memory, and so are its languages counted.
        rejected: Samples of rejected rows, of every source and reason.
        seconds: What reading (with cleaning and partitioning) and writing (with dropping duplicates) took.
    """

    counts: dict[str, Any]
    rejected: list[Rejected]
    seconds: dict[str, float]


def stream_corpus(
    config: CorpusConfig, seed: int, paths: Mapping[str, Path], limits: Limits | None = None
) -> StreamedCorpus:
    """Read, clean, split and mix as `build_corpus` does, in memory that does not depend on the size of the corpus.

    It is bounded by `limits` (a few hundred MB as they are), max_dev, max_test and rejected_sample. The disk must have
    room for the text about twice. Of several duplicates the one that was read first is kept, but one in dev or test
    before any in train. Of `max_sentences` each language gets exactly as many rows as `mix_languages` would draw.

    Args:
        config: The corpus; max_dev and max_test must be set.
        seed: Chooses the held-out rows, the drawn ones and the order.
        paths: Where to write "train", "dev" and "test"; temporary files go beside train.
        limits: How much to hold in memory; duplicates aside, the result does not depend on it.

    Raises:
        InputError: a source cannot be used, or the text cannot be split.
        StorageError: the disk is full or the place cannot be written.
    """
    scratch = paths["train"].with_suffix(".partitions")
    try:
        return _stream(config, seed, paths, scratch, limits or Limits())
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _stream(
    config: CorpusConfig, seed: int, paths: Mapping[str, Path], scratch: Path, limits: Limits
) -> StreamedCorpus:
    started = time.monotonic()
    tally = Tally(config.rejected_sample)
    buckets, held_out = _partition(config, seed, scratch, limits, tally)
    read = time.monotonic()
    sharing: Counter[str] = Counter()
    held_out["test"] = _unclaimed(held_out["test"], _Claims.of([held_out["dev"]]), tally, sharing)
    for name, share in (("dev", config.split.dev), ("test", config.split.test)):
        if share and not len(held_out[name]):
            raise InputError(
                f"The corpus is too small to hold out {share:.3g} of it by hash, as corpus.streaming does: no row is "
                f"left for {name}. Add text, raise corpus.split.{name}, set it to 0, or switch corpus.streaming off."
            )
        write_tables(paths[name], [held_out[name].select(SCHEMA.names)])
    claims = _Claims.of(held_out.values())
    train, available = _write_train(
        (_unclaimed(table, claims, tally, sharing) for table in _shown(buckets.tables())),
        config, seed, paths["train"], scratch,
    )  # fmt: skip
    counts = {
        "sources": tally.sources(),
        "duplicates": tally.duplicates(),
        "dropped": {SHARING: sharing.total(), "beyond max_sentences": available - train["rows"]},
        "splits": {"train": train, **{name: split_counts(to_records(table)) for name, table in held_out.items()}},
    }
    return StreamedCorpus(counts, tally.samples, {"reading": read - started, "writing": time.monotonic() - read})


def _partition(
    config: CorpusConfig, seed: int, folder: Path, limits: Limits, tally: Tally
) -> tuple[Buckets, dict[str, pa.Table]]:
    """Read and clean all rows; those of train on disk, and those of dev and test, which may share texts still."""
    distinct = partial(_distinct, tally=tally)
    buckets = Buckets(folder, distinct, limits)
    most = (config.split.max_dev, config.split.max_test)
    held_out = [KEYED_SCHEMA.empty_table() for _ in most]
    for block in _blocks(config, seed, tally, limits):
        sides = _sides(block, config.split, seed)
        train = [block.filter(sides == 0)]
        for index, rows in enumerate(most):
            # Sorted by key: the first are kept. The bound only sinks, so all copies of a row go the same way.
            candidates = distinct(pa.concat_tables([held_out[index], block.filter(sides == index + 1)]))
            held_out[index] = candidates.slice(0, rows)
            train.append(candidates.slice(rows))
        buckets.add(pa.concat_tables(train))
    return buckets, dict(zip(("dev", "test"), held_out, strict=True))


def _blocks(config: CorpusConfig, seed: int, tally: Tally, limits: Limits) -> Iterator[pa.Table]:
    """The clean rows of all sources with their keys, a block of bounded size at a time."""
    number = size = 0
    records: list[Record] = []

    def block() -> pa.Table:
        return keyed_table(records, number - len(records), config.cleaning.near_duplicates, seed)

    for record in clean_records(config, seed, tally):
        records.append(record)
        number += 1
        size += len(record.text) + len(record.translation or "")
        if len(records) == limits.block_rows or size > limits.block_characters:
            yield block()
            records, size = [], 0
    if records:
        yield block()


def _sides(table: pa.Table, split: SplitConfig, seed: int) -> NDArray[np.int64]:
    """0 for train, 1 and 2 for what may go into dev and test: int64 [rows].

    A group goes one way. A row without a group goes the way of that of its texts whose hash is the smallest: with a
    sentence that is held out, most often all its translations are. The smallest of two uniform numbers is below x with
    probability 1 - (1 - x)^2, so that is uniform again, and the shares are shares of rows.
    """
    text, translation, group = (uniform(_column(table, name), f"{seed}:split") for name in SHARED_KEYS)
    is_pair, has_group = _column(table, "translation_key") != 0, _column(table, "group_key") != 0
    drawn = np.where(is_pair, 1 - (1 - np.minimum(text, translation)) ** 2, text)
    drawn = np.where(has_group, group, drawn)
    sides: NDArray[np.int64] = np.select([drawn < split.dev, drawn < split.dev + split.test], [1, 2], 0)
    return sides


def _distinct(table: pa.Table, tally: Tally) -> pa.Table:
    """The rows without duplicates, the one read first of each, in ascending order of `key`."""
    table = table.combine_chunks()
    repeated, order = _repeated(table, "key")
    if repeated.any():
        repeated_exactly, _ = _repeated(table, "exact_key")
        _reject(table.filter(repeated & repeated_exactly), EXACT_DUPLICATE, tally)
        _reject(table.filter(repeated & ~repeated_exactly), NEAR_DUPLICATE, tally)
    return table.take(order[~repeated[order]])


def _repeated(table: pa.Table, column: str) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which rows repeat the key of a row that was read before, and the order by key and reading: bool, int64 [rows]."""
    keys = _column(table, column)
    order = np.lexsort((_column(table, "number"), keys))
    repeated = np.zeros(len(keys), dtype=np.bool_)
    repeated[order[1:]] = keys[order[1:]] == keys[order[:-1]]
    return repeated, order


@dataclass(frozen=True)
class _Claims:
    """The keys of held-out rows, of which no other row may have one."""

    keys: NDArray[np.uint64]
    exact: NDArray[np.uint64]
    shared: NDArray[np.uint64]

    @classmethod
    def of(cls, tables: Iterable[pa.Table]) -> _Claims:
        """The keys of all rows of some tables."""
        table = pa.concat_tables(tables)
        shared = np.concatenate([_column(table, name) for name in SHARED_KEYS])
        return cls(_column(table, "key"), _column(table, "exact_key"), shared[shared != 0])


def _unclaimed(table: pa.Table, claims: _Claims, tally: Tally, sharing: Counter[str]) -> pa.Table:
    """The rows that neither repeat a held-out row nor share a text or group with one; the others are counted."""
    repeated = np.isin(_column(table, "key"), claims.keys)
    exact = np.isin(_column(table, "exact_key"), claims.exact)
    shares = np.any([np.isin(_column(table, name), claims.shared) for name in SHARED_KEYS], axis=0)
    _reject(table.filter(repeated & exact), EXACT_DUPLICATE, tally)
    _reject(table.filter(repeated & ~exact), NEAR_DUPLICATE, tally)
    sharing[SHARING] += int(np.count_nonzero(shares & ~repeated))
    return table.filter(~(repeated | shares))


def _reject(table: pa.Table, reason: str, tally: Tally) -> None:
    for source, count in _value_counts(table.column("source")).items():
        rows = table.filter(pc.equal(table.column("source"), source)).slice(0, tally.most)
        tally.reject_alike(source, reason, count, (duplicate(record, reason) for record in to_records(rows)))


def _write_train(
    tables: Iterable[pa.Table], config: CorpusConfig, seed: int, path: Path, scratch: Path
) -> tuple[dict[str, Any], int]:
    """Write the train split, drawn from these tables; its counts, and how many rows there were to draw from."""
    counts = _TrainCounts()
    whole = scratch / path.name
    write_tables(whole, blocks(counts.counting(tables), ROWS_PER_WRITE))
    available = counts.drawn_by.total()
    if not available:
        raise InputError("Nothing is left to train on. Lower corpus.split.dev and corpus.split.test, or add text.")
    if config.max_sentences is None or config.max_sentences >= available:
        whole.replace(path)
        return counts.as_dict(), available
    quotas = language_quotas(dict(sorted(counts.drawn_by.items())), config.max_sentences, config.temperature)
    drawn_counts = _TrainCounts()
    drawn = _drawn(map(_table, iterate_batches(whole)), counts.drawn_by, quotas, seed)
    write_tables(path, blocks(drawn_counts.counting(drawn), ROWS_PER_WRITE))
    return drawn_counts.as_dict(), available


class _TrainCounts:
    """Counts rows on their way: by the language that `mix_languages` goes by, and sentences by their own."""

    def __init__(self) -> None:
        self.drawn_by: Counter[str] = Counter()
        self.sides: Counter[str] = Counter()

    def counting(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """The same tables with the columns of a split."""
        for table in tables:
            self.drawn_by.update(_value_counts(_drawn_by(table)))
            for name in ("language", "translation_language"):
                self.sides.update(_value_counts(table.column(name).drop_null()))
            yield table.select(SCHEMA.names)

    def as_dict(self) -> dict[str, Any]:
        """As corpus.json has it."""
        languages = dict(sorted(self.sides.items()))
        return {
            "rows": self.drawn_by.total(), "sentences_with_repeats": self.sides.total(), "languages": languages
        }  # fmt: skip


def _drawn(
    tables: Iterable[pa.Table], counts: Mapping[str, int], quotas: Mapping[str, int], seed: int
) -> Iterator[pa.Table]:
    """Exactly `quotas` of the `counts` rows of each language, every choice equally likely, in their order.

    Selection sampling, Algorithm S of Knuth, The Art of Computer Programming, volume 2, 3.4.2: with n rows to come, of
    which k are wanted still, a row is taken with probability k / n.
    """
    generator = random.Random(f"{seed}:mix")
    coming, wanted = dict(counts), dict(quotas)
    for table in tables:
        taken = []
        for language in _drawn_by(table).to_pylist():
            take = generator.random() * coming[language] < wanted[language]
            coming[language] -= 1
            wanted[language] -= take
            taken.append(take)
        yield table.filter(pa.array(taken))


def _shown(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same tables, with a progress bar on a terminal."""
    rows = 0
    with rows_progress() as show:
        for table in tables:
            yield table
            rows += len(table)
            show(rows, "Dropping duplicates and shuffling")


def _drawn_by(table: pa.Table) -> pa.ChunkedArray:
    return pc.coalesce(table.column("translation_language"), table.column("language"))


def _value_counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {entry["values"]: entry["counts"] for entry in pc.value_counts(column).to_pylist()}


def _column(table: pa.Table, name: str) -> NDArray[Any]:
    values: NDArray[Any] = table.column(name).to_numpy()
    return values


def _table(batch: pa.RecordBatch) -> pa.Table:
    return pa.Table.from_batches([batch])
