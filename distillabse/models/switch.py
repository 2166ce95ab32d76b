"""The Switch student: an encoder whose feed-forward blocks are experts, of which every token uses one.

Switch Transformers (Fedus et al. 2021, arXiv:2101.03961): p(x) = softmax(W_r x), y = p_i(x) E_i(x) with i the largest
(equations 1 and 2). The number of experts changes how much the model holds, not how much it computes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, ElectraConfig, ElectraModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.models.electra.modeling_electra import ElectraLayer

MODEL_TYPE = "distillabse_switch"
INITIAL_SCALE = 0.1


class SwitchConfig(ElectraConfig):
    """ElectraConfig and what its sparse layers are.

    Attributes:
        sparse_layers: layers with experts, counted from 0; the others have one feed-forward block.
        num_experts: experts of a sparse layer.
        expert_size: width inside an expert.
        capacity_factor: in training an expert takes at most this times (tokens / experts) tokens of a batch.
        router_jitter: in training the router's input is multiplied by 1 + U(-jitter, jitter).
        expert_dropout: dropout inside an expert.
    """

    model_type = MODEL_TYPE

    sparse_layers: list[int] | tuple[int, ...] = ()
    num_experts: int = 8
    expert_size: int = 1024
    capacity_factor: float = 1.25
    router_jitter: float = 0.01
    expert_dropout: float = 0.0


@dataclass(frozen=True)
class Routing:
    """Where the real tokens of a batch go.

    Attributes:
        order: int64 [tokens], the tokens sorted by expert, in their own order within each.
        counts: int64 [experts], how many each expert gets.
        gate: float32 [tokens], the router's probability of the chosen expert, by token (not sorted).
    """

    order: Tensor
    counts: Tensor
    gate: Tensor


class Router(nn.Module):
    """Logits of the experts, always in float32: in bfloat16 training diverges (section 2.4, selective precision)."""

    def __init__(self, hidden_size: int, experts: int, jitter: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden_size))
        self.jitter = jitter

    def forward(self, tokens: Tensor) -> Tensor:
        """[tokens, hidden size] -> float32 [tokens, experts]."""
        with torch.autocast(tokens.device.type, enabled=False):
            tokens = tokens.float()
            if self.training and self.jitter:
                tokens = tokens * torch.empty_like(tokens).uniform_(1 - self.jitter, 1 + self.jitter)
            return nn.functional.linear(tokens, self.weight.float())


def route(logits: Tensor) -> Routing:
    """Each token to its most probable expert; logits float32 [tokens, experts]."""
    gate, expert = logits.softmax(dim=-1).max(dim=-1)
    order = expert.argsort(stable=True)
    return Routing(order, torch.bincount(expert, minlength=logits.shape[1]), gate)


class Experts(nn.Module):
    """Feed-forward blocks side by side: E_i(x) = act(x W_i + b_i) V_i + c_i.

    Stacked parameters, not a list of modules: every expert gets a gradient in every step, if a zero one, so that no
    process of a sharded job can disagree with another about which parameters took part.
    """

    def __init__(self, experts: int, hidden_size: int, expert_size: int, activation: str, dropout: float) -> None:
        super().__init__()
        self.inner_weight = nn.Parameter(torch.empty(experts, hidden_size, expert_size))
        self.inner_bias = nn.Parameter(torch.empty(experts, expert_size))
        self.outer_weight = nn.Parameter(torch.empty(experts, expert_size, hidden_size))
        self.outer_bias = nn.Parameter(torch.empty(experts, hidden_size))
        self.activation = ACT2FN[activation]
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """What each expert makes of its tokens; ZeRO 3 gathers parameters only for a module that is called.

        Args:
            tokens: [experts, slots, hidden size], one batched product for all experts; or, with `counts`,
                [tokens, hidden size] sorted by expert.
            counts: how many tokens each expert gets; idle experts cost nothing.

        Returns:
            Shape of `tokens`.
        """
        if counts is not None:
            parts = torch.split(tokens, list(counts))
            return torch.cat([self.one(index, part) for index, part in enumerate(parts)])
        inner = self.activation(torch.baddbmm(self.inner_bias[:, None], tokens, self.inner_weight))
        return torch.baddbmm(self.outer_bias[:, None], self.dropout(inner), self.outer_weight)

    def one(self, index: int, tokens: Tensor) -> Tensor:
        """One expert: [tokens, hidden size] -> the same shape."""
        inner = self.activation(torch.addmm(self.inner_bias[index], tokens, self.inner_weight[index]))
        return torch.addmm(self.outer_bias[index], self.dropout(inner), self.outer_weight[index])


class SwitchFeedForward(nn.Module):
    """Top-1 routing of real tokens to experts.

    In training an expert has a capacity, and tokens over it get no expert: the residual connection carries them on. In
    evaluation nothing is dropped, so what a token gets never depends on its neighbours.
    """

    def __init__(self, config: SwitchConfig) -> None:
        super().__init__()
        self.router = Router(config.hidden_size, config.num_experts, config.router_jitter)
        self.experts = Experts(
            config.num_experts, config.hidden_size, config.expert_size, config.hidden_act, config.expert_dropout
        )
        self.capacity_factor = config.capacity_factor
        self.health = RouterHealth()

    def forward(self, states: Tensor, real_tokens: Tensor) -> Tensor:
        """What the experts add to the residual.

        Args:
            states: [batch, tokens, hidden size].
            real_tokens: bool [batch, tokens]; the others are not routed.

        Returns:
            Shape and dtype of `states`; zero for padding and for tokens over an expert's capacity.
        """
        flat = states.flatten(0, 1)
        positions = real_tokens.flatten().nonzero()[:, 0]
        tokens = flat[positions]
        logits = self.router(tokens)
        routing = route(logits)
        if self.training:
            kept, output = self._with_capacity(tokens, routing)
            self.health.record(logits.detach(), routing.counts, len(tokens) - len(kept))
        else:
            kept, output = routing.order, self.experts(tokens[routing.order], routing.counts.tolist())
        output = (output * routing.gate[kept, None]).to(states.dtype)
        return torch.zeros_like(flat).index_copy(0, positions[kept], output).view_as(states)

    def _with_capacity(self, tokens: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """The tokens that found a place, sorted by expert, and what their experts make of them."""
        experts = len(routing.counts)
        capacity = max(1, math.ceil(self.capacity_factor * len(tokens) / experts))
        slots = min(capacity, int(routing.counts.max()))
        expert = torch.repeat_interleave(torch.arange(experts, device=tokens.device), routing.counts)
        place = torch.arange(len(tokens), device=tokens.device) - (routing.counts.cumsum(0) - routing.counts)[expert]
        fits = place < capacity
        kept, slot = routing.order[fits], (expert * slots + place)[fits]
        table = tokens.new_zeros(experts * slots, tokens.shape[1]).index_copy(0, slot, tokens[kept])
        return kept, self.experts(table.view(experts, slots, tokens.shape[1])).flatten(0, 1)[slot]


class RouterHealth:
    """What a layer's router did since the last `read`, summed on the device."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    @torch.no_grad()
    def record(self, logits: Tensor, counts: Tensor, dropped: int) -> None:
        """Add one batch: logits [tokens, experts], tokens of each expert, tokens over capacity."""
        entropy = torch.special.entr(logits.softmax(dim=-1)).sum()
        sums = torch.cat([counts.float(), torch.stack([entropy, entropy.new_tensor(float(dropped))])])
        self._sums = sums if self._sums is None else self._sums + sums

    def read(self) -> Tensor | None:
        """Float32 [experts + 2]: tokens of each expert, entropy in nats, dropped tokens; then starts anew."""
        sums, self._sums = self._sums, None
        return sums


