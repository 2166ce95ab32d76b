"""Rows of all processes, for losses that compare the sentences of a batch with each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def gathered(rows: Tensor) -> Tensor:
    """The rows of all processes, one process after another; as they are where there is one process.

    All processes must call it together and with the same shape. Each may then compute the loss of the whole batch:
    gradients flow back to the process that a row came from, summed over the losses of all processes, so that their
    average, which data parallel training takes, is the gradient that one process with all rows would have.

    Args:
        rows: [rows, width].
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    every: Tensor = _Gather.apply(rows)  # type: ignore[no-untyped-call]
    return every


class _Gather(torch.autograd.Function):
    """all_gather with a gradient; that of torch.distributed.nn is deprecated."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]
