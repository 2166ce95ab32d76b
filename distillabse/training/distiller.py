"""Student, frozen teacher and objectives as one module whose forward pass gives the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, autocast, nn, no_grad

from distillabse.config import ObjectiveConfig, need_teacher_of_translations
from distillabse.models.taps import Signals, Tap, TappedEncoder, shape_of
from distillabse.objectives import Feature, PairObjective, build_objective
from distillabse.quantization.fake import FakeQuantization, quantized_forward
from distillabse.training.deepspeed import shard_teacher

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from sentence_transformers import SentenceTransformer

_STUDENT, _OBJECTIVES, _QUANTIZATION = "student.", "objectives.", "quantization."


class Distiller(nn.Module):
    """Works unchanged under DDP, DeepSpeed and accelerate: they only ever call `forward`.

    The teacher moves with the module but is no part of it: it is not in `state_dict()`, gets no gradient and stays in
    evaluation mode.
    """

    def __init__(
        self,
        student: SentenceTransformer,
        teacher: SentenceTransformer,
        objectives: Sequence[ObjectiveConfig],
        reduction: NDArray[np.float32] | None = None,
        quantization: FakeQuantization | None = None,
    ) -> None:
        """Prepare training.

        Args:
            student: is trained.
            teacher: is not.
            objectives: those of weight 0 are left out.
            reduction: from the teacher's vectors to those that the student is measured by, where the student's are
                narrower, [teacher's dimension, student's dimension]; maps to the teacher's dimension start with it.
            quantization: how the student is rounded in training, with scales that are trained, too.

        Raises:
            ConfigurationError: an objective does not fit the two shapes.
        """
        super().__init__()
        self.student = student
        shapes = shape_of(teacher), shape_of(student)
        used = [config for config in objectives if config.weight > 0]
        self.teacher_reads_translations = need_teacher_of_translations(used)
        self.objectives = nn.ModuleList(build_objective(config, *shapes) for config in used)
        self.quantization = quantization
        for objective in self.objectives:
            if reduction is not None and isinstance(objective, Feature):
                objective.start_from(torch.from_numpy(reduction))
        teacher.requires_grad_(False).eval()
        # A tuple hides the teacher from nn.Module's registry.
        self._teacher = (teacher,)
        self._teacher_is_sharded = False
        self._tapped_teacher = TappedEncoder(teacher, self.teacher_taps)
        self._tapped_student = TappedEncoder(student, _union(objective.student_taps for objective in self.objectives))

    @property
    def teacher(self) -> SentenceTransformer:
        """The frozen teacher."""
        return self._teacher[0]

    def shard_teacher(self, settings: dict[str, Any]) -> None:
        """Spread the teacher over the processes; see `distillabse.training.deepspeed.shard_teacher`."""
        shard_teacher(self.teacher, settings)
        self._teacher_is_sharded = True

    @staticmethod
    def divided(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """This module's weights by name as those of the student, and what is learnt beside it.

        That is maps of objectives, named as in `objectives`, and scales, named "quantization.".
        """
        student = {name.removeprefix(_STUDENT): weights[name] for name in weights if name.startswith(_STUDENT)}
        learnt = {name.removeprefix(_OBJECTIVES): weights[name] for name in weights if not name.startswith(_STUDENT)}
        return student, learnt

    def load_learnt(self, learnt: Mapping[str, Tensor], assign: bool = False) -> None:
        """Take over what is learnt beside the student, named as in `divided`; `assign` as in `load_state_dict`."""
        named = {name if name.startswith(_QUANTIZATION) else _OBJECTIVES + name: learnt[name] for name in learnt}
        if self.load_state_dict(named, strict=False, assign=assign).unexpected_keys:
            raise KeyError(f"not of these objectives: {', '.join(named)}")

    def measured(self, student: SentenceTransformer, learnt: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """While this is open, `student` gives the vectors that it will have as a product, with what was learnt."""
        if self.quantization is None:
            return nullcontext()
        own = {name.removeprefix(_QUANTIZATION): learnt[name] for name in learnt if name.startswith(_QUANTIZATION)}
        return quantized_forward(student, self.quantization.linears(student, own))

    @cached_property
    def teacher_taps(self) -> tuple[Tap, ...]:
        """What the objectives read from the teacher besides its sentence vector, in a fixed order."""
        return tuple(sorted(_union(objective.teacher_taps for objective in self.objectives)))

    def teacher_signals(self, input_ids: Tensor, attention_mask: Tensor) -> Signals:
        """The frozen teacher's signals for a padded batch, computed in the precision that the student runs in.

        Autocast sees to that, unless DeepSpeed does: it casts the student's weights and leaves the teacher's alone.
        """
        precision = next(self.student.parameters()).dtype
        low = precision in (torch.bfloat16, torch.float16)
        with no_grad(), autocast(input_ids.device.type, precision) if low else nullcontext():
            return self._tapped_teacher(input_ids, attention_mask)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        teacher_sentence: Tensor | None = None,
        teacher_taps: Sequence[Tensor] = (),
        teacher_input_ids: Tensor | None = None,
        teacher_attention_mask: Tensor | None = None,
        links: Tensor | None = None,
    ) -> dict[str, Any]:
        """Loss of a padded batch.

        A batch of B pairs has 2B rows, the sources and then their translations. Its teacher has B rows, of the sources,
        or 2B where an objective needs them.

        Args:
            input_ids, attention_mask: int64 [batch, tokens].
            teacher_sentence: the teacher's vectors [batch, dimension], if they are cached; else the teacher runs.
            teacher_taps: with them, its taps [batch, tokens, width] in the order of `self.teacher_taps`.
            teacher_input_ids, teacher_attention_mask: what the teacher reads, where that is not what the student reads.
            links: of pairs, as in `PairObjective.forward`.

        Returns:
            {"loss": float32 scalar with gradient, "terms": {name: detached weighted scalar}}; the terms sum to it.
        """
        if teacher_sentence is None:
            if teacher_input_ids is None or teacher_attention_mask is None:
                teacher_input_ids, teacher_attention_mask = input_ids, attention_mask
            target = self.teacher_signals(teacher_input_ids, teacher_attention_mask)
        else:
            target = Signals(teacher_sentence, dict(zip(self.teacher_taps, teacher_taps, strict=True)))
        quantization = self.quantization
        with nullcontext() if quantization is None else quantization.attached(self.student):
            output = self._tapped_student(input_ids, attention_mask)
        terms: dict[str, Tensor] = {}
        # Logarithms of small probabilities need float32, whatever precision the models run in.
        with autocast(input_ids.device.type, enabled=False):
            for objective in self.objectives:
                if isinstance(objective, PairObjective):
                    whole = objective.teacher_reads_translations
                    values = objective(target if whole else target.first(len(input_ids) // 2), output, links)
                else:
                    values = objective(target, output, attention_mask)
                for name, value in values.items():
                    term = objective.weight * value
                    terms[name] = terms[name] + term if name in terms else term
        loss = sum(terms.values())
        return {"loss": loss, "terms": {name: term.detach() for name, term in terms.items()}}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distiller:
        if not self._teacher_is_sharded:  # DeepSpeed has put its parts where they belong
            self.teacher._apply(fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _union(sets: Any) -> frozenset[Any]:
    return frozenset().union(*sets)
