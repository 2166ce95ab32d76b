"""INT8 layers from an encoder and a few hundred texts, without training.

What costs accuracy, and what is done about it, in the order of the computation:

* Channels of very different size share one scale. Inputs are divided by s_j = max|x_j|^a / max|w_j|^(1-a), and the
  weights multiplied by it (SmoothQuant, Xiao et al. 2022, arXiv:2211.10438, equation 4). `a` is searched for each group
  of layers that share their inputs.
* Channels that are never around zero. Each is shifted by its mean (Outlier Suppression+, Wei et al. 2023,
  arXiv:2304.09145), so that a constant zero point in the middle serves all.
* Inputs that are lopsided, like those after a GELU: another constant zero point, searched, too.
* Weights: rounded with a look at what they are multiplied with (GPTQ).

Division and shift cost nothing where the inputs come from a layer normalisation, whose weights take them in, or are an
attention's averages of values: there the value layer does. All other inputs stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distillabse.errors import InputError
from distillabse.quantization.linears import CENTRE, LEVELS, QuantizedLinear, fake_quantized, on_cpu, token_scales
from distillabse.quantization.rounding import round_to_nearest, round_with_inputs, weight_scales
from distillabse.quantization.statistics import InputStatistics, input_statistics, linear_layers

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import nn

EXPONENTS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
ZERO_POINTS = (8, 12, 16, 24, 32, 64, CENTRE)
# What is left of the error of rounding to the nearest after GPTQ.
_LEFT_BY_GPTQ = 1 / 3
_SMALLEST = 1e-5
_ANY_SCALE = 0.05
_RANGES = 12
# transformers' name for BERT, RoBERTa, XLM-R and ELECTRA alike: the output layer's inputs are averages of values.
_CONTEXT, _VALUE = "attention.output.dense", "attention.self.value"


@torch.no_grad()
def calibrate(
    encoder: SentenceTransformer, texts: Sequence[str], *, static: bool = False, largest: int = 127
) -> dict[str, QuantizedLinear]:
    """INT8 form of every linear layer of the transformer.

    Args:
        encoder: what to quantise; not changed.
        texts: a few hundred, like those that will be encoded, and never those it is judged on.
        static: give all inputs of a layer one scale instead of one for each token.
        largest: greatest weight, 63 for CPUs whose 8-bit products saturate.

    Returns:
        The layers by their names in the transformer.

    Raises:
        InputError: there are no texts.
    """
    if not texts:
        raise InputError("There are no texts to calibrate INT8 on. Give a few hundred of those that will be encoded.")
    layers = linear_layers(encoder)
    done: dict[str, QuantizedLinear] = {}
    for group in input_statistics(encoder, texts):
        of_group = [layers[name] for name in group.names]
        value = _value_layer(group, done)
        movable = group.normalised or value is not None
        shift = group.mean if movable else None
        smoothing = _smoothing(group, of_group, shift, static, largest) if movable else None
        inputs = _moved(group.sample(), shift, smoothing)
        zero_point = CENTRE if movable else _zero_point(inputs)
        scale, least = None, 0.0
        if static:
            scale, zero_point = static_range(inputs)
        elif zero_point != CENTRE:
            least = float(-inputs.min().clamp(max=0)) / zero_point
        moments = group.moments_of(shift, smoothing)
        for name, layer in zip(group.names, of_group, strict=True):
            weight = layer.weight.float() if smoothing is None else layer.weight.float() * smoothing
            weight_scale = weight_scales(weight, largest)
            bias = _bias(layer)
            done[name] = QuantizedLinear(
                weight=round_with_inputs(weight, weight_scale, moments, largest),
                scale=weight_scale,
                bias=bias if shift is None else bias + layer.weight.float() @ shift,
                zero_point=zero_point,
                least_scale=least,
                input_scale=scale,
                smoothing=None if value is not None else smoothing,
                shift=None if value is not None else shift,
            )
        if value is not None and shift is not None:
            done[value] = _moved_outputs(done[value], shift, smoothing)
    return {name: on_cpu(linear) for name, linear in done.items()}


@torch.no_grad()
def rounded(encoder: SentenceTransformer, largest: int = 127, *, static: bool = False) -> dict[str, QuantizedLinear]:
    """INT8 form of every linear layer without any texts: weights to the nearest, inputs as they are.

    As fast as a calibrated one, and less exact, with `static` not exact at all: for measuring speed.
    """
    done = {}
    for name, layer in linear_layers(encoder).items():
        weight = layer.weight.float()
        scale = weight_scales(weight, largest)
        linear = QuantizedLinear(round_to_nearest(weight, scale, largest), scale, _bias(layer))
        done[name] = on_cpu(replace(linear, input_scale=_ANY_SCALE) if static else linear)
    return done


def smoothing_vector(inputs: Tensor, weights: Tensor, exponent: float) -> Tensor:
    """SmoothQuant's s_j = max|x_j|^a / max|w_j|^(1-a), float32 [inputs].

    Args:
        inputs: greatest magnitudes of the input channels, [inputs].
        weights: greatest magnitudes of their weights over all layers that share the inputs, [inputs].
        exponent: a, between 0 and 1; the greater, the more of the difficulty goes into the weights.
    """
    return inputs.clamp(min=_SMALLEST) ** exponent / weights.clamp(min=_SMALLEST) ** (1 - exponent)


def static_range(inputs: Tensor) -> tuple[float, int]:
    """Scale and zero point with the least squared error on inputs [tokens, inputs], cutting off what is rare."""
    low, high = float(inputs.min().clamp(max=0)), float(inputs.max().clamp(min=0))
    best: tuple[float, float, int] | None = None
    for part_low in torch.linspace(0.3, 1, _RANGES).tolist():
        for part_high in torch.linspace(0.3, 1, _RANGES).tolist():
            scale = max((part_high * high - part_low * low) / LEVELS, _SMALLEST)
            zero_point = round(-part_low * low / scale)
            error = float((fake_quantized(inputs, torch.tensor(scale), zero_point) - inputs).square().mean())
            if best is None or error < best[0]:
                best = error, scale, zero_point
    assert best is not None
    return best[1], best[2]


def _smoothing(
    group: InputStatistics, layers: Sequence[nn.Linear], shift: Tensor | None, static: bool, largest: int
) -> Tensor:
    """The vector, of those with an exponent of EXPONENTS, with which the layers' outputs change least."""
    weight = torch.cat([layer.weight.float() for layer in layers])
    moved = _moved(group.sample(), shift, None)
    centre = 0 if shift is None else shift
    reach = torch.maximum(group.high - centre, centre - group.low)
    # A rare outlier sets the greatest magnitude, and says little of the rest: the spread is tried, too.
    magnitudes = (reach, moved.std(dim=0))
    best: tuple[float, Tensor] | None = None
    for magnitude, exponent in product(magnitudes, EXPONENTS):
        vector = smoothing_vector(magnitude, weight.abs().amax(dim=0), exponent)
        inputs, smoothed = moved / vector, weight * vector
        scale, zero_point = static_range(inputs) if static else (None, CENTRE)
        scales = token_scales(inputs, CENTRE) if scale is None else torch.tensor(scale)
        of_inputs = (fake_quantized(inputs, scales, zero_point) - inputs) @ smoothed.T
        weight_scale = weight_scales(smoothed, largest)
        of_weights = inputs @ (round_to_nearest(smoothed, weight_scale, largest) * weight_scale[:, None] - smoothed).T
        error = float(of_inputs.square().mean() + _LEFT_BY_GPTQ * of_weights.square().mean())
        if best is None or error < best[0]:
            best = error, vector
    assert best is not None
    return best[1]


