"""A figure, its 95 % bootstrap interval, and means of figures over languages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, rankdata

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Score:
    """One figure.

    Attributes:
        value: the figure on all rows.
        n: number of rows.
        resampled: the figure on every bootstrap sample, float64 [samples].
    """

    value: float
    n: int
    resampled: Values

    def as_json(self) -> dict[str, Any]:
        """{"value", "ci95", "n"}, where ci95 is the percentile interval."""
        return {"value": self.value, "ci95": np.percentile(self.resampled, [2.5, 97.5]).tolist(), "n": self.n}


Measures = dict[str, dict[str, Score]]
"""Scores by measure and language."""


@dataclass(frozen=True)
class Bootstrap:
    """Resampling of rows, in the same way for every encoder and for every language with as many rows.

    What is compared is compared on the same samples; and where rows are the same sentences in several languages, the
    interval of the mean over languages knows it.
    """

    samples: int = 1000
    seed: int = 0

    def score(self, statistic: Callable[..., Values], *columns: NDArray[Any]) -> Score:
        """The statistic of columns with at least two rows.

        Args:
            statistic: Of arrays [..., rows] and an `axis`, gives [...].
            columns: Arrays [rows] whose rows belong together.
        """
        resampled = bootstrap(
            columns, statistic, n_resamples=self.samples, method="percentile", paired=True, vectorized=True,
            rng=np.random.default_rng(self.seed), batch=100,
        ).bootstrap_distribution  # fmt: skip
        return Score(float(statistic(*columns, axis=-1)), len(columns[0]), np.asarray(resampled))

    def mean(self, values: NDArray[Any]) -> Score:
        """The mean of at least two values."""
        return self.score(np.mean, values)


def mean_score(scores: Sequence[Score]) -> Score:
    """The plain mean over languages, each counting the same; n is the total of rows."""
    resampled: Values = np.mean([score.resampled for score in scores], axis=0)
    return Score(float(np.mean([score.value for score in scores])), sum(score.n for score in scores), resampled)


def measures_as_json(measures: Mapping[str, Mapping[str, Score]]) -> dict[str, Any]:
    """{measure: {"languages": {language: score}, "mean": score}}."""
    return {
        measure: {
            "languages": {language: score.as_json() for language, score in scores.items()},
            "mean": mean_score(list(scores.values())).as_json(),
        }
        for measure, scores in measures.items()
        if scores
    }


def pearson(left: Values, right: Values, axis: int = -1) -> Values:
    """Pearson's correlation along an axis; 0 where one side is constant, which orders nothing."""
    left, right = (side - side.mean(axis=axis, keepdims=True) for side in (left, right))
    scale = np.sqrt((left**2).sum(axis=axis) * (right**2).sum(axis=axis))
    correlation: Values = (left * right).sum(axis=axis) / np.where(scale > 1e-12, scale, np.inf)
    return correlation


def spearman(left: Values, right: Values, axis: int = -1) -> Values:
    """Spearman's rank correlation along an axis, ties sharing their mean rank; 0 where one side is constant."""
    return pearson(rankdata(left, axis=axis), rankdata(right, axis=axis), axis=axis)
