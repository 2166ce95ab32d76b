"""Experts made from a dense student's feed-forward blocks.

Sparse upcycling (Komatsuzaki et al. 2022, arXiv:2212.05055): each expert starts as a copy of the dense block, and only
the router is new. Its probabilities are far below 1 at first, about one over the number of experts, so the experts'
outputs are scaled by the reciprocal of their mean: the student starts as the dense one, not with its blocks faded out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distillabse.models.initialisation import sampled_states, strongest_neurons
from distillabse.models.switch import Experts, SwitchConfig, SwitchStudent, route
from distillabse.models.taps import encoder_layers

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from distillabse.config import SwitchStudentConfig


@torch.no_grad()
def upcycled(dense: Any, student: SwitchStudentConfig, counts: NDArray[np.int64] | None = None) -> SwitchStudent:
    """A Switch student with the weights of a dense one; with random initialisation its experts are new.

    Args:
        dense: BertModel or ElectraModel; not changed.
        student: experts, sparse layers, noise.
        counts: how often the corpus uses each row of the vocabulary, int64 [rows]; for the scale of the experts.
    """
    switch: SwitchStudent = SwitchStudent(_switch_config(dense, student)).to(dense.device)
    own = switch.state_dict()
    switch.load_state_dict({**own, **{name: value for name, value in dense.state_dict().items() if name in own}})
    if student.initialisation == "teacher":
        attended = sampled_states(dense, counts).after_attention
        for index in student.sparse_layer_indices:
            layer: Any = switch.encoder.layer[index]
            tokens = attended[index].flatten(0, 1)
            router = layer.feed_forward.router.eval()
            router.weight.copy_(_without_direction(router.weight, tokens.mean(dim=0)))
            gate = route(router(tokens)).gate.mean()
            _start_from(encoder_layers(dense)[index], layer.feed_forward.experts, student.expert_noise, gate)
    switch.train(dense.training)
    return switch


def _switch_config(dense: Any, student: SwitchStudentConfig) -> SwitchConfig:
    inherited = {
        name: getattr(dense.config, name)
        for name in (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
            "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "type_vocab_size",
            "layer_norm_eps", "pad_token_id",
        )
    }  # fmt: skip
    return SwitchConfig(
        **inherited,
        embedding_size=dense.embeddings.word_embeddings.embedding_dim,
        sparse_layers=student.sparse_layer_indices,
        num_experts=student.experts,
        expert_size=student.expert_size or dense.config.intermediate_size,
        capacity_factor=student.capacity_factor,
        router_jitter=student.router_jitter,
        expert_dropout=student.expert_dropout,
    )


def _without_direction(rows: Tensor, direction: Tensor) -> Tensor:
    """Rows at right angles to `direction`: what all token states share must not send them all to one expert."""
    unit = direction / direction.norm()
    rest: Tensor = rows - (rows @ unit)[:, None] * unit
    return rest


def _start_from(source: Any, experts: Experts, noise: float, gate: Tensor) -> None:
    """Every expert takes the strongest neurons of a dense layer's block, as many as it is wide, each with its noise."""
    inner, outer = source.intermediate.dense, source.output.dense
    kept = strongest_neurons(inner.weight, outer.weight, experts.inner_weight.shape[2])
    for target, value in (
        (experts.inner_weight, inner.weight[kept].T),
        (experts.inner_bias, inner.bias[kept]),
        (experts.outer_weight, outer.weight[:, kept].T / gate),
        (experts.outer_bias, outer.bias / gate),
    ):
        target.copy_(value + noise * value.std() * torch.randn_like(target))
