"""What every objective is: named scalar terms from two sets of signals."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from distillabse.config import LayerPair, PairObjectiveConfig
from distillabse.errors import ConfigurationError
from distillabse.models.taps import EncoderShape, Signals, Tap


class Objective(nn.Module, ABC):
    """A family of loss terms that compare teacher and student sentence by sentence.

    Attributes:
        weight: factor of all its terms in the total loss.
        teacher_taps: tensors it needs from the teacher besides the sentence vector.
        student_taps: tensors it needs from the student besides the sentence vector.
    """

    weight: float
    teacher_taps: frozenset[Tap] = frozenset()
    student_taps: frozenset[Tap] = frozenset()

    @abstractmethod
    def forward(self, teacher: Signals, student: Signals, attention_mask: Tensor) -> dict[str, Tensor]:
        """Scalar float32 terms by name, before `weight`; `attention_mask` is [batch, tokens], 1 for real tokens."""


class PairObjective(nn.Module, ABC):
    """A family of loss terms on translation pairs.

    Attributes:
        weight: factor of all its terms in the total loss.
        teacher_taps: tensors it needs from the teacher besides the sentence vector.
        student_taps: tensors it needs from the student besides the sentence vector.
        teacher_reads_translations: whether it needs the teacher's signals of the translations, too.
        needs_links: whether it needs to know which words of a pair mean the same.
    """

    teacher_taps: frozenset[Tap] = frozenset()
    student_taps: frozenset[Tap] = frozenset()

    def __init__(self, config: PairObjectiveConfig) -> None:
        super().__init__()
        self.weight = config.weight
        self.teacher_reads_translations = config.teacher_reads_translations
        self.needs_links = config.needs_links

    @abstractmethod
    def forward(self, teacher: Signals, student: Signals, links: Tensor | None) -> dict[str, Tensor]:
        """Scalar float32 terms by name, before `weight`, for B pairs.

        Args:
            teacher: B rows, of the sources; with `teacher_reads_translations` 2B rows. Its token axis may differ from
                the student's: the two may have tokenizers of their own.
            student: 2B rows: the sources, then their translations in the same order.
            links: int64 [links, 7], words that mean the same: number of the pair, first token and end (exclusive) of
                the word in the student's source, in the student's translation, and in the teacher's source.
        """


def resolve_layers(
    pairs: list[LayerPair], teacher: EncoderShape, student: EncoderShape, kind: str
) -> list[tuple[int, int]]:
    """(student layer, teacher layer) pairs counted from 0.

    Raises:
        ConfigurationError: a layer that its model lacks.
    """
    return [
        (
            resolve_layer(pair.student, student.layers, f"objectives.{kind}.layers.student", "student"),
            resolve_layer(pair.teacher, teacher.layers, f"objectives.{kind}.layers.teacher", "teacher"),
        )
        for pair in pairs
    ]


def resolve_layer(layer: int, count: int, key: str, owner: str) -> int:
    """A layer of `count`, counted from 0.

    Raises:
        ConfigurationError: there is no such layer; the message names `key`.
    """
    if not -count <= layer < count:
        raise ConfigurationError(
            f"{key}: the {owner} has no layer {layer}; give 0 to {count - 1}, or -1 (the last) to {-count}."
        )
    return layer % count
