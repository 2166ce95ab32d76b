"""The loss terms, one file per family."""

from distillabse.objectives.base import Objective
from distillabse.objectives.build import build_objective

__all__ = ["Objective", "build_objective"]
