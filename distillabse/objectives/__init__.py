"""The loss terms, one file per family."""

from distillabse.objectives.base import Objective, PairObjective
from distillabse.objectives.build import build_objective, require_enough_pairs
from distillabse.objectives.pairs import Feature

__all__ = ["Feature", "Objective", "PairObjective", "build_objective", "require_enough_pairs"]
