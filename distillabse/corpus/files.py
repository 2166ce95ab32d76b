"""Local files: tables, plain text and Moses pairs, plain or compressed, read line by line."""

from __future__ import annotations

import csv
import glob
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from distillabse.config import FileSource, MosesSource
from distillabse.corpus.records import Record, Rejected
from distillabse.corpus.rows import rejected, require_columns, to_record
from distillabse.errors import InputError

Row = tuple[int, Mapping[str, object]]
"""A line number and the line's values by column."""

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_FORMATS = {".tsv": "tsv", ".csv": "csv", ".jsonl": "jsonl", ".parquet": "parquet"}
_NOT_TEXT = {
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "gzip data (name it .gz)",
    b"\x28\xb5\x2f\xfd": "Zstandard data (name it .zst)",
    b"\xfd7zXZ": "an xz file",
    b"BZh91AY": "a bzip2 file",
    b"7z\xbc\xaf": "a 7z archive",
    b"PAR1": "a Parquet file",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}


def read_files(source: FileSource) -> Iterator[Record | Rejected]:
    """Read every file that `source.path` matches, in sorted order.

    Raises:
        InputError: no file matches; a file cannot be read, is empty, or lacks a column.
    """
    for path in _matching_files(source.path):
        yield from _read_file(path, source)


def is_table(path: Path) -> bool:
    """Whether a file's name is that of a table, and not of plain text."""
    return _format_of(path) != "text"


def table_columns(path: Path) -> list[str]:
    """Names of the columns of a table: TSV, CSV, JSONL or Parquet.

    Raises:
        InputError: the file does not exist, cannot be read, or is not a table.
    """
    if not path.is_file():
        raise InputError(f"There is no file {path}.")
    if not is_table(path):
        raise InputError(f"{path} is not a table: give a .tsv, .csv, .jsonl or .parquet file.")
    kind = _format_of(path)
    if kind == "parquet":
        try:
            return list(pq.read_schema(path).names)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{path} cannot be read as Parquet ({error}).") from error
    # Of the other formats every row has all columns.
    first = next((row for row in _READERS[kind](path, []) if not isinstance(row, Rejected)), None)
    if first is None:
        raise InputError(f"{path} has no rows.")
    return list(first[1])


