"""Experts made from a teacher's feed-forward block (sparse upcycling, Komatsuzaki et al. 2022, arXiv:2212.05055).

Where an expert is as wide as the block, it starts as a copy of it. Where it is narrower, it takes the neurons that its
own tokens need (MoEfication, Zhang et al. 2022, arXiv:2110.01786): the token states are clustered, the router's rows
are the centres of the clusters, and each expert keeps the neurons that vary most on its cluster. The router's
probabilities are well below 1 at first, so the experts' outputs are scaled by the reciprocal of their mean: the student
starts with the whole of its blocks, not with faded ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distillabse.models.switch import SwitchFeedForward, SwitchLayer

# Of the router's rows at the start: decisive enough for clusters to survive the first steps, far from saturation.
ROUTER_LENGTH = 2.0
# A smaller cluster says too little about neurons.
_FEWEST_TOKENS = 64


class FeedForward(NamedTuple):
    """One block: inner weight [neurons, width] and bias [neurons], activation, outer [width, neurons] and [width]."""

    inner_weight: Tensor
    inner_bias: Tensor
    outer_weight: Tensor
    outer_bias: Tensor
    activation: Callable[[Tensor], Tensor]

    def projected(self, basis: Tensor) -> FeedForward:
        """The same block on states @ basis, for a basis [width, narrower width]."""
        return self._replace(
            inner_weight=self.inner_weight @ basis,
            outer_weight=basis.T @ self.outer_weight,
            outer_bias=self.outer_bias @ basis,
        )

    def neurons(self, states: Tensor) -> Tensor:
        """[tokens, width] -> [tokens, neurons], after the activation."""
        return self.activation(nn.functional.linear(states, self.inner_weight, self.inner_bias))

    def output(self, states: Tensor) -> Tensor:
        """[tokens, width] -> [tokens, width]."""
        return nn.functional.linear(self.neurons(states), self.outer_weight, self.outer_bias)

    def narrowed(self, neurons: Tensor, size: int) -> FeedForward:
        """The `size` neurons whose output varies most; the mean output of the others goes into the bias.

        Args:
            neurons: their values on a sample of tokens, [tokens, neurons].
            size: how many to keep, in their order; all where there are no more.
        """
        strength = neurons.std(dim=0) * self.outer_weight.norm(dim=0)
        kept = strength.topk(min(size, len(strength))).indices.sort().values
        mean = neurons.mean(dim=0)
        mean[kept] = 0.0
        return self._replace(
            inner_weight=self.inner_weight[kept],
            inner_bias=self.inner_bias[kept],
            outer_weight=self.outer_weight[:, kept],
            outer_bias=self.outer_bias + self.outer_weight @ mean,
        )


@torch.no_grad()
def start_experts(block: SwitchFeedForward, source: FeedForward, states: Tensor, noise: float) -> None:
    """Give a block's router and experts their first weights.

    Args:
        block: what to fill, in evaluation mode.
        source: the dense block, as wide outside as `block`.
        states: what goes into the block, on a sample of tokens, [tokens, width].
        noise: Gaussian, in standard deviations of each weight, so that equal experts grow apart.
    """
    experts = block.experts
    count, _, size = experts.inner_weight.shape
    block.router.weight.copy_(ROUTER_LENGTH * cluster_directions(states, count))
    gates, chosen = block.router(states).softmax(dim=-1).max(dim=-1)
    gate = gates.mean()
    neurons = source.neurons(states)
    for index in range(count):
        mine = chosen == index
        narrow = source.narrowed(neurons[mine] if mine.sum() >= _FEWEST_TOKENS else neurons, size)
        for target, value in (
            (experts.inner_weight[index], narrow.inner_weight.T),
            (experts.inner_bias[index], narrow.inner_bias),
            (experts.outer_weight[index], narrow.outer_weight.T / gate),
            (experts.outer_bias[index], narrow.outer_bias / gate),
        ):
            target.copy_(value + noise * value.std() * torch.randn_like(value))


def cluster_directions(states: Tensor, count: int) -> Tensor:
    """Unit vectors [count, width] to the clusters of token states [tokens, width] (k-means of their directions).

    They stand at right angles to the mean state: what all tokens share must not send them all to one expert.
    """
    from sklearn.cluster import KMeans

    mean = nn.functional.normalize(states.mean(dim=0), dim=0)
    unit = nn.functional.normalize(states - (states @ mean)[:, None] * mean, dim=1)
    centres = KMeans(count, random_state=0).fit(unit.cpu().numpy()).cluster_centers_
    return nn.functional.normalize(torch.from_numpy(centres).to(states), dim=1)


def dense_block(layer: SwitchLayer, attended: Tensor) -> FeedForward:
    """The dense block, as wide as one expert, that comes closest to what the experts do on a sample.

    It is their average, which is right where they are near copies of each other, or the neurons among all of theirs
    that vary most, which is right where they are not.

    Args:
        layer: the sparse layer.
        attended: what goes into its experts, [tokens, hidden size].
    """
    experts = layer.feed_forward.experts
    logits = layer.feed_forward.router(attended)
    chosen = nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[1]).float()
    share, gate = chosen.mean(dim=0), (chosen * logits.softmax(dim=-1)).mean(dim=0)
    gated = gate[:, None, None] * experts.outer_weight
    average = FeedForward(
        torch.einsum("e,ehi->ih", share, experts.inner_weight),
        torch.einsum("e,ei->i", share, experts.inner_bias),
        gated.sum(dim=0).T,
        gate @ experts.outer_bias,
        experts.activation,
    )
    union = average._replace(
        inner_weight=experts.inner_weight.transpose(1, 2).flatten(0, 1),
        inner_bias=experts.inner_bias.flatten(),
        outer_weight=gated.flatten(0, 1).T,
    )
    selected = union.narrowed(union.neurons(attended), len(average.inner_bias))
    wanted = layer.feed_forward(attended[None], torch.ones_like(attended[None, :, 0], dtype=torch.bool))[0]
    return min((average, selected), key=lambda block: float((block.output(attended) - wanted).square().mean()))
