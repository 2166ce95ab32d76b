"""Rewriting an ONNX graph node by node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import helper, numpy_helper

MICROSOFT = "com.microsoft"


class GraphEditor:
    """New nodes and constants for a graph, in the order in which they are added.

    Attributes:
        weights: the initializers that the graph came with, by name.
        made_by: the node that makes a tensor of the graph as it came.
        read_by: the nodes that read it.
        nodes: what the graph will consist of.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.graph = model.graph
        self.weights = {tensor.name: tensor for tensor in self.graph.initializer}
        self.made_by = {name: node for node in self.graph.node for name in node.output}
        self.read_by: dict[str, list[Any]] = {}
        for node in self.graph.node:
            for name in node.input:
                self.read_by.setdefault(name, []).append(node)
        self.nodes: list[Any] = []
        self._constants: dict[str, Any] = {}
        self._taken = set(self.made_by) | set(self.weights)

    def add(
        self, operator: str, inputs: Sequence[str], output: str | None = None, domain: str = "", **attributes: Any
    ) -> str:
        """Add a node with one output; returns the output's name."""
        name = output or self._free(f"{operator}_{len(self.nodes)}")
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, domain=domain, **attributes))
        return name

    def keep(self, node: Any, renamed: Mapping[str, str], output: str | None = None) -> None:
        """Add a node of the graph as it is, but that it reads `renamed` tensors, and calls its output `output`."""
        copy = type(node)()
        copy.CopyFrom(node)
        for index, name in enumerate(node.input):
            copy.input[index] = renamed.get(name, name)
        if output is not None:
            copy.output[0] = output
        self.nodes.append(copy)

    def has(self, name: str) -> bool:
        """Whether a node that was added makes the tensor."""
        return any(name in node.output for node in self.nodes)

    def constant(self, name: str, value: Any) -> str:
        """Name of a constant; the same name is the same constant."""
        self._constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def integers(self, name: str, values: list[int]) -> str:
        """Name of an int64 vector."""
        return self.constant(f"{name}_{'_'.join(str(value) for value in values)}", np.array(values, dtype=np.int64))

    def weight(self, name: str) -> NDArray[Any]:
        """Value of an initializer that the graph came with, or of a constant that was added."""
        value: NDArray[Any] = numpy_helper.to_array(self._constants.get(name) or self.weights[name])
        return value

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an initializer."""
        return tuple((self._constants.get(name) or self.weights[name]).dims)

    def is_constant(self, name: str) -> bool:
        """Whether a tensor is an initializer."""
        return name in self.weights or name in self._constants

    def finish(self) -> None:
        """Put the new nodes in place, and drop nodes and constants that nothing reads any more."""
        read = {value.name for value in self.graph.output}
        used = []
        for node in reversed(self.nodes):
            if read.intersection(node.output):
                read.update(node.input)
                used.append(node)
        self.nodes = used[::-1]
        kept = [tensor for name, tensor in self.weights.items() if name in read and name not in self._constants]
        added = [tensor for name, tensor in self._constants.items() if name in read]
        del self.graph.node[:], self.graph.initializer[:], self.graph.value_info[:]
        self.graph.node.extend(self.nodes)
        self.graph.initializer.extend([*kept, *added])
        domains = {entry.domain for entry in self.model.opset_import}
        if MICROSOFT not in domains and any(node.domain == MICROSOFT for node in self.nodes):
            self.model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))

    def _free(self, wanted: str) -> str:
        name = wanted
        while name in self._taken:
            name = f"{name}_"
        self._taken.add(name)
        return name
