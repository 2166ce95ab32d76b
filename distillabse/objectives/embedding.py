"""Objectives on the sentence vector."""

from __future__ import annotations

from torch import Tensor

from distillabse.config import CosineObjective, MSEObjective
from distillabse.errors import ConfigurationError
from distillabse.models.taps import EncoderShape, Signals
from distillabse.objectives.base import Objective


class Cosine(Objective):
    """1 - cosine between teacher and student, mean over the batch."""

    def __init__(self, config: CosineObjective, teacher: EncoderShape, student: EncoderShape) -> None:
        super().__init__()
        require_equal_dimensions(teacher, student, "cosine")
        self.weight = config.weight

    def forward(self, teacher: Signals, student: Signals, attention_mask: Tensor) -> dict[str, Tensor]:
        """The term cosine, between 0 and 2."""
        return {"cosine": 1 - (teacher.sentence * student.sentence).sum(dim=-1).mean()}


class MSE(Objective):
    """||teacher - student||^2 of the normalised vectors, mean over the batch (Reimers & Gurevych 2020, one side)."""

    def __init__(self, config: MSEObjective, teacher: EncoderShape, student: EncoderShape) -> None:
        super().__init__()
        require_equal_dimensions(teacher, student, "mse")
        self.weight = config.weight

    def forward(self, teacher: Signals, student: Signals, attention_mask: Tensor) -> dict[str, Tensor]:
        """The term mse, between 0 and 4."""
        return {"mse": (teacher.sentence - student.sentence).square().sum(dim=-1).mean()}


def require_equal_dimensions(teacher: EncoderShape, student: EncoderShape, kind: str) -> None:
    """Refuse an objective that compares vectors of different dimensions.

    Raises:
        ConfigurationError: the dimensions differ; the message names the objective and the remedy.
    """
    if teacher.dimension != student.dimension:
        raise ConfigurationError(
            f"objectives.{kind}: the teacher's vectors have {teacher.dimension} dimensions, the student's "
            f"{student.dimension}. Set student.head: dense to give the student the teacher's dimension."
        )
