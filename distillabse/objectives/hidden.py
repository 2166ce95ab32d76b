"""Token states: the student's hidden states follow the teacher's."""

from __future__ import annotations

import torch
from torch import Tensor

from distillabse.config import HiddenObjective
from distillabse.errors import ConfigurationError
from distillabse.models.taps import EncoderShape, Signals, Tap
from distillabse.objectives.base import Objective, resolve_layers


class Hidden(Objective):
    """Mean squared error of layer outputs over real tokens and dimensions (TinyBERT, arXiv:1909.10351)."""

    def __init__(self, config: HiddenObjective, teacher: EncoderShape, student: EncoderShape) -> None:
        super().__init__()
        if teacher.hidden_size != student.hidden_size:
            raise ConfigurationError(
                f"objectives.hidden: the hidden sizes differ ({teacher.hidden_size} and {student.hidden_size}). "
                "Use minilm_v2, which compares relations and needs no equal sizes."
            )
        self.weight = config.weight
        self.layers = resolve_layers(config.layers, teacher, student, "hidden")
        self.student_taps = frozenset(Tap("hidden", layer) for layer, _ in self.layers)
        self.teacher_taps = frozenset(Tap("hidden", layer) for _, layer in self.layers)

    def forward(self, teacher: Signals, student: Signals, attention_mask: Tensor) -> dict[str, Tensor]:
        """The term hidden, summed over layer pairs."""
        losses = [
            masked_mean_square(teacher.taps[Tap("hidden", t)], student.taps[Tap("hidden", s)], attention_mask)
            for s, t in self.layers
        ]
        return {"hidden": torch.stack(losses).sum()}


def masked_mean_square(target: Tensor, output: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean of (target - output)^2 over the batch's real tokens and all dimensions; inputs [batch, tokens, width]."""
    mask = attention_mask.float()
    squares = (target.float() - output.float()).square().mean(dim=-1)
    return (squares * mask).sum() / mask.sum()
