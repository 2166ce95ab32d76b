"""What the routers of a Switch student did since the last log, and whether experts are dying."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distillabse.models.switch import sparse_layers

logger = logging.getLogger(__name__)

# Figures under this prefix go to the trackers and the training history, and are too many for a console.
PREFIX = "router/"
_DEAD_SHARE = 0.1


class RouterMonitor:
    """Reads the routers of one student and warns, once for each expert, when one gets next to no tokens."""

    def __init__(self, model: Any) -> None:
        self._layers = sparse_layers(model)
        self._dead: dict[int, set[int]] = {index: set() for index in self._layers}

    def figures(self, summed: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, float]:
        """Figures since the last call, by layer; none for a dense student.

        Args:
            summed: adds a tensor up over the processes of the job.

        Returns:
            For each sparse layer: the load of each expert (its share of the routed tokens), the entropy of these loads
            and the mean entropy of the router's probabilities (both 1 where all experts are alike), and the share of
            tokens that found their expert full.
        """
        found: dict[str, float] = {}
        for index, layer in self._layers.items():
            sums = layer.feed_forward.health.read()
            if sums is not None:
                found.update(self._of_layer(index, summed(sums).cpu()))
        return found

    def _of_layer(self, index: int, sums: Tensor) -> dict[str, float]:
        counts, (entropy, dropped) = sums[:-2], sums[-2:].tolist()
        tokens, largest = float(counts.sum()), math.log(len(counts))
        load = counts / tokens
        self._warn_of_dead(index, load)
        return {
            **{f"{PREFIX}layer_{index}/load_expert_{expert}": share for expert, share in enumerate(load.tolist())},
            f"{PREFIX}layer_{index}/load_entropy": float(torch.special.entr(load).sum()) / largest,
            f"{PREFIX}layer_{index}/router_entropy": entropy / tokens / largest,
            f"{PREFIX}layer_{index}/dropped": dropped / tokens,
        }

    def _warn_of_dead(self, index: int, load: Tensor) -> None:
        dead = {int(expert) for expert in (load < _DEAD_SHARE / len(load)).nonzero()}
        for expert in sorted(dead - self._dead[index]):
            logger.warning(
                "Layer %d, expert %d gets %.2f %% of the tokens, of an even share of %.2f %%: it is dying. Raise "
                "objectives.routing.load_balance or student.router_jitter, or take fewer student.experts.",
                index, expert, 100 * float(load[expert]), 100 / len(load),
            )  # fmt: skip
        self._dead[index] = dead
