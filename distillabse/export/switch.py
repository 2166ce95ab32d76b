"""The Switch feed-forward block as ONNX operators that run only the experts that have tokens.

Tokens are sorted by expert, cut into one part for each, multiplied part by part, and put back. All that is elementwise
(bias, activation, gate) happens once for the whole batch, so an expert is two products and, without tokens, costs next
to nothing.

torch sees one opaque operator, whose translation names every expert's weights: whatever the example input routes to,
all of them are in the graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distillabse.models.switch import SwitchFeedForward


@torch.library.custom_op("distillabse::switch_feed_forward", mutates_args=())
def switch_feed_forward(
    states: Tensor,
    real_tokens: Tensor,
    router_weight: Tensor,
    inner_weights: Sequence[Tensor],
    inner_bias: Tensor,
    outer_weights: Sequence[Tensor],
    outer_bias: Tensor,
) -> Tensor:
    """The operator that stands for the block in an exported program; its translation is `as_onnx`."""
    raise NotImplementedError("this operator is only exported, never run")


@switch_feed_forward.register_fake
def _(states: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(states)


class SwitchGraph(nn.Module):
    """What is exported in the place of a SwitchFeedForward: one parameter for each expert's matrices."""

    def __init__(self, block: SwitchFeedForward) -> None:
        super().__init__()
        experts = block.experts
        self.router_weight = nn.Parameter(block.router.weight.detach().T.clone())
        self.inner = nn.ParameterList(weight.detach().clone() for weight in experts.inner_weight)
        self.outer = nn.ParameterList(weight.detach().clone() for weight in experts.outer_weight)
        self.inner_bias = nn.Parameter(experts.inner_bias.detach().clone())
        self.outer_bias = nn.Parameter(experts.outer_bias.detach().clone())

    def forward(self, states: Tensor, real_tokens: Tensor) -> Tensor:
        """[batch, tokens, hidden size] and bool [batch, tokens] -> the shape of `states`."""
        output: Tensor = switch_feed_forward(
            states, real_tokens, self.router_weight, list(self.inner), self.inner_bias, list(self.outer),
            self.outer_bias,
        )  # fmt: skip
        return output


def as_onnx(
    states: Any,
    real_tokens: Any,
    router_weight: Any,
    inner_weights: Sequence[Any],
    inner_bias: Any,
    outer_weights: Sequence[Any],
    outer_bias: Any,
) -> Any:
    """The block in standard operators: exact GELU, top-1, no capacity."""
    from onnxscript import opset18 as op

    experts = len(inner_weights)
    hidden = router_weight.shape[0]
    flat = op.Reshape(states, op.Constant(value_ints=[-1, hidden]))
    probabilities = op.Softmax(op.MatMul(flat, router_weight), axis=-1)
    gate = op.ReduceMax(probabilities, op.Constant(value_ints=[-1]), keepdims=1)
    chosen = op.ArgMax(probabilities, axis=-1, keepdims=0)
    # Padding goes to an expert that does not exist, behind all others.
    last = op.Constant(value_int=experts)
    chosen = op.Where(op.Reshape(real_tokens, op.Constant(value_ints=[-1])), chosen, last)
    ordered, order = op.TopK(chosen, op.Shape(chosen), axis=0, largest=0, sorted=1)
    numbers = op.Constant(value_ints=list(range(experts)))
    is_expert = op.Equal(op.Unsqueeze(chosen, op.Constant(value_ints=[1])), numbers)
    counts = op.ReduceSum(op.Cast(is_expert, to=7), op.Constant(value_ints=[0]), keepdims=0)
    first, routed = op.Constant(value_ints=[0]), op.ReduceSum(counts, keepdims=1)
    order, ordered = op.Slice(order, first, routed), op.Slice(ordered, first, routed)
    inner = _by_expert(op, op.Gather(flat, order), counts, inner_weights)
    inner = op.Add(inner, op.Gather(inner_bias, ordered))
    inner = op.Mul(op.Mul(inner, op.Add(op.Erf(op.Div(inner, math.sqrt(2))), 1.0)), 0.5)
    outer = _by_expert(op, inner, counts, outer_weights)
    outer = op.Mul(op.Add(outer, op.Gather(outer_bias, ordered)), op.Gather(gate, order))
    nothing = op.ConstantOfShape(op.Shape(flat))
    placed = op.ScatterND(nothing, op.Unsqueeze(order, op.Constant(value_ints=[1])), outer)
    return op.Reshape(placed, op.Shape(states))


def _by_expert(op: Any, tokens: Any, counts: Any, weights: Sequence[Any]) -> Any:
    """Each part of `tokens`, sorted by expert, times its expert's matrix."""
    parts = op.Split(tokens, counts, axis=0, num_outputs=len(weights))
    return op.Concat(*(op.MatMul(part, weight) for part, weight in zip(parts, weights, strict=True)), axis=0)


def translations() -> dict[Any, Callable[..., Any]]:
    """For `torch.onnx.export(custom_translation_table=...)`."""
    return {torch.ops.distillabse.switch_feed_forward.default: as_onnx}


@dataclass(frozen=True)
class ExpertProduct:
    """Tokens sorted by expert times their experts' matrices, as `as_onnx` writes it.

    Attributes:
        tokens: name of the sorted tokens, float32 [tokens, inputs].
        counts: name of the tokens of each expert, int64 [experts].
        experts: name of the expert of each sorted token, int64 [tokens].
        weights: names of the matrices [inputs, outputs], one for each expert.
        result: name of the result, float32 [tokens, outputs].
        replaced: names of the nodes that compute it.
    """

    tokens: str
    counts: str
    experts: str
    weights: tuple[str, ...]
    result: str
    replaced: frozenset[str]


def expert_products(graph: Any) -> dict[str, ExpertProduct]:
    """Every product with experts' matrices in an ONNX graph, by the name of its result."""
    reader = {name: node for node in graph.node for name in node.input}
    maker = {name: node for node in graph.node for name in node.output}
    found: dict[str, ExpertProduct] = {}
    for split in (node for node in graph.node if node.op_type == "Split"):
        products = [reader[name] for name in split.output if name in reader and reader[name].op_type == "MatMul"]
        if len(products) < len(split.output):
            continue
        concat = reader[products[0].output[0]]
        result = concat.output[0]
        bias = next(maker[name] for name in reader[result].input if name != result)
        found[result] = ExpertProduct(
            tokens=split.input[0],
            counts=split.input[1],
            experts=bias.input[1],
            weights=tuple(node.input[1] for node in products),
            result=result,
            replaced=frozenset(node.name for node in (split, *products, concat)),
        )
    return found


def count_expert_products(path: Path) -> int:
    """Products with an expert's matrix in the ONNX file `path`, each of which is in the graph as a constant."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    return sum(name in constants for product in expert_products(graph).values() for name in product.weights)


def routers(graph: Any) -> set[str]:
    """Names of the matrices of all routers in an ONNX graph."""
    maker = {name: node for node in graph.node for name in node.output}
    probabilities = {node.input[0] for node in graph.node if node.op_type == "ArgMax"}
    logits = {maker[name].input[0] for name in probabilities if maker[name].op_type == "Softmax"}
    return {maker[name].input[1] for name in logits}
