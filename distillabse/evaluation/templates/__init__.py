"""The page and the model card as jinja2 templates, and the one spelling of names and figures that they share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

TITLES = {
    "teacher-torch": "Teacher, PyTorch",
    "teacher-onnx": "Teacher, ONNX Runtime",
    "torch": "PyTorch student",
    "onnx-fp32": "ONNX fp32 student",
    "onnx-int8": "INT8 student",
    "onnx-float16": "float16 student",
}
MISSING = "\N{EN DASH}"


def render(template: str, **values: Any) -> str:
    """Fill a template of this folder; values are escaped in HTML and left alone in Markdown."""
    return _environment().get_template(template).render(**values)


def title(artefact: str) -> str:
    """Name of an engine or artefact for people."""
    return TITLES.get(artefact, artefact)


def cosine(value: float | None) -> str:
    """Four decimals."""
    return MISSING if value is None else f"{value:.4f}"


def measured(value: float | None) -> str:
    """What a gate found or needs: seven significant digits."""
    return MISSING if value is None else f"{value:.7g}"


def integer(value: int | None) -> str:
    """Thousands separators."""
    return MISSING if value is None else f"{value:,}"


def milliseconds(value: float | None) -> str:
    """Two decimals, so that a column lines up."""
    return MISSING if value is None else f"{value:,.2f}"


def megabytes(value: int | None) -> str:
    """Bytes as decimal megabytes."""
    return MISSING if value is None else f"{value / 1e6:,.1f} MB"


def ratio(value: float | None, decimals: int = 1) -> str:
    """A factor, such as 4.6x."""
    return MISSING if value is None else f"{value:,.{decimals}f}x"


def gain(value: float, more: str, less: str) -> str:
    """A factor in words: `gain(4.6, "faster", "slower")` is "4.6x faster", and 0.5 is "2.0x slower"."""
    return f"{ratio(value)} {more}" if value >= 1 else f"{ratio(1 / value)} {less}"


def excerpt(text: str, characters: int = 280) -> str:
    """The beginning of a text that is too long for a table."""
    return text if len(text) <= characters else f"{text[:characters].rstrip()}\N{HORIZONTAL ELLIPSIS}"


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested values as pairs of dotted name and text; what is None or empty is left out."""
    for key, value in values.items():
        if isinstance(value, list | tuple):
            if value and isinstance(value[0], Mapping):
                yield from flatten({str(index): item for index, item in enumerate(value)}, f"{prefix}{key}.")
            elif value:
                yield f"{prefix}{key}", ", ".join(map(_text, value))
        elif isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", _text(value)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(enabled_extensions=("html.j2",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (title, cosine, measured, integer, milliseconds, megabytes, ratio, excerpt, flatten):
        environment.filters[function.__name__] = function
    return environment
