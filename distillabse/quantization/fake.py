"""Fake quantisation for training: an encoder computes as its INT8 graph will, and the scales are learnt with it.

Weights and inputs of every linear layer are rounded to their grids in the forward pass. Gradients pass the rounding as
if it were not there, and the scales have gradients of their own: learned step size quantisation (LSQ, Esser et al.
2020, arXiv:1902.08153). Zero points, shifts and smoothings stay as they were calibrated.

The encoder's modules stay what they are: only while `FakeQuantization.attached` is open do its linear layers compute in
another way. So it is saved, copied and sharded like any other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, autocast, nn

from distillabse.errors import ConfigurationError
from distillabse.quantization.linears import LEVELS, QuantizedLinear, moved_to, on_cpu
from distillabse.quantization.rounding import round_to_nearest
from distillabse.quantization.statistics import linear_layers

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# A scale is its start times e^(rate * offset), and the offset is what is learnt: so it stays positive, and Adam, whose
# steps are about as long as the learning rate, changes it by this many times that part of itself.
SCALE_RATE = 30.0


class _LearnedStep(torch.autograd.Function):
    """LSQ's quantiser, equations 1, 2, 3 and 5; `scale` has as many dimensions as `values` or one element."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        steps = values / scale
        ctx.save_for_backward(steps, scale)
        ctx.limits = low, high
        return steps.round().clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,) = gradients
        steps, scale = ctx.saved_tensors
        low, high = ctx.limits
        whole = steps.round().clamp_(low, high)
        inside = (steps > low) & (steps < high)
        of_scale = gradient * torch.where(inside, whole - steps, whole)
        factor = 1 / math.sqrt(steps.numel() / scale.numel() * high)
        return gradient * inside, factor * of_scale.sum_to_size(scale.shape), None, None


