"""The corpus in memory that does not grow with it.

The first pass partitions the rows on disk, the second drops duplicates and shuffles, one partition after another.

Every row has a 64-bit `key`, a seeded hash of what near duplicates (or exact ones, without that rule) have in common.
Rows are partitioned by the leading bits of their keys and sorted by them, so that duplicates meet, and what comes out
is in an order that is uniformly random and depends on the seed and the texts alone, not on the order of the sources.

Dev and test are held in memory. Which rows are candidates is decided by a hash of the group or the text; of the
candidates those with the smallest keys are kept, the others go to train. That alone would leak, so at the end every
train row that shares a text or a group with a row of dev or test is dropped, and so is every test row that shares one
with a row of dev. No row of two splits then has a text or group in common, for all keys of dev and test are in memory
when that is checked. What it costs is bounded, too: the rows that share something with max_dev + max_test rows.
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
from distillabse.corpus.deduplication import (
    SHARING,
    Claims,
    column_values,
    distinct_rows,
    unclaimed_rows,
    value_counts,
)
from distillabse.corpus.hashing import KEYED_SCHEMA, keyed_table, uniform
from distillabse.corpus.progress import rows_progress
from distillabse.corpus.records import (
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
from distillabse.storage import storage_errors


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
        limits: How much to hold in memory; the rows of the result do not depend on it.

    Raises:
        InputError: a source cannot be used, or the text cannot be split.
        StorageError: the disk is full or the place cannot be written.
    """
    tally = Tally(config.rejected_sample)
    return stream_records(clean_records(config, seed, tally), config, seed, paths, tally, limits or Limits())


def stream_records(
    records: Iterable[Record], config: CorpusConfig, seed: int, paths: Mapping[str, Path], tally: Tally, limits: Limits
) -> StreamedCorpus:
    """Split, mix and write clean records, of which duplicates are dropped; see `stream_corpus`.

    Args:
        records: The rows, read once.
        config: As in `stream_corpus`; its sources are not read.
        seed: Likewise.
        paths: Likewise.
        tally: What was read and rejected so far; duplicates are added.
        limits: How much to hold in memory.

    Raises:
        InputError: the text cannot be split.
        StorageError: the disk is full or the place cannot be written.
    """
    scratch = paths["train"].with_suffix(".partitions")
    try:
        with storage_errors(scratch):
            return _stream(records, config, seed, paths, scratch, tally, limits)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _stream(
    records: Iterable[Record],
    config: CorpusConfig,
    seed: int,
    paths: Mapping[str, Path],
    scratch: Path,
    tally: Tally,
    limits: Limits,
) -> StreamedCorpus:
    started = time.monotonic()
    buckets, held_out = _partition(records, config, seed, scratch, limits, tally)
    read = time.monotonic()
    sharing: Counter[str] = Counter()
    held_out["test"] = unclaimed_rows(held_out["test"], Claims.of([held_out["dev"]]), tally, sharing)
    for name, share in (("dev", config.split.dev), ("test", config.split.test)):
        if share and not len(held_out[name]):
            raise InputError(
                f"The corpus is too small to hold out {share:.3g} of it by hash, as corpus.streaming does: no row is "
                f"left for {name}. Add text, raise corpus.split.{name}, set it to 0, or switch corpus.streaming off."
            )
        write_tables(paths[name], [held_out[name].select(SCHEMA.names)])
    claims = Claims.of(held_out.values())
    train, available = _write_train(
        (unclaimed_rows(table, claims, tally, sharing) for table in _shown(buckets.tables())),
        config, seed, paths["train"], scratch, limits.block_rows,
    )  # fmt: skip
    counts = {
        "sources": tally.sources(),
        "duplicates": tally.duplicates(),
        "dropped": {SHARING: sharing.total(), "beyond max_sentences": available - train["rows"]},
        "splits": {"train": train, **{name: split_counts(to_records(table)) for name, table in held_out.items()}},
    }
    return StreamedCorpus(counts, tally.samples, {"reading": read - started, "writing": time.monotonic() - read})


