"""Any encoders beside a baseline on any texts: what `distillabse bench BASELINE ENCODER...` writes."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from distillabse.config import BenchConfig
from distillabse.corpus.records import Sentence, training_texts
from distillabse.environment import describe_environment
from distillabse.errors import ConfigurationError, InputError
from distillabse.evaluation.comparison_page import render_comparison
from distillabse.evaluation.fidelity import Vectors, fidelity, row_cosines, unit
from distillabse.evaluation.grid import THESIS_TEXTS
from distillabse.evaluation.measurement import Protocol, measure_engines
from distillabse.evaluation.places import Place, find_places, has_tensorrt, run_of
from distillabse.evaluation.rounds import wilcoxon_p
from distillabse.evaluation.worst import worst_sentences
from distillabse.models.reduction import load_reduction
from distillabse.storage import new_folder, sha256_of_file, write_json
from distillabse.verification.gates import plain
from distillabse.verification.texts import UNDETERMINED, distinct_texts, texts_of_file

logger = logging.getLogger(__name__)

FORMAT = 1
RESULT = "comparison.json"
PAGE = "comparison.html"
SEED = 42
_RESAMPLES = 1000
_SPEEDUP = ("", "_ci95", "_wilcoxon_p")
_ENVIRONMENT = ("threads", "cpus", "device", "cores_used_by_others", "throttling", "gpu")


def compare_files(
    given: Sequence[str],
    texts: Path,
    output: Path,
    config: BenchConfig,
    *,
    protocol: Protocol = "standard",
    training_text: Path | None = None,
) -> dict[str, Any]:
    """Compare encoders with the first of them, and write comparison.json and comparison.html into a folder.

    Args:
        given: Places of encoders, see `places.find_places`; the first is the baseline.
        texts: A text a line, or a table with the columns text and language.
        output: The folder; one that is there must be that of an earlier comparison.
        config: How speed is measured.
        protocol: "standard": the grid of `config` on up to 2,000 texts, drawn at random; "thesis": see
            `grid.thesis_cells`.
        training_text: What the student was trained on; without it the corpus of the run that a bundle lies in.

    Returns:
        What was written as JSON.

    Raises:
        InputError: an encoder or the texts cannot be used.
        ConfigurationError: two encoders have one name, or `output` holds something else.
    """
    require_own_folder(output)
    places = find_places(given, config.device)
    read = distinct_texts(texts)[:THESIS_TEXTS] if protocol == "thesis" else texts_of_file(texts)
    training = _training_texts(places, training_text)
    result = compare(places, read, config, name=output.absolute().name, protocol=protocol, training=training)
    result["texts"] = {"file": str(texts), "sha256": sha256_of_file(texts), **result["texts"]}
    with new_folder(output) as folder:
        write_json(folder / RESULT, result)
        (folder / PAGE).write_text(render_comparison(result), encoding="utf-8")
    return result


def compare(
    places: Sequence[Place],
    texts: Sequence[Sentence],
    config: BenchConfig,
    *,
    name: str = "comparison",
    protocol: Protocol = "standard",
    training: Iterable[str] | None = None,
    seed: int = SEED,
) -> dict[str, Any]:
    """Compare encoders with the first of them.

    Args:
        places: At least two.
        texts: At least two, distinct.
        config: How speed is measured.
        name: What the comparison is called.
        protocol: See `compare_files`.
        training: What the students were trained on, if that is known.
        seed: Of everything that is drawn.

    Returns:
        The content of comparison.json, but for the file of the texts.

    Raises:
        ConfigurationError: there is nothing to compare the baseline with.
        InputError: there are too few texts, or an encoder cannot be used.
    """
    if len(places) < 2:
        raise ConfigurationError("A comparison needs a baseline and at least one encoder. Name one more.")
    if len(texts) < 2:
        raise InputError(f"A comparison needs at least two different texts, got {len(texts)}.")
    begun = time.monotonic()
    tensorrt = config.device == "cuda" and has_tensorrt()
    engines = {engine: place for place in places for engine in place.engines(config.device, tensorrt)}
    baseline = next(iter(engines)).name
    measured = measure_engines(
        list(engines),
        [sentence.text for sentence in texts],
        config,
        seed,
        [baseline],
        protocol=protocol,
        training=training,
    )
    vectors, figures = measured.vectors, measured.figures
    targets, left_out = _targets({engine.name: place.folder for engine, place in engines.items()}, vectors, baseline)
    languages = [sentence.language for sentence in texts]
    known = [] if set(languages) == {UNDETERMINED} else languages
    said = [None if language == UNDETERMINED else language for language in languages]
    rows = {}
    for student, target in targets.items():
        try:
            rows[student] = fidelity(target, vectors[student], languages=known, lengths=measured.tokens, seed=seed)
        except InputError as error:  # a constant teacher, which its guard has found, too
            left_out[student] = str(error)
    result = {
        "format": FORMAT,
        "name": name,
        "baseline": baseline,
        "protocol": protocol,
        "texts": {"count": len(texts), "tokens": figures["tokens"]},
        "encoders": {
            engine.name: {**place.description(engine), "dimension": int(vectors[engine.name].shape[1])}
            for engine, place in engines.items()
        },
        "fidelity": rows,
        "fidelity_left_out": left_out,
        "fidelity_pairs": compare_students(targets, vectors, seed),
        "latency": latency_rows(figures["latency"], baseline),
        **{key: figures[key] for key in ("left_out", "throughput", "memory", "cold_start", "energy")},
        **{key: figures[key] for key in ("guards", "trusted")},
        "worst": {
            student: worst_sentences(target, vectors[student], [text.text for text in texts], said)
            for student, target in targets.items()
        },
        "environment": {**describe_environment(), **{key: figures[key] for key in _ENVIRONMENT}},
        "seconds": time.monotonic() - begun,
    }
    return dict(plain(result))


def compare_students(targets: Mapping[str, Vectors], vectors: Mapping[str, Vectors], seed: int) -> list[dict[str, Any]]:
    """Every two students, text by text: the mean difference of their cosines to the baseline, left minus right.

    Args:
        targets: The baseline's vectors in the space of each student: float32 [n, dimension].
        vectors: The students' own, for the same texts.
        seed: Of the bootstrap.

    Returns:
        "left", "right", "difference", its 95 % percentile-bootstrap interval over texts, "ci95", and "wilcoxon_p" of
        Wilcoxon's signed-rank test.
    """
    cosines = {name: row_cosines(target, vectors[name]) for name, target in targets.items()}
    found = []
    for left, right in combinations(cosines, 2):
        differences = cosines[left] - cosines[right]
        random = np.random.default_rng(seed)
        interval = bootstrap(
            (differences,), np.mean, n_resamples=_RESAMPLES, method="percentile", rng=random, batch=100
        ).confidence_interval
        found.append(
            {
                "left": left,
                "right": right,
                "difference": float(differences.mean()),
                "ci95": [float(interval.low), float(interval.high)],
                "wilcoxon_p": wilcoxon_p(differences),
            }
        )
    return found


def latency_rows(latency: Mapping[str, Sequence[Mapping[str, Any]]], baseline: str) -> dict[str, list[dict[str, Any]]]:
    """Latency with the one baseline's name left out of the keys."""
    key = f"speedup_vs_{baseline.replace('-', '_')}"
    renamed = {f"{key}_wilcoxon_p": "wilcoxon_p", f"{key}_ci95": "speedup_ci95", key: "speedup"}
    return {
        name: [{renamed.get(key, key): value for key, value in row.items()} for row in rows]
        for name, rows in latency.items()
    }


