"""Translation pairs as token ids of student and teacher, and padded batches of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from distillabse import layout
from distillabse.alignment import Aligner, aligned_links
from distillabse.corpus.records import Record
from distillabse.errors import ConfigurationError, InputError
from distillabse.storage import new_folder
from distillabse.training.data import FileArray, PaddingCollator, TokenisedSentences, tokenise_corpus

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from distillabse.training.cache import TeacherCache
    from distillabse.training.distiller import Distiller

_ROWS = np.dtype("<i8")
_LINKS = np.dtype("<i4")
_SPANS = 6


class TranslationPairs(Dataset[dict[str, Any]]):
    """Pairs of a source, in a language that the teacher knows, and its translation.

    Texts are rows: all that are sources come first, each once, and then those that are translations alone.

    Attributes:
        student: token ids of all texts, as the student reads them.
        teacher: token ids as the teacher reads them: of the sources, or of all texts where it reads translations, too.
        rows: the row of source and translation of each pair, one after the other: int64 [2 x pairs].
        link_starts: where the links of each pair begin, int64 [pairs + 1]; None where words are not linked.
        link_spans: their six token positions, int32 [6 x links]; see `PairObjective.forward`.
    """

    def __init__(
        self,
        student: TokenisedSentences,
        teacher: TokenisedSentences,
        rows: NDArray[np.int64] | FileArray,
        link_starts: NDArray[np.int64] | FileArray | None = None,
        link_spans: NDArray[np.int32] | FileArray | None = None,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.rows = rows
        self.link_starts = link_starts
        self.link_spans = link_spans

    @classmethod
    def open(cls, folder: Path) -> TranslationPairs:
        """Open what `prepare_pairs` wrote.

        Raises:
            InputError: a file is missing or cut short.
        """
        student = TokenisedSentences.open(folder / layout.STUDENT_TOKENS)
        teacher = TokenisedSentences.open(folder / layout.TEACHER_TOKENS)
        files = [folder / layout.PAIR_ROWS, folder / layout.LINK_STARTS, folder / layout.LINK_SPANS]
        if not files[0].is_file() or files[1].is_file() != files[2].is_file():
            raise InputError(f"{folder} is not whole. Remove it and run the stage that writes it again.")
        rows = FileArray(files[0], _ROWS)
        if not files[1].is_file():
            return cls(student, teacher, rows)
        return cls(student, teacher, rows, FileArray(files[1], _ROWS), FileArray(files[2], _LINKS))

    def __len__(self) -> int:
        return len(self.rows) // 2

    def __getitem__(self, pair: int) -> dict[str, Any]:
        """One pair: "source" and "translation" (int32 [tokens] each), the "rows" of both, and its "links", if any."""
        return self.__getitems__([pair])[0]

    def __getitems__(self, pairs: Sequence[int]) -> list[dict[str, Any]]:
        """Several pairs at once, as a DataLoader asks for them."""
        numbers = np.asarray(pairs, np.int64)
        rows = self.pair_rows(numbers)
        sources = self.student.__getitems__(rows[:, 0].tolist())
        translations = self.student.__getitems__(rows[:, 1].tolist())
        items = [
            {"source": source["input_ids"], "translation": translation["input_ids"], "rows": both}
            for source, translation, both in zip(sources, translations, rows.tolist(), strict=True)
        ]
        if self.link_starts is not None and self.link_spans is not None:
            bounds = self.link_starts[numbers[:, None] + np.arange(2)].tolist()
            for item, (start, end) in zip(items, bounds, strict=True):
                item["links"] = self.link_spans[_SPANS * start : _SPANS * end].reshape(-1, _SPANS)
        return items

    def lengths(self, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of the longer side of each of these pairs."""
        rows = self.pair_rows(pairs)
        lengths: NDArray[np.int64] = self.student.lengths(rows.reshape(-1)).reshape(rows.shape).max(axis=1)
        return lengths

    def pair_rows(self, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
        """Source and translation of each of these pairs: int64 [pairs, 2].

        Raises:
            IndexError: a pair that is not there.
        """
        if len(pairs) and not 0 <= pairs.min() <= pairs.max() < len(self):
            raise IndexError(f"pairs {pairs.min()} to {pairs.max()} of {len(self)}")
        rows: NDArray[np.int64] = self.rows[2 * pairs[:, None] + np.arange(2)]
        return rows


class PairCollator:
    """Pads a list of pairs to what `Distiller.forward` takes: the sources, then their translations."""

    def __init__(
        self,
        pairs: TranslationPairs,
        student_pad: int,
        teacher_pad: int,
        teacher_reads_translations: bool,
        multiple_of: int = 1,
        cache: TeacherCache | None = None,
    ) -> None:
        self.read_by_teacher = pairs.teacher
        self.student_collator = PaddingCollator(student_pad, multiple_of)
        self.teacher_collator = PaddingCollator(teacher_pad, multiple_of)
        self.teacher_reads_translations = teacher_reads_translations
        self.cache = cache

    def __call__(self, pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Pad on the right; with a cache the teacher's signals come along, else what the teacher is to read."""
        sides = [pair["source"] for pair in pairs] + [pair["translation"] for pair in pairs]
        batch = self.student_collator([{"input_ids": ids} for ids in sides])
        rows = [pair["rows"][0] for pair in pairs]
        if self.teacher_reads_translations:
            rows += [pair["rows"][1] for pair in pairs]
        if self.cache is not None:
            batch.update(self.cache.read(rows, int(self.read_by_teacher.lengths(np.asarray(rows)).max())))
        else:
            read = self.teacher_collator(self.read_by_teacher.__getitems__(rows))
            batch.update({f"teacher_{name}": tensor for name, tensor in read.items()})
        if "links" in pairs[0]:
            counts = [len(pair["links"]) for pair in pairs]
            numbers = np.repeat(np.arange(len(pairs)), counts)
            links = np.column_stack([numbers, np.concatenate([pair["links"] for pair in pairs])])
            batch["links"] = torch.from_numpy(links.astype(np.int64))
        return batch


def collator_for(
    sentences: TokenisedSentences | TranslationPairs, distiller: Distiller, multiple_of: int, cache: TeacherCache | None
) -> PaddingCollator | PairCollator:
    """What turns rows of these sentences, or pairs of them, into a batch of this distiller."""
    pad = distiller.student.tokenizer.pad_token_id
    if isinstance(sentences, TokenisedSentences):
        return PaddingCollator(pad, multiple_of, cache)
    teacher_pad = distiller.teacher.tokenizer.pad_token_id
    return PairCollator(sentences, pad, teacher_pad, distiller.teacher_reads_translations, multiple_of, cache)


def prepare_pairs(
    student: SentenceTransformer,
    teacher: SentenceTransformer,
    records: Callable[[], Iterable[Record]],
    folder: Path,
    teacher_reads_translations: bool,
    teacher_languages: Sequence[str] | None,
    distinct: bool,
    aligner: Aligner | None = None,
) -> TranslationPairs:
    """Tokenise the pairs of a corpus into a folder that is whole or absent.

    Args:
        student, teacher: give tokenizer, prompt and truncation.
        records: reads the corpus from its start; called several times.
        folder: gets the token ids and the pairs.
        teacher_reads_translations: whether the teacher needs the token ids of translations.
        teacher_languages: those that it knows; None for all.
        distinct: tokenise each text once, which takes memory for all of them; otherwise every side of every pair.
        aligner: finds the words of each pair that mean the same; None where nothing needs them.

    Raises:
        ConfigurationError: a row without a translation, or a source in a language that the teacher does not know.
        StorageError: the disk is full.
    """
    texts: Iterable[str]
    with new_folder(folder) as temporary:
        if distinct:
            numbers: dict[str, int] = {}
            for record in _pairs(records, teacher_languages):
                numbers.setdefault(record.text, len(numbers))
            sources = len(numbers)
            for record in records():
                numbers.setdefault(str(record.translation), len(numbers))
            texts, read = list(numbers), list(numbers)[: None if teacher_reads_translations else sources]
            found = (numbers[side] for record in records() for side in (record.text, str(record.translation)))
            rows = np.fromiter(found, _ROWS)
        else:
            count = sum(1 for _ in _pairs(records, teacher_languages))
            texts = chain(_side(records, "text"), _side(records, "translation"))
            both = chain(_side(records, "text"), _side(records, "translation"))
            read = both if teacher_reads_translations else _side(records, "text")  # type: ignore[assignment]
            rows = (np.arange(count)[:, None] + np.array([0, count])).reshape(-1).astype(_ROWS)
        tokenise_corpus(student, texts, temporary / layout.STUDENT_TOKENS)
        tokenise_corpus(teacher, read, temporary / layout.TEACHER_TOKENS)
        rows.tofile(temporary / layout.PAIR_ROWS)
        if aligner is not None:
            links = aligned_links(
                ((record.text, str(record.translation)) for record in records()),
                student,
                teacher,
                aligner,
                (f"{record.language}-{record.translation_language}" for record in records()),
            )
            links.starts.astype(_ROWS).tofile(temporary / layout.LINK_STARTS)
            links.spans.astype(_LINKS).tofile(temporary / layout.LINK_SPANS)
    return TranslationPairs.open(folder)


def _side(records: Callable[[], Iterable[Record]], name: str) -> Iterator[str]:
    return (getattr(record, name) for record in records())


def _pairs(records: Callable[[], Iterable[Record]], languages: Sequence[str] | None) -> Iterator[Record]:
    """The records, each a pair whose source the teacher knows.

    Raises:
        ConfigurationError: one is not.
    """
    for record in records():
        if record.translation is None:
            raise ConfigurationError(
                f"objectives: they learn from translation pairs, but {record.source} has sentences without translation "
                f"({record.text[:60]!r}). Name its translation column, or remove this source."
            )
        if languages is not None and record.language not in languages:
            raise ConfigurationError(
                f"corpus.sources: {record.source} has {record.language!r} as the language of its sources, which the "
                f"teacher does not know (teacher.languages: {', '.join(languages)}). Exchange `text` and "
                "`translation`, or add the language to teacher.languages if the teacher does know it."
            )
        yield record
