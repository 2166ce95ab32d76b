"""INT8 that does not depend on the neighbours: weights per output channel, activations per token, embeddings per row.

Plain dynamic quantisation shares one activation scale in the whole batch, so a sentence's vector moves with whatever
it is batched with. Here every token has a scale and a zero point of its own, from the minimum and maximum of its row:

    x = scale * (q - zero),  q in uint8        w = weight_scale * p,  p in int8, one weight_scale per output channel
    x . w = (q . p - zero * sum(p)) * weight_scale * scale

`q . p` is MatMulInteger of uint8 with int8, the fastest integer product of ONNX Runtime on x86 (int8 with int8 is
several times slower). The int32 product is multiplied by the weight scale first and by the token scale last: were the
two scales multiplied with each other first, ONNX Runtime's extended optimisation would fuse the pattern wrongly.

A router stays in float32: it is small, and its choices are not a matter of precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from distillabse.export.switch import ExpertProduct, expert_products, routers

_SMALLEST = np.float32(1e-12)


@dataclass(frozen=True)
class Quantized:
    """How much of a graph is now INT8."""

    matmuls: int
    embeddings: int


def quantize(source: Path, target: Path, *, embeddings: bool = True, reduce_range: bool = False) -> Quantized:
    """Write the INT8 form of the fp32 graph `source` to `target`.

    Args:
        source: graph with MatMul nodes whose second input is a constant [inputs, outputs] matrix.
        target: where to write; inputs, outputs and their types stay as they are.
        embeddings: also store the largest embedding table as INT8 rows, each with its scale.
        reduce_range: 7-bit weights, for CPUs whose 8-bit products saturate (AVX2 and AVX-512 without VNNI).
    """
    model = onnx.load(str(source))
    rewriter = _Rewriter(model.graph, 63 if reduce_range else 127)
    done = rewriter.rewrite(embeddings)
    onnx.checker.check_model(model)
    onnx.save(model, str(target))
    return done


def quantize_columns(weight: NDArray[np.float32], largest: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric int8 weights [inputs, outputs] and one float32 scale per output: weight = scale * int8."""
    scale = np.maximum(np.abs(weight).max(axis=0), _SMALLEST).astype(np.float32) / np.float32(largest)
    return np.clip(np.round(weight / scale), -largest, largest).astype(np.int8), scale


def quantized_matrix(
    weight: NDArray[np.float32], largest: int
) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.float32]]:
    """`quantize_columns`, and the scaled sum of every column, which takes the tokens' zero points out of a product."""
    quantized, scale = quantize_columns(weight, largest)
    return quantized, scale, quantized.sum(axis=0, dtype=np.int64).astype(np.float32) * scale


