"""Objectives on the sentence vectors of translation pairs.

x_i and y_i are the normalised vectors of sentence i and of its translation, t the teacher's and s the student's, N the
pairs of a batch. What compares the pairs of a batch with each other takes the batch of all processes together.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from distillabse.config import (
    ContrastiveObjective,
    FeatureObjective,
    LogitObjective,
    MultilingualObjective,
    StructureLevelObjective,
)
from distillabse.models.taps import EncoderShape, Signals
from distillabse.objectives.base import PairObjective
from distillabse.objectives.embedding import require_equal_dimensions
from distillabse.objectives.gathering import gathered
from distillabse.objectives.hidden import linear_map


class Multilingual(PairObjective):
    """||x^t - x^s||^2 + ||x^t - y^s||^2, mean over the batch (Reimers and Gurevych 2020, arXiv:2004.09813).

    Of normalised vectors, and summed over dimensions. The teacher never reads a translation.
    """

    def __init__(self, config: MultilingualObjective, teacher: EncoderShape, student: EncoderShape) -> None:
        super().__init__(config)
        require_equal_dimensions(teacher, student, "multilingual")

    def forward(self, teacher: Signals, student: Signals, links: Tensor | None) -> dict[str, Tensor]:
        """The terms multilingual/source and multilingual/translation, each between 0 and 4."""
        sources, translations = student.sentence.chunk(2)
        return {
            "multilingual/source": _mean_square_distance(teacher.sentence, sources),
            "multilingual/translation": _mean_square_distance(teacher.sentence, translations),
        }


class StructureLevel(PairObjective):
    """The student's similarities within a batch follow those of the teacher's sources (MMKD-style)."""

    def __init__(self, config: StructureLevelObjective, teacher: EncoderShape, student: EncoderShape) -> None:
        super().__init__(config)
        self.form = config.form
        self.temperature = config.temperature

    def forward(self, teacher: Signals, student: Signals, links: Tensor | None) -> dict[str, Tensor]:
        """The terms structure_level/source, /translation and /cross.

        The similarities are the student's among sources, among translations, and of sources with translations.
        """
        sources, translations = (gathered(half) for half in student.sentence.chunk(2))
        target = gathered(teacher.sentence)
        expected = target @ target.T
        similarities = {
            "source": sources @ sources.T,
            "translation": translations @ translations.T,
            "cross": sources @ translations.T,
        }
        return {f"structure_level/{name}": self._distance(expected, found) for name, found in similarities.items()}

    def _distance(self, expected: Tensor, found: Tensor) -> Tensor:
        if self.form == "mse":
            return (expected - found).square().mean()
        if len(found) < 3:  # one similarity has no correlation, and a softmax of one is 1
            return 0 * found.sum()
        expected, found = _of_others(expected), _of_others(found)
        if self.form == "kl":
            return relative_entropy(expected / self.temperature, found / self.temperature)
        return 1 - pearson_correlation(expected, found)


class Contrastive(PairObjective):
    """Additive-margin softmax with the other pairs of the batch as negatives (LaBSE, arXiv:2007.01852).

    -1/N sum_i log(e^(c(x_i y_i - m)) / (e^(c(x_i y_i - m)) + sum_(n != i) e^(c x_i y_n))) with margin m and scale c,
    and the same from translations to sources. It needs no teacher.
    """

    def __init__(self, config: ContrastiveObjective, teacher: EncoderShape, student: EncoderShape) -> None:
        super().__init__(config)
        self.margin = config.margin
        self.scale = config.scale

    def forward(self, teacher: Signals, student: Signals, links: Tensor | None) -> dict[str, Tensor]:
        """The terms contrastive/to_translation and contrastive/to_source."""
        sources, translations = (gathered(half) for half in student.sentence.chunk(2))
        pairs = torch.arange(len(sources), device=sources.device)
        margins = self.margin * torch.eye(len(sources), device=sources.device)
        logits = self.scale * (sources @ translations.T - margins)
        return {
            "contrastive/to_translation": cross_entropy(logits, pairs),
            "contrastive/to_source": cross_entropy(logits.T, pairs),
        }


class Feature(PairObjective):
    """||x^t - f(x^s)||^2 + ||y^t - f(y^s)||^2, mean over the batch (LEALLA, arXiv:2302.08387).

    f is a linear map to the teacher's dimension, trained with the student and no part of it. It starts at zero, or from
    the directions that narrower students are measured by. Equal dimensions need none.
    """

    def __init__(self, config: FeatureObjective, teacher: EncoderShape, student: EncoderShape) -> None:
        super().__init__(config)
        self.to_teacher = linear_map(student.dimension, teacher.dimension)

    @torch.no_grad()
    def start_from(self, reduction: Tensor) -> None:
        """Let f begin with what leads back to the teacher's dimension; [teacher's dimension, student's dimension]."""
        self.to_teacher.get_parameter("weight").copy_(reduction)

    def forward(self, teacher: Signals, student: Signals, links: Tensor | None) -> dict[str, Tensor]:
        """The terms feature/source and feature/translation."""
        halves = zip(teacher.sentence.chunk(2), self.to_teacher(student.sentence).chunk(2), strict=True)
        names = ("feature/source", "feature/translation")
        return {name: _mean_square_distance(*half) for name, half in zip(names, halves, strict=True)}


class Logit(PairObjective):
    """1/N^2 sum_ij ((x_i^t y_j^t - x_i^s y_j^s) / T)^2 with temperature T (LEALLA, arXiv:2302.08387)."""

    def __init__(self, config: LogitObjective, teacher: EncoderShape, student: EncoderShape) -> None:
        super().__init__(config)
        self.temperature = config.temperature

    def forward(self, teacher: Signals, student: Signals, links: Tensor | None) -> dict[str, Tensor]:
        """The term logit."""
        expected, found = (_cosines(signals.sentence) for signals in (teacher, student))
        return {"logit": ((expected - found) / self.temperature).square().mean()}


def relative_entropy(expected: Tensor, found: Tensor) -> Tensor:
    """KL(softmax(expected) || softmax(found)) of each row, mean over rows; both are logits [rows, columns]."""
    target, output = expected.log_softmax(dim=-1), found.log_softmax(dim=-1)
    return (target.exp() * (target - output)).sum(dim=-1).mean()


def pearson_correlation(left: Tensor, right: Tensor) -> Tensor:
    """Pearson's correlation of all entries; 0 where either does not vary."""
    left, right = (normalize((values - values.mean()).flatten(), dim=0, eps=1e-6) for values in (left, right))
    return left @ right


def _mean_square_distance(target: Tensor, output: Tensor) -> Tensor:
    return (target - output).square().sum(dim=-1).mean()


def _cosines(sentence: Tensor) -> Tensor:
    """Of all sources with all translations, those of all processes."""
    sources, translations = (gathered(half) for half in sentence.chunk(2))
    return sources @ translations.T


def _of_others(similarities: Tensor) -> Tensor:
    """[N, N] without its diagonal: [N, N - 1]."""
    rows = len(similarities)
    return similarities.flatten()[:-1].view(rows - 1, rows + 1)[:, 1:].reshape(rows, rows - 1)
