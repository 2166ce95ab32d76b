"""What keeps a Switch student's experts in use: the load-balancing loss and the router z-loss."""

from __future__ import annotations

import torch
from torch import Tensor

from distillabse.config import RoutingObjective
from distillabse.errors import ConfigurationError
from distillabse.models.taps import EncoderShape, Signals, Tap
from distillabse.objectives.base import Objective


def load_balance(logits: Tensor) -> Tensor:
    """N sum_i f_i P_i: 1 where experts share the tokens evenly, N where one takes them all.

    f_i is the share of tokens whose most probable expert is i (no gradient), P_i the mean probability of i (Switch
    Transformers, arXiv:2101.03961, equations 4 to 6, without alpha).

    Args:
        logits: the router's, float32 [tokens, experts].
    """
    experts = logits.shape[1]
    share = torch.bincount(logits.argmax(dim=-1), minlength=experts) / len(logits)
    return experts * (share * logits.softmax(dim=-1).mean(dim=0)).sum()


def router_z(logits: Tensor) -> Tensor:
    """Mean over tokens of log(sum exp(logits))^2 (ST-MoE, arXiv:2202.08906, equation 5, without its coefficient)."""
    return logits.logsumexp(dim=-1).square().mean()


class Routing(Objective):
    """Both losses, summed over the sparse layers. Padding is not routed, so it does not count."""

    def __init__(self, config: RoutingObjective, teacher: EncoderShape, student: EncoderShape) -> None:
        super().__init__()
        if not student.sparse_layers:
            raise ConfigurationError(
                "objectives.routing: the student is dense and has no router. Remove it, or set student.kind: switch."
            )
        self.weight = config.weight
        self.coefficients = {"load_balance": config.load_balance, "router_z": config.z_loss}
        self.layers = tuple(Tap("router", layer) for layer in student.sparse_layers)
        self.student_taps = frozenset(self.layers)

    def forward(self, teacher: Signals, student: Signals, attention_mask: Tensor) -> dict[str, Tensor]:
        """The terms load_balance and router_z."""
        logits = [student.taps[tap] for tap in self.layers]
        terms = {"load_balance": load_balance, "router_z": router_z}
        return {
            name: self.coefficients[name] * torch.stack([term(layer) for layer in logits]).sum()
            for name, term in terms.items()
        }
