"""Gates on the folder: every file as it was written, nothing else, and spelt so that every consumer can read it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from distillabse import layout
from distillabse.checksums import broken_checksums, unlisted_files
from distillabse.storage import read_json
from distillabse.verification.gates import BUNDLE, Outcome, none_of
from distillabse.verification.subject import Subject

_REQUIRED = (
    layout.MODEL_SETTINGS, layout.MODULES, layout.TRANSFORMER_SETTINGS, layout.TOKENIZER, layout.TOKENIZER_SETTINGS,
    layout.SPECIAL_TOKENS, layout.PROVENANCE, layout.CHECKSUMS,
)  # fmt: skip
# Formats that are, or may hold, pickled objects: loading one can run any code.
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npz")


def examine_files(subject: Subject) -> Outcome:
    """Checksums, unlisted and pickled files, and that the record and the graphs agree on what is there."""
    folder = subject.folder
    promised = {graph.file for graph in subject.graphs} | set(subject.pooled)
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*.onnx")}
    return Outcome(
        [
            none_of("files that differ from SHA256SUMS", BUNDLE, broken_checksums(folder)),
            none_of("files that SHA256SUMS does not list", BUNDLE, unlisted_files(folder)),
            none_of("files that may hold pickled objects", BUNDLE, sorted(_pickles(folder))),
            none_of("required files that are missing", BUNDLE, sorted(_missing(folder))),
            none_of("promised graphs that are missing", BUNDLE, sorted(promised - present)),
            none_of("graphs that the record does not name", BUNDLE, sorted(present - promised)),
        ]
    )


def examine_layout(subject: Subject) -> Outcome:
    """What consumers older than sentence-transformers 5.4, fastembed and text-embeddings-inference need to find."""
    return Outcome([none_of("settings that a consumer cannot read", BUNDLE, list(_unreadable(subject.folder)))])


def pooling_folders(folder: Path) -> list[Path]:
    """Folders of a bundle's Pooling modules."""
    return [folder / module["path"] for module in read_json(folder / layout.MODULES) if _kind(module) == "Pooling"]


def vector_size(folder: Path) -> int:
    """Dimension of a sentence vector as the settings of the modules say: the last Dense, else the pooled states."""
    modules = read_json(folder / layout.MODULES)
    dense = [
        read_json(folder / module["path"] / layout.MODEL_SETTINGS) for module in modules if _kind(module) == "Dense"
    ]
    if dense:
        return int(dense[-1]["out_features"])
    settings = read_json(pooling_folders(folder)[0] / layout.MODEL_SETTINGS)
    modes = sum(value is True for key, value in settings.items() if key.startswith("pooling_mode_"))
    return int(settings["word_embedding_dimension"]) * modes


def _missing(folder: Path) -> Iterator[str]:
    for name in _REQUIRED:
        if not (folder / name).is_file():
            yield name
    if not list(folder.glob("*.safetensors")):
        yield "model.safetensors"
    if (folder / layout.MODULES).is_file():
        for module in read_json(folder / layout.MODULES):
            if (
                _kind(module) in ("Pooling", "Dense")
                and not (folder / module["path"] / layout.MODEL_SETTINGS).is_file()
            ):
                yield f"{module['path']}/{layout.MODEL_SETTINGS}"


def _unreadable(folder: Path) -> Iterator[str]:
    settings = read_json(folder / layout.MODEL_SETTINGS)
    if not settings.get("architectures"):
        yield f"{layout.MODEL_SETTINGS}: no architectures"
    for module in read_json(folder / layout.MODULES):
        if module["type"] != f"sentence_transformers.models.{_kind(module)}":
            yield f"{layout.MODULES}: {module['type']}"
    for pooling in pooling_folders(folder):
        yield from _unreadable_pooling(read_json(pooling / layout.MODEL_SETTINGS), settings["hidden_size"])
    tokenizer = read_json(folder / layout.TOKENIZER_SETTINGS)
    if not isinstance(tokenizer.get("model_max_length"), int):
        yield f"{layout.TOKENIZER_SETTINGS}: no model_max_length"
    if not tokenizer.get("pad_token"):
        yield f"{layout.TOKENIZER_SETTINGS}: no pad_token"
    if "pad_token" not in read_json(folder / layout.SPECIAL_TOKENS):
        yield f"{layout.SPECIAL_TOKENS}: no pad_token"
    if not isinstance(read_json(folder / layout.TRANSFORMER_SETTINGS).get("max_seq_length"), int):
        yield f"{layout.TRANSFORMER_SETTINGS}: no max_seq_length"


def _unreadable_pooling(settings: dict[str, Any], width: int) -> Iterator[str]:
    modes = [settings.get(f"pooling_mode_{name}") for name in ("cls_token", "mean_tokens")]
    if not all(isinstance(mode, bool) for mode in modes):
        yield "Pooling: pooling_mode_cls_token and pooling_mode_mean_tokens are not spelt out"
    if settings.get("word_embedding_dimension") != width:
        yield f"Pooling: word_embedding_dimension is {settings.get('word_embedding_dimension')}, hidden_size {width}"


def _kind(module: dict[str, Any]) -> str:
    return str(module["type"]).rsplit(".", 1)[-1]


def _pickles(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        if path.suffix in _PICKLES or (path.suffix == ".npy" and not _is_plain_array(path)):
            yield path.relative_to(folder).as_posix()


def _is_plain_array(path: Path) -> bool:
    try:
        np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError):
        return False
    return True
