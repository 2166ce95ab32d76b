"""The kinds of graphs in a bundle, and what ONNX Runtime must find in each. A new kind is told here, and only here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillabse import layout

TORCH, FP32, INT8, FLOAT16 = "torch", "onnx-fp32", "onnx-int8", "onnx-float16"

# What is counted after ONNX Runtime's optimisation, and the operators that count as it.
OPERATORS = {
    "LayerNormalization": ("LayerNormalization", "SkipLayerNormalization"),
    "fused GELU": ("Gelu", "BiasGelu", "FastGelu"),
    "integer products": ("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"),
    "block-wise products": ("MatMulNBits",),
    "weights turned back to float32": ("DequantizeLinear",),
    "expert products": ("expert products",),
}


@dataclass(frozen=True)
class Graph:
    """One graph of a bundle.

    Attributes:
        artefact: its name in results.
        file: its path inside the bundle.
        kind: a key of `EXPECTED`.
    """

    artefact: str
    file: str
    kind: str


def _fp32(settings: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, int]:
    from distillabse.models.switch import MODEL_TYPE as SWITCH

    layers = settings["num_hidden_layers"]
    wanted = {"LayerNormalization": 2 * layers + 1}
    if settings.get("hidden_act", "gelu") == "gelu":
        wanted["fused GELU"] = layers
    if settings["model_type"] == SWITCH:
        wanted["expert products"] = 2 * settings["num_experts"] * len(settings["sparse_layers"])
    return wanted


def _per_token(settings: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, int]:
    return {"integer products": record["int8"]["matmuls"]}


def _static(settings: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, int]:
    # What ONNX Runtime cannot fuse it computes in float32, slower than without INT8.
    return {"integer products": record["int8"]["matmuls"], "weights turned back to float32": 0}


def _block_weights(settings: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, int]:
    return {"block-wise products": record["int8"]["matmuls"]}


def _float16(settings: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, int]:
    return {"LayerNormalization": _fp32(settings, record)["LayerNormalization"]}


EXPECTED: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, int]]] = {
    "fp32": _fp32,
    "per_token": _per_token,
    "static": _static,
    "block_weights": _block_weights,
    "float16": _float16,
}
"""For each kind: how many of what a graph must hold, from config.json and the bundle's record."""


def graphs_of(folder: Path, record: Mapping[str, Any]) -> tuple[Graph, ...]:
    """The graphs that a bundle must have: fp32, and what its record says of quantised ones, there or not.

    Args:
        folder: the bundle.
        record: content of its distillabse.json.
    """
    graphs = [Graph(FP32, layout.ONNX_FP32, "fp32")]
    if (quantised := record.get("int8")) is not None:
        file = layout.int8_graph(folder) or next(iter(layout.ONNX_INT8.values()))
        graphs.append(Graph(INT8, file, quantised.get("kind", "per_token")))
    if record.get("float16"):
        graphs.append(Graph(FLOAT16, layout.ONNX_FLOAT16, "float16"))
    return tuple(graphs)
