"""Bitext retrieval: is the translation of a sentence nearer to it than all other sentences of that language?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from distillabse.config import AlignedTable, RetrievalTask, Source
from distillabse.corpus.records import Record
from distillabse.corpus.sources import read_source
from distillabse.errors import InputError
from distillabse.tasks.base import LookUp, drawn, read_rows, require_two
from distillabse.tasks.languages import iso_639_1, select
from distillabse.tasks.scores import Bootstrap, Measures

_TIE = 1e-6  # above the rounding of float32 dot products of unit vectors
_LEAST_DENOMINATOR = 1e-6

Pair = tuple[str, str]
"""A sentence in another language, and its translation in the pivot language."""


@dataclass(frozen=True)
class Retrieval:
    """Pairs by language.

    Attributes:
        name: what the task is called.
        pairs: by language, at least two pairs each.
        margin: whether to score by ratio margin, too.
        neighbours: k of the margin.
    """

    name: str
    pairs: Mapping[str, Sequence[Pair]]
    margin: bool = True
    neighbours: int = 4
    kind: ClassVar[str] = "retrieval"
    headline: ClassVar[str] = "accuracy"
    _identities: dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]] = field(default_factory=dict, repr=False)

    def texts(self) -> Iterator[str]:
        """Both sides of every pair."""
        return (text for pairs in self.pairs.values() for pair in pairs for text in pair)

    def scores(self, vectors: LookUp, teacher: LookUp | None, bootstrap: Bootstrap) -> Measures:
        """Top-1 accuracies in both directions and their mean, by cosine and by margin.

        With a teacher also `mixed_accuracy`, where the encoder's vectors of the other language look for the teacher's
        of the pivot language, and the mean cosine of the encoder's vectors of either side to the teacher's of the
        pivot language.
        """
        found: Measures = {}
        for language, pairs in self.pairs.items():
            sides = [list(side) for side in zip(*pairs, strict=True)]
            other, pivot = (vectors(side) for side in sides)
            rows = self._accuracies(language, sides, other @ pivot.T)
            if teacher is not None:
                target = teacher(sides[1])
                rows["mixed_accuracy"] = credits(other @ target.T, self._ids(language, sides)[1])
                rows["teacher_cosine_other"] = (other * target).sum(axis=1)
                rows["teacher_cosine_pivot"] = (pivot * target).sum(axis=1)
            for measure, values in rows.items():
                found.setdefault(measure, {})[language] = bootstrap.mean(np.asarray(values, dtype=np.float64))
        return found

    def _accuracies(
        self, language: str, sides: list[list[str]], cosines: NDArray[np.float32]
    ) -> dict[str, NDArray[np.float64]]:
        """Credit of every pair: to the pivot language, from it, and the mean of both."""
        other, pivot = self._ids(language, sides)
        rows = {}
        scored = {"accuracy": cosines}
        if self.margin:
            scored["margin_accuracy"] = ratio_margins(cosines, self.neighbours)
        for measure, similarities in scored.items():
            to_pivot, from_pivot = credits(similarities, pivot), credits(similarities.T, other)
            rows[measure] = (to_pivot + from_pivot) / 2
            rows[f"{measure}_to_pivot"], rows[f"{measure}_from_pivot"] = to_pivot, from_pivot
        return rows

    def _ids(self, language: str, sides: list[list[str]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Equal numbers for equal texts, of either side."""
        if language not in self._identities:
            first, second = (np.unique(side, return_inverse=True)[1] for side in sides)
            self._identities[language] = (first, second)
        return self._identities[language]


def credits(similarities: NDArray[np.float32], candidates: NDArray[np.int64]) -> NDArray[np.float64]:
    """Whether the most similar candidate of each row is the one on the diagonal, or a candidate with the same text.

    Of several that are equally similar, one is drawn: the credit is the expectation, so that an encoder with one vector
    for everything scores 1/n and not 1.

    Args:
        similarities: float [n, n], queries by candidates; row i belongs to column i.
        candidates: int [n], equal for candidates with equal text.

    Returns:
        float64 [n], from 0 to 1.
    """
    credit = np.empty(len(similarities))
    for index, row in enumerate(similarities):
        tied = row >= row.max() - _TIE
        credit[index] = (candidates[tied] == candidates[index]).mean()
    return credit


