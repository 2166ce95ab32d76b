"""Words of any language with their places in the text, and as numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import regex
from numpy.typing import NDArray

# Line_Break=SA are the scripts that only a dictionary can divide into words: Thai, Lao, Khmer, Burmese.
_WORD = regex.compile(r"\b(?!\p{Line_Break=SA})[\p{L}\p{N}].*?\b", regex.WORD | regex.DOTALL)


class Word(NamedTuple):
    """A word, case-folded, and where it stands: characters [start, end) of the text."""

    text: str
    start: int
    end: int


def words_of(text: str) -> list[Word]:
    """The words of a text: its segments by Unicode's default word boundaries that begin with a letter or a digit.

    These boundaries (UAX #29) need no language: words between spaces and punctuation, with the apostrophes in them.
    Chinese characters and hiragana stand alone. Scripts that neither space nor character divides give no words.
    """
    return [Word(match[0].casefold(), *match.span()) for match in _WORD.finditer(text)]


@dataclass(frozen=True)
class Words:
    """The words of many sentences as numbers, one sentence after another.

    Attributes:
        ids: int32 [words]; the same number for the same word.
        starts: int64 [sentences + 1]; sentence i is `ids[starts[i] : starts[i + 1]]`.
    """

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Words of each sentence, int64 [sentences]."""
        return np.diff(self.starts)

    def sentence_of(self, words: NDArray[np.int64]) -> NDArray[np.int64]:
        """The sentence in which each of these words stands, by its place in `ids`."""
        sentences: NDArray[np.int64] = np.searchsorted(self.starts, words, side="right") - 1
        return sentences

    def places(self, sentences: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places in `ids` of all words of these sentences, one sentence after another."""
        lengths = self.lengths[sentences]
        before = lengths.cumsum() - lengths
        places: NDArray[np.int64] = np.arange(lengths.sum()) + np.repeat(self.starts[sentences] - before, lengths)
        return places

    def subset(self, sentences: NDArray[np.int64]) -> Words:
        """These sentences alone."""
        return Words(self.ids[self.places(sentences)], np.append(0, self.lengths[sentences].cumsum()))


class Vocabulary:
    """Gives every word a number, in the order in which they come."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def numbers(self, sentences: Iterable[list[Word]]) -> NDArray[np.int32]:
        """The numbers of the words of these sentences, one sentence after another: int32 [words]."""
        numbers = self._numbers
        words = chain.from_iterable(sentences)
        return np.fromiter((numbers.setdefault(word.text, len(numbers)) for word in words), np.int32)
