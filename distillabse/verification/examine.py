"""The two doors: a bundle alone, and the bundle of a job with its teacher and evaluation sets."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from distillabse import layout
from distillabse.config import EvaluationConfig, GatesConfig, JobConfig, TeacherConfig
from distillabse.corpus.records import Sentence, known_texts
from distillabse.environment import describe_environment
from distillabse.errors import InputError
from distillabse.evaluation.sets import TEST, evaluation_sets
from distillabse.layout import RunFolder
from distillabse.models.reduction import load_reduction, reduced
from distillabse.storage import new_folder, write_json
from distillabse.verification.files import examine_files, examine_layout
from distillabse.verification.gates import BUNDLE, Check, Findings, plain, require_passed, run_checks
from distillabse.verification.graphs import examine_graph, examine_operators
from distillabse.verification.inputs import examine_limits, examine_odd_texts, examine_truncation
from distillabse.verification.kinds import FP32
from distillabse.verification.subject import Subject
from distillabse.verification.teacher import Teacher, fidelity_checks, reduction_agreement, worst_texts
from distillabse.verification.vectors import (
    examine_invariance,
    examine_loss,
    examine_parity,
    examine_pooled,
    examine_threads,
    examine_vectors,
)

TEXTS = "texts"


def bundle_checks(subject: Subject, limits: GatesConfig) -> list[Check]:
    """All that can be said of a bundle without its teacher."""
    checks = [
        Check("files", BUNDLE, partial(examine_files, subject)),
        Check("layout", BUNDLE, partial(examine_layout, subject)),
        Check("limits", BUNDLE, partial(examine_limits, subject)),
    ]
    for graph in subject.graphs:
        checks += [
            Check("contract", graph.artefact, partial(examine_graph, subject, graph)),
            Check("graphs", graph.artefact, partial(examine_operators, subject, graph)),
            Check("parity", graph.artefact, partial(examine_parity, subject, graph.artefact, limits)),
            Check("threads", graph.artefact, partial(examine_threads, subject, graph, limits)),
        ]
        if layout.pooled_graph(graph.file) in subject.pooled:
            checks.append(Check("pooled", graph.artefact, partial(examine_pooled, subject, graph, limits)))
        if graph.artefact != FP32:
            checks.append(Check("loss", graph.artefact, partial(examine_loss, subject, graph.artefact, limits)))
    for artefact in subject.artefacts:
        checks += [
            Check("vectors", artefact, partial(examine_vectors, subject, artefact)),
            Check("invariance", artefact, partial(examine_invariance, subject, artefact, limits)),
            Check("truncation", artefact, partial(examine_truncation, subject, artefact, limits)),
            Check("odd_texts", artefact, partial(examine_odd_texts, subject, artefact, limits)),
        ]
    return checks


def examine_bundle(subject: Subject, limits: GatesConfig, teacher: Teacher | None = None) -> dict[str, Any]:
    """Run every check on a bundle, those against a teacher, too, where there is one.

    Returns:
        What is written as JSON: "gates", "passed", and figures by section and artefact ("parity", "invariance", ...);
        with a teacher also "fidelity" by artefact and set, and "worst".
    """
    findings = Findings()
    checks = bundle_checks(subject, limits)
    run_checks([*checks, *(fidelity_checks(subject, teacher, limits) if teacher else [])], findings)
    result = findings.result()
    if teacher is not None:
        broken_off = subject.most_compressed not in result.get("fidelity", {})
        result["worst"] = [] if broken_off else plain(worst_texts(subject, teacher))
    return result


def verify_bundle(
    folder: Path, texts: Sequence[Sentence], limits: GatesConfig, teacher: str | None = None
) -> dict[str, Any]:
    """Examine a bundle that stands alone.

    Args:
        folder: the bundle.
        texts: what it is examined on.
        limits: what its gates ask for.
        teacher: folder or hub name of a teacher to compare it with.

    Raises:
        InputError: `folder` is no bundle, there are too few texts, or the teacher cannot be loaded.
    """
    from distillabse.models.teacher import load_teacher

    subject = Subject(folder, texts, TEXTS)
    compared = None
    if teacher is not None:
        encoder, reduction = load_teacher(TeacherConfig(model=teacher)), load_reduction(folder)
        encoder = encoder if reduction is None else reduced(encoder, reduction)
        compared = Teacher(encoder, {TEXTS: subject.texts}, EvaluationConfig(), seed=0)
    languages = sorted({sentence.language for sentence in subject.texts})
    return {
        "bundle": str(folder),
        "texts": {"n": len(subject.texts), "languages": languages},
        "limits": limits.model_dump(mode="json"),
        **examine_bundle(subject, limits, compared),
        "environment": describe_environment(),
    }


def verify_stage(config: JobConfig, run: RunFolder) -> None:
    """Examine `run.bundle` beside the job's teacher, write verify.json, then judge.

    Raises:
        GateFailed: at least one gate was not met; verify.json is written all the same.
        InputError: there is no bundle.
    """
    from distillabse.models.teacher import load_teacher

    if not (run.bundle / layout.PROVENANCE).is_file():
        raise InputError(f"{run.bundle} holds no bundle. Run `distillabse export` first.")
    sets = evaluation_sets(config, run)
    subject = Subject(run.bundle, sets[TEST], TEST)
    if config.export.quantization.enabled and len(subject.graphs) == 1:
        raise InputError(
            f"{run.bundle} has no quantised graph by its own record, but export.quantization asks for one. Run "
            "`distillabse export` again."
        )
    encoder, reduction = load_teacher(config.teacher), load_reduction(run.bundle)
    in_space = encoder if reduction is None else reduced(encoder, reduction)
    teacher = Teacher(in_space, sets, config.evaluation, config.seed, config.teacher.languages)
    result = examine_bundle(subject, config.gates, teacher)
    if reduction is not None:
        read = known_texts(sets[TEST], config.teacher.languages)
        result["reduction"] = reduction_agreement(encoder, reduction, list(dict.fromkeys(read)), config.seed)
    with new_folder(run.verify) as folder:
        write_json(folder / run.verification.name, result)
    require_passed(result["gates"], str(run.verification))
