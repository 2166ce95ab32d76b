"""The rows of a corpus, and the Parquet files that carry them from stage to stage."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, starmap
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from distillabse.errors import InputError
from distillabse.storage import new_file

SCHEMA = pa.schema(
    [
        pa.field("text", pa.string(), nullable=False),
        pa.field("language", pa.string(), nullable=False),
        pa.field("translation", pa.string()),
        pa.field("translation_language", pa.string()),
        pa.field("source", pa.string(), nullable=False),
        pa.field("group", pa.string()),
    ]
)
_LABELS = ("language", "translation_language", "source", "group")
_ROWS_PER_WRITE = 1 << 16


@dataclass(frozen=True, slots=True)
class Record:
    """One row: a sentence, or a sentence and its translation.

    Attributes:
        text: The sentence.
        language: Its language code.
        translation: Its translation; None in a monolingual row.
        translation_language: The translation's language code; None in a monolingual row.
        source: Name of the file, dataset or topic that the row comes from.
        group: Rows with the same group are never separated when the corpus is split.
    """

    text: str
    language: str
    translation: str | None = None
    translation_language: str | None = None
    source: str = ""
    group: str | None = None


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that was not used, and why.

    Attributes:
        source: Name of the file, dataset or topic.
        line_number: Line or row in the source, counted from 1; None where only the row's text is known.
        reason: A short fixed phrase; rejected rows are counted by it.
        sample: The start of what was there.
    """

    source: str
    line_number: int | None
    reason: str
    sample: str


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence, its language code, and what it is a translation of, if anything."""

    text: str
    language: str
    source: Sentence | None = None


def sentences(records: Iterable[Record]) -> list[Sentence]:
    """The distinct texts of both sides, in first-seen order; a text keeps the language it is first seen with."""
    found: dict[str, Sentence] = {}
    for record in records:
        source = found.setdefault(record.text, Sentence(record.text, record.language))
        if record.translation is not None and record.translation_language is not None:
            found.setdefault(record.translation, Sentence(record.translation, record.translation_language, source))
    return list(found.values())


def known_texts(chosen: Sequence[Sentence], languages: Sequence[str] | None) -> list[str]:
    """What a teacher that knows these languages reads in place of each sentence: that itself, else its source.

    Args:
        chosen: sentences.
        languages: None for a teacher that knows all.

    Raises:
        InputError: a sentence in an unknown language that is no translation from a known one.
    """
    return [_known(sentence, languages).text for sentence in chosen]


def _known(sentence: Sentence, languages: Sequence[str] | None) -> Sentence:
    if languages is None or sentence.language in languages:
        return sentence
    if sentence.source is None or sentence.source.language not in languages:
        raise InputError(
            f"The teacher does not know {sentence.language!r} (teacher.languages: {', '.join(languages)}), and the "
            f"text {sentence.text[:60]!r} is no translation from a language that it knows. Name the source beside it, "
            "leave the text out, or add its language if the teacher does know it."
        )
    return sentence.source


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write records as Parquet, whole or not at all.

    Raises:
        StorageError: the disk is full or the place cannot be written.
    """
    remaining = iter(records)
    write_tables(path, map(to_table, iter(lambda: list(islice(remaining, _ROWS_PER_WRITE)), [])))


def write_tables(path: Path, tables: Iterable[pa.Table]) -> None:
    """Write tables with the columns of `SCHEMA` as Parquet, a row group for each, whole or not at all.

    Raises:
        StorageError: the disk is full or the place cannot be written.
    """
    with new_file(path) as temporary, pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)


def to_table(records: Sequence[Record]) -> pa.Table:
    """The records as an Arrow table with the columns of `SCHEMA`."""
    return pa.table({name: [getattr(row, name) for row in records] for name in SCHEMA.names}, SCHEMA)


def read_records(path: Path) -> list[Record]:
    """Read what `write_records` wrote.

    Raises:
        InputError: the file is missing or is not a split of a corpus.
    """
    return list(iterate_records(path))


def iterate_records(path: Path) -> Iterator[Record]:
    """Read what `write_records` wrote, row by row, in constant memory.

    Raises:
        InputError: the file is missing or is not a split of a corpus.
    """
    for batch in iterate_batches(path):
        yield from to_records(batch)


def iterate_batches(path: Path, rows: int = _ROWS_PER_WRITE) -> Iterator[pa.RecordBatch]:
    """Read what `write_records` wrote as Arrow record batches of at most so many rows, with the columns of `SCHEMA`.

    Raises:
        InputError: the file is missing or is not a split of a corpus.
    """
    with _split_file(path) as file:
        for batch in file.iter_batches(rows, columns=SCHEMA.names):
            batch.validate(full=True)  # Parquet does not check its strings.
            yield batch


def count_records(path: Path) -> int:
    """How many rows `write_records` wrote, without reading them.

    Raises:
        InputError: the file is missing or is not a split of a corpus.
    """
    with _split_file(path) as file:
        return int(file.metadata.num_rows)


@contextmanager
def _split_file(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a split; whatever is wrong with it becomes an InputError."""
    remedy = "Run the corpus stage (`distillabse corpus`) first."
    try:
        # Buffering ahead, the default, keeps all that was read until the file is closed.
        with pq.ParquetFile(path, pre_buffer=False) as file:
            if missing := [name for name in SCHEMA.names if name not in file.schema_arrow.names]:
                raise pa.ArrowInvalid(f"no column {', '.join(missing)}")
            yield file
    except FileNotFoundError:
        raise InputError(f"{path} does not exist. {remedy}") from None
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a split of a corpus ({error}). {remedy}") from None


def to_records(rows: pa.Table | pa.RecordBatch) -> list[Record]:
    """The rows of an Arrow table that has the columns of `SCHEMA`, and maybe more."""
    columns = {name: rows.column(name).to_pylist() for name in SCHEMA.names}
    for name in _LABELS:  # A few values stand in millions of rows: keep one object for each.
        columns[name] = [value if value is None else sys.intern(value) for value in columns[name]]
    return list(starmap(Record, zip(*columns.values(), strict=True)))


def training_texts(path: Path, distinct: bool) -> Iterator[str]:
    """The texts of both sides of a split's rows.

    Args:
        path: What `write_records` wrote.
        distinct: Each text once, in first-seen order, which takes memory for all of them; otherwise every side of every
            row, in constant memory.

    Raises:
        InputError: the file is missing or is not a split of a corpus.
    """
    records = iterate_records(path)
    if distinct:
        yield from (sentence.text for sentence in sentences(records))
    else:
        for record in records:
            yield record.text
            if record.translation is not None:
                yield record.translation
