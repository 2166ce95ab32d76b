"""Which sentences every process takes in every step: each exactly once in an epoch, in constant memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch.utils.data import DataLoader, Sampler

from distillabse.errors import ConfigurationError
from distillabse.mixing import mixed

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Steps whose sentences are sorted by length together: enough that a batch holds sentences of about one length.
WINDOW = 50
# Rounds of the Feistel network, counted in pairs. For sizes of a few items, 4 pairs are measurably not uniform.
_ROUND_PAIRS = 8


class Lengths(Protocol):
    """What a sampler must know of sentences."""

    def __len__(self) -> int:
        """How many there are."""

    def lengths(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of each of these rows."""


class Permutation:
    """A pseudo-random permutation of 0 ... size - 1 that is computed and not stored.

    A Feistel network over the two halves of a number's bits, which are changed by turns by a keyed hash (splitmix64) of
    the other half; a result outside the range goes in again until it is inside ("cycle walking", Black and Rogaway
    2002, Ciphers with Arbitrary Finite Domains). The numbers are at most doubled by rounding up to a power of two, so
    a result takes two passes at worst on average.
    """

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        self.size = size
        bits = max(size - 1, 0).bit_length()
        self._low_bits = np.uint64(bits // 2)
        self._low_mask = np.uint64((1 << bits // 2) - 1)
        self._high_mask = np.uint64((1 << bits - bits // 2) - 1)
        self._keys = np.random.SeedSequence([seed, epoch, 0]).generate_state(2 * _ROUND_PAIRS, np.uint64)

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """What stands at these positions, each from 0 to size - 1."""
        values = self._encrypt(positions.astype(np.uint64))
        while len(outside := np.flatnonzero(values >= self.size)):
            values[outside] = self._encrypt(values[outside])
        return values.astype(np.int64)

    def _encrypt(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        high, low = values >> self._low_bits, values & self._low_mask
        for first, second in self._keys.reshape(-1, 2):
            high = high ^ (mixed(low + first) & self._high_mask)
            low = low ^ (mixed(high + second) & self._low_mask)
        return (high << self._low_bits) | low


class SentenceBatches(Sampler[list[int]]):
    """The micro-batches of one process, as rows of the sentences.

    The rows of all epochs form one endless sequence: a permutation of all sentences for epoch 0, then another for epoch
    1, and so on. Step k takes rows [k T, (k + 1) T) of it, with T = batch_size x accumulation x processes. So every
    step is full, no sentence is lost or doubled where an epoch ends, and after ceil((e + 1) n / T) steps every one of n
    sentences has been seen e + 1 times, and fewer than T of them once more. What is in a step depends on seed and T
    alone, not on how T is divided.

    With `by_length` the rows of 50 steps are sorted by length, cut into steps, and the steps shuffled, which leaves
    little padding. These 50 never reach over the first step of an epoch, so the above holds.

    An "epoch" of `len(self)` micro-batches, as the Trainer counts them, is n // T steps.
    """

    def __init__(
        self,
        sentences: Lengths,
        batch_size: int,
        accumulation: int = 1,
        rank: int = 0,
        processes: int = 1,
        seed: int = 0,
        by_length: bool = True,
    ) -> None:
        """Prepare the batches of process `rank`.

        Args:
            sentences: their number, and the lengths of any of them.
            batch_size: sentences of one process's micro-batch.
            accumulation: micro-batches of one process in a step.
            rank: number of this process.
            processes: how many there are.
            seed: of the permutations; not negative.
            by_length: bring sentences of about one length together.

        Raises:
            ConfigurationError: there are fewer sentences than one step takes.
        """
        self.sentences = sentences
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.rank = rank
        self.processes = processes
        self.seed = seed
        self.by_length = by_length
        self.step_size = batch_size * accumulation * processes
        self._size = len(sentences)
        self._epoch = 0
        if self._size < self.step_size:
            raise ConfigurationError(
                f"There are {self._size:,} sentences for training, but one step takes {self.step_size:,}: {processes} "
                f"processes x {batch_size} (training.per_device_train_batch_size) x {accumulation} "
                "(training.gradient_accumulation_steps). Lower one of them, or add text."
            )

    def __len__(self) -> int:
        return self.accumulation * self._epoch_steps

    def __iter__(self) -> Iterator[list[int]]:
        first = self._epoch * self._epoch_steps
        for rows in self._steps(first, first + self._epoch_steps):
            for block in rows.reshape(self.accumulation, -1):
                # Rows of about one length lie side by side: in turns, all processes get equally much to do.
                yield block[self.rank :: self.processes].tolist()

    def set_epoch(self, epoch: int) -> None:
        """Go to the first step of an epoch of n // T steps."""
        self._epoch = epoch

    @property
    def _epoch_steps(self) -> int:
        return self._size // self.step_size

    def _steps(self, step: int, end: int) -> Iterator[NDArray[np.int64]]:
        """The rows of all processes in each step, int64 [T]."""
        while step < end:
            # A step belongs to the epoch of its first row.
            epoch = step * self.step_size // self._size
            window, passed = divmod(step - self._first_step(epoch), WINDOW)
            first = step - passed
            last = min(first + WINDOW, self._first_step(epoch + 1))
            rows = self._window(first, last, epoch, window)[passed : end - first]
            yield from rows
            step += len(rows)

    def _first_step(self, epoch: int) -> int:
        return -(-epoch * self._size // self.step_size)

    def _window(self, first: int, last: int, epoch: int, window: int) -> NDArray[np.int64]:
        """The rows of steps `first` to `last`, without it: int64 [steps, T]."""
        rows = self._rows(np.arange(first * self.step_size, last * self.step_size))
        if self.by_length:
            rows = rows[np.argsort(-self.sentences.lengths(rows), kind="stable")]
        steps = rows.reshape(-1, self.step_size)
        if self.by_length:
            generator = np.random.default_rng([self.seed, epoch, 1 + window])
            steps = steps[generator.permutation(len(steps))]
        return steps

    def _rows(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows at these ascending positions of the endless sequence."""
        epochs, positions = np.divmod(positions, self._size)
        first, last = int(epochs[0]), int(epochs[-1])
        parts = [
            Permutation(self._size, self.seed, epoch)(positions[epochs == epoch]) for epoch in range(first, last + 1)
        ]
        return np.concatenate(parts)


class SentenceLoader(DataLoader[dict[str, Any]]):
    """A DataLoader over `SentenceBatches` that the Trainer can tell the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Tell the batch sampler."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