def learned_step(values: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """Values rounded to whole multiples of `scale`, from `low` to `high` of them, with LSQ's gradients.

    With v = values / scale, and clip and round as above, the gradient of the result is

        with respect to values: 1 where low < v < high, else 0                                    (equation 5)
        with respect to scale:  round(v) - v where low < v < high, else `low` or `high`           (equation 3)

    and that of the scale is multiplied by 1 / sqrt(n * high), n being how many values share it (section 2.2).

    Args:
        values: float32 of any shape.
        scale: float32, positive, one element or broadcast along the last dimension: [..., 1].
        low, high: whole numbers, low <= 0 < high.
    """
    result: Tensor = _LearnedStep.apply(values, scale, low, high)  # type: ignore[no-untyped-call]
    return result


class LearntScale(nn.Module):
    """A positive scale, or many, that is learnt from where it starts."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        # No buffer: DeepSpeed casts those to bf16, and what is computed with must be what is exported.
        self._start = (start.float(),)
        self.offset = nn.Parameter(torch.zeros_like(self._start[0]))

    def forward(self) -> Tensor:
        """The scale now, float32, of the shape that it started with."""
        return self.at(self.offset)

    def at(self, offset: Tensor) -> Tensor:
        """The scale with another offset."""
        return self._start[0].to(offset.device) * torch.exp(SCALE_RATE * offset.float())


class FakeQuantization(nn.Module):
    """The learnt scales of an encoder's linear layers, and how the layers compute with them."""

    def __init__(
        self, linears: Mapping[str, QuantizedLinear], groups: Sequence[Sequence[str]], largest: int = 127
    ) -> None:
        """Start from calibrated layers.

        Args:
            linears: from `calibrate(static=True)`.
            groups: names of layers that share their inputs, and so their scale, as from `shared_inputs`.
            largest: greatest weight, as it was calibrated.

        Raises:
            ConfigurationError: the layers have a scale for each token.
        """
        super().__init__()
        if any(linear.input_scale is None for linear in linears.values()):
            raise ConfigurationError(
                "Only constant scales can be learnt, and these layers have one for each token: calibrate with "
                "static=True (export.quantization.kind: static)."
            )
        self.largest = largest
        self._linears = dict(linears)
        self._weight_of = {name: index for index, name in enumerate(linears)}
        self._input_of = {name: index for index, group in enumerate(groups) for name in group}
        of_weights = [LearntScale(linear.scale[:, None]) for linear in linears.values()]
        of_inputs = [LearntScale(torch.tensor([linears[group[0]].input_scale])) for group in groups]
        self.weights, self.inputs = nn.ModuleList(of_weights), nn.ModuleList(of_inputs)

    @contextmanager
    def attached(self, encoder: SentenceTransformer) -> Iterator[None]:
        """While this is open, the encoder's linear layers compute with rounded weights and inputs."""
        with _forwards(encoder, {name: partial(self, name) for name in self._linears}):
            yield

    def forward(self, name: str, layer: nn.Linear, inputs: Tensor) -> Tensor:
        """What a layer makes of inputs [..., inputs]: float32 [..., outputs].

        In float32 whatever precision training runs in: bf16 has as few bits as what is learnt here.
        """
        if self._linears[name].weight.device != inputs.device:
            self._linears[name] = moved_to(self._linears[name], inputs.device)
        linear = self._linears[name]
        with autocast(inputs.device.type, enabled=False):
            low, high = -linear.zero_point, LEVELS - linear.zero_point
            seen = learned_step(linear.moved(inputs.float()), self.inputs[self._input_of[name]](), low, high)
            weight, bias = _smoothed(layer, linear)
            rounded = learned_step(weight, self.weights[self._weight_of[name]](), -self.largest, self.largest)
            return nn.functional.linear(seen, rounded, bias)

    @torch.no_grad()
    def linears(
        self, encoder: SentenceTransformer, learnt: Mapping[str, Tensor] | None = None
    ) -> dict[str, QuantizedLinear]:
        """The layers as they are now, ready for a graph: they compute what the attached encoder does.

        Args:
            encoder: has the trained weights.
            learnt: this module's state, where it is sharded itself.
        """
        learnt = learnt or self.state_dict()
        layers, done = linear_layers(encoder), {}
        for name, start in self._linears.items():
            of_weight, of_input = f"weights.{self._weight_of[name]}", f"inputs.{self._input_of[name]}"
            device = layers[name].weight.device
            scale = self._learnt_scale(of_weight).at(learnt[f"{of_weight}.offset"].to(device))[:, 0]
            of_inputs = self._learnt_scale(of_input).at(learnt[f"{of_input}.offset"].to(device))
            weight, bias = _smoothed(layers[name], moved_to(start, device))
            made = replace(
                start,
                weight=round_to_nearest(weight, scale, self.largest),
                scale=scale,
                bias=bias,
                input_scale=float(of_inputs),
            )
            done[name] = on_cpu(made)
        return done

    def _learnt_scale(self, name: str) -> LearntScale:
        scale = self.get_submodule(name)
        assert isinstance(scale, LearntScale)
        return scale


@contextmanager
def quantized_forward(encoder: SentenceTransformer, linears: Mapping[str, QuantizedLinear]) -> Iterator[None]:
    """While this is open, the encoder's linear layers compute as `linears` do: as its INT8 graph will."""

    def forward(name: str, layer: nn.Linear, inputs: Tensor) -> Tensor:
        linear = linears[name] if inputs.device.type == "cpu" else moved_to(linears[name], inputs.device)
        return linear(inputs)

    with _forwards(encoder, {name: partial(forward, name) for name in linears}):
        yield


@torch.no_grad()
def take_weights(encoder: SentenceTransformer, linears: Mapping[str, QuantizedLinear]) -> None:
    """Give an encoder's linear layers the weights that `linears` have, as floats and without shift and smoothing.

    Rounded again with their scales they are the same integers: training starts from what calibration found.
    """
    layers = linear_layers(encoder)
    for name, linear in linears.items():
        layer = layers[name]
        weight = linear.weight.float() * linear.scale[:, None]
        if linear.smoothing is not None:
            weight = weight / linear.smoothing
        layer.weight.copy_(weight)
        layer.bias.copy_(linear.bias if linear.shift is None else linear.bias - weight @ linear.shift)


def _smoothed(layer: nn.Linear, linear: QuantizedLinear) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer whose inputs are shifted and smoothed as those of `linear`."""
    weight, bias = layer.weight.float(), layer.bias.float()
    if linear.shift is not None:
        bias = bias + weight @ linear.shift
    return weight if linear.smoothing is None else weight * linear.smoothing, bias


@contextmanager
def _forwards(encoder: SentenceTransformer, computations: Mapping[str, Any]) -> Iterator[None]:
    """While this is open, `computations[name](layer, inputs)` stands for what a linear layer of that name computes.

    Hooks of the layers, such as those that read them or gather their weights, run as ever.
    """
    layers = linear_layers(encoder)
    changed = [(layers[name], layers[name].__dict__.get("forward")) for name in computations]
    for name, compute in computations.items():
        layers[name].forward = partial(compute, layers[name])  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer, earlier in changed:
            del layer.forward
            if earlier is not None:
                layer.forward = earlier  # type: ignore[method-assign]
