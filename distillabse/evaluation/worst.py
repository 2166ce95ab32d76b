"""The texts that a student keeps least of its teacher, and what lies next to them in both spaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distillabse.evaluation.fidelity import Vectors, row_cosines, unit

WORST = 20


def worst_sentences(
    teacher: Vectors,
    student: Vectors,
    texts: Sequence[str],
    languages: Sequence[str | None] = (),
    count: int = WORST,
) -> list[dict[str, Any]]:
    """The texts whose vectors are furthest from the teacher's, worst first.

    A neighbour is the text with the highest cosine to it in one of the two spaces, among all other texts; rows that
    repeat the text itself are no neighbours.

    Args:
        teacher: float32 [n, dimension].
        student: float32 [n, width]; as wide as the teacher's.
        texts: the n texts that both encoded.
        languages: language of each, or nothing.
        count: how many are given at most.

    Returns:
        For each: text, language, cosine, teacher_neighbour, teacher_similarity, student_neighbour,
        student_similarity. Neighbour and similarity are None where there is no other text.
    """
    cosines = row_cosines(teacher, student)
    rows = np.argsort(cosines, kind="stable")[:count]
    same = np.asarray(texts, dtype=object)[rows, None] == np.asarray(texts, dtype=object)[None, :]
    nearest = {name: _nearest(vectors, rows, same) for name, vectors in (("teacher", teacher), ("student", student))}
    found = []
    for number, row in enumerate(rows):
        entry: dict[str, Any] = {
            "text": texts[row],
            "language": languages[row] if languages else None,
            "cosine": float(cosines[row]),
        }
        for name, (neighbours, similarities) in nearest.items():
            known = not same[number].all()
            entry[f"{name}_neighbour"] = texts[neighbours[number]] if known else None
            entry[f"{name}_similarity"] = float(similarities[number]) if known else None
        found.append(entry)
    return found


def _nearest(
    vectors: Vectors, rows: NDArray[np.int64], excluded: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Row and cosine of the nearest vector of each of `rows`: both [rows]. `excluded` is bool [rows, n]."""
    scaled = unit(vectors)
    similarities = np.where(excluded, -np.inf, scaled[rows] @ scaled.T)
    nearest = similarities.argmax(axis=1)
    return nearest, np.take_along_axis(similarities, nearest[:, None], axis=1)[:, 0]
