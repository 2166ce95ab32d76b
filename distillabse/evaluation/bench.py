"""The bench stage: the student's artefacts against the teacher, in PyTorch and in ONNX Runtime."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillabse import layout
from distillabse.config import ExportConfig, JobConfig, QuantizationConfig
from distillabse.corpus.records import training_texts
from distillabse.environment import describe_environment
from distillabse.errors import InputError
from distillabse.evaluation.measurement import measure_engines, show_failures
from distillabse.evaluation.sets import texts_for_speed
from distillabse.evaluation.workers import Engine
from distillabse.export.bundle import int8_file, write_bundle
from distillabse.layout import RunFolder
from distillabse.storage import new_folder, write_json
from distillabse.verification.gates import plain
from distillabse.verification.kinds import FP32, INT8, TORCH

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

# Fidelity is measured by `verify`; here vectors are only looked at by guards.
_JUDGED_TEXTS = 256
TEACHER_TORCH, TEACHER_ONNX = "teacher-torch", "teacher-onnx"


def bench_stage(config: JobConfig, run: RunFolder) -> None:
    """Measure speed, memory and size of teacher and student side by side and write `run.bench`.

    A guard that fails is an error in the log, and "trusted" is false; whether that ends the job is for its caller.

    Raises:
        InputError: there is no bundle.
    """
    from distillabse.models.teacher import load_encoder, load_teacher

    if not (run.bundle / layout.PROVENANCE).is_file():
        raise InputError(f"{run.bundle} holds no bundle. Run `distillabse export` first.")
    texts = texts_for_speed(config, run)
    teacher = load_teacher(config.teacher)
    with tempfile.TemporaryDirectory(prefix="distillabse-teacher-") as temporary:
        folder = Path(temporary)
        logger.info("Exporting the teacher to ONNX as a baseline")
        write_bundle(
            teacher, folder, ExportConfig(opset=config.export.opset, quantization=QuantizationConfig(kind="none")), {}
        )
        engines = [
            Engine(TEACHER_TORCH, "torch", folder, None),
            Engine(TEACHER_ONNX, "onnx", folder, layout.ONNX_FP32),
            Engine(TORCH, "torch", run.bundle, None),
            Engine(FP32, "onnx", run.bundle, layout.ONNX_FP32),
        ]
        sizes = {"teacher": graph_bytes(folder / layout.ONNX_FP32), "fp32": graph_bytes(run.bundle / layout.ONNX_FP32)}
        if config.export.quantization.enabled:
            engines.append(Engine(INT8, "onnx", run.bundle, int8_file(config.export.quantization)))
            sizes["int8"] = graph_bytes(run.bundle / int8_file(config.export.quantization))
        training = training_texts(run.split("train"), distinct=False)
        baselines = (TEACHER_TORCH, TEACHER_ONNX)
        result = measure_engines(
            engines, texts, config.bench, config.seed, baselines, training=training, encoded=_JUDGED_TEXTS
        ).figures
    student = load_encoder(str(run.bundle))
    parameters = {"teacher": count_parameters(teacher), "student": count_parameters(student)}
    if (active := count_active_parameters(student)) < parameters["student"]:
        parameters["student_active"] = active
    result.update(
        size_bytes=sizes,
        parameters=parameters,
        random_weights=config.teacher.random_weights,
        environment=describe_environment(),
    )
    with new_folder(run.bench) as product:
        write_json(product / run.measurements.name, plain(result))
    show_failures(result)


def graph_bytes(graph: Path) -> int:
    """Size on disk of an ONNX graph with its external data, in bytes."""
    return sum(path.stat().st_size for path in graph.parent.glob(f"{graph.name}*"))


def count_parameters(encoder: SentenceTransformer | Any) -> int:
    """Parameters that take part in the sentence vector: BERT's own pooler does not."""
    return sum(parameter.numel() for name, parameter in encoder.named_parameters() if ".pooler." not in name)


def count_active_parameters(encoder: SentenceTransformer | Any) -> int:
    """The same, but of the experts of each sparse layer only the one that a token uses."""
    from distillabse.models.switch import sparse_layers
    from distillabse.models.teacher import transformer_of

    stacks = [layer.feed_forward.experts for layer in sparse_layers(transformer_of(encoder)).values()]
    idle = sum(weights.numel() - weights[0].numel() for stack in stacks for weights in stack.parameters())
    return count_parameters(encoder) - idle
