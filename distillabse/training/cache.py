"""The teacher's signals on disk, so that it runs once and not in every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.progress import track

from distillabse.storage import storage_errors
from distillabse.training.data import PaddingCollator

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray

    from distillabse.training.distiller import Distiller

_BATCH = 128


class TeacherCache:
    """Memory-mapped float16 arrays: the sentence vectors, and every tapped tensor with the tokens of all rows in line.

    Attributes:
        sentence: [rows, dimension].
        taps: each [tokens of all rows, width], in the order of `Distiller.teacher_taps`.
        starts: [rows + 1], where the tokens of each row begin.
    """

    def __init__(self, sentence: NDArray[Any], taps: Sequence[NDArray[Any]], starts: NDArray[np.int64]) -> None:
        self.sentence = sentence
        self.taps = list(taps)
        self.starts = starts

    def read(self, rows: Sequence[int], tokens: int) -> dict[str, Any]:
        """What `Distiller.forward` takes for these rows: float32, the taps padded with zeros to `tokens`."""
        padded = [torch.zeros(len(rows), tokens, tap.shape[1]) for tap in self.taps]
        for index, row in enumerate(rows):
            start, end = self.starts[row], self.starts[row + 1]
            for target, tap in zip(padded, self.taps, strict=True):
                target[index, : end - start] = torch.from_numpy(np.asarray(tap[start:end]))
        sentence = torch.from_numpy(np.asarray(self.sentence[list(rows)], dtype=np.float32))
        return {"teacher_sentence": sentence, "teacher_taps": padded}


def build_cache(
    distiller: Distiller, sentences: Dataset, folder: Path, device: torch.device, bf16: bool
) -> TeacherCache:
    """Run the teacher over every sentence, longest first, and write its signals into `folder`.

    Args:
        distiller: gives the teacher and the taps that its objectives need.
        sentences: columns input_ids, length and row.
        folder: an existing folder with room for 2 bytes a number.
        device: where the teacher runs.
        bf16: run it under bfloat16 autocast, as training does.

    Raises:
        StorageError: the disk is full.
    """
    lengths = np.asarray(sentences["length"], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    order = np.argsort(-lengths, kind="stable")
    collator = PaddingCollator(distiller.student.tokenizer.pad_token_id)
    distiller.teacher.to(device)
    cache: TeacherCache | None = None
    batches = range(0, len(order), _BATCH)
    with storage_errors(folder), torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
        for first in track(batches, "Teacher, once", transient=True):
            rows = order[first : first + _BATCH].tolist()
            batch = collator([sentences[row] for row in rows])
            signals = distiller.teacher_signals(**{name: tensor.to(device) for name, tensor in batch.items()})
            tensors = [signals.taps[tap].float().cpu().numpy() for tap in distiller.teacher_taps]
            if cache is None:
                cache = TeacherCache(
                    _empty(folder / "sentence.npy", (len(order), signals.sentence.shape[1])),
                    [_empty(folder / f"tap-{n}.npy", (int(starts[-1]), x.shape[2])) for n, x in enumerate(tensors)],
                    starts,
                )
            cache.sentence[rows] = signals.sentence.float().cpu().numpy()
            for array, tensor in zip(cache.taps, tensors, strict=True):
                for index, row in enumerate(rows):
                    array[starts[row] : starts[row + 1]] = tensor[index, : lengths[row]]
    assert cache is not None
    return cache


def _empty(path: Path, shape: tuple[int, int]) -> NDArray[np.float16]:
    array: NDArray[np.float16] = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
    return array
