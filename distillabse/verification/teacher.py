"""Gates on what is kept of a teacher."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distillabse.config import EvaluationConfig, GatesConfig
from distillabse.corpus.records import Sentence, known_texts
from distillabse.errors import InputError
from distillabse.evaluation.fidelity import Vectors, fidelity, neighbour_agreement
from distillabse.evaluation.worst import worst_sentences
from distillabse.verification.gates import Check, Outcome, at_least
from distillabse.verification.subject import Subject

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)


class Teacher:
    """A teacher and the texts that students are compared with it on.

    Args:
        encoder: in the student's space; see `models.reduction.reduced`.
        sets: texts by name; that of the subject's name holds the subject's own texts.
        evaluation: resamples of the intervals.
        seed: of samples and resamples.
        languages: those that it knows. A translation from one of them into another language is compared with the
            teacher's vector of its source; None says that the teacher knows all.

    Attributes:
        vectors: by set, float32 [texts, dimension].

    Raises:
        InputError: a text in a language that it does not know is no translation from one that it knows.
    """

    def __init__(
        self,
        encoder: SentenceTransformer,
        sets: Mapping[str, Sequence[Sentence]],
        evaluation: EvaluationConfig,
        seed: int,
        languages: Sequence[str] | None = None,
    ) -> None:
        self.sets, self.evaluation, self.seed = sets, evaluation, seed
        self.vectors: dict[str, Vectors] = {}
        for name, chosen in sets.items():
            logger.info("Encoding %d sentences of %r with the teacher", len(chosen), name)
            texts = known_texts(chosen, languages)
            self.vectors[name] = np.asarray(encoder.encode(texts, batch_size=64, show_progress_bar=False))


def fidelity_checks(subject: Subject, teacher: Teacher, limits: GatesConfig) -> list[Check]:
    """A check of each artefact on all sets, with gates on the subject's own texts."""

    def of(artefact: str) -> Check:
        return Check("fidelity", artefact, lambda: examine_fidelity(subject, artefact, teacher, limits))

    return [of(artefact) for artefact in subject.artefacts]


def examine_fidelity(subject: Subject, artefact: str, teacher: Teacher, limits: GatesConfig) -> Outcome:
    """An artefact beside the teacher; figures as of `fidelity`, by set.

    Raises:
        InputError: the teacher's vectors have another dimension.
    """
    figures: dict[str, Any] = {}
    for name, chosen in teacher.sets.items():
        texts = [sentence.text for sentence in chosen]
        vectors = subject.vectors(artefact) if name == subject.name else subject.encode(artefact, texts)
        _require_one_dimension(teacher.vectors[name], vectors)
        figures[name] = fidelity(
            teacher.vectors[name], vectors, languages=[sentence.language for sentence in chosen],
            lengths=subject.lengths(texts), bootstrap_samples=teacher.evaluation.bootstrap_samples, seed=teacher.seed,
        )  # fmt: skip
    own = figures[subject.name]
    return Outcome(
        [
            at_least(
                "mean cosine to the teacher", artefact, own["cosine_mean"], limits.teacher_cosine_mean, subject.name
            ),
            at_least("skill", artefact, own["skill"], limits.teacher_skill, subject.name),
        ],
        figures,
    )


def _require_one_dimension(teacher: Vectors, student: Vectors) -> None:
    if teacher.shape[1] != student.shape[1]:
        raise InputError(
            f"The teacher's vectors have {teacher.shape[1]} dimensions, the bundle's {student.shape[1]}. Give the "
            "teacher that it was made from."
        )


def worst_texts(subject: Subject, teacher: Teacher) -> list[dict[str, Any]]:
    """The subject's texts that its most compressed artefact keeps least: see `worst_sentences`."""
    return worst_sentences(
        teacher.vectors[subject.name],
        subject.vectors(subject.most_compressed),
        subject.plain_texts,
        [sentence.language for sentence in subject.texts],
    )


def reduction_agreement(
    teacher: SentenceTransformer, reduction: NDArray[np.float32], texts: Sequence[str], seed: int
) -> dict[str, float]:
    """How much of the teacher's own space its reduced vectors keep, since no cosine can be taken between the two.

    Returns:
        dimension; neighbour_top1 and similarity_spearman between the teacher and its reduced vectors.
    """
    vectors = teacher.encode(list(texts), batch_size=64, show_progress_bar=False)
    top1, spearman = neighbour_agreement(vectors, vectors @ reduction, np.random.default_rng(seed))
    return {"dimension": reduction.shape[1], "neighbour_top1": top1, "similarity_spearman": spearman}
