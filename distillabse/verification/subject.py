"""The bundle under examination: each part is loaded when a check first asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distillabse import layout
from distillabse.corpus.records import Sentence
from distillabse.encoder import Encoder, load_tokenizer
from distillabse.errors import InputError
from distillabse.evaluation.fidelity import Vectors
from distillabse.storage import read_json
from distillabse.verification.kinds import TORCH, Graph, graphs_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer

_SAMPLE = 64


class Subject:
    """A bundle and the texts that it is examined on.

    Args:
        folder: the bundle.
        texts: at least two different ones.
        name: what the texts are called in the gates.

    Attributes:
        record: content of distillabse.json.
        graphs: the graphs that the record promises.

    Raises:
        InputError: there is no bundle, its record cannot be read, or there are fewer than two different texts.
    """

    def __init__(self, folder: Path, texts: Sequence[Sentence], name: str) -> None:
        if not (folder / layout.PROVENANCE).is_file():
            raise InputError(
                f"{folder} holds no bundle: {layout.PROVENANCE} is missing. Give the folder that `distillabse export` "
                "wrote, or run that first."
            )
        if len({sentence.text for sentence in texts}) < 2:
            raise InputError(f"The set {name!r} has fewer than two different texts. Nothing can be verified on it.")
        self.folder, self.texts, self.name = folder, list(texts), name
        self.record: dict[str, Any] = read_json(folder / layout.PROVENANCE)
        if not isinstance(self.record, dict):
            raise InputError(f"{folder / layout.PROVENANCE} is not the record of a bundle. Export it again.")
        self.graphs: tuple[Graph, ...] = graphs_of(folder, self.record)
        self._encoders: dict[str, Encoder] = {}
        self._vectors: dict[str, Vectors] = {}

    @property
    def artefacts(self) -> list[str]:
        """What gives vectors: PyTorch, then every graph."""
        return [TORCH, *(graph.artefact for graph in self.graphs)]

    @property
    def pooled(self) -> list[str]:
        """The graphs of sentence vectors alone that the record promises."""
        return [str(name) for name in self.record.get("pooled", [])]

    @property
    def plain_texts(self) -> list[str]:
        """The texts without their languages."""
        return [sentence.text for sentence in self.texts]

    @property
    def sample(self) -> list[str]:
        """The first texts, for checks that encode them several times."""
        return self.plain_texts[:_SAMPLE]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The transformers settings, config.json."""
        return dict(read_json(self.folder / layout.MODEL_SETTINGS))

    @cached_property
    def student(self) -> SentenceTransformer:
        """The bundle in sentence-transformers."""
        from distillabse.models.teacher import load_encoder

        return load_encoder(str(self.folder)).eval()

    @cached_property
    def whole_tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer, which cuts nothing."""
        tokenizer = load_tokenizer(self.folder)
        tokenizer.no_truncation()
        return tokenizer

    @cached_property
    def prompt(self) -> str:
        """What the model prepends to every text."""
        path = self.folder / layout.SENTENCE_TRANSFORMERS_SETTINGS
        settings = read_json(path) if path.is_file() else {}
        name = settings.get("default_prompt_name")
        return str(settings["prompts"][name]) if name else ""

    @property
    def max_length(self) -> int:
        """Where texts are cut, in tokens."""
        return int(read_json(self.folder / layout.TRANSFORMER_SETTINGS)["max_seq_length"])

    def encoder(self, artefact: str) -> Encoder:
        """A graph in ONNX Runtime, loaded once."""
        if artefact not in self._encoders:
            file = next(graph.file for graph in self.graphs if graph.artefact == artefact)
            self._encoders[artefact] = Encoder(self.folder, file=file)
        return self._encoders[artefact]

    def encode(self, artefact: str, texts: Sequence[str]) -> Vectors:
        """Vectors of an artefact as its user gets them: float32 [texts, dimension]."""
        if artefact == TORCH:
            return np.asarray(self.student.encode(list(texts), batch_size=32, show_progress_bar=False))
        return self.encoder(artefact).encode(texts)

    def encode_batch(self, artefact: str, texts: Sequence[str], width: int = 1) -> Vectors:
        """Vectors of texts that are run as one batch, padded to at least `width` tokens: float32 [texts, dimension]."""
        if artefact != TORCH:
            encoder = self.encoder(artefact)
            return encoder.run(encoder.tokenize(texts, pad_to=width))
        from distillabse.models.tokens import tokenise
        from distillabse.training.data import PaddingCollator

        rows = tokenise(self.student, texts)
        collate = PaddingCollator(self.student.tokenizer.pad_token_id, max(width, *map(len, rows)))
        return self._run_torch(collate([{"input_ids": row} for row in rows]))

    def encode_ids(self, artefact: str, ids: Sequence[int]) -> Vectors:
        """Vector of one row of token ids, special tokens included: float32 [1, dimension]."""
        row = np.array([ids], np.int64)
        inputs = {"input_ids": row, "attention_mask": np.ones_like(row)}
        if artefact != TORCH:
            return self.encoder(artefact).run(inputs)
        import torch

        return self._run_torch({name: torch.from_numpy(values) for name, values in inputs.items()})

    def _run_torch(self, batch: dict[str, Any]) -> Vectors:
        import torch

        with torch.inference_mode():
            vectors: Vectors = self.student(batch)["sentence_embedding"].numpy()
        return vectors

    def token_ids(self, artefact: str, text: str) -> list[int]:
        """A text's token ids as an artefact's own reader makes them, special tokens included."""
        if artefact != TORCH:
            return [int(token) for token in self.encoder(artefact).tokenize([text])["input_ids"][0]]
        from distillabse.models.tokens import tokenise

        return tokenise(self.student, [text])[0]

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text as it is cut."""
        encodings = self.whole_tokenizer.encode_batch_fast([self.prompt + text for text in texts])
        return [min(len(encoding.ids), self.max_length) for encoding in encodings]

    def vectors(self, artefact: str) -> Vectors:
        """Vectors of the texts, encoded once: float32 [texts, dimension]."""
        if artefact not in self._vectors:
            self._vectors[artefact] = self.encode(artefact, self.plain_texts)
        return self._vectors[artefact]

    @property
    def most_compressed(self) -> str:
        """The artefact that was changed most: the last graph, or PyTorch where there is none."""
        return self.graphs[-1].artefact if self.graphs else TORCH
