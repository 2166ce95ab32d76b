"""One door to every source of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

from distillabse.config import FileSource, HubSource, MosesSource, Source
from distillabse.corpus.files import read_files, read_moses
from distillabse.corpus.hub import read_hub
from distillabse.corpus.phrasebook import read_phrasebook
from distillabse.corpus.progress import rows_progress
from distillabse.corpus.records import Record, Rejected
from distillabse.errors import InputError

_ROWS_PER_UPDATE = 1000


def read_source(source: Source, seed: int) -> Iterator[Record | Rejected]:
    """Read a source row by row. Rows that cannot be used come out as `Rejected`, never as an error.

    Args:
        source: Any of the configured kinds.
        seed: Chooses the phrasebook's expansions; every other source has an order of its own.

    Raises:
        InputError: the source cannot be read, lacks a column or gives no usable row.
    """
    reasons: Counter[str] = Counter()
    usable = False
    for row in islice(_rows(source, seed), getattr(source, "limit", None)):
        if isinstance(row, Rejected):
            reasons[row.reason] += 1
        else:
            usable = True
        yield row
    if not usable:
        why = ", ".join(f"{count:,} rows: {reason}" for reason, count in reasons.items()) or "no row passes `where`"
        raise InputError(f"The source {source.model_dump(exclude_defaults=True)} gives no usable row ({why}).")


def read_sources(sources: Sequence[Source], seed: int) -> Iterator[Record | Rejected]:
    """Read all sources, one after another, with a progress bar on a terminal.

    Raises:
        InputError: a source cannot be used.
    """
    with rows_progress() as show:
        rows = (row for source in sources for row in read_source(source, seed))
        for number, row in enumerate(rows, start=1):
            yield row
            if number % _ROWS_PER_UPDATE == 0:
                show(number, f"Reading {row.source}")


def _rows(source: Source, seed: int) -> Iterator[Record | Rejected]:
    if isinstance(source, FileSource):
        return read_files(source)
    if isinstance(source, MosesSource):
        return read_moses(source)
    if isinstance(source, HubSource):
        return read_hub(source)
    return read_phrasebook(source, seed)
