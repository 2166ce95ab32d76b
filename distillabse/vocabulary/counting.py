"""How often a corpus uses each row of an encoder's vocabulary, and which scripts it is written in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from distillabse.models.tokens import tokenise
from distillabse.vocabulary.trimming import table_rows

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_BLOCK = 5000
COMMON_SCRIPTS = ("Zinh", "Zyyy")  # digits, punctuation, combining marks: written in every script


def count_tokens(encoder: SentenceTransformer, texts: Mapping[str, Sequence[str]]) -> dict[str, NDArray[np.int64]]:
    """How often each language uses each row of the embedding table, special tokens included: int64 [rows].

    Args:
        encoder: whose tokenizer counts.
        texts: sentences of each language.
    """
    from rich.progress import track

    rows = table_rows(encoder)
    counts = {language: np.zeros(rows, dtype=np.int64) for language in sorted(texts)}
    blocks = [(language, start) for language in counts for start in range(0, len(texts[language]), _BLOCK)]
    for language, start in track(blocks, description="Counting tokens", transient=True, disable=len(blocks) < 4):
        ids = tokenise(encoder, texts[language][start : start + _BLOCK])
        counts[language] += np.bincount(np.fromiter(chain.from_iterable(ids), dtype=np.int64), minlength=rows)
    return counts


def coverage_thresholds(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """For each row the coverage above which it is needed: the share of all tokens whose rows are more frequent.

    The rows whose threshold is below some coverage are the fewest that cover so much. Ties go to the lower row.

    Args:
        counts: occurrences of each row, [rows].

    Returns:
        float64 [rows]; infinite where a row is never used.
    """
    thresholds = np.full(len(counts), np.inf)
    used = np.flatnonzero(counts)
    order = used[np.argsort(-counts[used], kind="stable")]
    if len(order):
        total = np.cumsum(counts[order])
        thresholds[order] = (total - counts[order]) / total[-1]
    return thresholds


def used_scripts(texts: Iterable[str], coverage: float) -> set[str]:
    """The most frequent scripts that make up `coverage` of the characters which belong to one.

    Returns:
        ISO 15924 codes (fontTools.unicodedata), without Common and Inherited.
    """
    from fontTools.unicodedata import script

    counts: Counter[str] = Counter()
    for character, count in Counter(chain.from_iterable(texts)).items():
        counts[script(character)] += count
    names = sorted(set(counts) - set(COMMON_SCRIPTS))
    thresholds = coverage_thresholds(np.array([counts[name] for name in names], dtype=np.int64))
    return {name for name, threshold in zip(names, thresholds.tolist(), strict=True) if threshold < coverage}
