"""Weights on a grid of int8 values."""

from __future__ import annotations

import torch
from torch import Tensor

_SMALLEST = 1e-12
_BLOCK = 128


def weight_scales(weight: Tensor, largest: int = 127) -> Tensor:
    """One scale for each output, with which its greatest weight is `largest`: float32 [outputs]."""
    return weight.abs().amax(dim=1).clamp(min=_SMALLEST) / largest


def round_to_nearest(weight: Tensor, scale: Tensor, largest: int = 127) -> Tensor:
    """int8 [outputs, inputs], each weight by itself."""
    return torch.clamp(torch.round(weight / scale[:, None]), -largest, largest).to(torch.int8)


def round_with_inputs(
    weight: Tensor, scale: Tensor, moments: Tensor, largest: int = 127, damping: float = 0.01
) -> Tensor:
    """Round so that the products with the inputs change least: GPTQ (Frantar et al. 2022, arXiv:2210.17323).

    Inputs are rounded one after the other, those with the greatest second moment first; what rounding one of them
    changes in the products is made up for by those that are still to come (equations 2 and 3, by blocks as in 3.3).

    Args:
        weight: float [outputs, inputs].
        scale: float [outputs].
        moments: float [inputs, inputs], sum of x x^T over tokens.
        largest: greatest integer.
        damping: this part of the mean of the diagonal is added to it.

    Returns:
        int8 [outputs, inputs].
    """
    order = torch.argsort(moments.diagonal(), descending=True)
    hessian = moments[order][:, order].double()
    hessian.diagonal().add_(damping * hessian.diagonal().mean().clamp(min=_SMALLEST))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    # Every column is read as a whole: rows of the transposed matrix lie together in memory.
    remaining = weight[:, order].float().T.contiguous()
    rounded = torch.empty_like(remaining)
    for start in range(0, len(remaining), _BLOCK):
        end = min(start + _BLOCK, len(remaining))
        errors = torch.empty_like(remaining[start:end])
        for index in range(start, end):
            rounded[index] = torch.clamp(torch.round(remaining[index] / scale), -largest, largest)
            error = (remaining[index] - rounded[index] * scale) / factor[index, index]
            remaining[index:end] -= torch.outer(factor[index, index:end], error)
            errors[index - start] = error
        remaining[end:] -= factor[start:end, end:].T @ errors
    result = torch.empty_like(rounded)
    result[order] = rounded
    return result.T.to(torch.int8).contiguous()
