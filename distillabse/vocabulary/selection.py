"""Which rows of a vocabulary a corpus needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from distillabse.errors import ConfigurationError, InputError
from distillabse.vocabulary.counting import coverage_thresholds
from distillabse.vocabulary.trimming import rows_needed_by, trimmable

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def select_rows(
    encoder: SentenceTransformer,
    counts: Mapping[str, NDArray[np.int64]],
    scripts: Sequence[str],
    coverage: float,
    size: int | None = None,
) -> NDArray[np.int64]:
    """The rows to keep: what the tokenizer needs, single characters, and the most used rows of every language.

    Args:
        encoder: to be trimmed.
        counts: occurrences of each row in each language without special and unknown tokens, [rows].
        scripts: ISO 15924 codes of the scripts whose single characters are kept, so that words fall back to pieces.
        coverage: share of every language's tokens to keep; not looked at where `size` is given.
        size: keep at most so many rows, at the highest coverage that fits.

    Returns:
        int64 [kept rows], ascending.

    Raises:
        ConfigurationError: a tokenizer that cannot be trimmed, a coverage or size that keeps nothing of a language.
        InputError: a language of which the encoder knows nothing.
    """
    document = trimmable(encoder)
    if not counts:
        raise InputError("There are no sentences to choose a vocabulary by. Give at least one of every language.")
    for language, row_counts in counts.items():
        if not row_counts.any():
            raise InputError(
                f"The teacher knows no token of the language {language!r}: every word is unknown to it, so nothing of "
                f"it could be kept. Remove {language!r} from corpus.sources, or choose a teacher that knows it."
            )
    if size is None and coverage <= 0:
        raise ConfigurationError(
            f"vocabulary.coverage: {coverage} keeps nothing of any language. Give a share above 0, such as 0.999."
        )
    kept = set(rows_needed_by(encoder, document, document.characters(scripts)).tolist())
    if size is not None:
        most_frequent = {int(row_counts.argmax()) for row_counts in counts.values()}
        minimum = len(kept | document.closed(most_frequent))
        if size < minimum:
            raise ConfigurationError(
                f"vocabulary.size: {size} rows are too few: special tokens, the characters of the scripts "
                f"{', '.join(scripts)} and the most frequent token of every language take {minimum}. Give at least "
                f"{minimum}, or fewer languages in corpus.sources."
            )
    thresholds = np.min([coverage_thresholds(row_counts) for row_counts in counts.values()], axis=0)
    limit = np.inf if size is not None else coverage
    for row in np.argsort(thresholds, kind="stable")[: np.count_nonzero(thresholds < limit)].tolist():
        wanted = document.closed({row}) - kept
        if size is not None and len(kept) + len(wanted) > size:
            break
        kept |= wanted
    return np.array(sorted(kept), dtype=np.int64)
