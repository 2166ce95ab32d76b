"""Two ways to compose batches of translation pairs that pair_tricks.py tries: by neighbourhood, and short pairs first.

Both have the interface of `SentenceBatches`, in one process and without accumulation.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from distillabse.training.batches import Lengths, SentenceBatches

POOL_STEPS = 200
"""Steps whose pairs are searched together: neighbours are the nearest of some 13,000 pairs, not of 64."""
_LEADERS = 64
_CANDIDATES = 4


class NeighbourBatches(SentenceBatches):
    """Batches of groups whose sources are near each other for the teacher, so that negatives are hard.

    The pairs of every 200 steps, in the order of `SentenceBatches`, are divided into groups: a pair at random and the
    pairs nearest to it that are in no group yet. Of two pairs of a group neither may be as similar as `limit`: they
    would mean the same, and be no negatives. Groups of about one length share a batch, as pairs do elsewhere.
    """

    def __init__(
        self,
        pairs: Lengths,
        batch_size: int,
        vectors: NDArray[np.float32],
        group: int = 8,
        limit: float = 0.9,
        seed: int = 0,
    ) -> None:
        """Prepare batches.

        Args:
            pairs: their number and lengths.
            batch_size: pairs of a step, a multiple of `group`.
            vectors: the teacher's unit vectors of the sources, float32 [pairs, dimension].
            group: pairs that are near each other.
            limit: a cosine from which on two sources count as the same.
            seed: of order and groups.
        """
        super().__init__(pairs, batch_size, seed=seed)
        if batch_size % group:
            raise ValueError(f"batches of {batch_size} cannot hold whole groups of {group}")
        self.vectors = vectors
        self.group = group
        self.limit = limit

    def _steps(self, step: int, end: int) -> Iterator[NDArray[np.int64]]:
        while step < end:
            last = min(step + POOL_STEPS, end)
            rows = self._rows(np.arange(step * self.step_size, last * self.step_size))
            groups = neighbourhoods(self.vectors[rows], self.group, self.limit)
            rows = rows[groups]
            lengths = self.sentences.lengths(rows.reshape(-1)).reshape(rows.shape).mean(axis=1)
            steps = rows[np.argsort(-lengths, kind="stable")].reshape(-1, self.step_size)
            yield from np.random.default_rng([self.seed, step]).permutation(steps)
            step = last


def neighbourhoods(vectors: NDArray[np.float32], size: int, limit: float) -> NDArray[np.int64]:
    """Every row in one group of near rows: int64 [rows / size, size]; the first of each group is nearest to all others.

    Rows lead groups in their own order, which should be random. A row that is left without enough neighbours below
    `limit` gets what comes next instead.

    Args:
        vectors: unit vectors, float32 [rows, dimension]; the number of rows is a multiple of `size`.
        size: rows of a group.
        limit: rows of a group are less similar than this.
    """
    free = np.arange(len(vectors))
    groups = []
    while len(free):
        taken = np.zeros(len(free), dtype=bool)
        for leader, cosines in enumerate(vectors[free[:_LEADERS]] @ vectors[free].T):
            if taken[leader]:
                continue
            taken[leader] = True
            cosines[taken | (cosines >= limit)] = -2
            nearest = np.argsort(-cosines)[: _CANDIDATES * size]
            members = [leader]
            for candidate in nearest[cosines[nearest] > -2]:
                if len(members) == size:
                    break
                if (vectors[free[members]] @ vectors[free[candidate]]).max() < limit:
                    members.append(int(candidate))
            taken[members] = True
            rest = np.flatnonzero(~taken)[: size - len(members)]
            taken[rest] = True
            groups.append(free[[*members, *rest]])
        free = free[~taken]
    return np.stack(groups)


class ShortPairsFirst(SentenceBatches):
    """Short pairs first: in the first third of training a growing share of the pairs, then all of them.

    Competence-based curriculum with linear growth (Platanios et al. 2019, arXiv:1903.09848) with the longer side's
    tokens as difficulty: step t of the first T draws from the shortest c + (1 - c) t / T of all pairs. After that,
    batches are those of `SentenceBatches`. Training is one epoch of `steps`.
    """

    def __init__(self, pairs: Lengths, batch_size: int, steps: int, start: float = 0.1, seed: int = 0) -> None:
        """Prepare batches.

        Args:
            pairs: their number and lengths.
            batch_size: pairs of a step.
            steps: of the whole training.
            start: c, the share of the pairs that the first step draws from.
            seed: of all that is drawn.
        """
        super().__init__(pairs, batch_size, seed=seed)
        self.steps = steps
        self.start = start

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        growing = self.steps // 3
        by_length = np.argsort(self.sentences.lengths(np.arange(self._size)), kind="stable")
        random = np.random.default_rng([self.seed, 0])
        for step in range(growing):
            share = self.start + (1 - self.start) * step / growing
            available = max(round(share * self._size), self.batch_size)
            yield by_length[random.choice(available, self.batch_size, replace=False)].tolist()
        for rows in self._steps(0, self.steps - growing):
            yield rows.tolist()
