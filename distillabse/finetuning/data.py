"""Examples of a task, from the hub or from local tables, as `datasets.Dataset` with one set of columns.

Pairs have the columns language, id, first, second and label (int); questions have language, id, question, context,
answers (list of str) and answer_start (int, the character at which the first answer begins; -1 where it is not there).
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillabse.corpus.files import read_tables, table_columns
from distillabse.corpus.rows import require_columns
from distillabse.errors import InputError, first_line
from distillabse.finetuning.tasks import HubSplit, Task

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

NUMBERED = "#"
"""Begins the id of a row that has none of its own: it tells rows of one source apart, and means nothing in another."""

_LANGUAGE_COLUMNS = ("language", "lang")


def read_hub_split(task: Task, split: HubSplit, languages: Sequence[str], revision: str | None = None) -> Dataset:
    """Read one split of the hub in each of these languages.

    Args:
        task: what its columns are.
        split: dataset, configuration and split.
        languages: codes; each is a configuration, or the only code is the language of the only configuration.
        revision: commit, tag or branch of the dataset.

    Raises:
        InputError: the dataset cannot be had, lacks a column, or holds a value that cannot be.
    """
    import datasets

    rows: list[dict[str, Any]] = []
    for language in languages:
        configuration = split.configuration.format(language=language)
        name = f"{split.dataset}/{configuration}"
        try:
            loaded = datasets.load_dataset(split.dataset, configuration, split=split.split, revision=revision)
        except Exception as error:  # `datasets` and the hub's client share no base class of errors
            raise InputError(
                f"The dataset {name!r} cannot be had ({type(error).__name__}: {first_line(error)}). Check the network "
                "and the revision. Without a network, give local tables with --train and --test, or set HF_HOME to a "
                "cache that holds the dataset and HF_HUB_OFFLINE=1."
            ) from error
        require_columns(name, loaded.column_names, _columns(task, "answers"))
        names = getattr(loaded.features.get("label"), "names", None)
        numbered = ((f"{name}, row {number}", row) for number, row in enumerate(loaded, start=1))
        rows.extend(_examples(task, numbered, language, class_names=names))
    return _dataset(task, f"{split.dataset} ({split.split})", rows)


def read_table(task: Task, path: Path, language: str | None = None) -> Dataset:
    """Read a local TSV, CSV, JSONL or Parquet file with the columns that the dataset has on the hub.

    A column `language` (or `lang`) holds the code of every row. Of questions, instead of the mapping `answers` a column
    `answer` holds the text, with `answer_start` or without it; without it the first place counts where the answer is.

    Args:
        task: what its columns are.
        path: the file.
        language: of all rows, where the file has no such column.

    Raises:
        InputError: the file cannot be read, lacks a column, or holds a value that cannot be; names the line.
    """
    found = table_columns(path)
    language_column = next((name for name in _LANGUAGE_COLUMNS if name in found), None)
    if language_column is None and language is None:
        require_columns(str(path), found, ["language"])
    wanted = _columns(task, "answers" if "answers" in found else "answer")
    optional = [name for name in (language_column, "id", "answer_start") if name and name in found]
    require_columns(str(path), found, wanted)
    rows = read_tables(str(path), list(dict.fromkeys([*wanted, *optional])))
    return _dataset(task, str(path), list(_examples(task, rows, language, language_column)))


def select_languages(rows: Dataset, languages: Sequence[str], name: str) -> Dataset:
    """The rows of these languages.

    Raises:
        InputError: there is none of a language; names those that there are.
    """
    import numpy as np

    found = np.asarray(rows["language"])
    present = sorted(set(found.tolist()))
    missing = [language for language in languages if language not in present]
    if missing:
        raise InputError(f"{name} has no rows in {', '.join(map(repr, missing))}. Its languages: {', '.join(present)}.")
    return rows.select(np.flatnonzero(np.isin(found, list(languages))))


def tokenised(rows: Dataset, tokenise: Callable[[dict[str, list[Any]], list[int]], dict[str, list[Any]]]) -> Dataset:
    """What `tokenise` makes of batches of rows and their indices; it may give more rows than it gets."""
    return rows.map(
        tokenise,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        # Rows in memory are not cached, so there is nothing to find by a hash of the function and its tokenizer.
        new_fingerprint=secrets.token_hex(8),
        desc="Tokenising",
    )


def _columns(task: Task, answers: str) -> list[str]:
    return [*task.columns, "label" if task.kind == "pairs" else answers]


def _dataset(task: Task, name: str, rows: list[dict[str, Any]]) -> Dataset:
    import datasets

    if not rows:
        raise InputError(f"{name} holds no {task.kind}, not a single row. Give another file or dataset.")
    logger.info("%s: %s rows", name, f"{len(rows):,}")
    return datasets.Dataset.from_list(rows)


def _examples(
    task: Task,
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    language: str | None,
    language_column: str | None = None,
    class_names: Sequence[str] | None = None,
) -> Iterable[dict[str, Any]]:
    """One example for every row, which comes with its place; rows without an id are numbered within their language."""
    numbers: dict[str, int] = {}
    for where, row in rows:
        code = _text(row, language_column, where) if language_column else str(language)
        numbers[code] = numbers.get(code, 0) + 1
        identity = str(row["id"]) if row.get("id") not in (None, "") else f"{NUMBERED}{numbers[code]}"
        first, second = (_text(row, column, where) for column in task.columns)
        start: dict[str, Any] = {"language": code, "id": identity}
        if task.kind == "pairs":
            yield {**start, "first": first, "second": second, "label": _label(task, row["label"], class_names, where)}
        else:
            answers, begin = _answers(row, second, where)
            yield {**start, "question": first, "context": second, "answers": answers, "answer_start": begin}


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: {column} is {value!r}, not text. Mend or remove the row.")
    return value


def _label(task: Task, value: Any, class_names: Sequence[str] | None, where: str) -> int:
    """The class by the task's own order; the dataset's names count where they are those of the task."""
    if class_names is not None and sorted(class_names) == sorted(task.labels) and isinstance(value, int):
        value = class_names[value] if 0 <= value < len(class_names) else value
    if value in task.labels:
        return task.labels.index(value)
    if str(value).isdecimal() and int(value) < len(task.labels):
        return int(value)
    accepted = ", ".join(f"{label} ({index})" for index, label in enumerate(task.labels))
    raise InputError(f"{where}: the label {value!r} is none of {accepted}.")


def _answers(row: Mapping[str, Any], context: str, where: str) -> tuple[list[str], int]:
    """The texts of the answers, and where the first one begins in the context, or -1."""
    given = row.get("answers")
    if isinstance(given, Mapping):
        texts, starts = list(given.get("text") or []), list(given.get("answer_start") or [])
    else:
        texts = [row["answer"] if given is None else given]
        start = row.get("answer_start")
        starts = [int(start)] if start is not None and str(start).isdecimal() else []
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(f"{where}: there is no text of an answer ({given or texts!r}). Mend or remove the row.")
    begins = bool(starts) and context[starts[0] : starts[0] + len(texts[0])] == texts[0]
    return texts, int(starts[0]) if begins else context.find(texts[0])
