"""What every model card of a bundle says: metadata for the hub, use, licence and credit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distillabse import layout
from distillabse.evaluation.templates import render
from distillabse.models.switch import MODEL_TYPE
from distillabse.storage import read_json

_TAGS = ["sentence-transformers", "sentence-similarity", "feature-extraction", "distillation", "onnx"]


def write_plain_card(folder: Path, provenance: Mapping[str, Any]) -> None:
    """Write the card of a bundle of which nothing was measured yet; `report` replaces it by one with figures.

    Args:
        folder: A bundle with its graphs.
        provenance: What distillabse.json says; its "config" names the teacher.
    """
    config = provenance.get("config", {})
    card = render(
        "plain_card.md.j2",
        name=provenance.get("name", "Sentence encoder"),
        settings=read_json(folder / layout.MODEL_SETTINGS),
        graph=layout.int8_graph(folder) or layout.ONNX_FP32,
        # A record of another origin may tell of less than a job.
        **card_values(folder, config if {"teacher", "student"} <= config.keys() else None, []),
    )
    (folder / layout.MODEL_CARD).write_text(card, encoding="utf-8")


def card_values(bundle: Path, config: Mapping[str, Any] | None, languages: Sequence[str]) -> dict[str, Any]:
    """The values that all cards share.

    Args:
        bundle: Folder with tokenizer and settings.
        config: The resolved configuration, if there is one.
        languages: ISO 639 codes of the training text.
    """
    teacher = config["teacher"]["model"] if config else None
    license = _license(config) if config else None
    return {
        "layout": layout,
        "config": config,
        "metadata": _metadata(teacher, license, languages),
        "license": license,
        "teacher_url": f"https://huggingface.co/{teacher}" if _is_hub_id(teacher) else None,
        "is_switch": read_json(bundle / layout.MODEL_SETTINGS).get("model_type") == MODEL_TYPE,
        "max_length": read_json(bundle / layout.TRANSFORMER_SETTINGS)["max_seq_length"],
        "pad_token": read_json(bundle / layout.SPECIAL_TOKENS)["pad_token"],
    }


def with_use(card: str, use: str) -> str:
    """The card with another text in the section on use."""
    return re.sub(r"(?<=^## Use\n\n).*?(?=^## )", lambda _: f"{use}\n\n", card, flags=re.MULTILINE | re.DOTALL)


def _metadata(teacher: str | None, license: str | None, languages: Sequence[str]) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        language=list(languages) or None,
        license=license,
        base_model=teacher if _is_hub_id(teacher) else None,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=_TAGS,
    )
    return str(data.to_yaml()).strip()


def _license(config: Mapping[str, Any]) -> str | None:
    """The licence that was configured, or else that of the teacher's card in its folder or in the hub's cache."""
    from huggingface_hub import ModelCard, try_to_load_from_cache
    from yaml import YAMLError

    if configured := config.get("export", {}).get("license"):
        return str(configured)
    teacher = config["teacher"]
    card: Any = Path(teacher["model"]) / layout.MODEL_CARD
    if _is_hub_id(teacher["model"]):
        card = try_to_load_from_cache(teacher["model"], layout.MODEL_CARD, revision=teacher.get("revision"))
    if not isinstance(card, str | Path) or not Path(card).is_file():
        return None
    try:
        found = ModelCard.load(card, ignore_metadata_errors=True).data.license
    except (ValueError, YAMLError):  # its metadata is not what the hub asks for
        return None
    return found if isinstance(found, str) else None


def _is_hub_id(model: str | None) -> bool:
    return model is not None and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model) is not None and not Path(model).exists()
