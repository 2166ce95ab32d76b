"""What every objective is: named scalar terms from two sets of signals."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from distillabse.config import LayerPair
from distillabse.errors import ConfigurationError
from distillabse.models.taps import EncoderShape, Signals, Tap


class Objective(nn.Module, ABC):
    """A family of loss terms.

    Attributes:
        weight: factor of all its terms in the total loss.
        teacher_taps: tensors it needs from the teacher besides the sentence vector.
        student_taps: tensors it needs from the student besides the sentence vector.
    """

    weight: float
    teacher_taps: frozenset[Tap] = frozenset()
    student_taps: frozenset[Tap] = frozenset()

    @abstractmethod
    def forward(self, teacher: Signals, student: Signals, attention_mask: Tensor) -> dict[str, Tensor]:
        """Scalar float32 terms by name, before `weight`; `attention_mask` is [batch, tokens], 1 for real tokens."""


def resolve_layers(
    pairs: list[LayerPair], teacher: EncoderShape, student: EncoderShape, kind: str
) -> list[tuple[int, int]]:
    """(student layer, teacher layer) pairs counted from 0.

    Raises:
        ConfigurationError: a layer that its model lacks.
    """
    return [
        (
            _resolve(pair.student, student.layers, f"objectives.{kind}.layers.student", "student"),
            _resolve(pair.teacher, teacher.layers, f"objectives.{kind}.layers.teacher", "teacher"),
        )
        for pair in pairs
    ]


def _resolve(layer: int, count: int, key: str, owner: str) -> int:
    if not -count <= layer < count:
        raise ConfigurationError(
            f"{key}: the {owner} has no layer {layer}; give 0 to {count - 1}, or -1 (the last) to {-count}."
        )
    return layer % count
