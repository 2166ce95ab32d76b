"""From an objective's configuration to the module that computes it."""

from __future__ import annotations

from distillabse.config import (
    CosineObjective,
    HiddenObjective,
    MiniLMObjective,
    MiniLMv2Objective,
    MSEObjective,
    MultilingualObjective,
    ObjectiveConfig,
    RoutingObjective,
)
from distillabse.models.taps import EncoderShape
from distillabse.objectives.base import Objective, PairObjective
from distillabse.objectives.embedding import MSE, Cosine
from distillabse.objectives.hidden import Hidden
from distillabse.objectives.multilingual import Multilingual
from distillabse.objectives.relations import MiniLM, MiniLMv2
from distillabse.objectives.routing import Routing


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
