"""Sentences as token ids, in memory or in files of any size, and padded batches of them."""

from __future__ import annotations

import hashlib
import logging
import os
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch.utils.data import Dataset

from distillabse import layout
from distillabse.errors import InputError
from distillabse.models.tokens import tokenise
from distillabse.storage import new_folder, read_json, write_json

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from distillabse.training.cache import TeacherCache

logger = logging.getLogger(__name__)
_BLOCK = 20_000
# Vocabularies reach half a million rows: too many for 16 bits.
_IDS, _STARTS = np.dtype("<i4"), np.dtype("<i8")
# Items between two wanted ones that are cheaper to read with them than to skip with another system call.
_GAP = 64


class FileArray:
    """A flat array in a file, read with system calls.

    Pages of a memory-mapped file count as memory of the process for as long as they are mapped, so it would seem to
    grow to the size of the file. Reads leave nothing behind. Safe in threads and in forked or spawned processes: reads
    share no file position, and a pickled array opens its file anew.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.path = path
        self.dtype = dtype
        self._length = path.stat().st_size // dtype.itemsize
        self._descriptor: int | None = None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, items: slice | NDArray[np.int64]) -> NDArray[Any]:
        """Items of a slice without a step, or at indices of any shape, which must not be negative."""
        if isinstance(items, slice):
            start, stop, _ = items.indices(self._length)
            return self._read(start, stop)
        order = np.argsort(items, axis=None)
        wanted = items.reshape(-1)[order]
        found = np.empty(len(wanted), self.dtype)
        ends = [*(np.flatnonzero(np.diff(wanted) > _GAP) + 1).tolist(), len(wanted)]
        for first, end in zip([0, *ends], ends, strict=False):
            if first < end:
                low = int(wanted[first])
                found[first:end] = self._read(low, int(wanted[end - 1]) + 1)[wanted[first:end] - low]
        result = np.empty_like(found)
        result[order] = found
        return result.reshape(items.shape)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}

    def _read(self, start: int, stop: int) -> NDArray[Any]:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
        size = max(stop - start, 0) * self.dtype.itemsize
        read = os.pread(self._descriptor, size, start * self.dtype.itemsize)
        while 0 < len(read) < size:  # one call reads at most two gigabytes
            more = os.pread(self._descriptor, size - len(read), start * self.dtype.itemsize + len(read))
            if not more:
                break
            read += more
        if len(read) < size:
            raise InputError(f"{self.path} ends too early. Remove its folder and run the stage that writes it again.")
        return np.frombuffer(read, self.dtype)


class TokenisedSentences(Dataset[dict[str, Any]]):
    """The token ids of every sentence, one after another, and where each begins.

    Attributes:
        ids: int32 [tokens].
        starts: int64 [sentences + 1]; sentence i is `ids[starts[i] : starts[i + 1]]`.
        digest: SHA-256 of both: the same for the same text set, tokenizer and truncation.
    """

    def __init__(self, ids: NDArray[np.int32] | FileArray, starts: NDArray[np.int64] | FileArray, digest: str) -> None:
        """Take arrays or anything that is sliced like them; `tokenised_sentences` and `open` give the digest."""
        self.ids = ids
        self.starts = starts
        self.digest = digest

    @classmethod
    def open(cls, folder: Path) -> TokenisedSentences:
        """What `tokenise_corpus` wrote into `folder`; memory does not grow with what is read of it.

        Raises:
            InputError: a file is missing or has another size than it was written with.
        """
        about = read_json(folder / layout.TOKENS_RECORD)
        sizes = {
            layout.TOKEN_IDS: about["tokens"] * _IDS.itemsize,
            layout.TOKEN_STARTS: (about["sentences"] + 1) * _STARTS.itemsize,
        }
        for name, size in sizes.items():
            path = folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found:,} bytes instead of {size:,}"
                raise InputError(f"{path} {state}. Remove the folder {folder} and run the stage that writes it again.")
        ids, starts = FileArray(folder / layout.TOKEN_IDS, _IDS), FileArray(folder / layout.TOKEN_STARTS, _STARTS)
        return cls(ids, starts, about["digest"])

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> dict[str, Any]:
        """One sentence: "input_ids" (int32 [tokens]) and "row", its own number."""
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Several sentences at once, as a DataLoader asks for them."""
        return [
            {"input_ids": self.ids[start:end], "row": row}
            for row, (start, end) in zip(rows, self._bounds(np.asarray(rows, np.int64)).tolist(), strict=True)
        ]

    def lengths(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of each of these rows."""
        bounds = self._bounds(rows)
        lengths: NDArray[np.int64] = bounds[:, 1] - bounds[:, 0]
        return lengths

    def _bounds(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Start and end of each row: int64 [rows, 2].

        Raises:
            IndexError: a row that is not there.
        """
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self)} sentences")
        bounds: NDArray[np.int64] = self.starts[rows[:, None] + np.arange(2)]
        return bounds


