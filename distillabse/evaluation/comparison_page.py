"""The page of a comparison. A stand-in until the page itself is there."""

from __future__ import annotations

from html import escape
from typing import Any


def render_comparison(comparison: dict[str, Any]) -> str:
    """A minimal HTML page with the names of what was compared."""
    names = "".join(f"<li>{escape(name)}</li>" for name in comparison["encoders"])
    return f"<!doctype html><meta charset='utf-8'><title>{escape(comparison['name'])}</title><ul>{names}</ul>\n"
