"""IBM Model 1 (Brown et al. 1993, "The mathematics of statistical machine translation"), in both directions.

A cell is a word of a sentence with a word of its translation. All steps are sums over the cells of many pairs at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import digamma

from distillabse.alignment.words import Words

ITERATIONS = 5
# Of each translation of a word in the Dirichlet prior: small, so that a word has few translations.
PRIOR = 0.01
# A word that occurs once is explained by whatever stands beside it.
LEAST_OCCURRENCES = 2
# More tell little more, and these take about one gigabyte.
TRAINING_CELLS = 10_000_000
_BLOCK_CELLS = 1_000_000
# A pair of 100 words each; longer ones take a lot of time and are rarely sentences.
_PAIR_CELLS = 10_000


def align(source: Words, translation: Words, training_cells: int = TRAINING_CELLS) -> NDArray[np.int64]:
    """Words that mean the same: each is the other's most probable translation ("intersection" of both directions).

    A word has one translation at most. Those that occur once in the corpus have none, and pairs with more than 10,000
    cells are left out. Where a sentence holds a word twice, the nearer one by relative position is taken.

    Args:
        source, translation: sentences of one language, and their translations into one other, in the same order.
        training_cells: of all pairs, evenly spaced ones are learned from so that there are about this many cells.

    Returns:
        int64 [links, 2]: places in `source.ids` and in `translation.ids`, in the order of the source.
    """
    sizes = source.lengths * translation.lengths
    pairs = np.flatnonzero((sizes > 0) & (sizes <= _PAIR_CELLS))
    if not len(pairs):
        return np.empty((0, 2), np.int64)
    step = -(-int(sizes[pairs].sum()) // training_cells)
    model = _train(source, translation, pairs[::step])
    if model is None:
        return np.empty((0, 2), np.int64)
    return np.concatenate([_links(source, translation, model, block) for block in _blocks(pairs, sizes[pairs])])


@dataclass(frozen=True)
class _Model:
    """Pairs of words that occurred together, sorted, and how probably each is the other's translation."""

    keys: NDArray[np.int64]
    forward: NDArray[np.float64]
    """p(translation | source)"""
    backward: NDArray[np.float64]
    """p(source | translation)"""
    null_forward: NDArray[np.float64]
    """p(translation | no word), by the number of the translation"""
    null_backward: NDArray[np.float64]


def _train(source: Words, translation: Words, pairs: NDArray[np.int64]) -> _Model | None:
    """None where no words occur often enough."""
    left, right = _cells(source, translation, pairs)
    frequent = _frequent(source)[left] & _frequent(translation)[right]
    left, right = left[frequent], right[frequent]
    if not len(left):
        return None
    keys, entry = np.unique(_keys(source, translation, left, right), return_inverse=True)
    sources, translations = np.divmod(keys, _key_base(translation))
    forward, null_forward = _expectation_maximisation(entry, right, sources, translation.ids)
    backward, null_backward = _expectation_maximisation(entry, left, translations, source.ids)
    return _Model(keys, forward, backward, null_forward, null_backward)


def _expectation_maximisation(
    entry: NDArray[np.int64], output: NDArray[np.int64], given: NDArray[np.int64], ids: NDArray[np.int32]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How probably each entry's output word is said for its other word, and each output word for none.

    The maximisation step is that of variational Bayes (Riley and Gildea 2012, "Improving the IBM alignment models using
    variational Bayes"): with a sparse prior a rare word does not collect what stands beside it.

    Args:
        entry: of each cell, the pair of words.
        output: of each cell, the place of the word that is explained.
        given: of each entry, the word that explains.
        ids: the word at each place.
    """
    places, output = np.unique(output, return_inverse=True)
    words, word = np.unique(ids[places], return_inverse=True)
    prior = PRIOR * len(words)
    probability, null = np.ones(len(given)), np.ones(len(words))
    for _ in range(ITERATIONS):
        shares = probability[entry]
        total = np.bincount(output, shares) + null[word]
        counts = np.bincount(entry, shares / total[output])
        probability = np.exp(digamma(counts + PRIOR) - digamma(np.bincount(given, counts) + prior)[given])
        counts = np.bincount(word, null[word] / total)
        null = counts / counts.sum()
    of_all = np.zeros(int(ids.max()) + 1)
    of_all[words] = null
    return probability, of_all


def _links(source: Words, translation: Words, model: _Model, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """The links of some pairs."""
    left, right = _cells(source, translation, pairs)
    keys = _keys(source, translation, left, right)
    entry = np.searchsorted(model.keys, keys).clip(max=len(model.keys) - 1)
    known = model.keys[entry] == keys
    left, right, entry = left[known], right[known], entry[known]
    distance = np.abs(_relative_position(source, left) - _relative_position(translation, right))
    best = _best(right, model.forward[entry], distance) & _best(left, model.backward[entry], distance)
    best &= model.forward[entry] > model.null_forward[translation.ids[right]]
    best &= model.backward[entry] > model.null_backward[source.ids[left]]
    return np.stack([left[best], right[best]], axis=1)


def _relative_position(words: Words, places: NDArray[np.int64]) -> NDArray[np.float64]:
    """Where in its sentence a word stands, from 0 to 1."""
    sentence = words.sentence_of(places)
    return (places - words.starts[sentence] + 0.5) / words.lengths[sentence]


def _best(group: NDArray[np.int64], score: NDArray[np.float64], distance: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which cell of each group has the highest score, the one at the smallest distance where several have it."""
    order = np.lexsort((-distance, score, group))
    is_best = np.zeros(len(group), bool)
    is_best[order[np.flatnonzero(np.diff(group[order], append=-1))]] = True
    return is_best


def _cells(source: Words, translation: Words, pairs: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Every word of each sentence with every word of its translation, as places in `ids`."""
    widths = translation.lengths[pairs]
    sizes = source.lengths[pairs] * widths
    pair = np.repeat(np.arange(len(pairs)), sizes)
    within = np.arange(len(pair)) - (sizes.cumsum() - sizes)[pair]
    row, column = np.divmod(within, widths[pair])
    return source.starts[pairs][pair] + row, translation.starts[pairs][pair] + column


def _frequent(words: Words) -> NDArray[np.bool_]:
    """Whether the word at each place occurs often enough."""
    frequent: NDArray[np.bool_] = (np.bincount(words.ids) >= LEAST_OCCURRENCES)[words.ids]
    return frequent


def _keys(source: Words, translation: Words, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int64]:
    """One number for each pair of words."""
    return source.ids[left].astype(np.int64) * _key_base(translation) + translation.ids[right]


def _key_base(translation: Words) -> int:
    return int(translation.ids.max()) + 1


def _blocks(pairs: NDArray[np.int64], sizes: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """The pairs in parts of about a million cells."""
    ends = np.flatnonzero(np.diff(sizes.cumsum() // _BLOCK_CELLS)) + 1
    yield from np.split(pairs, ends)
