"""Compress a sentence encoder into a small fast student, and prove what was kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distillabse.encoder import Encoder

__all__ = ["Encoder"]


def __getattr__(name: str) -> Any:
    """Both are found when they are first asked for: they cost a tenth of a second that other imports need not pay."""
    if name == "Encoder":
        from distillabse.encoder import Encoder

        return Encoder
    if name == "__version__":
        from importlib.metadata import version

        return version("distillabse")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
