"""What a gate is, and how checks are run: one that breaks off, or judges nothing, is a gate that failed."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from distillabse.errors import GateFailed, first_line

logger = logging.getLogger(__name__)

BUNDLE = "bundle"
_NAMED = 5


@dataclass(frozen=True)
class Gate:
    """One requirement and what was found.

    Attributes:
        gate: what is required, in words.
        artefact: of which artefact: "torch", a graph such as "onnx-int8", or "bundle" for the folder as a whole.
        set: name of the texts that it was measured on, if any.
        value: what was found; None where it is not a finite number or could not be measured.
        limit: what it is compared with.
        passed: whether it is met.
        relation: how `value` must stand to `limit`.
        detail: what the figure alone does not say, e.g. which files, or an error.
    """

    gate: str
    artefact: str
    set: str | None
    value: float | None
    limit: float | None
    passed: bool
    relation: Literal["at least", "at most", "exactly"] = "at least"
    detail: str | None = None


def at_least(gate: str, artefact: str, value: float, limit: float, where: str | None = None, detail: str = "") -> Gate:
    """Passed where `value` >= `limit`; never where it is not finite."""
    return Gate(
        gate, artefact, where, _finite(value), limit, _is_finite(value) and value >= limit, detail=detail or None
    )


def at_most(gate: str, artefact: str, value: float, limit: float, where: str | None = None, detail: str = "") -> Gate:
    """Passed where `value` <= `limit`; never where it is not finite."""
    passed = _is_finite(value) and value <= limit
    return Gate(gate, artefact, where, _finite(value), limit, passed, "at most", detail or None)


def exactly(gate: str, artefact: str, value: float, limit: float, detail: str = "") -> Gate:
    """Passed where `value` == `limit`."""
    return Gate(gate, artefact, None, _finite(value), limit, value == limit, "exactly", detail or None)


def none_of(gate: str, artefact: str, found: Iterable[str]) -> Gate:
    """Passed where nothing was found; `gate` names what must not be, the detail the first few."""
    names = list(found)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return exactly(gate, artefact, len(names), 0, "; ".join(names[:_NAMED]) + more)


@dataclass(frozen=True)
class Outcome:
    """What one check found: its gates, and the figures behind them."""

    gates: list[Gate]
    figures: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Check:
    """Something to examine.

    Attributes:
        section: where its figures stand in the result: `result[section][artefact]`.
        artefact: what it examines.
        run: examines it; whatever it raises becomes a failed gate.
    """

    section: str
    artefact: str
    run: Callable[[], Outcome]


@dataclass
class Findings:
    """Gates and figures of all checks so far; `sections` holds plain values, figures by section and artefact."""

    gates: list[Gate] = field(default_factory=list)
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)

    def result(self) -> dict[str, Any]:
        """What is written as JSON: the sections, "gates" and "passed"."""
        gates = [asdict(gate) for gate in self.gates]
        return {**plain(self.sections), "gates": gates, "passed": not failed_gates(gates)}


def run_checks(checks: Sequence[Check], findings: Findings) -> None:
    """Run every check, with a progress bar on a terminal, and add what they found to `findings`."""
    with _progress() as progress:
        task = progress.add_task("", total=len(checks))
        for check in checks:
            progress.update(task, description=f"{check.section}, {check.artefact}")
            outcome = _outcome(check)
            findings.gates += outcome.gates
            if outcome.figures is not None:
                findings.sections.setdefault(check.section, {})[check.artefact] = outcome.figures
            progress.advance(task)


def failed_gates(gates: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The gates, as in the JSON, that did not pass; no gate at all is a failure, too."""
    if not gates:
        return [asdict(Gate("gates that were examined", BUNDLE, None, 0, 1, False))]
    return [gate for gate in gates if gate["passed"] is not True]


def require_passed(gates: Sequence[Mapping[str, Any]], see: str) -> None:
    """Judge gates as they stand in the JSON.

    Args:
        gates: all of them.
        see: where the reader finds them.

    Raises:
        GateFailed: one of them failed, or there is none.
    """
    if failed := failed_gates(gates):
        lines = "\n".join(f"  {describe(gate)}" for gate in failed)
        raise GateFailed(f"{len(failed)} of {len(gates)} gates failed:\n{lines}\nSee {see}.")
    logger.info("All %d gates passed", len(gates))


def describe(gate: Mapping[str, Any]) -> str:
    """One line on a gate of the JSON."""
    found = "no figure" if gate["value"] is None else f"{gate['value']:.6g}"
    needs = "" if gate["limit"] is None else f", needs {gate['relation']} {gate['limit']:.6g}"
    detail = f" ({gate['detail']})" if gate["detail"] else ""
    return f"{gate['gate']} of {gate['artefact']}: {found}{needs}{detail}"


def plain(value: Any) -> Any:
    """The same value with None for every figure that is not finite, which JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return _finite(value) if isinstance(value, float) else value


def _outcome(check: Check) -> Outcome:
    try:
        outcome = check.run()
        reason = "" if outcome.gates else "it judged nothing"
    except Exception as error:  # one check that breaks off must neither pass nor hide what the others find
        logger.debug("%s of %s broke off", check.section, check.artefact, exc_info=True)
        outcome, reason = Outcome([]), f"{type(error).__name__}: {first_line(error)}"
    if not reason:
        return outcome
    return Outcome([Gate(f"{check.section} can be examined", check.artefact, None, None, None, False, detail=reason)])


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _finite(value: float | None) -> float | None:
    return value if _is_finite(value) else None
