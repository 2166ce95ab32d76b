"""One linear layer in INT8, whatever graph it ends up in.

With a zero point z, a scale t of the inputs and one scale w_n for each output n:

    q = clip(round(((x - shift) / smoothing) / t) + z, 0, 255)             uint8
    y_n = t * w_n * sum_k (q_k - z) * weight_nk + bias_n                   weight int8

`t` is a constant (`input_scale`), or, where that is None, a number for each token (`token_scales`). A constant zero
point costs nothing in an integer product; one for each token would cost two more passes over the outputs. `shift` and
`smoothing` cost nothing where a layer normalisation makes the inputs: they go into its weights.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

CENTRE = 128
LEVELS = 255


@dataclass(frozen=True)
class QuantizedLinear:
    """A linear layer in INT8.

    Attributes:
        weight: int8 [outputs, inputs].
        scale: float32 [outputs].
        bias: float32 [outputs]; what `shift` takes away is in it.
        zero_point: of the inputs, 0 to 255.
        least_scale: of the inputs, where every token has its own; float.
        input_scale: of all inputs, or None where every token has its own.
        smoothing, shift: float32 [inputs], or None for ones and zeros.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor
    zero_point: int = CENTRE
    least_scale: float = 0.0
    input_scale: float | None = None
    smoothing: Tensor | None = None
    shift: Tensor | None = None

    def moved(self, inputs: Tensor) -> Tensor:
        """Inputs [..., inputs] shifted and smoothed."""
        moved = inputs if self.shift is None else inputs - self.shift
        return moved if self.smoothing is None else moved / self.smoothing

    def quantized_inputs(self, inputs: Tensor) -> Tensor:
        """What the integer product sees of inputs [..., inputs], as float32 again, still shifted and smoothed."""
        moved = self.moved(inputs)
        if self.input_scale is not None:
            return fake_quantized(moved, torch.tensor(self.input_scale), self.zero_point)
        return fake_quantized(moved, token_scales(moved, self.zero_point, self.least_scale), self.zero_point)

    def __call__(self, inputs: Tensor) -> Tensor:
        """float32 [..., inputs] -> float32 [..., outputs], as an INT8 graph computes it."""
        weight = self.weight.float() * self.scale[:, None]
        return torch.nn.functional.linear(self.quantized_inputs(inputs), weight, self.bias)


def moved_to(linear: QuantizedLinear, device: torch.device) -> QuantizedLinear:
    """The same layer with its tensors on a device."""
    tensors = {name: value.detach().to(device) for name, value in vars(linear).items() if isinstance(value, Tensor)}
    return replace(linear, **tensors)  # type: ignore[arg-type]


def on_cpu(linear: QuantizedLinear) -> QuantizedLinear:
    """The same layer with its tensors on the CPU."""
    return moved_to(linear, torch.device("cpu"))


def token_scales(inputs: Tensor, zero_point: int, least_scale: float = 0.0) -> Tensor:
    """A scale for each row, float [..., 1]: its greatest value fits, and for z = 128 its least, too.

    Any other zero point is for inputs of which the least value is known: `least_scale` makes it fit.
    """
    scales = inputs.amax(dim=-1, keepdim=True) / (LEVELS - zero_point)
    if zero_point == CENTRE:
        scales = inputs.abs().amax(dim=-1, keepdim=True) / (LEVELS - zero_point)
    return scales.clamp(min=max(least_scale, torch.finfo(torch.float32).tiny))


def fake_quantized(inputs: Tensor, scale: Tensor, zero_point: int) -> Tensor:
    """Inputs rounded to the 256 values that uint8 has with this scale and zero point."""
    return (torch.clamp(torch.round(inputs / scale) + zero_point, 0, LEVELS) - zero_point) * scale


def save_quantized_linears(linears: dict[str, QuantizedLinear], path: Path) -> None:
    """Write layers by name into one safetensors file."""
    from safetensors.torch import save_file

    tensors = {}
    for name, linear in linears.items():
        for field in fields(linear):
            if (value := getattr(linear, field.name)) is not None:
                tensor = value if isinstance(value, Tensor) else torch.tensor(value)
                tensors[f"{name}:{field.name}"] = tensor.clone()  # layers may share one
    save_file(tensors, path)


def load_quantized_linears(path: Path) -> dict[str, QuantizedLinear]:
    """What `save_quantized_linears` wrote."""
    from safetensors.torch import load_file

    values: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(path).items():
        name, _, field = key.rpartition(":")
        values.setdefault(name, {})[field] = tensor
    return {
        name: QuantizedLinear(**{key: value if value.dim() else value.item() for key, value in parts.items()})  # type: ignore[arg-type]
        for name, parts in values.items()
    }
