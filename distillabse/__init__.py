"""Compress a sentence encoder into a small fast student, and prove what was kept."""

from importlib.metadata import version

__version__ = version("distillabse")
