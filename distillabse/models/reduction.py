"""Fewer dimensions for the teacher's vectors, where the student's are to be narrower than the teacher's.

A student of 256 dimensions cannot give LaBSE's 768. Its target then is the teacher's vector on its first 256 principal
directions, which lose least of the cosines between texts (Mao and Nakagawa 2023 find that LaBSE loses little). The
matrix goes into the bundle: it takes the vectors of an index that the teacher made to the student's space.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distillabse import layout
from distillabse.models.projection import projection_basis
from distillabse.models.teacher import with_modules
from distillabse.storage import new_file

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from sentence_transformers import SentenceTransformer

REDUCTION_SAMPLE = 20_000
_KEY = "projection"


def fit_reduction(teacher: SentenceTransformer, texts: Sequence[str], dimension: int) -> NDArray[np.float32]:
    """Principal directions of the teacher's unit vectors of `texts`: float32 [its dimension, dimension].

    `REDUCTION_SAMPLE` texts are enough for any dimension in use.
    """
    vectors = teacher.encode(list(texts), batch_size=64, normalize_embeddings=True)
    return projection_basis(vectors.astype(np.float32), dimension)


def chained(first: NDArray[np.float32] | None, second: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
    """The matrix of two reductions, one after the other; None stands for vectors as they are."""
    if first is None or second is None:
        return second if first is None else first
    return first @ second


def reduced(teacher: SentenceTransformer, matrix: NDArray[np.float32]) -> SentenceTransformer:
    """The teacher with vectors `normalise(vector @ matrix)`; it shares the weights of `teacher`."""
    import torch
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize

    weight = torch.from_numpy(matrix.T.copy())
    dense = Dense(*matrix.shape, bias=False, activation_function=torch.nn.Identity(), init_weight=weight)
    encoder = with_modules(teacher, [*teacher, dense, Normalize()])
    encoder.requires_grad_(False)
    return encoder.eval()


def save_reduction(matrix: NDArray[np.float32], folder: Path) -> None:
    """Write the matrix into a student's folder."""
    from safetensors.numpy import save_file

    with new_file(folder / layout.TEACHER_PROJECTION) as temporary:
        save_file({_KEY: np.ascontiguousarray(matrix)}, temporary)
        temporary.chmod(0o644)


def load_reduction(folder: Path) -> NDArray[np.float32] | None:
    """The matrix of a student's folder, if its vectors are narrower than the teacher's."""
    from safetensors.numpy import load_file

    path = folder / layout.TEACHER_PROJECTION
    return load_file(path)[_KEY] if path.is_file() else None
