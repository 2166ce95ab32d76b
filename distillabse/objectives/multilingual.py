"""Multilingual distillation."""

from torch import Tensor

from distillabse.config import MultilingualObjective
from distillabse.models.taps import EncoderShape, Signals
from distillabse.objectives.base import PairObjective


class Multilingual(PairObjective):
    """x."""

    def __init__(self, config: MultilingualObjective, teacher: EncoderShape, student: EncoderShape) -> None:
        super().__init__()
        self.weight = config.weight

    def forward(self, teacher: Signals, student: Signals, links: Tensor | None) -> dict[str, Tensor]:
        """X."""
        source, translation = student.sentence.chunk(2)
        return {
            "multilingual/source": (teacher.sentence - source).square().sum(-1).mean(),
            "multilingual/translation": (teacher.sentence - translation).square().sum(-1).mean(),
        }