def read_tables(
    pattern: str, columns: Sequence[str], *, format: str = "auto", where: Mapping[str, str] | None = None
) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Read columns of every table that `pattern` matches, in sorted order; unlike a corpus, a table has no bad rows.

    Args:
        pattern: A file or a glob.
        columns: Those that a row is read for; rows may hold more.
        format: As in `FileSource`.
        where: Keep only rows whose column has this value.

    Yields:
        Where the row is, as "file, line 3", and its values by column.

    Raises:
        InputError: no file matches; a file cannot be read, is empty, lacks a column or has a malformed row.
    """
    where = where or {}
    for path in _matching_files(pattern):
        for row in _passing_rows(path, format, list(dict.fromkeys([*columns, *where])), where):
            if isinstance(row, Rejected):
                sample = f" ({row.sample[:80]!r})" if row.sample else ""
                raise InputError(f"{path}, line {row.line_number}: {row.reason}{sample}. Mend or remove the row.")
            yield f"{path}, line {row[0]}", row[1]


def read_moses(source: MosesSource) -> Iterator[Record | Rejected]:
    """Read two line-aligned files, from an OPUS .zip or by their common prefix.

    Raises:
        InputError: a file is missing or cannot be read, or the two have different numbers of lines.
    """
    languages = (source.language, source.translation_language)
    with ExitStack() as stack:
        sides = [stack.enter_context(side) for side in _moses_sides(source.path, languages)]
        counts = [0, 0]
        for number, pair in enumerate(zip_longest(*sides), start=1):
            counts = [count + (line is not None) for count, line in zip(counts, pair, strict=True)]
            if None not in pair:
                text, translation = (line.rstrip("\r\n") for line in pair)
                yield to_record(source.path, number, text, languages[0], (translation, languages[1]))
    if counts[0] != counts[1]:
        raise InputError(
            f"{source.path} is not line-aligned: {counts[0]:,} lines of {languages[0]!r} but {counts[1]:,} lines of "
            f"{languages[1]!r}. Fetch both files again, from the same release."
        )
    if counts == [0, 0]:
        raise InputError(f"{source.path} is empty.")


def _matching_files(pattern: str) -> list[Path]:
    expanded = str(Path(pattern).expanduser())
    if Path(expanded).is_file():
        return [Path(expanded)]
    files = sorted(Path(name) for name in glob.glob(expanded, recursive=True) if Path(name).is_file())
    if not files:
        raise InputError(f"No file matches {pattern!r} (looked from {Path.cwd()}). Check the source's path.")
    return files


def _read_file(path: Path, source: FileSource) -> Iterator[Record | Rejected]:
    name = str(path)
    optional = (source.translation, source.language_column, source.translation_language_column)
    wanted = list(dict.fromkeys([source.text, *(column for column in optional if column), *source.where]))
    for row in _passing_rows(path, source.format, wanted, source.where):
        if isinstance(row, Rejected):
            yield row
            continue
        number, values = row
        translation = None
        if source.translation:
            code = _language(values, source.translation_language, source.translation_language_column)
            translation = (values[source.translation], code)
        language = _language(values, source.language, source.language_column)
        yield to_record(name, number, values[source.text], language, translation)


def _passing_rows(path: Path, format: str, wanted: list[str], where: Mapping[str, str]) -> Iterator[Row | Rejected]:
    """The rows of a file that pass `where`, and those that cannot be read."""
    conditions = list(where.items())
    empty = True
    for row in _READERS[_format_of(path) if format == "auto" else format](path, wanted):
        empty = False
        if not isinstance(row, Rejected) and any(str(row[1][column]) != value for column, value in conditions):
            continue
        yield row
    if empty:
        raise InputError(f"{path} is empty. Columns wanted: {', '.join(map(repr, wanted))}.")


def _language(values: Mapping[str, object], code: str | None, column: str | None) -> object:
    return values[column] if column else code


def _format_of(path: Path) -> str:
    compressed = path.suffix.lower() in _COMPRESSIONS
    return _FORMATS.get((path.with_suffix("") if compressed else path).suffix.lower(), "text")


@contextmanager
def _text_lines(path: Path) -> Iterator[TextIO]:
    """Open a text file for iteration by lines: only a line feed ends one, undecodable bytes become surrogates."""
    compression = _COMPRESSIONS.get(path.suffix.lower())
    try:
        with pa.input_stream(str(path), compression=compression) as stream:
            start = stream.read(8)
        for magic, what in _NOT_TEXT.items():
            if start.startswith(magic):
                raise InputError(
                    f"{path} is {what}, not lines of UTF-8 text. Supported: TSV, CSV, JSONL and plain text, "
                    "each also as .gz or .zst, and Parquet."
                )
        with pa.input_stream(str(path), compression=compression) as stream:
            yield io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="\n")
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read ({error}). It may be damaged or cut off: fetch it again.") from error


def _delimited_rows(path: Path, wanted: list[str], *, delimiter: str, quoting: Any) -> Iterator[Row | Rejected]:
    with _text_lines(path) as lines:
        reader = csv.reader(lines, delimiter=delimiter, quoting=quoting)
        try:
            header = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(f"{path} does not begin with a line of column names ({error}).") from error
        require_columns(str(path), header, wanted)
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield rejected(str(path), reader.line_num, "malformed line", str(error))
                continue
            if len(row) == len(header):
                yield reader.line_num, dict(zip(header, row, strict=True))
            else:
                reason = "wrong number of columns" if row else "empty line"
                yield rejected(str(path), reader.line_num, reason, delimiter.join(row))


def _json_rows(path: Path, wanted: list[str]) -> Iterator[Row | Rejected]:
    incomplete: Mapping[str, object] | None = None
    complete = False
    with _text_lines(path) as lines:
        for number, line in enumerate(lines, start=1):
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                yield rejected(str(path), number, "invalid JSON" if line.strip() else "empty line", line)
                continue
            if not isinstance(values, dict):
                yield rejected(str(path), number, "not a JSON object", line)
            elif all(column in values for column in wanted):
                complete = True
                yield number, values
            else:
                incomplete = values
                yield rejected(str(path), number, "missing column", line)
    if incomplete is not None and not complete:
        require_columns(str(path), incomplete, wanted)


def _text_rows(path: Path, wanted: list[str]) -> Iterator[Row | Rejected]:
    require_columns(f"{path} (plain text)", wanted[:1], wanted)
    with _text_lines(path) as lines:
        for number, line in enumerate(lines, start=1):
            yield number, {wanted[0]: line.rstrip("\r\n")}


def _parquet_rows(path: Path, wanted: list[str]) -> Iterator[Row | Rejected]:
    number = 0
    try:
        # Buffering ahead, the default, keeps all that was read until the file is closed.
        with pq.ParquetFile(path, pre_buffer=False) as file:
            require_columns(str(path), file.schema_arrow.names, wanted)
            for batch in file.iter_batches(columns=wanted):
                for values in zip(*(_cells(batch.column(name)) for name in wanted), strict=True):
                    number += 1
                    yield number, dict(zip(wanted, values, strict=True))
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read as Parquet ({error}).") from error


def _cells(column: Any) -> list[object]:
    """The column's values; Parquet does not check its strings, so undecodable bytes become surrogates here too."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        cells = column.cast(pa.binary()).to_pylist()
        return [cell if cell is None else cell.decode("utf-8", "surrogateescape") for cell in cells]


_READERS: dict[str, Callable[[Path, list[str]], Iterator[Row | Rejected]]] = {
    "tsv": partial(_delimited_rows, delimiter="\t", quoting=csv.QUOTE_NONE),
    "csv": partial(_delimited_rows, delimiter=",", quoting=csv.QUOTE_MINIMAL),
    "jsonl": _json_rows,
    "text": _text_rows,
    "parquet": _parquet_rows,
}


def _moses_sides(path: str, languages: tuple[str, str]) -> list[Any]:
    """Two context managers, each of which opens one side's lines."""
    if path.endswith(".zip"):
        return [_zip_member(Path(path).expanduser(), language) for language in languages]
    sides = []
    for language in languages:
        candidates = [Path(f"{path}.{language}{suffix}").expanduser() for suffix in ("", *_COMPRESSIONS)]
        found = next((candidate for candidate in candidates if candidate.is_file()), None)
        if found is None:
            names = ", ".join(str(candidate) for candidate in candidates)
            raise InputError(f"None of {names} exists. Give the common prefix of the two files, or the OPUS .zip.")
        sides.append(_text_lines(found))
    return sides


@contextmanager
def _zip_member(path: Path, language: str) -> Iterator[TextIO]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [name for name in archive.namelist() if name.endswith(f".{language}")]
            if len(members) != 1:
                raise InputError(
                    f"{path} should hold exactly one member that ends in .{language} but holds {len(members)}. "
                    f"Its members: {', '.join(archive.namelist())}."
                )
            with archive.open(members[0]) as member:
                yield io.TextIOWrapper(member, encoding="utf-8-sig", errors="surrogateescape", newline="\n")
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} cannot be read as a .zip ({error}). Fetch it again from OPUS.") from error
