"""The graph with its weights in half precision: half the size, for GPUs and browsers with WebGPU."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from distillabse.encoder import import_onnxruntime
from distillabse.errors import InputError
from distillabse.export.graph import PROTOBUF_LIMIT

# Added to the attention scores of padding. exp(-10000) is 0 in float32 and in float16, and no sum with it overflows.
_MASK = -1e4
_LARGEST = float(np.finfo(np.float16).max)


def to_float16(source: Path, target: Path) -> None:
    """Write the half-precision form of the fp32 graph `source` to `target`.

    Inputs and outputs keep their types. Everything after `last_hidden_state`, i.e. pooling, Dense head and
    normalisation, stays in float32: sums over tokens and squares can exceed the largest half, 65504.

    Raises:
        InputError: the weights of `source` do not fit into one file.
        ConfigurationError: ONNX Runtime, whose converter this is, is not installed.
    """
    import_onnxruntime()
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    if sum(file.stat().st_size for file in source.parent.glob(f"{source.name}*")) > PROTOBUF_LIMIT:
        raise InputError(f"{source} is over 2 GB, more than a graph for browsers can hold. Use a smaller vocabulary.")
    model = onnx.load(str(source))
    _soften_mask(model.graph)
    head = _cut_head(model.graph)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # it tells of every weight that is too small for a half and becomes the smallest
        half = convert_float_to_float16(model, keep_io_types=True)
    half.graph.node.extend(head.node)
    half.graph.initializer.extend(head.initializer)
    half.graph.output.extend(head.output)
    onnx.save(half, str(target))
    onnx.checker.check_model(str(target))


def _soften_mask(graph: Any) -> None:
    """Replace the lowest float32, which is -infinity as a half and then NaN in a row that is all padding."""
    from onnx import numpy_helper

    for tensor in graph.initializer:
        if tensor.data_type == tensor.FLOAT and not tensor.dims:
            if numpy_helper.to_array(tensor) < -_LARGEST:
                tensor.CopyFrom(numpy_helper.from_array(np.float32(_MASK), tensor.name))


def _cut_head(graph: Any) -> Any:
    """Take what makes the sentence vector of the last hidden state and the inputs, with its constants, out of `graph`.

    What both parts read, such as the mask as floats, the head gets a second time: the body's will be halves.
    """
    import onnx

    states, embedding = graph.output
    constants = {tensor.name: tensor for tensor in graph.initializer}
    shared = {states.name, embedding.name, "", *(value.name for value in graph.input)}
    head = onnx.GraphProto()
    for node in _makers(graph, embedding.name, until=states.name):
        copied = head.node.add()
        copied.CopyFrom(node)
        copied.name = f"head_{node.name}"
        for names in (copied.input, copied.output):
            names[:] = [name if name in shared else f"head_{name}" for name in names]
    for name in sorted({name.removeprefix("head_") for node in head.node for name in node.input} & constants.keys()):
        head.initializer.add().CopyFrom(constants[name])
        head.initializer[-1].name = f"head_{name}"
    head.output.append(embedding)
    body = _makers(graph, states.name)
    read = {name for node in body for name in node.input}
    kept = [tensor for name, tensor in constants.items() if name in read]
    del graph.node[:], graph.output[:], graph.initializer[:]
    graph.node.extend(body)
    graph.output.append(states)
    graph.initializer.extend(kept)
    return head


def _makers(graph: Any, value: str, until: str | None = None) -> list[Any]:
    """The nodes that `value` is made by, in their order; `until` is taken as given."""
    wanted, nodes = {value}, []
    for node in reversed(graph.node):  # in topological order
        if not wanted.isdisjoint(set(node.output) - {until}):
            wanted.update(node.input)
            nodes.append(node)
    return nodes[::-1]