def _zero_point(inputs: Tensor) -> int:
    """The constant zero point with the least squared error, where every token has its own scale."""
    low = float(-inputs.min().clamp(max=0))

    def error(zero_point: int) -> float:
        scales = token_scales(inputs, zero_point, 0.0 if zero_point == CENTRE else low / zero_point)
        return float((fake_quantized(inputs, scales, zero_point) - inputs).square().mean())

    return min(ZERO_POINTS, key=error)


def _value_layer(group: InputStatistics, done: dict[str, QuantizedLinear]) -> str | None:
    """The layer whose outputs an attention averages into the inputs of this group."""
    if len(group.names) != 1 or not group.names[0].endswith(_CONTEXT):
        return None
    name = group.names[0].removesuffix(_CONTEXT) + _VALUE
    return name if name in done else None


def _moved_outputs(linear: QuantizedLinear, shift: Tensor, smoothing: Tensor | None) -> QuantizedLinear:
    """The layer whose outputs are (y - shift) / smoothing."""
    divisor = torch.ones_like(shift) if smoothing is None else smoothing
    return replace(linear, scale=linear.scale / divisor, bias=(linear.bias - shift) / divisor)


def _bias(layer: nn.Linear) -> Tensor:
    return torch.zeros_like(layer.weight[:, 0]).float() if layer.bias is None else layer.bias.float()


def _moved(inputs: Tensor, shift: Tensor | None, smoothing: Tensor | None) -> Tensor:
    moved = inputs if shift is None else inputs - shift
    return moved if smoothing is None else moved / smoothing
