"""The terms of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from distillabse.config.schema import Schema

Relation = Literal["qq", "kk", "vv"]


class LayerPair(Schema):
    """Which student layer learns from which teacher layer; negative numbers count from the end."""

    student: int = -1
    teacher: int = -1


def _last_layers() -> list[LayerPair]:
    return [LayerPair()]


def _every_relation() -> dict[Relation, float]:
    return {"qq": 1.0, "kk": 1.0, "vv": 1.0}


class MiniLMObjective(Schema):
    """Deep self-attention distillation (MiniLM, Wang et al. 2020): attention distributions and value relations."""

    kind: Literal["minilm"] = "minilm"
    weight: float = Field(1.0, gt=0)
    attention: bool = Field(
        True, description="KL of the attention distributions (equation 5); needs equal head counts."
    )
    value: bool = Field(True, description="KL of the value relations (equation 6).")
    layers: list[LayerPair] = Field(default_factory=_last_layers, min_length=1, description="Last to last by default.")


class MiniLMv2Objective(Schema):
    """Multi-head self-attention relations (MiniLMv2, Wang et al. 2021): QQ, KK, VV with relation heads."""

    kind: Literal["minilm_v2"] = "minilm_v2"
    weight: float = Field(1.0, gt=0)
    relations: dict[Relation, float] = Field(
        default_factory=_every_relation, min_length=1, description="Weight of each relation."
    )
    relation_heads: int = Field(12, ge=1, description="Must divide both hidden sizes; not tied to either head count.")
    layers: list[LayerPair] = Field(default_factory=_last_layers, min_length=1, description="Last to last by default.")


class HiddenObjective(Schema):
    """Mean squared error between token states of two layers (same hidden size), padding left out."""

    kind: Literal["hidden"] = "hidden"
    weight: float = Field(1.0, gt=0)
    layers: list[LayerPair] = Field(default_factory=_last_layers, min_length=1, description="Last to last by default.")


class CosineObjective(Schema):
    """1 - cosine between the student's and the teacher's sentence vectors."""

    kind: Literal["cosine"] = "cosine"
    weight: float = Field(1.0, gt=0)


class MSEObjective(Schema):
    """Squared error between sentence vectors, summed over dimensions, mean over the batch."""

    kind: Literal["mse"] = "mse"
    weight: float = Field(1.0, gt=0)


class PairObjectiveConfig(Schema):
    """A term that compares translation pairs. Weight 0 leaves it out."""

    teacher_reads_translations: ClassVar[bool] = False
    needs_links: ClassVar[bool] = False

    weight: float = Field(1.0, ge=0)


class MultilingualObjective(PairObjectiveConfig):
    """Squared error of source and of translation to the teacher's vector of the source (Reimers & Gurevych 2020)."""

    kind: Literal["multilingual"] = "multilingual"


class RoutingObjective(Schema):
    """What keeps the experts of a Switch student in use; it teaches nothing by itself."""

    kind: Literal["routing"] = "routing"
    weight: float = Field(1.0, gt=0)
    load_balance: float = Field(
        0.01, ge=0, description="Coefficient of the load-balancing loss (Switch Transformers, equation 4)."
    )
    z_loss: float = Field(0.001, ge=0, description="Coefficient of the router z-loss (ST-MoE, equation 5).")


ObjectiveConfig = Annotated[
    MiniLMObjective
    | MiniLMv2Objective
    | HiddenObjective
    | CosineObjective
    | MSEObjective
    | RoutingObjective
    | MultilingualObjective,
    Field(discriminator="kind"),
]


def learn_from_pairs(objectives: Sequence[ObjectiveConfig]) -> bool:
    """Whether one of them compares translation pairs."""
    return any(isinstance(objective, PairObjectiveConfig) for objective in objectives)


def need_teacher_of_translations(objectives: Sequence[ObjectiveConfig]) -> bool:
    """Whether, of a pair, one of them needs the teacher's signals of the translation, too.

    Those that compare sentence by sentence do, but for that of the routers, which needs no teacher.
    """
    return any(
        objective.weight > 0 and objective.teacher_reads_translations
        if isinstance(objective, PairObjectiveConfig)
        else not isinstance(objective, RoutingObjective)
        for objective in objectives
    )
