"""Which words of translation pairs mean the same, as characters or as tokens of a student and a teacher."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from distillabse.alignment import eflomal, ibm1
from distillabse.alignment.words import Vocabulary, Word, Words, words_of
from distillabse.corpus.progress import rows_progress
from distillabse.models.tokens import token_offsets

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

Aligner = Literal["ibm1", "eflomal"]
_ALIGN: dict[Aligner, Callable[[Words, Words], NDArray[np.int64]]] = {"ibm1": ibm1.align, "eflomal": eflomal.align}
_BLOCK = 20_000

# Where the words of each text stand, counted in something: int32 [words, 2].
_Locate = Callable[[Sequence[str], Sequence[list[Word]]], NDArray[np.int32]]


@dataclass(frozen=True)
class WordLinks:
    """The linked words of pairs.

    Attributes:
        starts: int64 [pairs + 1]; the links of pair i are `spans[starts[i] : starts[i + 1]]`.
        spans: int32 [links, 6]: first token and end (exclusive) of the word in the student's source, in the student's
            translation, and in the teacher's source; special tokens and prompt are counted, as the encoder sees them.
    """

    starts: NDArray[np.int64]
    spans: NDArray[np.int32]


def require_aligner(aligner: Aligner) -> None:
    """Refuse an aligner that is not installed.

    Raises:
        ConfigurationError: it is not installed; the message names the remedy.
    """
    if aligner == "eflomal":
        eflomal.require_eflomal()


def aligned_links(
    pairs: Iterable[tuple[str, str]],
    student: SentenceTransformer,
    teacher: SentenceTransformer,
    aligner: Aligner,
    languages: Iterable[str],
) -> WordLinks:
    """Align the words of translation pairs, and find them among the tokens of both encoders.

    Words beyond the length at which an encoder truncates have no tokens there, and so no links. Memory holds some 50
    bytes for every word, and no text.

    Args:
        pairs: source and translation; read once.
        student, teacher: give tokenizers, prompts and truncation, each its own.
        aligner: what finds the links.
        languages: of each pair, a name for its two languages, such as "en-de"; each is aligned by itself.

    Raises:
        ConfigurationError: the aligner is not installed, or a tokenizer cannot tell where its tokens stand.
        ValueError: there are not as many languages as pairs.
    """
    in_student, in_teacher = partial(token_spans, student), partial(token_spans, teacher)
    found = _align(pairs, languages, aligner, source=(in_student, in_teacher), translation=(in_student,))
    spans = np.concatenate([found.source[:, :2], found.translation, found.source[:, 2:]], axis=1)
    has_tokens = (spans[:, 1::2] > spans[:, ::2]).all(axis=1)
    counts = np.bincount(found.pair[has_tokens], minlength=found.pairs)
    return WordLinks(np.append(0, counts.cumsum()), spans[has_tokens])


def align_pairs(pairs: Iterable[tuple[str, str]], aligner: Aligner, languages: Iterable[str]) -> NDArray[np.int64]:
    """Align the words of translation pairs; arguments and errors as in `aligned_links`.

    Returns:
        int64 [links, 5]: number of the pair, and the characters [start, end) of the word in the source and in the
        translation.
    """
    found = _align(pairs, languages, aligner, source=(_characters,), translation=(_characters,))
    return np.concatenate([found.pair[:, None], found.source, found.translation], axis=1)


def token_spans(encoder: SentenceTransformer, texts: Sequence[str], words: Sequence[list[Word]]) -> NDArray[np.int32]:
    """First token and end (exclusive) of each word of some texts, as the encoder sees them: int32 [words, 2].

    All tokens that hold a character of the word are its own. A word without any has the span (0, 0).

    Raises:
        ConfigurationError: the tokenizer cannot tell where its tokens stand.
    """
    spans = []
    for offsets, of_text in zip(token_offsets(encoder, texts), words, strict=True):
        bounds = np.array([(word.start, word.end) for word in of_text], np.int64).reshape(-1, 2)
        tokens = np.flatnonzero(offsets[:, 1] > offsets[:, 0])
        first = np.searchsorted(offsets[tokens, 1], bounds[:, 0], side="right")
        last = np.searchsorted(offsets[tokens, 0], bounds[:, 1], side="left") - 1
        there = first <= last
        span = np.zeros((len(of_text), 2), np.int32)
        span[there, 0], span[there, 1] = tokens[first[there]], tokens[last[there]] + 1
        spans.append(span)
    return np.concatenate(spans)


def _characters(texts: Sequence[str], words: Sequence[list[Word]]) -> NDArray[np.int32]:
    return np.array([(word.start, word.end) for of_text in words for word in of_text], np.int32).reshape(-1, 2)


@dataclass(frozen=True)
class _Found:
    """Links in the order of the pairs: pair of each (int64 [links]), and where its words stand (int32 [links, ...])."""

    pairs: int
    pair: NDArray[np.int64]
    source: NDArray[np.int32]
    translation: NDArray[np.int32]


class _Side:
    """The words of all sources, or of all translations, and where they stand."""

    def __init__(self, locate: Sequence[_Locate]) -> None:
        self._locate = locate
        self._vocabulary = Vocabulary()
        self._ids = [np.empty(0, np.int32)]
        self._lengths = [np.zeros(1, np.int64)]
        self._spans = [np.empty((0, 2 * len(locate)), np.int32)]

    def add(self, texts: Sequence[str]) -> None:
        words = [words_of(text) for text in texts]
        self._ids.append(self._vocabulary.numbers(words))
        self._lengths.append(np.fromiter(map(len, words), np.int64))
        self._spans.append(np.concatenate([locate(texts, words) for locate in self._locate], axis=1))

    def words(self) -> Words:
        return Words(np.concatenate(self._ids), np.concatenate(self._lengths).cumsum())

    def spans(self) -> NDArray[np.int32]:
        return np.concatenate(self._spans)


def _align(
    pairs: Iterable[tuple[str, str]],
    languages: Iterable[str],
    aligner: Aligner,
    source: Sequence[_Locate],
    translation: Sequence[_Locate],
) -> _Found:
    require_aligner(aligner)
    began = time.monotonic()
    sides = _Side(source), _Side(translation)
    language_of: list[str] = []
    rows = zip(pairs, languages, strict=True)
    with rows_progress() as show:
        while block := list(islice(rows, _BLOCK)):
            for number, side in enumerate(sides):
                side.add([pair[number] for pair, _ in block])
            language_of.extend(language for _, language in block)
            show(len(language_of), "Finding words")
        sources, translations = (side.words() for side in sides)
        links = [np.empty((0, 2), np.int64)]
        of_pair = np.array(language_of, np.str_)
        done = 0
        for language in np.unique(of_pair):
            own = np.flatnonzero(of_pair == language)
            show(done, f"Aligning words, {language}")
            found = _ALIGN[aligner](sources.subset(own), translations.subset(own))
            links.append(np.stack([sources.places(own)[found[:, 0]], translations.places(own)[found[:, 1]]], axis=1))
            done += len(own)
    both = np.concatenate(links)
    both = both[np.argsort(both[:, 0], kind="stable")]
    seconds = max(time.monotonic() - began, 1e-9)
    logger.info(
        f"{aligner} linked {len(both):,} words of {len(language_of):,} pairs, {len(language_of) / seconds:,.0f} pairs/s"
    )
    return _Found(
        len(language_of), sources.sentence_of(both[:, 0]), sides[0].spans()[both[:, 0]], sides[1].spans()[both[:, 1]]
    )
