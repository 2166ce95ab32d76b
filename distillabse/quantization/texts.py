"""The texts that scales are found on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distillabse.corpus.records import count_records, iterate_records


def calibration_texts(split: Path, count: int, seed: int) -> list[str]:
    """Texts of a split, drawn evenly from all of its rows; of a pair, one side or the other.

    Args:
        split: what `write_records` wrote, the training split.
        count: how many, at most.
        seed: of the draw.

    Raises:
        InputError: the file is missing or is not a split of a corpus.
    """
    rows = count_records(split)
    random = np.random.default_rng(seed)
    chosen = set(random.choice(rows, size=min(count, rows), replace=False).tolist())
    texts = []
    for row, record in enumerate(iterate_records(split)):
        if row in chosen:
            translated = record.translation is not None and random.random() < 0.5
            texts.append(str(record.translation) if translated else record.text)
    return list(dict.fromkeys(texts))
