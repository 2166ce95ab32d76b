"""The texts that scales are calibrated on."""

from __future__ import annotations

from itertools import chain

import numpy as np

from distillabse.config import JobConfig
from distillabse.corpus.records import count_records, iterate_batches, to_records
from distillabse.layout import RunFolder


def calibration_texts(config: JobConfig, run: RunFolder) -> list[str]:
    """Distinct texts of the training split, `export.quantization.calibration_sentences` of them where it has as many.

    Rows are drawn with the job's seed and read in passing, in constant memory. Of a pair either side may be drawn.

    Raises:
        InputError: the corpus stage has not run.
    """
    wanted, split = config.export.quantization.calibration_sentences, run.split("train")
    rows = count_records(split)
    random = np.random.default_rng(config.seed)
    chosen = np.sort(random.choice(rows, size=min(rows, wanted), replace=False))
    drawn, first = [], 0
    for batch in iterate_batches(split):
        here = chosen[(chosen >= first) & (chosen < first + len(batch))] - first
        drawn.extend(to_records(batch.take(here)))
        first += len(batch)
    sides = chain.from_iterable((record.text, record.translation) for record in drawn)
    texts = list(dict.fromkeys(text for text in sides if text is not None))
    return [texts[index] for index in random.permutation(len(texts))[:wanted]]
