"""The bundle: one folder that every consumer reads, from sentence-transformers to a bare ONNX Runtime."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillabse import layout
from distillabse.checksums import renew_checksum, write_checksums
from distillabse.config import ExportConfig, JobConfig, QuantizationConfig
from distillabse.errors import InputError
from distillabse.layout import RunFolder
from distillabse.storage import new_file, new_folder, read_json, write_json

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from distillabse.export.quantize import Quantized
    from distillabse.quantization import QuantizedLinear

    QuantizedEncoder = tuple[SentenceTransformer, Mapping[str, QuantizedLinear]]

logger = logging.getLogger(__name__)


def export_stage(config: JobConfig, run: RunFolder, checkpoint: Path | None = None) -> None:
    """Write `run.bundle` from `run.student`, or from a checkpoint of its training, whole or not at all.

    Raises:
        InputError: there is no student yet, or the checkpoint is not whole.
    """
    from distillabse.models.reduction import load_reduction, save_reduction
    from distillabse.models.teacher import load_encoder
    from distillabse.quantization.texts import calibration_texts
    from distillabse.training.checkpoints import require_whole
    from distillabse.training.quantization_aware import load_quantized_encoder
    from distillabse.training.stage import checkpoint_reduction

    if checkpoint is not None:
        require_whole(checkpoint)
        student, reduction = checkpoint, checkpoint_reduction(config, run, checkpoint)
    elif run.student.is_dir():
        student, reduction = run.student, load_reduction(run.student)
    else:
        raise InputError(f"{run.student} does not exist. Run `distillabse distill` first.")
    texts: list[str] = []
    quantized = None
    if config.export.quantization.training is not None and checkpoint is None:
        quantized = load_quantized_encoder(run.quantized)
    elif config.export.quantization.calibrated:
        texts = calibration_texts(config, run)
    with new_folder(run.bundle) as folder:
        if reduction is not None:
            save_reduction(reduction, folder)
        write_bundle(load_encoder(str(student)), folder, config.export, read_json(run.record), texts, quantized)
    logger.info("Bundle written to %s", run.bundle)


def write_bundle(
    encoder: SentenceTransformer,
    folder: Path,
    config: ExportConfig,
    provenance: dict[str, Any],
    texts: Sequence[str] = (),
    quantized: QuantizedEncoder | None = None,
) -> None:
    """Fill `folder` with the torch encoder, its ONNX graphs, `provenance` and checksums of every file.

    Args:
        encoder: what to export.
        folder: an empty folder; what is in it already is part of the bundle.
        config: opset and INT8 settings.
        provenance: where the encoder comes from, written as it is into distillabse.json.
        texts: what INT8 is calibrated on. Without any, weights are rounded to the nearest, and every token has a zero
            point of its own: slower and less exact.
        quantized: the encoder after quantisation-aware distillation, and its layers; the INT8 graph is made of it.

    Raises:
        InputError: a static graph needs texts, and there are none.
    """
    from distillabse.export.card import write_plain_card
    from distillabse.export.float16 import to_float16
    from distillabse.export.graph import export_graph
    from distillabse.export.pooled import write_pooled_graphs
    from distillabse.models.folder import save_encoder

    save_encoder(encoder, folder)
    logger.info("Exporting the fp32 graph")
    export_graph(encoder, folder / layout.ONNX_FP32, config.opset)
    if config.quantization.enabled:
        logger.info("Quantising to INT8")
        done = _write_int8(encoder, folder, config, texts, quantized)
        kind = config.quantization.kind
        provenance = {**provenance, "int8": {"kind": kind, "matmuls": done.matmuls, "embeddings": done.embeddings}}
    if config.float16:
        to_float16(folder / layout.ONNX_FP32, folder / layout.ONNX_FLOAT16)
        provenance = {**provenance, "float16": True}
    if pooled := write_pooled_graphs(folder):
        provenance = {**provenance, "pooled": pooled}
    write_json(folder / layout.PROVENANCE, provenance)
    write_plain_card(folder, provenance)
    write_checksums(folder)


def _write_int8(
    encoder: SentenceTransformer,
    folder: Path,
    config: ExportConfig,
    texts: Sequence[str],
    quantized: QuantizedEncoder | None,
) -> Quantized:
    from distillabse.export.graph import export_graph
    from distillabse.quantization import calibrate

    settings, target = config.quantization, folder / int8_file(config.quantization)
    if quantized is not None:  # its other weights have been trained, too
        with tempfile.TemporaryDirectory() as temporary:
            source = Path(temporary) / "model.onnx"
            export_graph(quantized[0], source, config.opset)
            return quantize_graph(source, target, settings, quantized[1])
    linears = None
    if settings.calibrated and (texts or settings.kind == "static"):
        linears = calibrate(encoder, texts, static=settings.kind == "static", largest=settings.greatest_weight)
    return quantize_graph(folder / layout.ONNX_FP32, target, settings, linears)


def quantize_graph(
    source: Path, target: Path, config: QuantizationConfig, linears: Mapping[str, QuantizedLinear] | None = None
) -> Quantized:
    """Write the INT8 form of the fp32 graph `source`; see `quantize` for `linears`."""
    from distillabse.export.quantize import quantize, quantize_weights

    if config.kind == "block_weights":
        return quantize_weights(source, target, embeddings=config.embeddings)
    return quantize(source, target, linears, embeddings=config.embeddings, largest=config.greatest_weight)


def int8_file(config: QuantizationConfig) -> str:
    """Path of the INT8 graph inside a bundle."""
    return layout.ONNX_INT8[config.cpu]


def replace_in_bundle(bundle: Path, name: str, text: str) -> None:
    """Replace one text file of a finished bundle, and its line in the checksums, if it has any."""
    with new_file(bundle / name) as temporary:
        temporary.write_text(text, encoding="utf-8")
    renew_checksum(bundle, name)
