"""Gates on what production sends: texts that are too long, empty, or made of anything that Unicode allows."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from typing import Any

import numpy as np

from distillabse import layout
from distillabse.config import GatesConfig
from distillabse.errors import InputError, first_line
from distillabse.evaluation.fidelity import Vectors, row_cosines
from distillabse.storage import read_json
from distillabse.verification.gates import BUNDLE, Gate, Outcome, at_least, at_most, exactly, none_of
from distillabse.verification.kinds import FP32, TORCH
from distillabse.verification.subject import Subject
from distillabse.verification.vectors import LENGTH_TOLERANCE

_ACCENTS = "Crème brûlée à Besançon, naïve Ångström, Tiếng Việt"
_SURROGATES = "lone surrogates"
ODD_TEXTS = {
    "empty": "",
    "a space": " ",
    "white space": " \t\r\n\u00a0\u2003\u3000",
    "emoji": "😀 👍🏽 👩\u200d👩\u200d👧\u200d👦 🏳\ufe0f\u200d🌈 🇬🇪🇯🇵 1\ufe0f⃣",
    "10,000 characters": ("The same sentence again and again. " * 286)[:10_000],
    "10,000 characters without a space": "ab" * 5_000,
    "10,000 characters of emoji": "👩\u200d👩\u200d👧\u200d👦" * 1_429,
    "mixed scripts": "The поезд 列車 قطار रेलगाड़ी მატარებელი τρένο 기차 is late",
    "right to left with marks": "\u202eabc\u202c \u200f\u05e9\u05c1\u05dc\u05d5\u05dd\u200e "
    "\u0645\u064e\u0631\u0652\u062d\u064e\u0628\u064b\u0627 \u2067\u0661\u0662\u0663\u2069",
    "accents composed": unicodedata.normalize("NFC", _ACCENTS),
    "accents decomposed": unicodedata.normalize("NFD", _ACCENTS),
    "stacked marks": "Z" + "\u0301\u0316\u0327" * 40,
    _SURROGATES: "a \ud83d b \udc00\ud800 c",
    "NUL": "before\x00after",
    "control characters": "".join(map(chr, range(1, 32))) + "\x7f\x80\x9f\u200b\u2060\ufeff\ufffd",
    "unknown characters": "\U00013000\U00013001 \U00012000 \U0010fffd\U0010fffe",
    "markup": "<script>alert('[CLS] [SEP] [PAD] <s> </s> <pad>')</script>",
}
_WRONG_TYPES: tuple[Any, ...] = (None, b"bytes", [None], [b"bytes"], [1], [["nested"]])
_NEIGHBOURS = 8
_SHORT_WORDS = ("a", "the", "1", ".", "é", "中", "A")
_CHARACTERS = "x7q2z9k4"
_SURPLUS = 2


def examine_limits(subject: Subject) -> Outcome:
    """Every file says the same of where texts are cut, and the model reaches as far."""
    tokenizer = read_json(subject.folder / layout.TOKENIZER)
    told = int(read_json(subject.folder / layout.TOKENIZER_SETTINGS)["model_max_length"])
    positions = subject.settings["max_position_embeddings"]
    own = [name for name in ("truncation", "padding") if tokenizer.get(name) is not None]
    return Outcome(
        [
            exactly("model_max_length, as max_seq_length", BUNDLE, told, subject.max_length),
            at_most("max_seq_length, within the positions", BUNDLE, subject.max_length, positions),
            none_of("lengths of its own in tokenizer.json", BUNDLE, own),
        ]
    )


def examine_truncation(subject: Subject, artefact: str, limits: GatesConfig) -> Outcome:
    """A long text has the vector of its first tokens; a text of exactly the greatest length is not cut.

    Returns:
        Gates, and as figures max_length and the cut text, least cosine to its tokens.
    """
    longest = subject.max_length
    exact, long = _text_of(subject, longest), _text_of(subject, longest + 1)
    # Another word at the end alone, and texts with much to lose.
    texts = [long, f"{long} {long}", *(" ".join([text] * (longest + 1)) for text in subject.sample[:_SURPLUS] if text)]
    wanted = [_first_tokens(subject, text) for text in texts]
    cut = [subject.token_ids(artefact, text) for text in texts]
    vectors = subject.encode(artefact, texts)
    least = min(
        float(row_cosines(vector[None], subject.encode_ids(artefact, ids))[0])
        for vector, ids in zip(vectors, wanted, strict=True)
    )
    whole = subject.token_ids(artefact, exact)
    surplus = sum(found != ids for found, ids in zip(cut, wanted, strict=True))
    gates = [
        exactly("long texts not cut to their first tokens", artefact, surplus, 0),
        exactly("tokens of a text of max_seq_length", artefact, len(whole), longest),
        exactly("texts of max_seq_length that are cut", artefact, int(whole != _all_tokens(subject, exact)), 0),
        at_least("cut text, least cosine to its tokens", artefact, least, limits.invariance_min),
    ]
    return Outcome(gates, {"max_length": longest, "min": least})


def examine_odd_texts(subject: Subject, artefact: str, limits: GatesConfig) -> Outcome:
    """Each odd text has a finite unit vector, the same alone and among others, and as torch reads it.

    Lone surrogates are no Unicode text; torch's tokenizer may refuse them, a graph's reader may not.

    Returns:
        Gates, and as figures for each text: "length" of its vector, "batch" (cosine alone to in a batch), "torch"
        (cosine to torch, where that reads the text), or "error".
    """
    figures: dict[str, dict[str, Any]] = {}
    alone: dict[str, Vectors] = {}
    for name, text in ODD_TEXTS.items():
        try:
            alone[name] = subject.encode(artefact, [text])
        except Exception as error:  # whatever a tokenizer raises: the other texts are examined all the same
            figures[name] = {"error": f"{type(error).__name__}: {first_line(error)}"}
    batch = subject.encode_batch(artefact, [*(ODD_TEXTS[name] for name in alone), *subject.sample[:_NEIGHBOURS]])
    for (name, vector), other in zip(alone.items(), batch, strict=False):
        length = float(np.linalg.norm(vector.astype(np.float64)))
        figures[name] = {"length": length, "batch": float(row_cosines(vector, other[None])[0])}
    refused = [f"{name} ({found['error']})" for name, found in figures.items() if "error" in found]
    if artefact == TORCH:
        refused = [line for line in refused if not line.startswith(_SURROGATES)]
    errors = [abs(found["length"] - 1) for found in figures.values() if "length" in found]
    gates = [
        none_of("odd texts that are refused", artefact, refused),
        at_most("odd texts, largest error of length", artefact, float(np.max(errors)), LENGTH_TOLERANCE),
        _least("odd texts, least cosine in a batch", artefact, figures, "batch", limits.invariance_min),
    ]
    if artefact != TORCH:
        gates += [
            _same_tokens(subject, artefact, list(alone)),
            none_of("wrong types taken for texts", artefact, _taken(subject, artefact)),
        ]
    if artefact == FP32:
        for name in set(alone) - {_SURROGATES}:
            found = row_cosines(alone[name], subject.encode(TORCH, [ODD_TEXTS[name]]))
            figures[name]["torch"] = float(found[0])
        gates.append(
            _least("odd texts, least cosine to torch", artefact, figures, "torch", limits.onnx_fp32_to_torch_min)
        )
    return Outcome(gates, figures)


def _same_tokens(subject: Subject, artefact: str, names: list[str]) -> Gate:
    differ = [
        name
        for name in names
        if name != _SURROGATES
        and subject.token_ids(artefact, ODD_TEXTS[name]) != subject.token_ids(TORCH, ODD_TEXTS[name])
    ]
    return none_of("odd texts, other tokens than in torch", artefact, differ)


def _taken(subject: Subject, artefact: str) -> Iterator[str]:
    for wrong in _WRONG_TYPES:
        try:
            subject.encoder(artefact).encode(wrong)
        except TypeError:
            continue
        yield repr(wrong)


def _least(gate: str, artefact: str, figures: dict[str, dict[str, Any]], key: str, limit: float) -> Gate:
    found = {name: row[key] for name, row in figures.items() if key in row}
    worst = min(found, key=lambda name: np.nan_to_num(found[name], nan=-2.0))
    return at_least(gate, artefact, found[worst], limit, detail=worst)


def _all_tokens(subject: Subject, text: str) -> list[int]:
    return list(subject.whole_tokenizer.encode(subject.prompt + text).ids)


def _first_tokens(subject: Subject, text: str) -> list[int]:
    """Token ids of a text that is cut: the special tokens at both ends stay, what is between loses its end."""
    encoding = subject.whole_tokenizer.encode(subject.prompt + text)
    is_special = np.array(encoding.special_tokens_mask, dtype=bool)
    before = int(np.argmin(is_special))
    after = int(np.argmin(is_special[::-1]))
    ids = list(encoding.ids)
    end = ids[len(ids) - after :]
    return [*ids[: subject.max_length - after], *end] if before + after < len(ids) else ids


def _text_of(subject: Subject, tokens: int) -> str:
    """A text of exactly so many tokens, special tokens included: a short word again and again, then single characters.

    Raises:
        InputError: nothing that was tried has as many.
    """
    special = len(_all_tokens(subject, ""))
    for word in _SHORT_WORDS:
        text: str = " ".join([word] * ((tokens - special) // max(1, len(_all_tokens(subject, word)) - special)))
        for character in ("", *_CHARACTERS):
            text += character
            if len(_all_tokens(subject, text)) == tokens:
                return text
    raise InputError(f"No text of exactly {tokens} tokens was found for this tokenizer.")
