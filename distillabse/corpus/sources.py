"""One door to every source of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice

from distillabse.config import FileSource, HubSource, MosesSource, Source
from distillabse.corpus.files import read_files, read_moses
from distillabse.corpus.hub import read_hub
from distillabse.corpus.phrasebook import read_phrasebook
from distillabse.corpus.records import Record, Rejected
from distillabse.errors import ConfigurationError, InputError


def read_source(source: Source, seed: int) -> Iterator[Record | Rejected]:
    """Read a source row by row. Rows that cannot be used come out as `Rejected`, never as an error.

    Args:
        source: Any of the configured kinds.
        seed: Chooses the phrasebook's expansions; every other source has an order of its own.

    Raises:
        ConfigurationError: it is not clear which language the text has.
        InputError: the source cannot be read, lacks a column or gives no usable row.
    """
    check_languages(source)
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


def check_languages(source: Source) -> None:
    """Refuse a table whose text has no language or two.

    Raises:
        ConfigurationError: names the keys of which exactly one must be set, or none.
    """
    if isinstance(source, FileSource):
        place = source.path
        _check_side(place, "text", source.text, source.language, source.language_column)
        column = source.translation_language_column
        _check_side(place, "translation", source.translation, source.translation_language, column)
    elif isinstance(source, HubSource):
        _check_side(source.dataset, "translation", source.translation, source.translation_language, None)


def _check_side(place: str, side: str, column: str | None, *languages: str | None) -> None:
    prefix = "translation_" if side == "translation" else ""
    given = sum(language is not None for language in languages)
    if column is not None and given != 1:
        raise ConfigurationError(
            f"{place}: set exactly one of {prefix}language and {prefix}language_column for the column {column!r}."
        )
    if column is None and given:
        raise ConfigurationError(f"{place}: {prefix}language is set, but {side!r} names no column. Set it too.")


def _rows(source: Source, seed: int) -> Iterator[Record | Rejected]:
    if isinstance(source, FileSource):
        return read_files(source)
    if isinstance(source, MosesSource):
        return read_moses(source)
    if isinstance(source, HubSource):
        return read_hub(source)
    return read_phrasebook(source, seed)
