"""What every task offers, once its rows are in memory."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from distillabse.config.tasks import TextTable
from distillabse.corpus.files import read_tables
from distillabse.errors import InputError
from distillabse.tasks.scores import Bootstrap, Measures

T = TypeVar("T")
Vectors = NDArray[np.float32]
LookUp = Callable[[Sequence[str]], Vectors]
"""Unit vectors float32 [n, dimension] of texts that were encoded before."""


class Task(Protocol):
    """A task with its rows: which texts it needs, and what vectors of them score.

    Attributes:
        kind: as in the configuration.
        headline: the measure that stands for the task where there is room for one.
    """

    kind: ClassVar[str]
    headline: ClassVar[str]

    @property
    def name(self) -> str:
        """What it is called in tables."""
        ...

    def texts(self) -> Iterable[str]:
        """Every text that `scores` looks up, repeated or not."""
        ...

    def scores(self, vectors: LookUp, teacher: LookUp | None, bootstrap: Bootstrap) -> Measures:
        """Scores of an encoder by measure and language.

        Args:
            vectors: The encoder's own.
            teacher: The teacher's in the same space, where there is one.
            bootstrap: For the intervals.
        """
        ...


def read_rows(table: TextTable, columns: Sequence[str], task: str) -> list[tuple[str, list[str]]]:
    """Language code and values of `columns` of every row of a table.

    Raises:
        InputError: a file cannot be read, lacks a column or has a malformed or empty field; or no row passes `where`.
    """
    wanted = [*columns, *([table.language_column] if table.language_column else [])]
    rows = []
    for place, row in read_tables(table.path, wanted, format=table.format, where=table.where):
        values = [str(row[column] if row[column] is not None else "") for column in wanted]
        if not all(value.strip() for value in values):
            empty = ", ".join(repr(column) for column, value in zip(wanted, values, strict=True) if not value.strip())
            raise InputError(f"tasks: {task}: {place}: the column {empty} is empty. Mend or remove the row.")
        rows.append((values.pop() if table.language_column else str(table.language), values))
    if not rows:
        raise InputError(f"tasks: {task}: no row of {table.path} passes where: {table.where}.")
    return rows


def drawn(rows: Sequence[T], limit: int | None, seed: int) -> list[T]:
    """At most `limit` rows in their order: the same numbers of the rows for the same seed and number of rows."""
    if limit is None or len(rows) <= limit:
        return list(rows)
    return [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), limit))]


def require_two(rows: Sequence[object], task: str, language: str) -> None:
    """Refuse a language with fewer than two rows, of which nothing can be said.

    Raises:
        InputError: names the task and the language.
    """
    if len(rows) < 2:
        raise InputError(
            f"tasks: {task}: {len(rows)} rows in {language!r}; at least two are needed. Leave it out of `languages`, "
            "or check the file and `where`."
        )
