"""The cells of the grid, batch size by length, and texts that have exactly the length of a cell."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from distillabse.errors import InputError
from distillabse.evaluation.rounds import Rounds, batches_in_order, draw_batches
from distillabse.evaluation.workers import Turn

THESIS_BATCHES = (1, 64, 128, 256, 512)
THESIS_TOKENS = 32
THESIS_TEXTS = 10_000
# More distinct texts make a cell no truer, and each takes a while to make.
_MOST_TEXTS = 512
_FILLERS = (" a", " .", "a", ".", " 1", "1", "的", " é")

CountTokens = Callable[[list[str]], list[int]]
"""Tokens of every text, special tokens included, as the model cuts them."""


@dataclass
class Cell:
    """One batch size with texts of one length, and what the engines did in it so far.

    Attributes:
        batch: sentences of a batch.
        length: tokens of every text; None for texts as they are.
        texts: what batches are made of.
        in_order: the texts one after the other, each once before any is repeated, instead of drawn at random.
        count: batches of a round.
        turns: what each engine did, by round.
        passes: the pass that each round belongs to.
    """

    batch: int
    length: int | None
    texts: list[str]
    in_order: bool = False
    count: int = 1
    turns: dict[str, list[Turn]] = field(default_factory=dict)
    passes: list[int] = field(default_factory=list)

    @property
    def title(self) -> str:
        """What it is called."""
        return f"batch {self.batch}" + ("" if self.length is None else f", {self.length} tokens")

    @property
    def rounds(self) -> int:
        """Rounds so far."""
        return len(self.passes)

    @property
    def is_through(self) -> bool:
        """Whether texts in their order have all been encoded; of texts drawn at random there is no end."""
        return not self.in_order or self.rounds * self.count * self.batch >= len(self.texts)

    def batches(self, number: int, seed: int) -> list[list[str]]:
        """The batches of a round, which are the same for every engine."""
        if self.in_order:
            return batches_in_order(self.texts, self.batch, self.count, number * self.count)
        length = 0 if self.length is None else self.length
        return draw_batches(self.texts, self.batch, self.count, [seed, self.batch, length, number])

    def timings(self) -> dict[str, Rounds]:
        """Seconds of every batch, by engine and round."""
        return {name: [turn.seconds for turn in turns] for name, turns in self.turns.items()}

    def milliseconds_per_sentence(self, name: str) -> float:
        """All time of an engine, divided by the sentences that it really encoded."""
        turns = self.turns[name]
        return 1000 * sum(sum(turn.seconds) for turn in turns) / sum(turn.sentences for turn in turns)

    def wall_milliseconds(self, name: str) -> list[float]:
        """Wall-clock milliseconds of every batch, where the others are a GPU's; else none."""
        return [1000 * second for turn in self.turns[name] for second in turn.wall_seconds or ()]


def standard_cells(
    texts: Sequence[str], batch_sizes: Sequence[int], lengths: Sequence[int | None], count: CountTokens
) -> list[Cell]:
    """Every batch size with every length, batches drawn at random.

    Raises:
        InputError: no texts of one of the lengths can be made.
    """
    by_length = {length: list(texts) if length is None else texts_of_length(texts, length, count) for length in lengths}
    return [Cell(batch, length, by_length[length]) for length in lengths for batch in batch_sizes]


def thesis_cells(texts: Sequence[str], count: CountTokens) -> list[Cell]:
    """The protocol of the thesis that the project starts from, with its way of reporting mended.

    Batches of 1, 64, 128, 256 and 512, the first 10,000 texts in their order, cut to 32 tokens. The thesis divided the
    time of a run by a fixed 100 sentences, however many there were; here the time is divided by the sentences that were
    really encoded, see `Cell.milliseconds_per_sentence`. Where there are fewer texts, or time for fewer, it is those.
    """
    cut = cut_to_length(texts[:THESIS_TEXTS], THESIS_TOKENS, count)
    return [Cell(batch, THESIS_TOKENS, cut, in_order=True) for batch in THESIS_BATCHES]


def texts_of_length(texts: Sequence[str], length: int, count: CountTokens) -> list[str]:
    """Texts of exactly `length` tokens: as many of the given ones, from each in turn, as it takes, cut at a character.

    Args:
        texts: What they are made of; the end is joined to the beginning.
        length: Tokens, special ones included.
        count: The tokenizer.

    Returns:
        At most 512 texts, fewer where some cannot be brought to this length.

    Raises:
        InputError: no text of this length can be made: it is less than the special tokens take, or more than the model
            reads.
    """
    starts = range(min(len(texts), _MOST_TEXTS))
    joined = _joined(texts, starts, length, count)
    found = [text for text in _filled(cut_to_length(joined, length, count), length, count) if text.strip()]
    if not found:
        raise InputError(
            f"No text of exactly {length} tokens can be made of these texts for the baseline's tokenizer. Its greatest "
            "length or its special tokens may stand against it: choose other bench.lengths."
        )
    return found


