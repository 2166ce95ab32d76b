"""How many texts become batches: windows of an iterable, micro-batches of like length, and threads that overlap."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Item = TypeVar("Item")
Result = TypeVar("Result")

# A window also ends here, so that very long texts cannot fill the memory before they are cut to tokens.
CHARACTERS_PER_WINDOW = 8_000_000
# Windows that are read and tokenised while one is being encoded.
WINDOWS_AHEAD = 2


def windows(texts: Iterable[str], size: int, characters: int = CHARACTERS_PER_WINDOW) -> Iterator[list[str]]:
    """Cut an iterable into lists of at most `size` texts; a list also ends when it holds `characters` characters.

    Raises:
        TypeError: one of the texts is not a string; the message names it by its number in the iterable.
    """
    window: list[str] = []
    total = 0
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(
                f"text {number} is {_short(text)}, not a string: drop it, "
                + ("or decode it with .decode('utf-8')" if isinstance(text, bytes) else "or convert it with str()")
            )
        window.append(text)
        total += len(text)
        if len(window) >= size or total >= characters:
            yield window
            window, total = [], 0
    if window:
        yield window


def micro_batches(lengths: Sequence[int], batch_size: int | None, token_budget: int) -> list[NDArray[np.intp]]:
    """Group rows by length, longest first.

    What needs most memory is met at once, and the estimate of the time left errs on the high side.

    Args:
        lengths: Tokens of every row.
        batch_size: Rows of a micro-batch, or None to go by `token_budget`.
        token_budget: Tokens of a micro-batch, padding included; a row that is longer is a micro-batch of its own.

    Returns:
        Row numbers of every micro-batch; each row is in exactly one.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    batches = []
    start = 0
    while start < len(order):
        rows = batch_size or max(1, token_budget // max(1, lengths[order[start]]))
        batches.append(order[start : start + rows])
        start += rows
    return batches


def overlapped(
    items: Iterable[Item],
    prepare: Callable[[Item], list[Callable[[], Result]]],
    workers: int,
    ahead: int = WINDOWS_AHEAD,
) -> Iterator[list[Result]]:
    """Run the tasks of every item on `workers` threads, while a thread of its own prepares the tasks of the next.

    The tasks of the next item start as soon as a worker is free, so that none waits for the last task of an item. At
    most `ahead` + 1 items are held at a time. When one fails, or the iterator is closed, tasks not started are dropped.

    Yields:
        The results of an item's tasks, in the order of tasks and items.
    """
    pending: deque[Future[list[Future[Result]]]] = deque()
    preparer = ThreadPoolExecutor(1, thread_name_prefix="tokenise")
    runners = ThreadPoolExecutor(workers, thread_name_prefix="encode")

    def start(item: Item) -> list[Future[Result]]:
        return [runners.submit(task) for task in prepare(item)]

    def oldest() -> list[Result]:
        return [task.result() for task in pending.popleft().result()]

    try:
        for item in items:
            pending.append(preparer.submit(start, item))
            if len(pending) > ahead:
                yield oldest()
        while pending:
            yield oldest()
    finally:
        preparer.shutdown(cancel_futures=True)  # first: it hands tasks to the runners
        runners.shutdown(cancel_futures=True)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}... ({type(value).__name__})"
