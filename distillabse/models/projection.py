"""The directions that a narrower student keeps of its teacher's hidden space."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BLOCK = 50_000


def projection_basis(
    rows: NDArray[np.float32],
    width: int,
    kind: Literal["svd", "pca", "random"] = "svd",
    counts: NDArray[np.int64] | None = None,
    seed: int = 0,
) -> NDArray[np.float32]:
    """Orthonormal directions that rows of the hidden space are projected onto.

    Args:
        rows: embedding rows or token states, [rows, hidden size].
        width: how many directions, at most the hidden size.
        kind: "svd": the first right singular vectors of diag(sqrt(counts)) rows, which lose least of the table as the
            corpus uses it: they minimise sum_i counts_i |row_i - projection of row_i|^2 (Eckart and Young 1936).
            "pca": principal directions of the centred rows, each row counting once. "random": uniformly drawn.
        counts: how often the corpus uses each row [rows]; without it every row counts once.
        seed: of the random directions.

    Returns:
        float32 [hidden size, width], columns of length 1 at right angles; the most important first.
    """
    from scipy.linalg import eigh, qr

    hidden = rows.shape[1]
    if kind == "random":
        directions, _ = qr(np.random.default_rng(seed).standard_normal((hidden, width)), mode="economic")
        return np.asarray(directions, dtype=np.float32)
    weights = np.ones(len(rows)) if kind == "pca" or counts is None or not counts.any() else counts.astype(np.float64)
    gram = np.zeros((hidden, hidden))
    total = np.zeros(hidden)
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        weighted = block * np.sqrt(weights[start : start + _BLOCK, None], dtype=np.float32)
        gram += weighted.T @ weighted
        total += weights[start : start + _BLOCK] @ block
    if kind == "pca":
        gram -= np.outer(total, total) / len(rows)
    # Eigenvectors of A^T A are the right singular vectors of A; the table itself may have half a million rows.
    _, vectors = eigh(gram, subset_by_index=[hidden - width, hidden - 1])
    vectors = vectors[:, ::-1]
    # An eigenvector's sign is arbitrary; with its largest entry positive it is the same on every machine.
    signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(width)])
    return np.ascontiguousarray(vectors * signs, dtype=np.float32)
