"""The objective of `MiniLMObjective` and `CosineObjective`, in the form of TextBrewer's adaptors and losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


class Adaptor:
    """What TextBrewer's losses get of one model: attention and values of its last layer, and the sentence vector."""

    def __init__(self, model: Any) -> None:
        model.encoder.layer[-1].attention.self.value.register_forward_hook(self._keep)

    def _keep(self, module: Any, inputs: Any, output: Any) -> None:
        self.values = output

    def __call__(self, batch: dict[str, Any], outputs: Any) -> dict[str, Any]:
        """Only the last layer is matched, so only its features are made."""
        mask = batch["attention_mask"]
        weights = mask[..., None].float()
        sentence = (outputs.last_hidden_state.float() * weights).sum(dim=1) / weights.sum(dim=1)
        return {"attention": [outputs.attentions[-1]], "hidden": [self.values, sentence], "inputs_mask": mask}


def relation_losses(heads: int) -> dict[str, Callable[..., Any]]:
    """The objective of `MiniLMObjective` and `CosineObjective` in the form of TextBrewer's losses."""
    import torch
    from torch.nn import functional

    def over_rows(divergence: Any, mask: Any) -> Any:
        """Mean over heads, real rows and sentences of [batch, heads, tokens]."""
        mask = mask.float()
        return ((divergence.mean(dim=1) * mask).sum(dim=-1) / mask.sum(dim=-1)).mean()

    def attention_kl(student: Any, teacher: Any, mask: Any) -> Any:
        student, teacher = (one.float().clamp_min(1e-30) for one in (student, teacher))
        return over_rows((teacher * (teacher.log() - student.log())).sum(dim=-1), mask)

    def value_relations(values: Any, mask: Any) -> Any:
        values = values.float().unflatten(-1, (heads, -1)).transpose(1, 2)
        scores = values @ values.transpose(-1, -2) / math.sqrt(values.shape[-1])
        lowest = torch.finfo(torch.float32).min
        return scores.masked_fill(mask[:, None, None, :] == 0, lowest).log_softmax(dim=-1)

    def value_kl(student: Any, teacher: Any, mask: Any) -> Any:
        student, teacher = value_relations(student, mask), value_relations(teacher, mask)
        return over_rows((teacher.exp() * (teacher - student)).sum(dim=-1), mask)

    def cosine(student: Any, teacher: Any, mask: Any) -> Any:
        return 1 - functional.cosine_similarity(student, teacher).mean()

    return {"attention_kl": attention_kl, "value_kl": value_kl, "cosine": cosine}