def require_own_folder(output: Path) -> None:
    """Refuse to replace a folder that is no comparison.

    Raises:
        ConfigurationError: it holds other files.
    """
    others = [path.name for path in output.iterdir() if path.name not in (RESULT, PAGE)] if output.is_dir() else []
    if others or output.is_file():
        raise ConfigurationError(
            f"{output} is no folder of an earlier comparison ({(others or ['a file'])[0]}), and would be replaced. "
            "Choose another with -o."
        )


def _targets(
    folders: Mapping[str, Path], vectors: Mapping[str, Vectors], baseline: str
) -> tuple[dict[str, Vectors], dict[str, str]]:
    """The baseline's vectors in each student's space, and why a student has none.

    A bundle whose vectors are narrower than its teacher's holds the matrix that takes the teacher's to them.
    """
    of_baseline = vectors[baseline]
    targets: dict[str, Vectors] = {}
    left_out: dict[str, str] = {}
    for name, found in vectors.items():
        if name == baseline:
            continue
        matrix = load_reduction(folders[name])
        if found.shape[1] == of_baseline.shape[1]:
            targets[name] = of_baseline
        elif matrix is not None and matrix.shape == (of_baseline.shape[1], found.shape[1]):
            targets[name] = unit(of_baseline @ matrix).astype(np.float32)
        else:
            left_out[name] = (
                f"its vectors have {found.shape[1]} dimensions, those of {baseline} {of_baseline.shape[1]}: no cosine "
                "is defined between them."
            )
            logger.warning("No fidelity of %s: %s", name, left_out[name])
    return targets, left_out


def _training_texts(places: Sequence[Place], named: Path | None) -> Iterator[str] | None:
    """What the students were trained on: the file that is named, else the corpora of the runs that bundles lie in."""
    if named is not None:
        return (sentence.text for sentence in distinct_texts(named))
    corpora = list(dict.fromkeys(corpus for place in places if (corpus := run_of(place))))
    if not corpora:
        return None
    return (text for corpus in corpora for text in training_texts(corpus, distinct=False))
