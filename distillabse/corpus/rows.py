"""What every reader does with a row: check that its columns are there and turn its values into a record."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from distillabse.corpus.records import Record, Rejected
from distillabse.errors import InputError

_SAMPLE_CHARACTERS = 200


class _Fault(Exception):
    """Why a row cannot be used."""


def to_record(
    source: str, line_number: int, text: object, language: object, translation: tuple[object, object] | None = None
) -> Record | Rejected:
    """Check a row's values, whatever type they have.

    Args:
        source: Name of the file or dataset.
        line_number: Line or row in it, counted from 1.
        text: The sentence.
        language: Its language code.
        translation: The translation and its language code, in a parallel source.
    """
    try:
        first = _checked(text, language)
        second: tuple[str | None, str | None] = (None, None) if translation is None else _checked(*translation)
    except _Fault as fault:
        sample = str(text) if translation is None else f"{text} | {translation[0]}"
        return rejected(source, line_number, str(fault), sample)
    return Record(*first, *second, source)


def rejected(source: str, line_number: int | None, reason: str, sample: str) -> Rejected:
    """A rejected row with a sample that is short and can be written as UTF-8 whatever it holds."""
    start = sample[:_SAMPLE_CHARACTERS]
    return Rejected(source, line_number, reason, start.encode("utf-8", "backslashreplace").decode("utf-8"))


def require_columns(name: str, found: Iterable[str], wanted: Sequence[str]) -> None:
    """Refuse a table that lacks a column.

    Raises:
        InputError: names the table, the missing columns and those it has.
    """
    columns = list(found)
    missing = [column for column in wanted if column not in columns]
    if missing:
        raise InputError(
            f"{name} has no column {', '.join(map(repr, missing))}. Columns found: {', '.join(map(repr, columns))}; "
            f"columns wanted: {', '.join(map(repr, wanted))}. Name the right ones in the source's configuration."
        )


def _checked(text: object, language: object) -> tuple[str, str]:
    if text is None:
        raise _Fault("empty text")
    if not isinstance(text, str):
        raise _Fault("not text")
    if not text.strip():
        raise _Fault("empty text")
    if not isinstance(language, str) or not language.strip():
        raise _Fault("no language")
    try:
        (text + language).encode()
    except UnicodeEncodeError:  # Undecodable bytes and lone \u escapes both arrive as surrogates.
        raise _Fault("broken UTF-8") from None
    return text, sys.intern(language)  # One object stands for a code in millions of rows.
