"""Candidates of a plan as the least that can be measured: one graph and the tokenizer's files, no torch weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillabse import layout
from distillabse.config import DenseStudentConfig, ExportConfig
from distillabse.evaluation.bench import count_parameters, graph_bytes
from distillabse.evaluation.plan_space import SHAPE
from distillabse.export.bundle import int8_file, quantize_graph
from distillabse.models.folder import write_transformer_settings
from distillabse.models.teacher import transformer_of
from distillabse.storage import new_folder, sha256_of_json, write_json

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def build_candidates(
    source: SentenceTransformer,
    students: Iterable[DenseStudentConfig],
    folder: Path,
    export: ExportConfig,
    seed: int,
    dimension: int | None = None,
) -> list[Path]:
    """The folder of every candidate inside `folder`, built with random weights where it is not there already.

    It is exported with a few rows of the vocabulary, and the table of the finished graph is filled up by repeating
    them: to export and quantise half a million rows takes a minute and ten gigabytes, and speed does not depend on
    what is in them.

    Its name is a hash of what determines its size and speed. It holds the graph, what `Encoder` needs beside it, and
    candidate.json: "graph" (its path inside), "parameters", "encoder_parameters" (without the embeddings) and
    "size_bytes" (of the graph).

    With `head: dense` their vectors have `dimension` dimensions, by default those of `source`.
    """
    common = {
        "source": fingerprint(source),
        "export": export.model_dump(mode="json"),
        "version": version("distillabse"),
        "dimension": dimension,
    }
    few, rows = None, transformer_of(source).config.vocab_size
    folders = []
    for student in students:
        architecture = {key: getattr(student, key) for key in (*SHAPE, "pooling", "head")}
        path = folder / sha256_of_json({**common, "student": architecture})[:12]
        if not (path / layout.CANDIDATE).is_file():
            few = few or _with_few_rows(source)
            with new_folder(path) as product:
                write_json(
                    product / layout.CANDIDATE, _write_candidate(few, rows, student, product, export, seed, dimension)
                )
        folders.append(path)
    return folders


def write_graph(encoder: SentenceTransformer, folder: Path, export: ExportConfig) -> Path:
    """Fill `folder` with what `Encoder` needs and no more: one graph, INT8 or else fp32, and the tokenizer's files.

    Returns:
        The graph.
    """
    from distillabse.export.graph import export_graph
    from distillabse.quantization import rounded

    encoder.tokenizer.save_pretrained(str(folder))
    write_transformer_settings(encoder, folder)
    prompts = {"prompts": encoder.prompts, "default_prompt_name": encoder.default_prompt_name}
    write_json(folder / layout.SENTENCE_TRANSFORMERS_SETTINGS, prompts)
    graph = folder / layout.ONNX_FP32
    export_graph(encoder, graph, export.opset)
    if export.quantization.enabled:
        source, graph = graph, folder / int8_file(export.quantization)
        # Weights are random: what calibration finds is no matter for speed.
        linears = rounded(encoder, export.quantization.greatest_weight, static=export.quantization.kind == "static")
        quantize_graph(source, graph, export.quantization, linears)
        for path in source.parent.glob(f"{source.name}*"):
            path.unlink()
    return graph


def fingerprint(encoder: SentenceTransformer) -> str:
    """SHA-256 of everything about an encoder that its speed depends on: structure and tokenizer, not the weights."""
    settings = transformer_of(encoder).config.to_dict()
    tokenizer = json.loads(encoder.tokenizer.backend_tokenizer.to_str())
    return sha256_of_json(
        {
            "modules": str(encoder),
            "settings": {
                key: settings[key] for key in settings if key not in ("_name_or_path", "transformers_version")
            },
            "parameters": {name: list(parameter.shape) for name, parameter in encoder.named_parameters()},
            # How texts were last cut and padded is not the tokenizer's own.
            "tokenizer": {key: tokenizer[key] for key in tokenizer if key not in ("truncation", "padding")},
            "lower_case": bool(getattr(encoder[0], "do_lower_case", False)),
            "max_length": encoder.max_seq_length,
            "prompts": [encoder.prompts, encoder.default_prompt_name],
        }
    )


def parameter_counts(encoder: SentenceTransformer) -> dict[str, int]:
    """All "parameters" that take part in the sentence vector, and "encoder_parameters".

    The latter are those outside the embeddings: without their tables, which cost memory but hardly any time, and
    without the matrix that widens factorised embeddings, which makes a student no larger than one that needs none.
    """
    parameters = count_parameters(encoder)
    embeddings = sum(parameter.numel() for name, parameter in encoder.named_parameters() if ".embeddings" in name)
    return {"parameters": parameters, "encoder_parameters": parameters - embeddings}


def _with_few_rows(source: SentenceTransformer) -> SentenceTransformer:
    """A copy whose embedding table has only the first rows; its tokenizer is the same."""
    import torch

    table = transformer_of(source).get_input_embeddings()
    # More than there are positions: INT8 takes the table with most rows for that of the words.
    positions = transformer_of(source).config.max_position_embeddings
    rows = min(table.num_embeddings, positions + 1 + (table.padding_idx or 0))
    few = torch.nn.Embedding(rows, table.embedding_dim, table.padding_idx)
    # What stands in the memo is taken for the copy already made.
    copied = copy.deepcopy(source, {id(table): few, id(source.tokenizer): source.tokenizer})
    transformer_of(copied).config.vocab_size = rows
    return copied


def _write_candidate(
    few: SentenceTransformer,
    rows: int,
    student: DenseStudentConfig,
    folder: Path,
    export: ExportConfig,
    seed: int,
    dimension: int | None,
) -> dict[str, Any]:
    """Build one with random weights and write its graph; what is known of it before it is measured."""
    import torch

    from distillabse.models.student import build_student

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        anew = student.model_copy(update={"initialisation": "random"})
        encoder = build_student(few, anew, dimension=dimension).eval()
    graph = write_graph(encoder, folder, export)
    _fill_table(graph, rows)
    counts = parameter_counts(encoder)
    table = transformer_of(encoder).get_input_embeddings()
    counts["parameters"] += (rows - table.num_embeddings) * table.embedding_dim
    return {"graph": graph.relative_to(folder).as_posix(), **counts, "size_bytes": graph_bytes(graph)}


def _fill_table(graph: Path, rows: int) -> None:
    """Repeat the rows of the embedding table, and of the INT8 table's scales, until there are `rows`."""
    import numpy as np
    import onnx
    from onnx import numpy_helper

    from distillabse.export.graph import PROTOBUF_LIMIT, save_graph

    model = onnx.load(str(graph))
    lookups = (node for node in model.graph.node if node.op_type == "Gather" and node.input[1] == "input_ids")
    tables = {node.input[0] for node in lookups}
    for tensor in model.graph.initializer:
        if tensor.name in tables:
            values = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(np.resize(values, (rows, values.shape[1])), tensor.name))
    size = sum(tensor.ByteSize() for tensor in model.graph.initializer)
    save_graph(model, graph, inline=size <= PROTOBUF_LIMIT)
