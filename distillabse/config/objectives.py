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


class RoutingObjective(Schema):
    """What keeps the experts of a Switch student in use; it teaches nothing by itself."""

    kind: Literal["routing"] = "routing"
    weight: float = Field(1.0, gt=0)
    load_balance: float = Field(
        0.01, ge=0, description="Coefficient of the load-balancing loss (Switch Transformers, equation 4)."
    )
    z_loss: float = Field(0.001, ge=0, description="Coefficient of the router z-loss (ST-MoE, equation 5).")


class PairObjectiveConfig(Schema):
    """What objectives on translation pairs have in common."""

    teacher_reads_translations: ClassVar[bool] = False
    """Whether it needs the teacher's signals of the translations, too."""
    needs_links: ClassVar[bool] = False
    """Whether it needs to know which words of a pair mean the same."""

    weight: float = Field(1.0, ge=0, description="Factor of its terms in the loss; 0 switches it off.")


class MultilingualObjective(PairObjectiveConfig):
    """The student's vectors of a sentence and of its translation follow the teacher's of the sentence.

    Multilingual knowledge distillation (Reimers and Gurevych 2020); also the sentence level of the MMKD-style levels.
    """

    kind: Literal["multilingual"] = "multilingual"


class TokenLevelObjective(PairObjectiveConfig):
    """MMKD-style token level: tokens of a translation follow the teacher's state of the source word they translate."""

    needs_links: ClassVar[bool] = True
    kind: Literal["token_level"] = "token_level"
    layers: list[LayerPair] = Field(default_factory=_last_layers, min_length=1, description="Last to last by default.")


class WordLevelObjective(PairObjectiveConfig):
    """MMKD-style word level: a word is nearer to its translation than to the other words of the batch (InfoNCE)."""

    needs_links: ClassVar[bool] = True
    kind: Literal["word_level"] = "word_level"
    temperature: float = Field(0.1, gt=0, description="Divides the cosines.")
    layer: int = Field(-1, description="Student layer whose states make the word vectors; -1 is the last.")


class StructureLevelObjective(PairObjectiveConfig):
    """MMKD-style structure level: the student's similarities within a batch follow those of the teacher's sources."""

    kind: Literal["structure_level"] = "structure_level"
    form: Literal["correlation", "mse", "kl"] = Field(
        "correlation",
        description="correlation: 1 - Pearson correlation of the similarities of different sentences; mse: mean "
        "squared difference of all similarities; kl: KL of each sentence's softmax over the other sentences.",
    )
    temperature: float = Field(0.1, gt=0, description="Divides the similarities; for form: kl alone.")


class ContrastiveObjective(PairObjectiveConfig):
    """Additive-margin softmax over the batch of all processes, both directions (LaBSE, Feng et al. 2022; LEALLA)."""

    kind: Literal["contrastive"] = "contrastive"
    margin: float = Field(0.3, ge=0, description="Taken off the cosine of a pair.")
    scale: float = Field(20.0, gt=0, description="Multiplies the cosines; 1 is the formula as LaBSE's paper prints it.")


class FeatureObjective(PairObjectiveConfig):
    """Feature distillation (LEALLA, Mao and Nakagawa 2023): a linear map of the student's vectors meets the teacher's.

    The map is trained along and thrown away, so the student's vectors may be smaller than the teacher's.
    """

    teacher_reads_translations: ClassVar[bool] = True
    kind: Literal["feature"] = "feature"


class LogitObjective(PairObjectiveConfig):
    """Logit distillation (LEALLA): cosines of all sources with all translations of a batch follow the teacher's."""

    teacher_reads_translations: ClassVar[bool] = True
    kind: Literal["logit"] = "logit"
    temperature: float = Field(100.0, gt=0, description="Divides the differences of the cosines.")


ObjectiveConfig = Annotated[
    MiniLMObjective
    | MiniLMv2Objective
    | HiddenObjective
    | CosineObjective
    | MSEObjective
    | RoutingObjective
    | MultilingualObjective
    | TokenLevelObjective
    | WordLevelObjective
    | StructureLevelObjective
    | ContrastiveObjective
    | FeatureObjective
    | LogitObjective,
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


def need_equal_dimensions(objectives: Sequence[ObjectiveConfig]) -> bool:
    """Whether one of them takes the difference of student's and teacher's vectors as they are."""
    kinds = (CosineObjective, MSEObjective, MultilingualObjective)
    return any(isinstance(objective, kinds) and objective.weight > 0 for objective in objectives)


def need_links(objectives: Sequence[ObjectiveConfig]) -> bool:
    """Whether one of them needs to know which words of a pair mean the same."""
    pairs = (objective for objective in objectives if isinstance(objective, PairObjectiveConfig))
    return any(objective.weight > 0 and objective.needs_links for objective in pairs)
