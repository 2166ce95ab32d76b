"""How much of the teacher's space a student keeps, beside what a student that has learnt nothing would score.

A mean cosine alone says little: sentence vectors share a common direction, so one constant vector already scores the
norm of the mean unit vector. That baseline and a shuffled one stand beside every figure, and skill rescales the cosine
so that the constant student scores 0 and the teacher itself 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, spearmanr

from distillabse.errors import InputError

Vectors = NDArray[np.float32]

_NEIGHBOURS = 2000
_PAIRS = 20_000
_EDGES = np.linspace(-1.0, 1.0, 81)
_LENGTH_BOUNDS = (8, 16, 32, 64)
_SMALLEST_SLICE = 10
_SAME = 1e-9


def unit(vectors: Vectors) -> NDArray[np.float64]:
    """Rows scaled to length 1, float64; a zero row stays zero."""
    wide = vectors.astype(np.float64)
    rows: NDArray[np.float64] = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
    return rows


def row_cosines(left: Vectors, right: Vectors) -> NDArray[np.float64]:
    """Cosine of each row of `left` with the same row of `right`: [n]."""
    cosines: NDArray[np.float64] = (unit(left) * unit(right)).sum(axis=1)
    return cosines


def constant_cosines(teacher: Vectors) -> NDArray[np.float64]:
    """Cosine of each teacher vector with the best constant vector, their mean direction: [n]."""
    rows = unit(teacher)
    mean = rows.mean(axis=0)
    cosines: NDArray[np.float64] = rows @ (mean / max(float(np.linalg.norm(mean)), 1e-12))
    return cosines


def skill_of(cosine: float, constant: float) -> float:
    """(cosine - constant) / (1 - constant): 0 for the best constant vector, 1 for the teacher.

    Raises:
        InputError: the teacher itself gives one vector for everything, so there is nothing to keep.
    """
    if 1 - constant < 1e-6:
        raise InputError(
            "The teacher gives the same vector for every sentence, so no fidelity can be measured. Check its attention "
            "mask and pooling."
        )
    return (cosine - constant) / (1 - constant)


def cosine_and_skill(teacher: Vectors, student: Vectors) -> dict[str, float]:
    """The two figures watched while training: {"cosine", "skill"}."""
    cosine = float(row_cosines(teacher, student).mean())
    return {"cosine": cosine, "skill": skill_of(cosine, float(constant_cosines(teacher).mean()))}


def fidelity(
    teacher: Vectors,
    student: Vectors,
    *,
    languages: Sequence[str] = (),
    lengths: Sequence[int] = (),
    bootstrap_samples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything that is reported of a student on one set of texts.

    Args:
        teacher, student: float32 [n, dimension], the same texts in the same order.
        languages: language of each text, for slices.
        lengths: tokens of each text, for slices.
        bootstrap_samples: resamples for the 95 % percentile interval of the mean cosine.
        seed: of the bootstrap, the shuffle and the samples.

    Raises:
        InputError: fewer than two texts, or a constant teacher.
    """
    if len(teacher) < 2:
        raise InputError(f"Fidelity needs at least two texts, got {len(teacher)}.")
    random = np.random.default_rng(seed)
    cosines, constants = row_cosines(teacher, student), constant_cosines(teacher)
    shuffled = row_cosines(teacher, student[_derangement(len(student), random)])
    mean, constant = float(cosines.mean()), float(constants.mean())
    interval = bootstrap(
        (cosines,), np.mean, n_resamples=bootstrap_samples, method="percentile", rng=random, batch=100
    ).confidence_interval
    top1, spearman = neighbour_agreement(teacher, student, random)
    return {
        "n": len(cosines),
        "cosine_mean": mean,
        "cosine_p01": float(np.percentile(cosines, 1)),
        "cosine_p05": float(np.percentile(cosines, 5)),
        "ci95": [float(interval.low), float(interval.high)],
        "constant_baseline": constant,
        "shuffled_baseline": float(shuffled.mean()),
        "skill": skill_of(mean, constant),
        "neighbour_top1": top1,
        "similarity_spearman": spearman,
        "slices": {
            "language": _slices(list(languages), cosines, teacher),
            "length": _slices([_length_slice(length) for length in lengths], cosines, teacher),
        },
        "histogram": {
            "edges": _EDGES.tolist(),
            **{
                name: np.histogram(np.clip(values, -1, 1), bins=_EDGES)[0].tolist()
                for name, values in (("student", cosines), ("constant", constants), ("shuffled", shuffled))
            },
        },
    }


def neighbour_agreement(teacher: Vectors, student: Vectors, random: np.random.Generator) -> tuple[float, float]:
    """Do both spaces have the same neighbourhoods?

    Returns:
        The share of texts whose nearest other text is the same in both, and Spearman's correlation of pairwise
        similarities; on samples of at most 2,000 texts and 20,000 pairs.
    """
    chosen = random.permutation(len(teacher))[:_NEIGHBOURS]
    similarities = []
    for vectors in (teacher, student):
        rows = unit(vectors[chosen])
        matrix = rows @ rows.T
        np.fill_diagonal(matrix, -np.inf)
        similarities.append(matrix)
    top1 = float((similarities[0].argmax(axis=1) == similarities[1].argmax(axis=1)).mean())
    left, right = np.triu_indices(len(chosen), k=1)
    pairs = random.permutation(len(left))[:_PAIRS]
    sampled = [matrix[left[pairs], right[pairs]] for matrix in similarities]
    if len(pairs) < 2 or any(np.ptp(values) < _SAME for values in sampled):
        # A student with one vector for all orders nothing.
        return top1, 0.0
    return top1, float(spearmanr(*sampled).statistic)


def _derangement(n: int, random: np.random.Generator) -> NDArray[np.int64]:
    """A permutation that leaves nothing in place: a random cycle."""
    order = random.permutation(n)
    result = np.empty(n, dtype=np.int64)
    result[order] = np.roll(order, 1)
    return result


def _length_slice(tokens: int) -> str:
    low = 1
    for high in _LENGTH_BOUNDS:
        if tokens <= high:
            return f"{low}-{high} tokens"
        low = high + 1
    return f"{low}+ tokens"


def _natural(label: str) -> tuple[int, str]:
    """Order by the leading number where there is one, so that 9-16 comes before 17-32."""
    number = label.partition("-")[0].rstrip("+ tokens")
    return (int(number) if number.isdigit() else 0, label)


def _slices(labels: Sequence[str], cosines: NDArray[np.float64], teacher: Vectors) -> Mapping[str, dict[str, float]]:
    """Figures per label, each against its own constant baseline; slices of fewer than 10 texts are left out."""
    found: dict[str, dict[str, float]] = {}
    names = np.asarray(labels)
    for label in sorted(set(labels), key=_natural):
        rows = names == label
        if rows.sum() < _SMALLEST_SLICE:
            continue
        mean, constant = float(cosines[rows].mean()), float(constant_cosines(teacher[rows]).mean())
        if 1 - constant > 1e-6:
            found[label] = {"n": int(rows.sum()), "cosine_mean": mean, "skill": skill_of(mean, constant)}
    return found