def cut_to_length(texts: Sequence[str], length: int, count: CountTokens) -> list[str]:
    """The longest beginning of each text that has at most `length` tokens, found by halving; shorter ones stay."""
    whole = list(texts)
    lengths = count(whole)
    long = [row for row, tokens in enumerate(lengths) if tokens > length]
    low, high = dict.fromkeys(long, 0), {row: len(whole[row]) for row in long}
    while open_rows := [row for row in long if high[row] - low[row] > 1]:
        middles = {row: (low[row] + high[row]) // 2 for row in open_rows}
        for row, tokens in zip(open_rows, count([whole[row][: middles[row]] for row in open_rows]), strict=True):
            if tokens <= length:
                low[row] = middles[row]
            else:
                high[row] = middles[row]
    for row in long:
        whole[row] = whole[row][: low[row]]
    return whole


def visit_in_turn(
    cells: Sequence[Cell],
    visit: Callable[[Cell], None],
    is_finished: Callable[[Cell], bool],
    seconds: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Pass over the cells again and again, until each is finished or the time is used up.

    Cells that are not finished get the same number of visits, spread over the whole time: what the machine does slowly
    is then inside every cell's interval, instead of being the difference between two cells or two runs.

    Args:
        cells: All of them; each is visited at least once.
        visit: Measures a few rounds of one.
        is_finished: Whether a cell needs no more, asked after each pass.
        seconds: Time for all.
        clock: Seconds.
    """
    end = clock() + seconds
    remaining = list(cells)
    for cell in remaining:
        visit(cell)
    while remaining := [cell for cell in remaining if not is_finished(cell)]:
        for cell in remaining:
            if clock() >= end:
                return
            visit(cell)


def affordable(cells: Sequence[Cell], cost: Sequence[float], seconds: float) -> tuple[list[Cell], list[dict[str, Any]]]:
    """The cells whose rounds fit into the time, from the cheapest on, at least one; and why the others are left out.

    Args:
        cells: All of them.
        cost: Seconds that the least number of rounds takes in each.
        seconds: Time for all.
    """
    chosen: list[int] = []
    spent = 0.0
    for row in sorted(range(len(cells)), key=lambda row: cost[row]):
        if chosen and spent + cost[row] > seconds:
            break
        chosen.append(row)
        spent += cost[row]
    left_out = [
        {
            "batch": cell.batch,
            "length": cell.length,
            "reason": f"its rounds take some {cost[row]:.0f} s, and {max(seconds - spent, 0):.0f} s were left; raise "
            "max_seconds",
        }
        for row, cell in enumerate(cells)
        if row not in chosen
    ]
    return [cells[row] for row in sorted(chosen)], left_out


def _joined(texts: Sequence[str], starts: range, length: int, count: CountTokens) -> list[str]:
    """From each start, texts joined until they have at least `length` tokens, or as many texts as tokens."""
    number = dict.fromkeys(starts, 1)
    joined = {start: texts[start] for start in starts}
    open_starts = list(starts)
    while open_starts:
        tokens = count([joined[start] for start in open_starts])
        open_starts = [
            start
            for start, found in zip(open_starts, tokens, strict=True)
            if found < length and number[start] < max(length, 2)
        ]
        for start in open_starts:
            joined[start] += " " + texts[(start + number[start]) % len(texts)]
            number[start] += 1
    return list(joined.values())


def _filled(texts: Sequence[str], length: int, count: CountTokens) -> list[str]:
    """Those of the texts that have `length` tokens, or get them by one small word or sign after the other."""
    found: list[str] = []
    open_texts = list(texts)
    for _ in range(2 * len(_FILLERS)):
        tokens = count(open_texts) if open_texts else []
        found += [text for text, has in zip(open_texts, tokens, strict=True) if has == length]
        open_texts = [text for text, has in zip(open_texts, tokens, strict=True) if has < length]
        if not open_texts:
            break
        open_texts = _one_longer(open_texts, length, count)
    return found


def _one_longer(texts: Sequence[str], length: int, count: CountTokens) -> list[str]:
    """Each text with the first filler that adds a token without going beyond `length`."""
    before = count(list(texts))
    grown: dict[int, str] = {}
    for filler in _FILLERS:
        rows = [row for row in range(len(texts)) if row not in grown]
        longer = [texts[row] + filler for row in rows]
        for row, text, tokens in zip(rows, longer, count(longer) if longer else [], strict=True):
            if before[row] < tokens <= length:
                grown[row] = text
    return list(grown.values())