@dataclass
class _Rewriter:
    graph: Any
    largest: int
    nodes: list[Any] = field(default_factory=list)
    constants: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, tuple[str, str, str]] = field(default_factory=dict)

    def rewrite(self, embeddings: bool) -> Quantized:
        weights = {tensor.name: tensor for tensor in self.graph.initializer}
        table = self._largest_table(weights) if embeddings else None
        experts, kept_in_float = expert_products(self.graph), routers(self.graph)
        replaced = {name for product in experts.values() for name in product.replaced}
        matmuls = tables = 0
        for node in self.graph.node:
            if node.name in replaced:
                if (product := experts.get(node.output[0])) is not None:
                    self._expert_product(product, weights)
                    matmuls += len(product.weights)
            elif (
                node.op_type == "MatMul"
                and node.input[1] in weights
                and len(weights[node.input[1]].dims) == 2
                and node.input[1] not in kept_in_float
            ):
                self._matmul(node, numpy_helper.to_array(weights[node.input[1]]))
                matmuls += 1
            elif node.op_type == "Gather" and node.input[0] == table:
                self._embedding(node, numpy_helper.to_array(weights[table]))
                tables += 1
            else:
                self.nodes.append(node)
        self._replace(weights)
        return Quantized(matmuls, tables)

    def _matmul(self, node: Any, weight: NDArray[np.float32]) -> None:
        x, name = node.input[0], node.input[1]
        quantized, scale, column_sums = quantized_matrix(weight, self.largest)
        rows, token_scale, zero = self._quantized_rows(x, weight.shape[0])
        product = self._add("MatMulInteger", [rows, self._constant(f"{name}_int8", quantized)])
        weight_scale = self._constant(f"{name}_scale", scale)
        scaled = self._scaled(product, weight_scale, self._constant(f"{name}_column_sums", column_sums), zero)
        result = self._add("Mul", [scaled, token_scale])
        shape = self._add("Concat", [self._leading_shape(x), self._integers("outputs", [weight.shape[1]])], axis=0)
        self.nodes.append(helper.make_node("Reshape", [result, shape], [node.output[0]], name=f"{node.name}_int8"))

    def _expert_product(self, product: ExpertProduct, weights: dict[str, Any]) -> None:
        """Rows are quantised before they are cut into parts, and scaled after they are joined: once for all experts."""
        matrices = [numpy_helper.to_array(weights[name]) for name in product.weights]
        quantized, scales, sums = zip(*(quantized_matrix(matrix, self.largest) for matrix in matrices), strict=True)
        rows, token_scale, zero = self._quantized_rows(product.tokens, matrices[0].shape[0])
        name = product.result
        parts = [f"{name}_part_{index}" for index in range(len(matrices))]
        self.nodes.append(helper.make_node("Split", [rows, product.counts], parts, name=f"{name}_parts", axis=0))
        integers = [
            self._add("MatMulInteger", [part, self._constant(f"{weight}_int8", matrix)])
            for part, weight, matrix in zip(parts, product.weights, quantized, strict=True)
        ]
        scale = self._add("Gather", [self._constant(f"{name}_scale", np.stack(scales)), product.experts])
        column_sums = self._add("Gather", [self._constant(f"{name}_column_sums", np.stack(sums)), product.experts])
        scaled = self._scaled(self._add("Concat", integers, axis=0), scale, column_sums, zero)
        self.nodes.append(helper.make_node("Mul", [scaled, token_scale], [name], name=f"{name}_int8"))

    def _scaled(self, product: str, scale: str, column_sums: str, zero: str) -> str:
        """(q . p) * weight_scale - zero * sum(p) * weight_scale; all but the token scale."""
        wide = self._add("Mul", [self._add("Cast", [product], to=TensorProto.FLOAT), scale])
        return self._add("Sub", [wide, self._add("Mul", [zero, column_sums])])

    def _quantized_rows(self, x: str, width: int) -> tuple[str, str, str]:
        """Nodes that quantise `x` row by row, made once for all its consumers.

        Returns:
            Names of: uint8 [tokens, width], float32 scale [tokens, 1], float32 zero point [tokens, 1].
        """
        if x not in self.rows:
            last, nothing = self._integers("last_axis", [-1]), self._constant("nothing", np.float32(0))
            flat = self._add("Reshape", [x, self._integers("rows_of", [-1, width])])
            # The range includes zero, so that the zero point is a uint8.
            high = self._add("Max", [self._add("ReduceMax", [flat, last], keepdims=0), nothing])
            low = self._add("Min", [self._add("ReduceMin", [flat, last], keepdims=0), nothing])
            span = self._add("Mul", [self._add("Sub", [high, low]), self._constant("step", np.float32(1 / 255))])
            scale = self._add("Max", [span, self._constant("smallest", _SMALLEST)])
            zero = self._add("Round", [self._add("Div", [self._add("Neg", [low]), scale])])
            zero_byte = self._add("Cast", [zero], to=TensorProto.UINT8)
            rows = self._add("QuantizeLinear", [flat, scale, zero_byte], axis=0)
            self.rows[x] = rows, self._add("Unsqueeze", [scale, last]), self._add("Unsqueeze", [zero, last])
        return self.rows[x]

    def _leading_shape(self, x: str) -> str:
        """Name of the shape of `x` without its last axis, made once."""
        name = f"{x}_leading_shape"
        if all(name not in node.output for node in self.nodes):
            shape = self._add("Shape", [x])
            start, end = self._integers("first", [0]), self._integers("last_axis", [-1])
            self.nodes.append(helper.make_node("Slice", [shape, start, end], [name], name=name))
        return name

    def _embedding(self, node: Any, table: NDArray[np.float32]) -> None:
        quantized, scale = quantize_columns(table.T, 127)
        name = node.input[0]
        rows = self._add("Gather", [self._constant(f"{name}_int8", quantized.T.copy()), node.input[1]])
        scales = self._add("Gather", [self._constant(f"{name}_scale", scale[:, None]), node.input[1]])
        wide = self._add("Cast", [rows], to=TensorProto.FLOAT)
        self.nodes.append(helper.make_node("Mul", [wide, scales], [node.output[0]], name=f"{node.name}_int8"))

    def _largest_table(self, weights: dict[str, Any]) -> str | None:
        tables = [
            node.input[0]
            for node in self.graph.node
            if node.op_type == "Gather"
            and node.input[0] in weights
            and len(weights[node.input[0]].dims) == 2
            and weights[node.input[0]].data_type == TensorProto.FLOAT
        ]
        return max(tables, key=lambda name: weights[name].dims[0], default=None)

    def _replace(self, weights: dict[str, Any]) -> None:
        """Put the new nodes in place, and drop what nothing reads any more."""
        read = {name for node in self.nodes for name in node.input}
        kept = [tensor for name, tensor in weights.items() if name in read]
        del self.graph.node[:], self.graph.initializer[:], self.graph.value_info[:]
        self.graph.node.extend(self.nodes)
        self.graph.initializer.extend([*kept, *self.constants.values()])

    def _add(self, operator: str, inputs: Sequence[str], **attributes: Any) -> str:
        name = f"int8_{len(self.nodes)}_{operator}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def _constant(self, name: str, value: Any) -> str:
        self.constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def _integers(self, name: str, values: list[int]) -> str:
        return self._constant(f"{name}_{'_'.join(str(value) for value in values)}", np.array(values, dtype=np.int64))
