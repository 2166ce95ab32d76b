"""What the linear layers of an encoder are given, on real texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distillabse.models.teacher import transformer_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

BATCH = 16
SAMPLED_TOKENS = 2048


@dataclass
class InputStatistics:
    """The inputs that one or several linear layers share, over all tokens that are not padding.

    Attributes:
        names: the layers, by their names in the transformer.
        normalised: whether a layer normalisation made the inputs.
        tokens: how many were seen.
        total, low, high: float32 [inputs], sum, least and greatest of every channel.
        moments: float32 [inputs, inputs], sum of x x^T.
        rows: float32 [some tokens, inputs], drawn evenly from all.
    """

    names: list[str]
    normalised: bool
    total: Tensor
    low: Tensor
    high: Tensor
    moments: Tensor
    tokens: int = 0
    rows: list[Tensor] = field(default_factory=list)

    def add(self, inputs: Tensor, kept: int) -> None:
        """Take in the inputs [tokens, inputs] of a batch, and keep some of its rows."""
        self.tokens += len(inputs)
        self.total += inputs.sum(dim=0)
        self.low = torch.minimum(self.low, inputs.amin(dim=0))
        self.high = torch.maximum(self.high, inputs.amax(dim=0))
        self.moments += inputs.T @ inputs
        self.rows.append(inputs[torch.linspace(0, len(inputs) - 1, min(kept, len(inputs))).long()].clone())

    @property
    def mean(self) -> Tensor:
        """Mean of every channel, float32 [inputs]."""
        return self.total / self.tokens

    def moments_of(self, shift: Tensor | None, smoothing: Tensor | None) -> Tensor:
        """Sum of x x^T over tokens for x = (inputs - shift) / smoothing, float32 [inputs, inputs]."""
        moments = self.moments
        if shift is not None:
            outer = torch.outer(self.total, shift)
            moments = moments - outer - outer.T + self.tokens * torch.outer(shift, shift)
        return moments if smoothing is None else moments / torch.outer(smoothing, smoothing)

    def sample(self) -> Tensor:
        """The kept rows, float32 [tokens, inputs]."""
        return torch.cat(self.rows)


def linear_layers(encoder: SentenceTransformer) -> dict[str, nn.Linear]:
    """The linear layers of the transformer by name.

    Without routers, whose choices are no matter of precision, and without a pooler, which no sentence vector uses.
    """
    return {
        name: module
        for name, module in transformer_of(encoder).named_modules()
        if isinstance(module, nn.Linear) and not {"router", "pooler"} & set(name.split("."))
    }


@torch.no_grad()
def input_statistics(encoder: SentenceTransformer, texts: Sequence[str]) -> list[InputStatistics]:
    """Run `texts` through the encoder, and gather what its linear layers are given.

    Layers that are given the same tensor, like query, key and value, are one group; groups come as they are computed.
    """
    texts = sorted(texts, key=len)
    kept = max(1, SAMPLED_TOKENS * BATCH // max(len(texts), BATCH))
    groups: dict[str, InputStatistics] = {}
    encoder.eval()
    for start in range(0, len(texts), BATCH):
        features = encoder.preprocess(texts[start : start + BATCH])
        features = {name: value.to(encoder.device) for name, value in features.items() if isinstance(value, Tensor)}
        mask = features["attention_mask"].bool()
        with _observed(encoder) as seen:
            encoder(features)
        for inputs, names, normalised in seen:
            rows = inputs[mask].float() if inputs.shape[:-1] == mask.shape else inputs.reshape(-1, inputs.shape[-1])
            if names[0] not in groups:
                width = rows.shape[1]
                zeros = torch.zeros(width, device=rows.device)
                moments = torch.zeros(width, width, device=rows.device)
                groups[names[0]] = InputStatistics(names, normalised, zeros, zeros.clone(), zeros.clone(), moments)
            groups[names[0]].add(rows, kept)
    return list(groups.values())


def shared_inputs(encoder: SentenceTransformer) -> list[list[str]]:
    """Names of the linear layers in the groups that are given the same tensor, as they are computed."""
    return [group.names for group in input_statistics(encoder, ["text"])]


@contextmanager
def _observed(encoder: SentenceTransformer) -> Iterator[list[tuple[Tensor, list[str], bool]]]:
    """While open, every different input of linear layers is listed: the tensor, the layers, and if it is normalised."""
    seen: list[tuple[Tensor, list[str], bool]] = []
    normalised: list[Tensor] = []

    def watch(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(_: nn.Module, arguments: Any) -> None:
            inputs = arguments[0]
            for other, names, _normalised in seen:
                if other is inputs:
                    names.append(name)
                    return
            seen.append((inputs, [name], any(inputs is output for output in normalised)))

        return hook

    def note(_: nn.Module, __: Any, output: Tensor) -> None:
        normalised.append(output)

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in linear_layers(encoder).items()]
    for module in transformer_of(encoder).modules():
        if isinstance(module, nn.LayerNorm):
            hooks.append(module.register_forward_hook(note))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
