"""Duplicates within tables of rows with keys, and rows that have something in common with held-out ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from distillabse.corpus.cleaning import EXACT_DUPLICATE, NEAR_DUPLICATE, duplicate
from distillabse.corpus.hashing import SHARED_KEYS
from distillabse.corpus.records import to_records
from distillabse.corpus.tally import Tally

SHARING = "sharing a text or group with dev or test"


def distinct_rows(table: pa.Table, tally: Tally) -> pa.Table:
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
    keys = column_values(table, column)
    order = np.lexsort((column_values(table, "number"), keys))
    repeated = np.zeros(len(keys), dtype=np.bool_)
    repeated[order[1:]] = keys[order[1:]] == keys[order[:-1]]
    return repeated, order


@dataclass(frozen=True)
class Claims:
    """The keys of held-out rows, of which no other row may have one; each ascending."""

    keys: NDArray[np.uint64]
    exact: NDArray[np.uint64]
    shared: NDArray[np.uint64]

    @classmethod
    def of(cls, tables: Iterable[pa.Table]) -> Claims:
        """The keys of all rows of some tables."""
        table = pa.concat_tables(tables)
        shared = np.concatenate([column_values(table, name) for name in SHARED_KEYS])
        return cls(
            *map(np.unique, (column_values(table, "key"), column_values(table, "exact_key"), shared[shared != 0]))
        )


def unclaimed_rows(table: pa.Table, claims: Claims, tally: Tally, sharing: Counter[str]) -> pa.Table:
    """The rows that neither repeat a held-out row nor share a text or group with one; the others are counted."""
    repeated = _among(column_values(table, "key"), claims.keys)
    exact = _among(column_values(table, "exact_key"), claims.exact)
    shares = np.any([_among(column_values(table, name), claims.shared) for name in SHARED_KEYS], axis=0)
    _reject(table.filter(repeated & exact), EXACT_DUPLICATE, tally)
    _reject(table.filter(repeated & ~exact), NEAR_DUPLICATE, tally)
    sharing[SHARING] += int(np.count_nonzero(shares & ~repeated))
    return table.filter(~(repeated | shares))


def _among(keys: NDArray[np.uint64], claimed: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which keys are among the claimed ones. `numpy.isin` would sort both anew for every table."""
    if not len(claimed):
        return np.zeros(len(keys), dtype=np.bool_)
    nearest = np.minimum(np.searchsorted(claimed, keys), len(claimed) - 1)
    found: NDArray[np.bool_] = claimed[nearest] == keys
    return found


def _reject(table: pa.Table, reason: str, tally: Tally) -> None:
    for source, count in value_counts(table.column("source")).items():
        rows = table.filter(pc.equal(table.column("source"), source)).slice(0, tally.most)
        tally.reject_alike(source, reason, count, (duplicate(record, reason) for record in to_records(rows)))


def value_counts(column: pa.ChunkedArray) -> dict[str, int]:
    """How often each value occurs."""
    return {entry["values"]: entry["counts"] for entry in pc.value_counts(column).to_pylist()}


def column_values(table: pa.Table, name: str) -> NDArray[Any]:
    """The numbers in one column."""
    values: NDArray[Any] = table.column(name).to_numpy()
    return values
