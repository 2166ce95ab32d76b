"""INT8 graphs: weights per output channel, activations per token or with one constant scale, embeddings per row.

Every kind is independent of the batch: a text's vector does not move with its neighbours, as it does with plain dynamic
quantisation, which shares one activation scale in the whole batch. What the numbers are is decided before
(`distillabse.quantization`); here they become nodes.

`per_token`: every token has its own scale, and all have a constant zero point z. With rows x, and scale_t of each row:

    q = QuantizeLinear(x, scale_t, z)        y = scale_t * MatMulIntegerToFloat(q, weight, 1, scale_n, z) + bias

`static`: QuantizeLinear and DequantizeLinear with constant scales around plain MatMul, the form that ONNX Runtime,
OpenVINO and TensorRT all read and fuse.

A product for which no numbers are given, like those of experts, has zero points of its own
(`distillabse.export.own_zero_points`).

A router stays in float32: it is small, and its choices are not a matter of precision.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from distillabse.export.editing import MICROSOFT, GraphEditor
from distillabse.export.flattening import flatten_tokens
from distillabse.export.graph import PROTOBUF_LIMIT, linear_of, save_graph
from distillabse.export.own_zero_points import OwnZeroPoints, quantize_columns
from distillabse.export.switch import expert_products, routers
from distillabse.quantization.linears import CENTRE, LEVELS

if TYPE_CHECKING:
    from distillabse.quantization import QuantizedLinear


@dataclass(frozen=True)
class Quantized:
    """How much of a graph is now INT8."""

    matmuls: int
    embeddings: int


def quantize(
    source: Path,
    target: Path,
    linears: Mapping[str, QuantizedLinear] | None = None,
    *,
    embeddings: bool = True,
    largest: int = 127,
) -> Quantized:
    """Write the INT8 form of the fp32 graph `source` to `target`.

    Args:
        source: graph that `export_graph` wrote.
        target: where to write; inputs, outputs and their types stay as they are.
        linears: the layers by their names in the transformer. What is not among them is rounded to the nearest.
        embeddings: also store the largest embedding table as INT8 rows, each with its scale.
        largest: greatest weight of what is not in `linears`, 63 for CPUs whose 8-bit products saturate (AVX2 and
            AVX-512 without VNNI).
    """
    model = onnx.load(str(source))
    if linears and all(linear.input_scale is None for linear in linears.values()):
        # Scales of rows need rows. Static products do without: two-axis products would be fused to Gemm, which
        # ONNX Runtime does not know in INT8 without a scale for its outputs.
        flatten_tokens(model)
    rewriter = _Rewriter(model, linears or {}, largest)
    done = rewriter.rewrite(embeddings)
    _save(model, target)
    return done


def quantize_weights(source: Path, target: Path, *, embeddings: bool = True) -> Quantized:
    """Write `source` with 8-bit weights, a scale for every 32 inputs of an output (MatMulNBits).

    Inputs are rounded to 8 bits inside of each product, by the same blocks of every token, so a vector does not depend
    on the batch. It needs no calibration.

    Args:
        source, target, embeddings: as in `quantize`.
    """
    from onnxruntime.quantization import matmul_nbits_quantizer

    logging.getLogger(matmul_nbits_quantizer.__name__).setLevel(logging.WARNING)  # it tells of every node
    model = onnx.load(str(source))
    matmuls = sum(linear_of(node) is not None for node in model.graph.node)
    kept = [node.name for node in model.graph.node if node.op_type == "MatMul" and linear_of(node) is None]
    # Level 4 is the integer product. Without it weights are turned back to float32 in every call: several times slower.
    quantizer = matmul_nbits_quantizer.MatMulNBitsQuantizer(
        model, bits=8, block_size=32, is_symmetric=True, accuracy_level=4, nodes_to_exclude=kept
    )
    quantizer.process()
    model = quantizer.model.model
    done = _Rewriter(model, {}, 127).rewrite(embeddings)
    _save(model, target)
    return Quantized(matmuls, done.embeddings)


def _save(model: Any, target: Path) -> None:
    size = sum(tensor.ByteSize() for tensor in model.graph.initializer)
    save_graph(model, target, inline=size <= PROTOBUF_LIMIT)
    onnx.checker.check_model(str(target))


class _Rewriter:
    """Replaces products and the embedding table of a graph."""

    def __init__(self, model: Any, linears: Mapping[str, QuantizedLinear], largest: int) -> None:
        self.edit = GraphEditor(model)
        self.own_zero_points = OwnZeroPoints(self.edit, largest)
        self.rows: dict[str, tuple[str, ...]] = {}
        # Products that have numbers, by the tensor they read; biases that take back what a shift took away.
        self.linears: dict[str, QuantizedLinear] = {}
        self.readers: dict[str, list[Any]] = {}
        for node in self.edit.graph.node:
            linear = linears.get(linear_of(node) or "")
            if linear is not None:
                self.linears[node.output[0]] = linear
                self.readers.setdefault(node.input[0], []).append(node)
        self.restored: dict[str, str] = {}
        self.biases: dict[str, NDArray[np.float32]] = {}
        self.done: set[str] = set()

    def rewrite(self, embeddings: bool) -> Quantized:
        edit = self.edit
        table = self._largest_table() if embeddings else None
        experts, kept_in_float = expert_products(edit.graph), routers(edit.graph)
        replaced = {name for product in experts.values() for name in product.replaced}
        matmuls = tables = 0
        for node in edit.graph.node:
            if node.output[0] in self.done:
                continue
            if node.name in replaced:
                if (product := experts.get(node.output[0])) is not None:
                    self.own_zero_points.expert_product(product)
                    matmuls += len(product.weights)
            elif node.output[0] in self.linears:
                self._linear(node, self.linears[node.output[0]])
                matmuls += 1
            elif (
                node.op_type == "MatMul"
                and node.input[1] in edit.weights
                and len(edit.shape(node.input[1])) == 2
                and node.input[1] not in kept_in_float
            ):
                self.own_zero_points.matmul(node, self.restored.get(node.input[0], node.input[0]))
                matmuls += 1
            elif node.op_type == "Gather" and node.input[0] == table:
                self._embedding(node, edit.weight(node.input[0]))
                tables += 1
            elif node.op_type == "LayerNormalization" and self._moves(node.output[0]):
                self._moved_normalisation(node)
            else:
                edit.keep(node, self.restored)
        edit.finish()
        return Quantized(matmuls, tables)

    # Layers with numbers of their own

    def _linear(self, node: Any, linear: QuantizedLinear) -> None:
        """The product and the bias that follows it."""
        edit, name = self.edit, node.input[1]
        weight = edit.constant(f"{name}_int8", linear.weight.numpy().T.copy())
        scale = edit.constant(f"{name}_scale", linear.scale.numpy())
        output, bias = self._with_bias(node, linear)
        x = node.input[0]
        if linear.input_scale is None:
            rows, token_scale, zero = self._rows_with_constant_zero(x, linear)
            one = edit.constant("one", np.float32(1))
            wide = edit.add("MatMulIntegerToFloat", [rows, weight, one, scale, zero], domain=MICROSOFT)
            result = edit.add("Mul", [wide, token_scale])
        else:
            weights = edit.add("DequantizeLinear", [weight, scale], axis=1)
            result = edit.add("MatMul", [self._static_rows(x, linear), weights])
        # With two axes: ONNX Runtime fuses a one-axis bias with GELU into an operator that is slower than the two.
        edit.add("Add", [result, edit.constant(f"{output}_bias", bias[None, :])], output)

    def _with_bias(self, node: Any, linear: QuantizedLinear) -> tuple[str, NDArray[np.float32]]:
        """Name of what comes out of a layer, and its bias: that in the graph is replaced by the layer's own."""
        output = node.output[0]
        bias = linear.bias.numpy()
        if (add := self._bias_after(node)) is not None:
            output = add.output[0]
            self.done.add(output)
        return output, bias + self.biases.get(output, np.float32(0))

    def _bias_after(self, node: Any) -> Any:
        """The node that adds the bias of a product."""
        readers = self.edit.read_by.get(node.output[0], [])
        if len(readers) == 1 and readers[0].op_type == "Add":
            other = next((name for name in readers[0].input if name != node.output[0]), "")
            if other in self.edit.weights and len(self.edit.shape(other)) == 1:
                return readers[0]
        return None

    def _rows_with_constant_zero(self, x: str, linear: QuantizedLinear) -> tuple[str, str, str]:
        """Names of uint8 rows, float32 scales [tokens, 1] and the zero point, made once for all readers of `x`."""
        edit, zero_point = self.edit, linear.zero_point
        if x not in self.rows:
            last = edit.integers("last_axis", [-1])
            high = edit.add("ReduceMax", [x if zero_point != CENTRE else edit.add("Abs", [x]), last], keepdims=1)
            step = edit.constant(f"step_above_{zero_point}", np.float32(1 / (LEVELS - zero_point)))
            scale = edit.add("Mul", [high, step])
            if linear.least_scale > 0:
                scale = edit.add("Max", [scale, edit.constant(f"{x}_least_scale", np.float32(linear.least_scale))])
            rows = edit.add("QuantizeLinear", [x, edit.add("Reshape", [scale, last]), self._zeros(zero_point)], axis=0)
            self.rows[x] = rows, scale
        zero = edit.constant(f"zero_point_{zero_point}", np.uint8(zero_point))
        return *self.rows[x], zero  # type: ignore[return-value]

    def _zeros(self, zero_point: int) -> str:
        """Name of the zero point once for every token, made once for the graph: uint8 [tokens]."""
        name = f"zero_points_{zero_point}"
        if not self.edit.has(name):
            count = self.edit.add("ReduceProd", [self.edit.add("Shape", ["input_ids"])], keepdims=1)
            once = self.edit.constant(f"zero_point_{zero_point}_once", np.array([zero_point], np.uint8))
            self.edit.add("Expand", [once, count], name)
        return name

    def _static_rows(self, x: str, linear: QuantizedLinear) -> str:
        """Name of the rows after QuantizeLinear and DequantizeLinear, made once for all layers that read `x`."""
        edit = self.edit
        if x not in self.rows:
            scale = edit.constant(f"{x}_scale", np.float32(linear.input_scale))
            zero = edit.constant(f"{x}_zero_point", np.uint8(linear.zero_point))
            rows = edit.add("QuantizeLinear", [x, scale, zero])
            self.rows[x] = (edit.add("DequantizeLinear", [rows, scale, zero]),)
        return self.rows[x][0]

    # Shift and division, in the layer normalisation before

    def _moves(self, x: str) -> bool:
        readers = self.readers.get(x, [])
        return bool(readers) and self.linears[readers[0].output[0]].smoothing is not None

    def _moved_normalisation(self, node: Any) -> None:
        """The normalisation gives (x - shift) / smoothing; who reads x itself gets it back."""
        edit, x = self.edit, node.output[0]
        linear = self.linears[self.readers[x][0].output[0]]
        assert linear.smoothing is not None and linear.shift is not None
        smoothing, shift = linear.smoothing.numpy(), linear.shift.numpy()
        scale, bias = edit.weight(node.input[1]), edit.weight(node.input[2])
        edit.keep(node, self.restored)
        edit.nodes[-1].input[1] = edit.constant(f"{x}_weight_moved", scale / smoothing)
        edit.nodes[-1].input[2] = edit.constant(f"{x}_bias_moved", (bias - shift) / smoothing)
        others = [reader for reader in edit.read_by[x] if all(reader is not own for own in self.readers[x])]
        if others:
            back = edit.add("Mul", [x, edit.constant(f"{x}_smoothing", smoothing)])
            biased = [self._biased_partner(reader, x) for reader in others]
            if len(others) == 1 and biased[0] is not None:
                # The residual connection: the shift goes into the bias of what is added.
                self.biases[biased[0]] = shift
            else:
                back = edit.add("Add", [back, edit.constant(f"{x}_shift", shift)])
            self.restored[x] = back

    def _biased_partner(self, reader: Any, x: str) -> str | None:
        """What an Add adds to `x`, where that is a layer with numbers and a bias."""
        if reader.op_type != "Add":
            return None
        partner = next((name for name in reader.input if name != x), "")
        maker = self.edit.made_by.get(partner)
        if maker is None or maker.op_type != "Add":
            return None
        return partner if any(name in self.linears for name in maker.input) else None

    # The embedding table

    def _embedding(self, node: Any, table: NDArray[np.float32]) -> None:
        edit, name = self.edit, node.input[0]
        quantized, scale = quantize_columns(table.T, 127)
        rows = edit.add("Gather", [edit.constant(f"{name}_int8", quantized.T.copy()), node.input[1]])
        scales = edit.add("Gather", [edit.constant(f"{name}_scale", scale[:, None]), node.input[1]])
        edit.add("Mul", [edit.add("Cast", [rows], to=TensorProto.FLOAT), scales], node.output[0])

    def _largest_table(self) -> str | None:
        weights = self.edit.weights
        tables = [
            node.input[0]
            for node in self.edit.graph.node
            if node.op_type == "Gather"
            and node.input[0] in weights
            and len(self.edit.shape(node.input[0])) == 2
            and weights[node.input[0]].data_type == TensorProto.FLOAT
        ]
        return max(tables, key=lambda name: weights[name].dims[0], default=None)
