"""Any ONNX file of a sentence encoder: its tokenizer and its pooling are found beside it or in the folder above."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer, normalizers

from distillabse import layout
from distillabse.errors import InputError
from distillabse.inference import KNOWN_INPUTS, NEEDED_INPUTS, OUTPUT, Device, session
from distillabse.storage import read_json
from distillabse.tokenization import whole_characters

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]

POOLING = "1_Pooling/config.json"
STATES = "last_hidden_state"
_DEFAULT_LENGTH = 512
_PADDING = ("[PAD]", "<pad>", "<|pad|>", "<|endoftext|>")


class OnnxFile:
    """Turns texts into sentence vectors with one ONNX file.

    Args:
        file: Inputs input_ids, attention_mask and maybe token_type_ids; output sentence_embedding, or
            last_hidden_state, which is pooled as 1_Pooling/config.json says, without one by the mean over the tokens.
        device: Where it runs.
        threads: Threads of the graph.

    Raises:
        InputError: the file cannot be loaded, or has no tokenizer, or other inputs and outputs.
        ConfigurationError: the device cannot be used.
    """

    def __init__(self, file: Path, device: Device = "cpu", threads: int | None = None) -> None:
        folder = tokenizer_folder(file)
        self._tokenizer, self._pad_id = _load_tokenizer(folder)
        self._session = session(file, device, threads)
        self._inputs = {node.name for node in self._session.get_inputs()}
        outputs = [node.name for node in self._session.get_outputs()]
        if (missing := NEEDED_INPUTS - self._inputs) or (unknown := self._inputs - KNOWN_INPUTS):
            wrong = f"no input {min(missing)!r}" if missing else f"an input {min(unknown)!r}"
            raise InputError(f"{file} has {wrong}; a sentence encoder reads {', '.join(sorted(KNOWN_INPUTS))}.")
        self._output = next((name for name in (OUTPUT, STATES) if name in outputs), "")
        if not self._output:
            raise InputError(f"{file} gives {', '.join(outputs)}; {OUTPUT} or {STATES} is needed.")
        self._pool = "none" if self._output == OUTPUT else pooling_of(folder)

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of every text, special tokens included, cut to the greatest length of the model."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast([whole_characters(t) for t in texts])]

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors of texts that are run as one batch: float32 [texts, dimension]."""
        rows = self.token_ids(texts)
        ids = np.full((len(rows), max(map(len, rows))), self._pad_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = row
            mask[number, : len(row)] = 1
        every = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        found = self._session.run([self._output], {name: every[name] for name in self._inputs})[0]
        vectors = found if self._pool == "none" else pooled(found, mask, self._pool)
        unit: Vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return unit.astype(np.float32)


def pooled(states: NDArray[Any], mask: NDArray[np.int64], pooling: str) -> Vectors:
    """Sentence vectors [batch, dimension] of token states [batch, tokens, dimension]; padding does not count.

    Args:
        states: last_hidden_state.
        mask: 1 for tokens, 0 for padding: int64 [batch, tokens].
        pooling: "mean", "cls", "max" or "lasttoken".
    """
    wide = mask[:, :, None].astype(states.dtype)
    if pooling == "cls":
        found = states[:, 0]
    elif pooling == "max":
        found = np.where(wide > 0, states, -np.inf).max(axis=1)
    elif pooling == "lasttoken":
        found = states[np.arange(len(states)), mask.sum(axis=1) - 1]
    else:
        found = (states * wide).sum(axis=1) / np.maximum(wide.sum(axis=1), 1)
    return np.asarray(found, dtype=np.float32)


def tokenizer_folder(file: Path) -> Path:
    """The folder with the tokenizer of an ONNX file: its own or the one above.

    Raises:
        InputError: neither has one, or there is no such file.
    """
    if not file.is_file():
        raise InputError(f"There is no file {file}. Give an ONNX file of a sentence encoder.")
    for folder in (file.parent, file.resolve().parent.parent):
        if (folder / layout.TOKENIZER).is_file():
            return folder
    raise InputError(f"{file} has no {layout.TOKENIZER} beside or above it. Put the model's there.")


def pooling_of(folder: Path) -> str:
    """How 1_Pooling/config.json pools tokens: "mean" where there is none.

    Raises:
        InputError: it asks for something else than one of mean, cls, max and lasttoken, or the model goes on after it.
    """
    modules = read_json(folder / layout.MODULES) if (folder / layout.MODULES).is_file() else []
    if further := [module["type"] for module in modules if module["type"].rsplit(".", 1)[-1] in ("Dense", "LayerNorm")]:
        raise InputError(
            f"{folder / layout.MODULES} has a module {further[0].rsplit('.', 1)[-1]} after pooling, which a graph that "
            f"ends with {STATES} leaves out. Give a graph with the output {OUTPUT}."
        )
    if not (folder / POOLING).is_file():
        return "mean"
    settings = read_json(folder / POOLING)
    old = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max"}
    old["pooling_mode_lasttoken"] = "lasttoken"
    asked = settings.get("pooling_mode") or [name for key, name in old.items() if settings.get(key)]
    modes = [asked] if isinstance(asked, str) else list(asked)
    if len(modes) != 1 or modes[0] not in old.values():
        raise InputError(f"{folder / POOLING} asks for the pooling {modes}; one of {', '.join(old.values())} is known.")
    return str(modes[0])


def _load_tokenizer(folder: Path) -> tuple[Tokenizer, int]:
    """The tokenizer, which cuts at the model's greatest length, and the id of padding."""
    try:
        tokenizer = Tokenizer.from_file(str(folder / layout.TOKENIZER))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise InputError(f"{folder / layout.TOKENIZER} is not a tokenizer ({error}).") from None
    encoder, texts = (_settings(folder / name) for name in (layout.TRANSFORMER_SETTINGS, layout.TOKENIZER_SETTINGS))
    if encoder.get("do_lower_case"):
        steps = [tokenizer.normalizer] if tokenizer.normalizer else []
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *steps])
    cut, padding = tokenizer.truncation, tokenizer.padding
    length = encoder.get("max_seq_length") or (cut["max_length"] if cut else texts.get("model_max_length"))
    tokenizer.enable_truncation(max_length=int(length) if length and length < 1e6 else _DEFAULT_LENGTH)
    tokenizer.no_padding()
    if padding:
        return tokenizer, int(padding["pad_id"])
    token = texts.get("pad_token")
    named = token["content"] if isinstance(token, dict) else token
    numbers = [tokenizer.token_to_id(name) for name in (named, *_PADDING) if name]
    return tokenizer, next((number for number in numbers if number is not None), 0)


def _settings(file: Path) -> dict[str, Any]:
    return dict(read_json(file)) if file.is_file() else {}
