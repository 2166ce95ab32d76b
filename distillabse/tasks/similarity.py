"""Semantic textual similarity: do cosines order pairs of sentences as people do?"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from distillabse.config import SimilarityTask
from distillabse.errors import InputError
from distillabse.tasks.base import LookUp, drawn, read_rows, require_two
from distillabse.tasks.languages import iso_639_1, select
from distillabse.tasks.scores import Bootstrap, Measures, pearson, spearman

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoredPair:
    """Two sentences, and how alike people find them."""

    first: str
    second: str
    score: float


@dataclass(frozen=True)
class Similarity:
    """Scored pairs by language.

    Attributes:
        name: what the task is called.
        pairs: by language, at least two each.
        pivot: language of the first sentence in the cross-lingual figure.
    """

    name: str
    pairs: Mapping[str, Sequence[ScoredPair]]
    pivot: str = "en"
    kind: ClassVar[str] = "similarity"
    headline: ClassVar[str] = "spearman"

    def texts(self) -> Iterator[str]:
        """Both sentences of every pair."""
        return (text for pairs in self.pairs.values() for pair in pairs for text in (pair.first, pair.second))

    def scores(self, vectors: LookUp, teacher: LookUp | None, bootstrap: Bootstrap) -> Measures:
        """Spearman and Pearson correlation of cosines with scores; `cross_spearman` has a first sentence in the pivot.

        With a teacher also `mixed_spearman`: the teacher's vectors of the first sentence in the pivot language, and the
        encoder's of the second in the other language.
        """
        found: Measures = {"spearman": {}, "pearson": {}, "cross_spearman": {}, "mixed_spearman": {}}
        pivot = self.pairs.get(self.pivot, ())
        for language, pairs in self.pairs.items():
            gold = np.array([pair.score for pair in pairs])
            second = vectors([pair.second for pair in pairs])
            cosines = (vectors([pair.first for pair in pairs]) * second).sum(axis=1).astype(np.float64)
            found["spearman"][language] = bootstrap.score(spearman, cosines, gold)
            found["pearson"][language] = bootstrap.score(pearson, cosines, gold)
            if language == self.pivot or not aligned(pivot, pairs):
                continue
            first = [pair.first for pair in pivot]
            for measure, side in (("cross_spearman", vectors), ("mixed_spearman", teacher)):
                if side is not None:
                    cosines = (side(first) * second).sum(axis=1).astype(np.float64)
                    found[measure][language] = bootstrap.score(spearman, cosines, gold)
        return {measure: scores for measure, scores in found.items() if scores}


def aligned(left: Sequence[ScoredPair], right: Sequence[ScoredPair]) -> bool:
    """Whether two languages have the same pairs in the same order, as far as their scores tell."""
    scores = [pair.score for pair in left]
    return len(set(scores)) > 1 and scores == [pair.score for pair in right]


def load_similarity(task: SimilarityTask, seed: int) -> Similarity:
    """Read the scored pairs of a configured task.

    Raises:
        InputError: a file cannot be used, a score is no number, a language is not known or not there, or has too few.
    """
    table, origin = task.table, f"tasks: {task.name}"
    found: dict[str, list[ScoredPair]] = {}
    for code, (first, second, score) in read_rows(table, [table.sentence1, table.sentence2, table.score], task.name):
        found.setdefault(code, []).append(ScoredPair(first, second, _number(score, origin, table.path)))
    pairs = {}
    for code, label in select(found, task.languages, origin).items():
        require_two(found[code], task.name, code)
        pairs[label] = drawn(found[code], task.max_pairs, seed)
    pivot = iso_639_1(task.pivot) or task.pivot
    unaligned = [label for label in pairs if pivot in pairs and not aligned(pairs[pivot], pairs[label])]
    if unaligned:
        logger.warning(
            "%s: rows in %s do not have the scores of those in %s in their order: no cross-lingual figure",
            origin,
            ", ".join(unaligned),
            pivot,
        )
    return Similarity(task.name, pairs, pivot)


def _number(score: str, origin: str, path: str) -> float:
    try:
        number = float(score)
    except ValueError:
        number = float("nan")
    if not np.isfinite(number):
        raise InputError(f"{origin}: {path} holds the score {score!r}, which is not a number. Check `score`.")
    return number
