"""From an objective's configuration to the module that computes it."""

from __future__ import annotations

from collections.abc import Iterable

from distillabse.config import (
    ContrastiveObjective,
    CosineObjective,
    FeatureObjective,
    HiddenObjective,
    LogitObjective,
    MiniLMObjective,
    MiniLMv2Objective,
    MSEObjective,
    MultilingualObjective,
    ObjectiveConfig,
    RoutingObjective,
    StructureLevelObjective,
    TokenLevelObjective,
    WordLevelObjective,
)
from distillabse.errors import ConfigurationError
from distillabse.models.taps import EncoderShape
from distillabse.objectives.base import Objective, PairObjective
from distillabse.objectives.embedding import MSE, Cosine
from distillabse.objectives.hidden import Hidden
from distillabse.objectives.pairs import Contrastive, Feature, Logit, Multilingual, StructureLevel
from distillabse.objectives.relations import MiniLM, MiniLMv2
from distillabse.objectives.routing import Routing
from distillabse.objectives.words import TokenLevel, WordLevel


def build_objective(config: ObjectiveConfig, teacher: EncoderShape, student: EncoderShape) -> Objective | PairObjective:
    """The objective that `config` describes, checked against the two shapes before any training.

    Raises:
        ConfigurationError: the shapes do not allow it; the message names the key and the remedy.
    """
    match config:
        case MiniLMObjective():
            return MiniLM(config, teacher, student)
        case MiniLMv2Objective():
            return MiniLMv2(config, teacher, student)
        case HiddenObjective():
            return Hidden(config, teacher, student)
        case CosineObjective():
            return Cosine(config, teacher, student)
        case MSEObjective():
            return MSE(config, teacher, student)
        case RoutingObjective():
            return Routing(config, teacher, student)
        case MultilingualObjective():
            return Multilingual(config, teacher, student)
        case TokenLevelObjective():
            return TokenLevel(config, teacher, student)
        case WordLevelObjective():
            return WordLevel(config, teacher, student)
        case StructureLevelObjective():
            return StructureLevel(config, teacher, student)
        case ContrastiveObjective():
            return Contrastive(config, teacher, student)
        case FeatureObjective():
            return Feature(config, teacher, student)
        case LogitObjective():
            return Logit(config, teacher, student)


def require_enough_pairs(objectives: Iterable[ObjectiveConfig], per_process_batch: int) -> None:
    """Refuse batches too small for objectives that compare the pairs of a batch with each other.

    Args:
        objectives: the job's; those of weight 0 count for nothing.
        per_process_batch: pairs in one process's batch.

    Raises:
        ConfigurationError: one needs more pairs; the message names the remedy.
    """
    for config in objectives:
        if config.weight and per_process_batch < (least := _least_pairs(config)):
            raise ConfigurationError(
                f"objectives.{config.kind} compares the pairs of a batch with each other and needs at least {least}, "
                f"but a process gets {per_process_batch} at a time. Raise training.per_device_train_batch_size; for a "
                "loss that tells sentences apart, hundreds are usual."
            )


def _least_pairs(config: ObjectiveConfig) -> int:
    match config:
        case StructureLevelObjective(form="correlation" | "kl"):
            return 3  # two sentences have a single similarity
        case StructureLevelObjective() | ContrastiveObjective() | LogitObjective() | WordLevelObjective():
            return 2
    return 1
