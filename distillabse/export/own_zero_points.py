"""INT8 products that need no calibration: every token has a scale and a zero point from its own minimum and maximum.

    x = scale * (q - zero),  q in uint8        w = weight_scale * p,  p in int8, one weight_scale per output channel
    x . w = (q . p - zero * sum(p)) * weight_scale * scale

`q . p` is MatMulInteger of uint8 with int8, the fastest integer product of ONNX Runtime on x86 (int8 with int8 is
several times slower). The int32 product is multiplied by the weight scale first and by the token scale last: were the
two scales multiplied with each other first, ONNX Runtime's extended optimisation would fuse the pattern wrongly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from distillabse.export.editing import GraphEditor
from distillabse.export.switch import ExpertProduct

_SMALLEST = np.float32(1e-12)


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


class OwnZeroPoints:
    """Adds such products to a graph."""

    def __init__(self, edit: GraphEditor, largest: int) -> None:
        self.edit = edit
        self.largest = largest
        self.rows: dict[str, tuple[str, str, str]] = {}

    def matmul(self, node: Any, x: str) -> None:
        """The product of `x` with the node's constant matrix."""
        edit, name = self.edit, node.input[1]
        weight = edit.weight(name)
        quantized, scale, column_sums = quantized_matrix(weight, self.largest)
        rows, token_scale, zero = self._quantized_rows(x, weight.shape[0])
        product = edit.add("MatMulInteger", [rows, edit.constant(f"{name}_int8", quantized)])
        weight_scale = edit.constant(f"{name}_scale", scale)
        scaled = self._scaled(product, weight_scale, edit.constant(f"{name}_column_sums", column_sums), zero)
        result = edit.add("Mul", [scaled, token_scale])
        shape = edit.add("Concat", [self._leading_shape(x), edit.integers("outputs", [weight.shape[1]])], axis=0)
        edit.add("Reshape", [result, shape], node.output[0])

    def expert_product(self, product: ExpertProduct) -> None:
        """Rows are quantised before they are cut into parts, and scaled after they are joined: once for all experts."""
        edit = self.edit
        matrices = [edit.weight(name) for name in product.weights]
        quantized, scales, sums = zip(*(quantized_matrix(matrix, self.largest) for matrix in matrices), strict=True)
        rows, token_scale, zero = self._quantized_rows(product.tokens, matrices[0].shape[0])
        name = product.result
        parts = [f"{name}_part_{index}" for index in range(len(matrices))]
        edit.nodes.append(helper.make_node("Split", [rows, product.counts], parts, name=f"{name}_parts", axis=0))
        integers = [
            edit.add("MatMulInteger", [part, edit.constant(f"{weight}_int8", matrix)])
            for part, weight, matrix in zip(parts, product.weights, quantized, strict=True)
        ]
        scale = edit.add("Gather", [edit.constant(f"{name}_scale", np.stack(scales)), product.experts])
        column_sums = edit.add("Gather", [edit.constant(f"{name}_column_sums", np.stack(sums)), product.experts])
        scaled = self._scaled(edit.add("Concat", integers, axis=0), scale, column_sums, zero)
        edit.add("Mul", [scaled, token_scale], name)

    def _scaled(self, product: str, scale: str, column_sums: str, zero: str) -> str:
        """(q . p) * weight_scale - zero * sum(p) * weight_scale; all but the token scale."""
        wide = self.edit.add("Mul", [self.edit.add("Cast", [product], to=TensorProto.FLOAT), scale])
        return self.edit.add("Sub", [wide, self.edit.add("Mul", [zero, column_sums])])

    def _quantized_rows(self, x: str, width: int) -> tuple[str, str, str]:
        """Nodes that quantise `x` row by row, made once for all its consumers.

        Returns:
            Names of: uint8 [tokens, width], float32 scale [tokens, 1], float32 zero point [tokens, 1].
        """
        edit = self.edit
        if x not in self.rows:
            last, nothing = edit.integers("last_axis", [-1]), edit.constant("nothing", np.float32(0))
            flat = edit.add("Reshape", [x, edit.integers("rows_of", [-1, width])])
            # The range includes zero, so that the zero point is a uint8.
            high = edit.add("Max", [edit.add("ReduceMax", [flat, last], keepdims=0), nothing])
            low = edit.add("Min", [edit.add("ReduceMin", [flat, last], keepdims=0), nothing])
            span = edit.add("Mul", [edit.add("Sub", [high, low]), edit.constant("step", np.float32(1 / 255))])
            scale = edit.add("Max", [span, edit.constant("smallest", _SMALLEST)])
            zero = edit.add("Round", [edit.add("Div", [edit.add("Neg", [low]), scale])])
            zero_byte = edit.add("Cast", [zero], to=TensorProto.UINT8)
            rows = edit.add("QuantizeLinear", [flat, scale, zero_byte], axis=0)
            self.rows[x] = rows, edit.add("Unsqueeze", [scale, last]), edit.add("Unsqueeze", [zero, last])
        return self.rows[x]

    def _leading_shape(self, x: str) -> str:
        """Name of the shape of `x` without its last axis, made once."""
        name = f"{x}_leading_shape"
        if not self.edit.has(name):
            shape = self.edit.add("Shape", [x])
            start, end = self.edit.integers("first", [0]), self.edit.integers("last_axis", [-1])
            self.edit.add("Slice", [shape, start, end], name)
        return name
