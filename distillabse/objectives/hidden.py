"""Token states: the student's hidden states follow the teacher's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distillabse.config import HiddenObjective
from distillabse.models.taps import EncoderShape, Signals, Tap
from distillabse.objectives.base import Objective, resolve_layers


class Hidden(Objective):
    """Mean squared error of layer outputs over each sentence's real tokens (TinyBERT, arXiv:1909.10351, equation 8).

    Where the student is narrower, a linear map of its own leads each layer to the teacher's width. It is trained with
    the student and no part of it. It starts at zero: it learns to read the student's states before it moves them.
    """

    def __init__(self, config: HiddenObjective, teacher: EncoderShape, student: EncoderShape) -> None:
        super().__init__()
        self.weight = config.weight
        self.layers = resolve_layers(config.layers, teacher, student, "hidden")
        self.student_taps = frozenset(Tap("hidden", layer) for layer, _ in self.layers)
        self.teacher_taps = frozenset(Tap("hidden", layer) for _, layer in self.layers)
        self.maps = nn.ModuleList(linear_map(student.hidden_size, teacher.hidden_size) for _ in self.layers)

    def forward(self, teacher: Signals, student: Signals, attention_mask: Tensor) -> dict[str, Tensor]:
        """The term hidden, summed over layer pairs."""
        losses = []
        for (own, teachers), to_teacher in zip(self.layers, self.maps, strict=True):
            output = to_teacher(student.taps[Tap("hidden", own)])
            losses.append(masked_mean_square(teacher.taps[Tap("hidden", teachers)], output, attention_mask))
        return {"hidden": torch.stack(losses).sum()}


class _Float32Linear(nn.Linear):
    """Computes in float32 whatever its weights are stored in: DeepSpeed stores those of all modules in bf16 or fp16."""

    def forward(self, states: Tensor) -> Tensor:
        return nn.functional.linear(states.float(), self.weight.float(), self.bias.float())


def linear_map(inputs: int, outputs: int) -> nn.Module:
    """A linear map that starts at zero and computes in float32; nothing at all where the widths are equal."""
    if inputs == outputs:
        return nn.Identity()
    linear = _Float32Linear(inputs, outputs)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def masked_mean_square(target: Tensor, output: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean of (target - output)^2 over dimensions and the real tokens of each sentence, then over the batch.

    Each sentence counts alike, so the loss of a batch is the mean of the losses of its parts, however it is divided
    among processes. Inputs are [batch, tokens, width].
    """
    mask = attention_mask.float()
    squares = (target.float() - output.float()).square().mean(dim=-1)
    return ((squares * mask).sum(dim=-1) / mask.sum(dim=-1)).mean()