class SwitchOutput(nn.Module):
    """Residual connection and layer normalisation."""

    def __init__(self, config: SwitchConfig) -> None:
        super().__init__()
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """[batch, tokens, hidden size] twice -> the same shape."""
        output: Tensor = self.LayerNorm(self.dropout(hidden_states) + input_tensor)
        return output


class SwitchLayer(ElectraLayer):
    """An encoder layer with experts in the place of its feed-forward block."""

    def __init__(self, config: SwitchConfig, layer_idx: int | None = None) -> None:
        super().__init__(config, layer_idx)
        del self.intermediate
        self.feed_forward = SwitchFeedForward(config)
        self.output = SwitchOutput(config)

    def forward(self, hidden_states: Tensor, *args: Any, real_tokens: Tensor, **kwargs: Any) -> Tensor:
        """[batch, tokens, hidden size] -> the same shape; `real_tokens` is bool [batch, tokens]."""
        attended: Tensor = self.attention(hidden_states, *args[:1], **kwargs)[0]
        output: Tensor = self.output(self.feed_forward(attended, real_tokens), attended)
        return output


class SwitchStudent(ElectraModel):
    """ElectraModel with experts in its sparse layers."""

    config_class = SwitchConfig

    def __init__(self, config: SwitchConfig) -> None:
        super().__init__(config)
        for index in config.sparse_layers:
            self.encoder.layer[index] = SwitchLayer(config, index)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As ElectraModel; the attention mask is [batch, tokens] (1: real) or additive [batch, 1, 1, tokens]."""
        if attention_mask is None:
            given = input_ids if input_ids is not None else inputs_embeds
            assert given is not None
            real_tokens = torch.ones(given.shape[:2], dtype=torch.bool, device=given.device)
        elif attention_mask.dim() == 4:
            real_tokens = attention_mask[:, 0, 0] == 0
        else:
            real_tokens = attention_mask.bool()
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            real_tokens=real_tokens,
            **kwargs,
        )

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Router):
            _truncated_normal(module.weight, module.weight.shape[1])
        elif isinstance(module, Experts):
            for weight, bias in ((module.inner_weight, module.inner_bias), (module.outer_weight, module.outer_bias)):
                _truncated_normal(weight, weight.shape[1])
                init.zeros_(bias)


def sparse_layers(model: Any) -> dict[int, SwitchLayer]:
    """The layers of a transformers model that have experts, by index; none in a dense one."""
    layers: Sequence[Any] = getattr(getattr(model, "encoder", None), "layer", ())
    return {index: layer for index, layer in enumerate(layers) if isinstance(layer, SwitchLayer)}


def _truncated_normal(weight: Tensor, inputs: int) -> None:
    """Standard deviation sqrt(s / inputs), s = 0.1, cut at two of them (section 2.4)."""
    deviation = math.sqrt(INITIAL_SCALE / inputs)
    init.trunc_normal_(weight, std=deviation, a=-2 * deviation, b=2 * deviation)


AutoConfig.register(MODEL_TYPE, SwitchConfig)
AutoModel.register(SwitchConfig, SwitchStudent)
