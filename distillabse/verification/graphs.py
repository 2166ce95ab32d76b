"""Gates on the graphs: valid ONNX, the agreed inputs and outputs, and what ONNX Runtime makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from distillabse.export.graph import INPUTS, OUTPUTS, PROTOBUF_LIMIT, count_after_optimisation
from distillabse.export.switch import count_expert_products
from distillabse.verification.gates import Gate, Outcome, exactly, none_of
from distillabse.verification.kinds import EXPECTED, OPERATORS, Graph
from distillabse.verification.subject import Subject

OPSETS = range(17, 24)
# ONNX Runtime 1.18 and later read it; opset 18 needs no newer one.
NEWEST_IR_VERSION = 10
PRODUCER = "distillabse"
_DOMAINS = ("", "ai.onnx", "com.microsoft")


def examine_graph(subject: Subject, graph: Graph) -> Outcome:
    """A valid graph of ours, with the inputs, outputs and versions that consumers rely on.

    Returns:
        Gates, and as figures opset, ir_version, producer and the bytes of the file with its external data.
    """
    import onnx

    path = subject.folder / graph.file
    onnx.checker.check_model(str(path))
    model = onnx.load(str(path), load_external_data=False)
    promised = subject.record.get("config", {}).get("export", {}).get("opset")
    size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    gates = [
        none_of("breaches of what consumers rely on", graph.artefact, _breaches(model, promised)),
        none_of("weights outside a file under 2 GB", graph.artefact, [] if size > PROTOBUF_LIMIT else _external(model)),
    ]
    return Outcome(gates, {"opset": _opset(model), "ir_version": model.ir_version, "producer": model.producer_name,
                           "size_bytes": size})  # fmt: skip


def examine_operators(subject: Subject, graph: Graph) -> Outcome:
    """ONNX Runtime finds in a graph what it was written to hold; figures are all operators after optimisation."""
    wanted = EXPECTED[graph.kind](subject.settings, subject.record)
    path = subject.folder / graph.file
    counts = dict(count_after_optimisation(path))
    if "expert products" in wanted:
        counts["expert products"] = count_expert_products(path)
    return Outcome([_counted(graph.artefact, what, counts, count) for what, count in wanted.items()], counts)


def _counted(artefact: str, what: str, counts: dict[str, int], wanted: int) -> Gate:
    found = sum(counts.get(operator, 0) for operator in OPERATORS[what])
    return exactly(f"{what} in the graph", artefact, found, wanted)


def _breaches(model: Any, promised_opset: int | None) -> Iterator[str]:
    opset = _opset(model)
    if opset not in OPSETS:
        yield f"operator set {opset}, outside {OPSETS.start} to {OPSETS.stop - 1}"
    if promised_opset not in (None, opset):
        yield f"operator set {opset}, where the record says {promised_opset}"
    if model.ir_version > NEWEST_IR_VERSION:
        yield f"IR version {model.ir_version}, newer than {NEWEST_IR_VERSION}"
    if model.producer_name != PRODUCER:
        yield f"written by {model.producer_name or 'nobody'!r}, not by {PRODUCER}"
    for function in model.functions:
        yield f"a function of its own, {function.name}"
    for operator in sorted(
        {f"{node.domain}.{node.op_type}" for node in model.graph.node if node.domain not in _DOMAINS}
    ):
        yield f"operator {operator} of an unknown domain"
    yield from _interface_breaches(model.graph)


def _interface_breaches(graph: Any) -> Iterator[str]:
    from onnx import TensorProto

    constants = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    for what, found, wanted in (("inputs", inputs, INPUTS), ("outputs", graph.output, OUTPUTS)):
        if (names := tuple(value.name for value in found)) != wanted:
            yield f"{what} {', '.join(names)} instead of {', '.join(wanted)}"
    elements = {**dict.fromkeys(INPUTS, TensorProto.INT64), **dict.fromkeys(OUTPUTS, TensorProto.FLOAT)}
    ranks = {**dict.fromkeys(INPUTS, 2), OUTPUTS[0]: 3, OUTPUTS[1]: 2}
    for value in (*inputs, *graph.output):
        tensor = value.type.tensor_type
        if tensor.elem_type != elements.get(value.name, tensor.elem_type):
            yield f"{value.name} of type {TensorProto.DataType.Name(tensor.elem_type)}"
        if len(tensor.shape.dim) != ranks.get(value.name, len(tensor.shape.dim)):
            yield f"{value.name} with {len(tensor.shape.dim)} axes"
        if value.name in INPUTS and any(axis.HasField("dim_value") for axis in tensor.shape.dim):
            yield f"{value.name} with a fixed axis"


def _opset(model: Any) -> int:
    return next((int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def _external(model: Any) -> list[str]:
    from onnx.external_data_helper import uses_external_data

    return [tensor.name for tensor in model.graph.initializer if uses_external_data(tensor)]
