"""The whole encoder as one ONNX graph: transformer, pooling, Dense head and L2 normalisation."""

from __future__ import annotations

import ast
import copy
import logging
import math
import re
import warnings
from collections import Counter
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distillabse.export.switch import SwitchGraph, translations
from distillabse.models.switch import sparse_layers
from distillabse.models.teacher import transformer_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

INPUTS = ("input_ids", "attention_mask")
OUTPUTS = ("last_hidden_state", "sentence_embedding")
PROTOBUF_LIMIT = 2**31 - 1
_SCOPES = "pkg.torch.onnx.name_scopes"
_LINEAR = re.compile(r"transformer\.(?P<name>.+)\.weight")


class EncoderGraph(nn.Module):
    """What is exported: (input_ids, attention_mask) -> (last_hidden_state, sentence_embedding).

    The same computation as the encoder's, spelt so that ONNX Runtime finds its patterns: plain attention with an
    additive mask, and the exact GELU in the order of operations that its fusion looks for.
    """

    def __init__(self, encoder: SentenceTransformer) -> None:
        super().__init__()
        self.transformer = copy.deepcopy(transformer_of(encoder))
        self.transformer.set_attn_implementation("eager")
        for layer in sparse_layers(self.transformer).values():
            layer.set_submodule("feed_forward", SwitchGraph(layer.feed_forward))
        _spell_out_gelu(self.transformer)
        _merge_token_types(self.transformer)
        head = list(encoder)[1:]
        # One normalisation is enough, and the last one is for all encoders.
        self.head = nn.ModuleList(head[:-1] if type(head[-1]).__name__ == "Normalize" else head)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Int64 [batch, tokens] twice -> float32 [batch, tokens, hidden size] and unit rows [batch, dimension]."""
        additive = (1.0 - attention_mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        states = self.transformer(input_ids=input_ids, attention_mask=additive).last_hidden_state
        features = {"token_embeddings": states, "attention_mask": attention_mask}
        for module in self.head:
            features = module(features)
        return states, nn.functional.normalize(features["sentence_embedding"], dim=-1)


class NoTokenTypes(nn.Module):
    """What is left where the only token type has gone into the position embeddings."""

    def forward(self, token_type_ids: Tensor) -> Tensor:
        """A zero for everything."""
        return torch.zeros(())


class FusableGELU(nn.Module):
    """x * (1 + erf(x / sqrt 2)) * 0.5, the exact GELU."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return x * (torch.erf(x / math.sqrt(2)) + 1.0) * 0.5


def export_graph(encoder: SentenceTransformer, path: Path, opset: int = 18) -> None:
    """Write the fp32 graph of `encoder` to `path`; both axes of both inputs are dynamic.

    A graph over protobuf's 2 GB keeps its weights in `<name>_data` beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    graph = EncoderGraph(encoder).eval().to("cpu")
    example = torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0]])
    longest = min(encoder.max_seq_length or 10**6, transformer_of(encoder).config.max_position_embeddings)
    axes = {0: torch.export.Dim("batch_size"), 1: torch.export.Dim("sequence_length", max=longest)}
    size = sum(parameter.numel() * parameter.element_size() for parameter in graph.parameters())
    with warnings.catch_warnings(), torch.no_grad(), redirect_stdout(StringIO()), _quiet_exporter():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            graph,
            (),
            str(path),
            kwargs={"input_ids": example, "attention_mask": (example > 0).long()},
            dynamo=True,
            opset_version=opset,
            input_names=list(INPUTS),
            output_names=list(OUTPUTS),
            dynamic_shapes=dict.fromkeys(INPUTS, axes),
            custom_translation_table=translations(),
            external_data=True,
            verbose=False,
        )
    _tidy(path, inline=size <= PROTOBUF_LIMIT)


def count_operators(path: Path) -> Counter[str]:
    """How many nodes of each operator a graph holds."""
    import onnx

    return Counter(node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node)


def count_after_optimisation(path: Path) -> Counter[str]:
    """How many nodes of each operator run after ONNX Runtime has fused what it can on this CPU."""
    import tempfile

    import onnxruntime

    from distillabse.encoder import session_options

    with tempfile.TemporaryDirectory() as folder:
        options = session_options(None)
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        options.log_severity_level = 3
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return count_operators(Path(options.optimized_model_filepath))


def _spell_out_gelu(model: nn.Module) -> None:
    from transformers.activations import GELUActivation

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, (GELUActivation, nn.GELU)):
                setattr(module, name, FusableGELU())


def _merge_token_types(model: nn.Module) -> None:
    """Put the row of token type 0, which every token has, into the table of positions."""
    embeddings = getattr(model, "embeddings", None)
    types, positions = (getattr(embeddings, f"{name}_embeddings", None) for name in ("token_type", "position"))
    if embeddings is None or not isinstance(types, nn.Embedding) or not isinstance(positions, nn.Embedding):
        return
    with torch.no_grad():
        positions.weight += types.weight[0]
    embeddings.token_type_embeddings = NoTokenTypes()


def linear_of(node: Any) -> str | None:
    """Name in the transformer of the linear layer whose product a node is."""
    if node.op_type != "MatMul" or not (match := _LINEAR.fullmatch(node.input[1])):
        return None
    return match["name"]


def _name_weights(graph: Any) -> None:
    """Give the matrices of linear layers, [inputs, outputs], the names of their layers instead of numbers."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    names: dict[str, str] = {}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in constants and len(constants[node.input[1]].dims) == 2:
            scopes = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), None)
            if scopes is not None:
                names.setdefault(node.input[1], f"{ast.literal_eval(scopes)[-2]}.weight")
    taken = set(constants)
    for old, new in list(names.items()):
        if new in taken:
            del names[old]
        taken.add(new)
    for old, new in names.items():
        constants[old].name = new
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)


def _tidy(path: Path, inline: bool) -> None:
    """Drop what describes the exporting machine, and put the weights where consumers look for them.

    Node names, stack traces and source paths do not belong into a product. Weights go into the graph itself, or, where
    protobuf cannot hold them, into `<name>_data`.
    """
    import onnx

    model = onnx.load(str(path))
    _name_weights(model.graph)
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
        _drop_number_of_parts(node)
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]
    del model.graph.metadata_props[:]
    del model.metadata_props[:]
    model.producer_name = "distillabse"
    save_graph(model, path, inline)
    onnx.checker.check_model(str(path))


def _drop_number_of_parts(node: Any) -> None:
    """A Split into parts of given sizes must not say how many; the exporter had to know."""
    if node.op_type == "Split" and len(node.input) > 1 and node.input[1]:
        kept = [attribute for attribute in node.attribute if attribute.name != "num_outputs"]
        del node.attribute[:]
        node.attribute.extend(kept)


def save_graph(model: Any, path: Path, inline: bool) -> None:
    """Write an ONNX model in the place of `path`: weights in the graph itself, or beside it in `<name>_data`."""
    import onnx

    for written in path.parent.glob(f"{path.name}*"):
        written.unlink()
    if inline:
        onnx.save(model, str(path))
    else:
        onnx.save(model, str(path), save_as_external_data=True, location=f"{path.name}_data")


class _quiet_exporter:
    """The exporter logs every pass; only its errors matter here."""

    names = ("torch.onnx", "onnxscript", "onnx_ir")

    def __enter__(self) -> None:
        self.levels = {name: logging.getLogger(name).level for name in self.names}
        for name in self.names:
            logging.getLogger(name).setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        for name, level in self.levels.items():
            logging.getLogger(name).setLevel(level)
