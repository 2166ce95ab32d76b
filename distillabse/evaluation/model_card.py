"""The bundle's README.md: a Hugging Face model card with the figures of the report."""

from __future__ import annotations

import re
from typing import Any

from distillabse import layout
from distillabse.errors import InputError
from distillabse.evaluation.templates import flatten, render
from distillabse.export.bundle import replace_in_bundle
from distillabse.export.card import card_values

_CPUS = {
    "avx512_vnni": "x86-64 with AVX-512 VNNI",
    "avx512": "x86-64 with AVX-512",
    "avx2": "x86-64 with AVX2",
    "arm64": "64-bit ARM",
}


def model_card(run: layout.RunFolder, report: dict[str, Any]) -> str:
    """The card as Markdown with YAML metadata.

    Args:
        run: Run folder with a finished bundle, whose tokenizer limits go into the usage examples.
        report: What `report.collect` returned.

    Raises:
        InputError: the run folder has no bundle.
    """
    if not run.bundle.is_dir():
        raise InputError(f"{run.bundle} does not exist. Run the stage 'export' first: distillabse export CONFIG")
    int8 = report["config"]["export"]["quantization"]
    return render(
        "model_card.md.j2",
        report=report,
        **card_values(run.bundle, report["config"], _languages(report)),
        graph=layout.ONNX_INT8[int8["cpu"]] if "onnx-int8" in report["fidelity"] else layout.ONNX_FP32,
        int8_cpu=_CPUS[int8["cpu"]] if "onnx-int8" in report["fidelity"] else None,
        environment=dict(flatten(report["environment"])),
        languages=_languages(report),
    )


def write_model_card(run: layout.RunFolder, report: dict[str, Any]) -> None:
    """Replace README.md in the bundle and its line in the bundle's checksums, if it has any.

    Raises:
        InputError: the run folder has no bundle.
    """
    replace_in_bundle(run.bundle, layout.MODEL_CARD, model_card(run, report))


def _languages(report: dict[str, Any]) -> list[str]:
    """ISO 639 codes of the training text; whatever else stands there for "unknown" is left out."""
    splits = (report["corpus"] or {}).get("splits", {})
    return sorted(code for code in splits.get("train", {}).get("languages", {}) if re.fullmatch("[a-z]{2,3}", code))
