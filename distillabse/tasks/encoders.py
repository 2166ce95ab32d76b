"""What is compared: anything that turns texts into vectors, and how each kind is opened."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from distillabse import layout
from distillabse.encoder import Encoder
from distillabse.errors import ConfigurationError, InputError
from distillabse.storage import read_json
from distillabse.tasks.base import Vectors

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

_TEXTS_PER_CALL = 1024


class TextEncoder(Protocol):
    """Anything with an `encode` from texts to float [n, dimension], such as `Encoder` and `SentenceTransformer`."""

    def encode(self, texts: list[str]) -> Any:
        """Vectors of texts, in their order; they need not have length 1."""
        ...


class RandomVectors:
    """A student that knows nothing: independent random directions, always the same for the same text.

    Args:
        dimension: Length of a vector.
        seed: Of the directions.
    """

    def __init__(self, dimension: int, seed: int = 0) -> None:
        self.dimension, self.seed = dimension, seed

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors float32 [n, dimension], uniform on the sphere."""
        return np.stack([self._vector(text) for text in texts])

    def _vector(self, text: str) -> Vectors:
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        random = np.random.default_rng([self.seed, int.from_bytes(digest, "little")])
        vector = random.standard_normal(self.dimension, dtype=np.float32)
        unit: Vectors = vector / np.linalg.norm(vector)
        return unit


class VectorTable:
    """Unit vectors of an encoder for distinct texts, each encoded once.

    Args:
        name: What the encoder is called, for errors and progress.
        encoder: It.
        texts: Repeated ones are encoded once.

    Raises:
        InputError: the encoder gives something else than one finite vector for every text.
    """

    def __init__(self, name: str, encoder: TextEncoder, texts: Iterable[str]) -> None:
        # Texts of like length together, longest first, as encoders pad a batch to its longest text.
        distinct = sorted(dict.fromkeys(texts), key=len, reverse=True)
        self._rows = {text: row for row, text in enumerate(distinct)}
        started = time.perf_counter()
        self._vectors = _encode(name, encoder, distinct)
        self.seconds = time.perf_counter() - started

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return int(self._vectors.shape[1])

    def __len__(self) -> int:
        """Number of distinct texts."""
        return len(self._rows)

    def __call__(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors float32 [n, dimension]; a text that was not given at first is a KeyError."""
        return self._vectors[[self._rows[text] for text in texts]]

    def projected(self, matrix: NDArray[np.float32]) -> VectorTable:
        """The same texts in fewer dimensions: unit vectors of `vector @ matrix`, float32 [dimension, fewer]."""
        table = object.__new__(VectorTable)
        table._rows, table.seconds = self._rows, self.seconds
        table._vectors = _unit(self._vectors @ matrix)
        return table


def _encode(name: str, encoder: TextEncoder, texts: list[str]) -> Vectors:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    rate = TextColumn("{task.fields[rate]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    parts: list[Vectors] = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(f"Encoding with {name}", total=len(texts), rate="")
        started = time.perf_counter()
        for start in range(0, len(texts), _TEXTS_PER_CALL):
            part = texts[start : start + _TEXTS_PER_CALL]
            parts.append(_checked(name, encoder.encode(part), len(part)))
            per_second = (start + len(part)) / max(time.perf_counter() - started, 1e-9)
            progress.update(bar, advance=len(part), rate=f"{per_second:,.0f} texts/s")
    return _unit(np.concatenate(parts))


def _checked(name: str, vectors: Any, texts: int) -> Vectors:
    array = np.asarray(vectors, dtype=np.float32)
    if array.ndim != 2 or len(array) != texts:
        raise InputError(f"{name} gives an array of shape {array.shape} for {texts} texts; [{texts}, n] is needed.")
    if not np.isfinite(array).all():
        raise InputError(f"{name} gives vectors that hold NaN or infinity. Check the model.")
    return array


def _unit(vectors: Vectors) -> Vectors:
    rows: Vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return rows


def open_encoder(place: str, device: Literal["cpu", "cuda"] = "cpu") -> TextEncoder:
    """Open a bundle, one of its graphs, or anything that sentence-transformers loads.

    Args:
        place: A bundle's folder (its INT8 graph where it has one), an .onnx file in a bundle, a folder of
            sentence-transformers, static ones of model2vec too, a hub id, or "packaged:all-MiniLM-L6-v2".
        device: Where it runs; static encoders always on the CPU.

    Raises:
        InputError: it cannot be loaded.
    """
    from distillabse.models.teacher import load_encoder, resolve_model

    path = Path(place)
    if path.suffix == ".onnx":
        bundle = path.parent.parent
        return Encoder(bundle, file=str(path.relative_to(bundle)), device=device)
    if (path / layout.ONNX_FP32).is_file():
        return Encoder(path, device=device)
    if is_static(path):
        encoder: TextEncoder = load_static(path)
    else:
        encoder = load_encoder(resolve_model(place), device=device)
    return encoder


def is_static(folder: Path) -> bool:
    """Whether a folder, of sentence-transformers or of model2vec, holds a table of token vectors, no transformer."""
    modules = folder / layout.MODULES
    if modules.is_file():
        return any("StaticEmbedding" in module["type"] for module in read_json(modules))
    return _model2vec_settings(folder).get("model_type") == "model2vec"


def load_static(folder: Path) -> SentenceTransformer:
    """A static encoder as model2vec saves it, with modules.json or without; model2vec itself is not needed.

    Raises:
        InputError: it cannot be loaded.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding

    try:
        if not (folder / layout.MODULES).is_file():
            scaled = [Normalize()] if _model2vec_settings(folder).get("normalize") else []
            return SentenceTransformer(modules=[StaticEmbedding.load(str(folder)), *scaled], device="cpu")
        return SentenceTransformer(str(folder), device="cpu")
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"The static encoder in {folder} cannot be loaded: {error}") from error


def _model2vec_settings(folder: Path) -> dict[str, Any]:
    settings = folder / layout.MODEL_SETTINGS
    return dict(read_json(settings)) if settings.is_file() else {}


def distil_static(teacher: SentenceTransformer, folder: Path) -> None:
    """Write the static floor of a teacher: the vector it gives to each token alone, by model2vec with its defaults.

    Raises:
        ConfigurationError: model2vec is not installed.
    """
    try:
        from model2vec.distill import distill_from_model
    except ImportError as error:
        raise ConfigurationError(
            f"tasks.baselines: static needs model2vec ({error}): pip install 'distillabse[floor]'."
        ) from None
    from distillabse.models.teacher import transformer_of

    logger.info("Distilling the static floor: every token of the teacher's vocabulary once")
    distill_from_model(transformer_of(teacher), teacher.tokenizer, device="cpu").save_pretrained(str(folder))