def _partition(
    records: Iterable[Record], config: CorpusConfig, seed: int, folder: Path, limits: Limits, tally: Tally
) -> tuple[Buckets, dict[str, pa.Table]]:
    """Take in all rows; those of train on disk, and those of dev and test, which may share texts still."""
    distinct = partial(distinct_rows, tally=tally)
    buckets = Buckets(folder, distinct, limits)
    most = (config.split.max_dev, config.split.max_test)
    held_out = [KEYED_SCHEMA.empty_table() for _ in most]
    for block in _blocks(records, config, seed, limits):
        sides = _sides(block, config.split, seed)
        train = [block.filter(sides == 0)]
        for index, rows in enumerate(most):
            # Sorted by key: the first are kept. The bound only sinks, so all copies of a row go the same way.
            candidates = distinct(pa.concat_tables([held_out[index], block.filter(sides == index + 1)]))
            held_out[index] = candidates.slice(0, rows)
            train.append(candidates.slice(rows))
        buckets.add(pa.concat_tables(train))
    return buckets, dict(zip(("dev", "test"), held_out, strict=True))


def _blocks(records: Iterable[Record], config: CorpusConfig, seed: int, limits: Limits) -> Iterator[pa.Table]:
    """The rows with their keys, a block of bounded size at a time."""
    number = size = 0
    held: list[Record] = []

    def block() -> pa.Table:
        return keyed_table(held, number - len(held), config.cleaning.near_duplicates, seed)

    for record in records:
        held.append(record)
        number += 1
        size += len(record.text) + len(record.translation or "")
        if len(held) == limits.block_rows or size > limits.block_characters:
            yield block()
            held, size = [], 0
    if held:
        yield block()


def _sides(table: pa.Table, split: SplitConfig, seed: int) -> NDArray[np.int64]:
    """0 for train, 1 and 2 for what may go into dev and test: int64 [rows].

    A group goes one way, and so do all translations of a text; where texts share a translation, they need not.
    """
    text, group = column_values(table, "text_key"), column_values(table, "group_key")
    drawn = uniform(np.where(group != 0, group, text), f"{seed}:split")
    sides: NDArray[np.int64] = np.select([drawn < split.dev, drawn < split.dev + split.test], [1, 2], 0)
    return sides


def _write_train(
    tables: Iterable[pa.Table], config: CorpusConfig, seed: int, path: Path, scratch: Path, group_rows: int
) -> tuple[dict[str, Any], int]:
    """Write the train split, drawn from these tables; its counts, and how many rows there were to draw from."""
    counts = _TrainCounts()
    whole = scratch / path.name
    write_tables(whole, blocks(counts.counting(tables), group_rows))
    available = counts.drawn_by.total()
    if not available:
        raise InputError("Nothing is left to train on. Lower corpus.split.dev and corpus.split.test, or add text.")
    if config.max_sentences is None or config.max_sentences >= available:
        whole.replace(path)
        return counts.as_dict(), available
    quotas = language_quotas(dict(sorted(counts.drawn_by.items())), config.max_sentences, config.temperature)
    drawn_counts = _TrainCounts()
    drawn = _drawn(map(_table, iterate_batches(whole, group_rows)), counts.drawn_by, quotas, seed)
    write_tables(path, blocks(drawn_counts.counting(drawn), group_rows))
    return drawn_counts.as_dict(), available


class _TrainCounts:
    """Counts rows on their way: by the language that `mix_languages` goes by, and sentences by their own."""

    def __init__(self) -> None:
        self.drawn_by: Counter[str] = Counter()
        self.sides: Counter[str] = Counter()

    def counting(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """The same tables with the columns of a split."""
        for table in tables:
            self.drawn_by.update(value_counts(_drawn_by(table)))
            for name in ("language", "translation_language"):
                self.sides.update(value_counts(table.column(name).drop_null()))
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


def _table(batch: pa.RecordBatch) -> pa.Table:
    return pa.Table.from_batches([batch])