def ratio_margins(cosines: NDArray[np.float32], neighbours: int) -> NDArray[np.float32]:
    """The ratio margin of Artetxe and Schwenk (2019, arXiv:1811.01136, equations 2 and 3).

    cos(x, y) over the mean of two means: of cos(x, z) for the k candidates z nearest to x, and of cos(z, y) for the k
    queries z nearest to y. It makes up for sentences that are near to everything. Where vectors point away from each
    other the denominator may not be positive; it is then a small positive number.

    Args:
        cosines: float32 [n, m] of two languages.
        neighbours: k; all there are where there are fewer.

    Returns:
        float32 [n, m].
    """

    def mean_of_nearest(axis: int) -> NDArray[np.float32]:
        k = min(neighbours, cosines.shape[axis])
        nearest = np.partition(cosines, -k, axis=axis).take(range(-k, 0), axis=axis, mode="wrap")
        mean: NDArray[np.float32] = nearest.mean(axis=axis, keepdims=True)
        return mean

    denominator = (mean_of_nearest(1) + mean_of_nearest(0)) / 2
    margins: NDArray[np.float32] = (cosines / np.maximum(denominator, _LEAST_DENOMINATOR)).astype(np.float32)
    return margins


def load_retrieval(task: RetrievalTask, seed: int) -> Retrieval:
    """Read the pairs of a configured task.

    Raises:
        InputError: a file cannot be used, a language is not known or not there, ids repeat, or there are too few pairs.
    """
    found = _aligned(task, task.aligned) if task.aligned is not None else _parallel(task, task.pairs, seed)
    origin = f"tasks: {task.name}"
    pairs = {}
    for code, label in select(found, task.languages, origin).items():
        require_two(found[code], task.name, code)
        pairs[label] = drawn(found[code], task.max_pairs, seed)
    return Retrieval(task.name, pairs, task.margin, task.neighbours)


def _parallel(task: RetrievalTask, source: Source | None, seed: int) -> dict[str, list[Pair]]:
    assert source is not None  # the schema sees to it
    found: dict[str, list[Pair]] = {}
    for row in read_source(source, seed):
        if not isinstance(row, Record):
            raise InputError(f"tasks: {task.name}: {row.source}, line {row.line_number}: {row.reason}. Mend the row.")
        sides = [(row.language, row.text), (row.translation_language, row.translation)]
        if iso_639_1(str(row.language)) == iso_639_1(task.pivot):  # a source may have the pivot language first
            sides.reverse()
        (code, text), (pivot, translation) = sides
        if iso_639_1(str(pivot)) != iso_639_1(task.pivot) or translation is None or text is None:
            raise InputError(
                f"tasks: {task.name}: {row.source} pairs {row.language!r} with {row.translation_language!r}; "
                f"one of them has to be the pivot language {task.pivot!r}."
            )
        found.setdefault(str(code), []).append((text, translation))
    return found


def _aligned(task: RetrievalTask, table: AlignedTable) -> dict[str, list[Pair]]:
    sentences: dict[str, dict[str, str]] = {}
    for code, (number, text) in read_rows(table, [table.id, table.text], task.name):
        if number in sentences.setdefault(code, {}):
            raise InputError(
                f"tasks: {task.name}: {table.path} has several rows with {table.id} {number!r} in {code!r}, so they "
                "are not aligned. Choose one of each with `where`, or another `id` column."
            )
        sentences[code][number] = text
    pivots = [code for code in sentences if iso_639_1(code) == iso_639_1(task.pivot)]
    if len(pivots) != 1:
        raise InputError(
            f"tasks: {task.name}: {table.path} has {len(pivots)} languages {task.pivot!r}, of {', '.join(sentences)}; "
            "exactly one is needed. Set `pivot`."
        )
    pivot = sentences.pop(pivots[0])
    return {
        code: [(text, pivot[number]) for number, text in rows.items() if number in pivot]
        for code, rows in sentences.items()
    }
