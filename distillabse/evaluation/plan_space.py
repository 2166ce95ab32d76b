"""The shapes that a plan measures, and which of the measured ones are worth training."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from pydantic import ValidationError

from distillabse.config import DenseStudentConfig, PlanConfig
from distillabse.errors import ConfigurationError
from distillabse.models.shape import TransformerShape, resolve_shape

SHAPE = tuple(field.name for field in fields(TransformerShape))


def candidates(
    space: PlanConfig, student: DenseStudentConfig, teacher: TransformerShape
) -> tuple[list[DenseStudentConfig], list[dict[str, Any]]]:
    """Every combination of the lists of `space` that a student of this teacher can have.

    Args:
        space: Lists of depths and widths; the hidden sizes are by default the teacher's own, a half and a third of it.
        student: The block that the candidates share but for their shape.
        teacher: The shape of the encoder that the student would be built from.

    Returns:
        The students, each with all of its widths filled in and no shape twice, and what was left out: for each refused
        combination its "shape" as asked for and the "reason".

    Raises:
        ConfigurationError: nothing remains.
    """
    found: list[DenseStudentConfig] = []
    left_out: list[dict[str, Any]] = []
    for values in itertools.product(
        space.layers,
        _or_default(space.hidden_size, _default_widths(teacher.hidden_size)),
        _or_default(space.intermediate_size, [None]),
        _or_default(space.attention_heads, [student.attention_heads]),
        space.embedding_size,
    ):
        asked = dict(zip(SHAPE, values, strict=True))
        try:
            candidate = _resolved(student, asked, teacher)
        except ConfigurationError as error:
            left_out.append({"shape": {key: value for key, value in asked.items() if value}, "reason": str(error)})
            continue
        if candidate not in found:
            found.append(candidate)
    if not found:
        raise ConfigurationError(
            f"plan: none of its {len(left_out)} shapes can be built from this teacher; the first is refused because: "
            f"{left_out[0]['reason']} Change plan.layers, plan.hidden_size or plan.attention_heads."
        )
    return found, left_out


def student_block(student: DenseStudentConfig) -> dict[str, Any]:
    """The `student` block of a configuration: the whole shape, and what else differs from the defaults."""
    changed = student.model_dump(mode="json", exclude_defaults=True)
    return {key: getattr(student, key) for key in SHAPE} | {key: changed[key] for key in changed if key not in SHAPE}


def pareto_set(points: Sequence[Sequence[float]]) -> list[bool]:
    """For each point whether no other is at least as high in every coordinate and higher in one."""

    def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
        pairs = list(zip(one, other, strict=True))
        return all(left >= right for left, right in pairs) and any(left > right for left, right in pairs)

    return [not any(dominates(other, point) for other in points) for point in points]


def merits(candidate: Mapping[str, Any], batch: int) -> tuple[float, int, int]:
    """What is wanted of a measured candidate, all of it as high as possible: speedup, encoder parameters, layers.

    The speedup stands for the latency: it is paired with a teacher that was measured in the same minutes, so that it
    can be compared between candidates that were not.
    """
    return (
        candidate["speedup"][str(batch)]["value"],
        candidate["encoder_parameters"],
        candidate["shape"]["layers"],
    )


def choose(measured: Sequence[Mapping[str, Any]], speedup: float, batch: int) -> int | None:
    """Number of the largest candidate that reaches the speedup: the lower end of its 95 % interval must.

    Largest is most parameters in the encoder; where they are equal more layers, then more parameters in all, and then
    the faster one. None reaches it: None.
    """
    reaching = [
        index for index, candidate in enumerate(measured) if candidate["speedup"][str(batch)]["ci95"][0] >= speedup
    ]

    def size(index: int) -> tuple[float, ...]:
        speed, parameters, layers = merits(measured[index], batch)
        return parameters, layers, measured[index]["parameters"], speed

    return max(reaching, key=size, default=None)


def _resolved(student: DenseStudentConfig, asked: Mapping[str, Any], teacher: TransformerShape) -> DenseStudentConfig:
    """The student with this shape, every width filled in."""
    block = student.model_dump()
    try:
        shape, _ = resolve_shape(DenseStudentConfig.model_validate({**block, **asked}), teacher)
        return DenseStudentConfig.model_validate({**block, **asdict(shape)})
    except ValidationError as error:
        reasons = ("{}: {}".format(".".join(map(str, item["loc"])), item["msg"]) for item in error.errors())
        reason = "; ".join(reasons).removeprefix(": ").replace("Value error, ", "")
        raise ConfigurationError(f"{reason}.") from None


def _default_widths(width: int) -> list[int]:
    return [width // part for part in (1, 2, 3) if width % part == 0]


def _or_default(values: Sequence[Any] | None, default: Sequence[Any]) -> Sequence[Any]:
    return default if values is None else values