def tokenised_sentences(encoder: SentenceTransformer, texts: Iterable[str]) -> TokenisedSentences:
    """Tokenise texts into memory, as `encoder` would see them."""
    summary = _Summary()
    ids, starts = map(np.concatenate, zip(*_tokenised_blocks(encoder, texts, summary), strict=True))
    return TokenisedSentences(ids, starts, summary.digest())


def tokenise_corpus(encoder: SentenceTransformer, texts: Iterable[str], folder: Path) -> TokenisedSentences:
    """Tokenise any number of texts, as `encoder` would see them, into a folder that is whole or absent.

    Memory is that of one block of texts.

    Args:
        encoder: gives tokenizer, prompt and truncation.
        texts: read once, from the start to the end.
        folder: gets the token ids, where each sentence begins, and a record of their numbers and digest.

    Raises:
        StorageError: the disk is full.
    """
    summary, started = _Summary(), time.monotonic()
    with (
        new_folder(folder) as temporary,
        (temporary / layout.TOKEN_IDS).open("wb") as ids_file,
        (temporary / layout.TOKEN_STARTS).open("wb") as starts_file,
    ):
        for ids, starts in _tokenised_blocks(encoder, texts, summary):
            ids_file.write(ids.data)
            starts_file.write(starts.data)
        about = {"sentences": summary.sentences, "tokens": summary.tokens, "digest": summary.digest()}
        write_json(temporary / layout.TOKENS_RECORD, about)
    rate = summary.sentences / max(time.monotonic() - started, 1e-9)
    logger.info(f"Tokenised {summary.sentences:,} sentences, {summary.tokens:,} tokens, {rate:,.0f} sentences/s")
    return TokenisedSentences.open(folder)


@contextmanager
def sentence_progress(description: str, total: int | None) -> Iterator[tuple[Progress, TaskID]]:
    """A bar on a terminal with sentences, sentences per second and, if there is a total, the time left."""
    console = Console(stderr=True)
    columns: list[ProgressColumn] = [TextColumn(description), BarColumn(), _Rate()]
    if total is not None:
        columns.append(TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress, progress.add_task("", total=total)


class PaddingCollator:
    """Pads a list of rows to their longest: int64 input_ids and attention_mask [batch, tokens]."""

    def __init__(self, pad_token_id: int, multiple_of: int = 1, cache: TeacherCache | None = None) -> None:
        self.pad_token_id = pad_token_id
        self.multiple_of = multiple_of
        self.cache = cache

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Pad on the right; with a cache the teacher's signals of the rows come along."""
        lengths = np.array([len(row["input_ids"]) for row in rows])
        longest = int(lengths.max())
        longest += -longest % self.multiple_of
        is_token = np.arange(longest) < lengths[:, None]
        input_ids = np.full(is_token.shape, self.pad_token_id, np.int64)
        input_ids[is_token] = np.concatenate([row["input_ids"] for row in rows])
        batch: dict[str, Any] = {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(is_token.astype(np.int64)),
        }
        if self.cache is not None:
            batch.update(self.cache.read([row["row"] for row in rows], longest))
        return batch


class _Summary:
    """Numbers and digest of sentences that come in blocks."""

    def __init__(self) -> None:
        self.sentences = self.tokens = 0
        self._hashes = hashlib.sha256(), hashlib.sha256()

    def add(self, ids: NDArray[np.int32], starts: NDArray[np.int64]) -> None:
        """Take in the next block of what is stored."""
        self._hashes[0].update(ids.data)
        self._hashes[1].update(starts.data)
        self.tokens += len(ids)

    def digest(self) -> str:
        """SHA-256 over the SHA-256 of all ids and that of all starts: blocks of any size give the same."""
        return hashlib.sha256(b"".join(part.digest() for part in self._hashes)).hexdigest()


def _tokenised_blocks(
    encoder: SentenceTransformer, texts: Iterable[str], summary: _Summary
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int64]]]:
    """Blocks of token ids, and of the numbers of tokens so far: 0, and then where each sentence ends."""
    ids, starts = np.empty(0, _IDS), np.zeros(1, _STARTS)
    remaining = iter(texts)
    total = len(texts) if isinstance(texts, Sequence) else None
    with sentence_progress("Tokenising", total) as (progress, task):
        while True:
            summary.add(ids, starts)
            yield ids, starts
            if not (rows := tokenise(encoder, list(islice(remaining, _BLOCK)))):
                return
            ids = np.fromiter(chain.from_iterable(rows), _IDS)
            starts = summary.tokens + np.cumsum(np.fromiter(map(len, rows), _STARTS))
            summary.sentences += len(rows)
            progress.advance(task, len(rows))


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.completed:,.0f} sentences, {task.speed or 0:,.0f}/s")
