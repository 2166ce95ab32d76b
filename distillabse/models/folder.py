"""Saving an encoder as a folder that old and new readers load alike.

sentence-transformers 5.4 and later spell module classes and pooling differently from what
text-embeddings-inference, fastembed and earlier releases read. Every reader accepts the earlier spelling, so that is
what is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from distillabse import layout
from distillabse.models.teacher import no_progress_bars
from distillabse.storage import read_json, write_json

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_POOLING_MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Tokenizer settings that describe the machine or call they were made in, not the tokenizer.
_TRANSIENT_TOKENIZER_KEYS = (
    "is_local", "local_files_only", "max_length", "stride", "truncation_side", "truncation_strategy",
    "pad_to_multiple_of",
)  # fmt: skip


def save_encoder(encoder: SentenceTransformer, folder: Path) -> None:
    """Write weights (safetensors), tokenizer and module settings in their portable spelling into `folder`.

    Modules that share a weight are written with one each: the folder gives the same vectors.
    """
    with no_progress_bars(), _unshared_weights(encoder):
        encoder.save(str(folder), create_model_card=False)
    for weights in folder.rglob("*.safetensors"):
        # safetensors writes for the owner alone; whoever serves the folder must read it.
        weights.chmod(0o644)
    _portable_modules(folder)
    _portable_tokenizer(encoder, folder)
    write_transformer_settings(encoder, folder)


@contextmanager
def _unshared_weights(encoder: SentenceTransformer) -> Iterator[None]:
    """While this is open every module has weights of its own: transformers refuses to write shared ones."""
    seen: set[int] = set()
    shared = []
    for module in encoder.modules():
        for name, weight in module.named_parameters(recurse=False):
            if id(weight) in seen:
                shared.append((module, name, weight))
            seen.add(id(weight))
    for module, name, weight in shared:
        setattr(module, name, nn.Parameter(weight.detach().clone()))
    try:
        yield
    finally:
        for module, name, weight in shared:
            setattr(module, name, weight)


def write_transformer_settings(encoder: SentenceTransformer, folder: Path) -> None:
    """Write where texts are cut, and whether they are lower-cased."""
    lower_case = bool(getattr(encoder[0], "do_lower_case", False))
    write_json(
        folder / layout.TRANSFORMER_SETTINGS, {"max_seq_length": encoder.max_seq_length, "do_lower_case": lower_case}
    )


def _portable_modules(folder: Path) -> None:
    modules = read_json(folder / layout.MODULES)
    for module in modules:
        name = module["type"].rsplit(".", 1)[-1]
        module["type"] = f"sentence_transformers.models.{name}"
        settings = folder / module["path"] / layout.MODEL_SETTINGS
        if name == "Pooling":
            write_json(settings, _portable_pooling(read_json(settings)))
        elif name == "Dense":
            write_json(settings, _portable_dense(read_json(settings)))
    write_json(folder / layout.MODULES, modules)


def _portable_pooling(settings: dict[str, Any]) -> dict[str, Any]:
    mode = settings["pooling_mode"]
    modes = {mode} if isinstance(mode, str) else set(mode)
    flags = {
        f"pooling_mode_{name}": name.removesuffix("_tokens").removesuffix("_token") in modes for name in _POOLING_MODES
    }
    return {
        "word_embedding_dimension": settings["embedding_dimension"],
        **flags,
        "include_prompt": settings.get("include_prompt", True),
    }


def _portable_dense(settings: dict[str, Any]) -> dict[str, Any]:
    kept = {key: settings[key] for key in ("in_features", "out_features", "bias", "activation_function")}
    return {**kept, "use_residual": True} if settings.get("use_residual") else kept


def _portable_tokenizer(encoder: SentenceTransformer, folder: Path) -> None:
    path = folder / layout.TOKENIZER_SETTINGS
    settings = {key: value for key, value in read_json(path).items() if key not in _TRANSIENT_TOKENIZER_KEYS}
    settings["model_max_length"] = encoder.max_seq_length
    # Readers rebuild a BertTokenizer's own normaliser; any other tokenizer is read as tokenizer.json says.
    is_bert = type(encoder.tokenizer).__name__ in ("BertTokenizer", "BertTokenizerFast")
    settings["tokenizer_class"] = "BertTokenizer" if is_bert else "PreTrainedTokenizerFast"
    write_json(path, settings)
    special = {name: getattr(encoder.tokenizer, name) for name in _SPECIAL_TOKENS}
    write_json(folder / layout.SPECIAL_TOKENS, {name: token for name, token in special.items() if token is not None})
    _plain_tokenizer(folder / layout.TOKENIZER, folder)


def _plain_tokenizer(path: Path, folder: Path) -> None:
    """Truncation and padding belong to the caller; a length left in tokenizer.json silently cuts texts short."""
    tokenizer = read_json(path)
    tokenizer["truncation"] = tokenizer["padding"] = None
    write_json(path, tokenizer)
    if tokenizer["model"].get("type") == "WordPiece":
        rows = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
        (folder / "vocab.txt").write_text("".join(f"{token}\n" for token, _ in rows), encoding="utf-8")
