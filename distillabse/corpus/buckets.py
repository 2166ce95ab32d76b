"""Rows on disk, partitioned by their key: sorting without holding all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

_OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4")


@dataclass(frozen=True)
class Limits:
    """What is held in memory at a time; not what the result depends on.

    Attributes:
        block_rows: Rows between two visits to the disk, at most.
        block_characters: Their characters; a block is complete with the row that exceeds them.
        bucket_bits: Of the key, by which rows are partitioned at a time: 8 make 256 files.
        bucket_bytes: Bytes in Arrow of a bucket that is loaded whole; a larger one is partitioned again.
    """

    block_rows: int = 1 << 17
    block_characters: int = 32 << 20
    bucket_bits: int = 8
    bucket_bytes: int = 64 << 20


class Buckets:
    """Tables go in, in any order; they come out in ascending order of their column `key`, reduced.

    Each level partitions by the next bits of the key. A file that is too large for memory is partitioned once more,
    until no bits are left. Rows with the same key cannot be told apart by it, so every block is reduced before it is
    written, too: however often a key repeats, a block holds it once.

    Args:
        folder: A new folder for the files; every file is removed once it was read.
        reduce: Drops rows with the same key but one and sorts by `key`.
        limits: When to write and when to partition again.
        level: How many times the rows were partitioned before.
    """

    def __init__(self, folder: Path, reduce: Callable[[pa.Table], pa.Table], limits: Limits, level: int = 0) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._reduce = reduce
        self._limits = limits
        self._level = level
        self._writers: dict[int, pa.RecordBatchWriter] = {}
        self._open = ExitStack()
        self._buckets = 1 << limits.bucket_bits
        self._bits_left = 64 - limits.bucket_bits * (level + 1)
        self._bytes = [0] * self._buckets

    def add(self, table: pa.Table) -> None:
        """Write the rows of a table that fits into memory."""
        table = self._reduce(table)
        keys = table.column("key").to_numpy()
        leading = (keys >> np.uint64(self._bits_left)) & np.uint64(self._buckets - 1)
        edges = np.searchsorted(leading, np.arange(self._buckets + 1)).tolist()
        for bucket, (start, end) in enumerate(pairwise(edges)):
            if start < end:
                part = table.slice(start, end - start)
                self._writer(bucket, table.schema).write_table(part)
                self._bytes[bucket] += part.nbytes

    def tables(self) -> Iterator[pa.Table]:
        """All rows, in ascending order of key, a bucket at a time."""
        self.close()
        for bucket in sorted(self._writers):
            path = self._path(bucket)
            if self._bytes[bucket] > self._limits.bucket_bytes and self._bits_left >= self._limits.bucket_bits:
                yield from self._partitioned_again(path).tables()
            else:
                with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
                    table = reader.read_all()
                path.unlink()
                yield self._reduce(table)

    def close(self) -> None:
        """Close all files."""
        self._open.close()

    def _partitioned_again(self, path: Path) -> Buckets:
        buckets = Buckets(path.with_suffix(""), self._reduce, self._limits, self._level + 1)
        with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
            batches = (pa.Table.from_batches([batch]) for batch in reader)
            for table in blocks(batches, self._limits.block_rows, self._limits.bucket_bytes // 2):
                buckets.add(table)
        path.unlink()
        return buckets

    def _writer(self, bucket: int, schema: pa.Schema) -> pa.RecordBatchWriter:
        if bucket not in self._writers:
            file = self._open.enter_context(pa.OSFile(str(self._path(bucket)), "wb"))
            self._writers[bucket] = self._open.enter_context(pa.ipc.new_stream(file, schema, options=_OPTIONS))
        return self._writers[bucket]

    def _path(self, bucket: int) -> Path:
        return self._folder / f"{bucket}.arrow"


def blocks(tables: Iterable[pa.Table], rows: int, size: int | None = None) -> Iterator[pa.Table]:
    """Concatenate small tables to blocks of at least so many rows or bytes; the last block may be smaller."""
    held: list[pa.Table] = []
    held_rows = held_bytes = 0
    for table in tables:
        held.append(table)
        held_rows += len(table)
        held_bytes += table.nbytes
        if held_rows >= rows or (size is not None and held_bytes >= size):
            yield pa.concat_tables(held).combine_chunks()
            held, held_rows, held_bytes = [], 0, 0
    if held:
        yield pa.concat_tables(held).combine_chunks()
