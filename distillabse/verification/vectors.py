"""Gates on vectors of real texts: the same in every artefact, whatever they are batched with and however often."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distillabse import layout
from distillabse.config import GatesConfig
from distillabse.encoder import Encoder
from distillabse.evaluation.fidelity import Vectors, constant_cosines, row_cosines
from distillabse.verification.files import vector_size
from distillabse.verification.gates import Outcome, at_least, at_most, exactly
from distillabse.verification.kinds import FP32, TORCH, Graph
from distillabse.verification.subject import Subject

BATCH = 32
# Vectors are of unit length to this.
LENGTH_TOLERANCE = 1e-3
# 1 - mean cosine to the mean direction. Of one vector for all it is 0 but for rounding, some 1e-14.
LEAST_SPREAD = 1e-6
THREADS = (1, 2, 4)
_THREADS_TEXTS = 40


def examine_vectors(subject: Subject, artefact: str) -> Outcome:
    """Finite rows of unit length, not all the same, as wide as the settings of the modules say."""
    vectors = subject.vectors(artefact)
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    figures = {
        "dimension": int(vectors.shape[1]),
        "length_error": float(np.abs(lengths - 1).max()),
        "spread": 1 - float(constant_cosines(vectors).mean()),
    }
    gates = [
        exactly("dimension, as the modules say", artefact, figures["dimension"], vector_size(subject.folder)),
        at_most("largest error of length", artefact, figures["length_error"], LENGTH_TOLERANCE, subject.name),
        at_least("spread of the vectors", artefact, figures["spread"], LEAST_SPREAD, subject.name),
    ]
    return Outcome(gates, figures)


def examine_parity(subject: Subject, artefact: str, limits: GatesConfig) -> Outcome:
    """A graph beside the torch student; limits are those of the fp32 graph, which is to be the same."""
    vectors, torch_vectors = subject.vectors(artefact), subject.vectors(TORCH)
    cosines = row_cosines(vectors, torch_vectors)
    figures = {
        "min": float(cosines.min()),
        "mean": float(cosines.mean()),
        "max_difference": float(np.abs(vectors - torch_vectors).max()),
    }
    if artefact != FP32:
        return Outcome([exactly("texts compared with torch", artefact, len(cosines), len(subject.texts))], figures)
    largest = limits.onnx_fp32_to_torch_max_difference
    gates = [
        at_least("least cosine to torch", artefact, figures["min"], limits.onnx_fp32_to_torch_min, subject.name),
        at_most("largest difference to torch", artefact, figures["max_difference"], largest, subject.name),
    ]
    return Outcome(gates, figures)


def examine_loss(subject: Subject, artefact: str, limits: GatesConfig) -> Outcome:
    """What a quantised graph loses against the fp32 graph, overall and by language."""
    cosines = row_cosines(subject.vectors(artefact), subject.vectors(FP32))
    names = np.array([sentence.language for sentence in subject.texts])
    languages = {name: _summary(cosines[names == name]) for name in sorted(set(names.tolist()))}
    overall = _summary(cosines)
    # NaN is the least of all, so that it is never passed over.
    worst = min(languages, key=lambda name: np.nan_to_num(languages[name]["mean"], nan=-np.inf))
    of_worst = languages[worst]["mean"]
    where = subject.name
    gates = [
        at_least("mean cosine to the fp32 student", artefact, overall["mean"], limits.int8_to_fp32_mean, where),
        at_least("1st percentile of cosine to fp32", artefact, overall["p01"], limits.int8_to_fp32_p1, where),
        at_least(
            "mean cosine to fp32, worst language", artefact, of_worst, limits.int8_to_fp32_language_mean, where, worst
        ),
    ]
    return Outcome(gates, {**overall, "languages": languages})


def examine_invariance(subject: Subject, artefact: str, limits: GatesConfig) -> Outcome:
    """A vector depends on its text alone: not on its neighbours, on padding, on the order or on a twin in the batch.

    Texts are batched in the order given, so short ones stand beside long ones; padding is to twice the longest text,
    as far as the model goes.

    Returns:
        Gates, and as figures the least cosine of a vector alone with the same in a batch, padded, with all texts in
        another order, and of two vectors of one text in one batch.
    """
    texts = subject.sample
    batches = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
    width = min(2 * max(subject.lengths(texts)), subject.max_length)
    alone = np.concatenate([subject.encode_batch(artefact, [text]) for text in texts])
    together = np.concatenate([subject.encode_batch(artefact, batch) for batch in batches])
    padded = np.concatenate([subject.encode_batch(artefact, [text], width) for text in texts])
    order = np.random.default_rng(0).permutation(len(texts))
    reordered = np.empty_like(alone)
    reordered[order] = subject.encode(artefact, [texts[row] for row in order])
    twins = [subject.encode_batch(artefact, batch[: BATCH // 2] * 2) for batch in batches]
    figures = {
        "batch_min": _least(alone, together),
        "padding_min": _least(alone, padded),
        "order_min": _least(alone, reordered),
        "twins_min": min(
            (_least(*np.split(pair, 2)) for pair in twins), key=lambda value: np.nan_to_num(value, nan=-2.0)
        ),
    }
    return Outcome(
        [
            at_least(f"invariance, {name}", artefact, value, limits.invariance_min, subject.name)
            for name, value in figures.items()
        ],
        figures,
    )


def examine_threads(subject: Subject, graph: Graph, limits: GatesConfig) -> Outcome:
    """The same vectors again and on any number of threads.

    Returns:
        Gates, and as figures the least cosine and the largest difference, over runs and numbers of threads, to the
        first run on one thread.
    """
    texts = subject.sample[:_THREADS_TEXTS]
    runs: list[Vectors] = []
    for threads in THREADS:
        encoder = Encoder(subject.folder, file=graph.file, threads=threads)
        # One call on all threads, twice, and a call on each thread.
        runs += [encoder.run(encoder.tokenize(texts)), encoder.run(encoder.tokenize(texts)), encoder.encode(texts)]
    cosines = np.stack([row_cosines(runs[0], run) for run in runs[1:]])
    figures = {
        "min": float(cosines.min()),
        "max_difference": float(max(np.abs(run - runs[0]).max() for run in runs[1:])),
        "threads": list(THREADS),
    }
    least = float(cosines.min())
    return Outcome(
        [at_least("least cosine over threads and runs", graph.artefact, least, limits.invariance_min, subject.name)],
        figures,
    )


def examine_pooled(subject: Subject, graph: Graph, limits: GatesConfig) -> Outcome:
    """The graph of sentence vectors alone gives the vectors of the graph that it stands beside."""
    texts = subject.sample[:_THREADS_TEXTS]
    whole, pooled = (
        Encoder(subject.folder, file=file).encode(texts) for file in (graph.file, layout.pooled_graph(graph.file))
    )
    least = _least(whole, pooled)
    return Outcome(
        [at_least("least cosine of the pooled graph", graph.artefact, least, limits.invariance_min, subject.name)],
        {"min": least},
    )


def _least(left: Vectors, right: Vectors) -> float:
    return float(row_cosines(left, right).min())


def _summary(cosines: NDArray[np.float64] | Sequence[float]) -> dict[str, float]:
    return {
        "n": len(cosines),
        "mean": float(np.mean(cosines)),
        "p01": float(np.percentile(cosines, 1)),
        "min": float(np.min(cosines)),
    }
