"""The engines that a worker can load: each turns texts into vectors as its users do."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from distillabse.inference import Device

_BULK_BATCH = 32


class LoadedEngine(Protocol):
    """What all kinds of engines have in common."""

    def tokens(self, texts: list[str]) -> list[int]:
        """The length of each text in tokens, special tokens included, as the model cuts it."""
        ...

    def encode(self, batch: list[str]) -> NDArray[np.float32]:
        """Sentence vectors of texts that are run as one batch."""
        ...

    def bulk(self, texts: list[str]) -> NDArray[np.float32]:
        """Sentence vectors of any number of texts, sorted and batched as the engine's own users get it."""
        ...


class TorchEngine:
    """What people run today: the SentenceTransformer in fp32 with SDPA, as in its own `encode`."""

    def __init__(self, folder: Path, device: str, threads: int) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        import distillabse.models.switch  # noqa: F401  # makes the Switch student known to transformers

        torch.set_num_threads(threads)
        settings = {"attn_implementation": "sdpa", "dtype": torch.float32}
        self._model = SentenceTransformer(
            str(folder), device=device, model_kwargs=settings, local_files_only=True
        ).eval()
        if device == "cuda":
            self.clock = CudaClock(torch.cuda.Event)

    def tokens(self, texts: list[str]) -> list[int]:
        """See `LoadedEngine`."""
        return list(self._model.preprocess(texts)["attention_mask"].sum(dim=1).tolist())

    def encode(self, batch: list[str]) -> NDArray[np.float32]:
        """See `LoadedEngine`."""
        import torch
        from sentence_transformers.util import batch_to_device

        with torch.inference_mode():
            features = batch_to_device(self._model.preprocess(batch), self._model.device)
            # Copying to the CPU waits for the GPU, so the time covers all of its work.
            vectors: NDArray[np.float32] = self._model(features)["sentence_embedding"].cpu().numpy()
        return vectors

    def bulk(self, texts: list[str]) -> NDArray[np.float32]:
        """See `LoadedEngine`."""
        return np.asarray(self._model.encode(texts, show_progress_bar=False), dtype=np.float32)

    def gpu_peak_bytes(self) -> int | None:
        """Most memory that PyTorch has taken from the GPU; None on a CPU."""
        import torch

        return int(torch.cuda.max_memory_reserved()) if self._model.device.type == "cuda" else None


class StaticEngine:
    """A table of token vectors, averaged: model2vec's layout or that of sentence-transformers. It has no attention."""

    def __init__(self, folder: Path, threads: int) -> None:
        import torch

        from distillabse.tasks.encoders import load_static

        torch.set_num_threads(threads)
        self._model = load_static(folder).eval()

    def tokens(self, texts: list[str]) -> list[int]:
        """See `LoadedEngine`; there are no special tokens."""
        encodings = self._model[0].tokenizer.encode_batch(texts, add_special_tokens=False)
        return [len(encoding.ids) for encoding in encodings]

    def encode(self, batch: list[str]) -> NDArray[np.float32]:
        """See `LoadedEngine`."""
        import torch

        with torch.inference_mode():
            vectors: NDArray[np.float32] = self._model(self._model.preprocess(batch))["sentence_embedding"].numpy()
        return vectors

    def bulk(self, texts: list[str]) -> NDArray[np.float32]:
        """See `LoadedEngine`."""
        return np.asarray(self._model.encode(texts, show_progress_bar=False), dtype=np.float32)


class OnnxEngine:
    """A graph of a bundle in ONNX Runtime."""

    def __init__(self, folder: Path, file: str | None, device: Device, threads: int) -> None:
        from distillabse.encoder import Encoder

        self._encoder = Encoder(folder, file=file, device=device, threads=threads)

    def tokens(self, texts: list[str]) -> list[int]:
        """See `LoadedEngine`."""
        return list(self._encoder.tokenize(texts)["attention_mask"].sum(axis=1).tolist())

    def encode(self, batch: list[str]) -> NDArray[np.float32]:
        """See `LoadedEngine`."""
        return self._encoder.run(self._encoder.tokenize(batch))

    def bulk(self, texts: list[str]) -> NDArray[np.float32]:
        """See `LoadedEngine`."""
        return self._encoder.encode(texts)


class OnnxFileEngine:
    """Any ONNX file of a sentence encoder, which need not be ours."""

    def __init__(self, file: Path, device: Device, threads: int) -> None:
        from distillabse.evaluation.onnx_file import OnnxFile

        self._file = OnnxFile(file, device, threads)

    def tokens(self, texts: list[str]) -> list[int]:
        """See `LoadedEngine`."""
        return [len(row) for row in self._file.token_ids(texts)]

    def encode(self, batch: list[str]) -> NDArray[np.float32]:
        """See `LoadedEngine`."""
        return self._file.encode(batch)

    def bulk(self, texts: list[str]) -> NDArray[np.float32]:
        """See `LoadedEngine`: batches of 32 of like length, as in sentence-transformers."""
        order = np.argsort([-len(text) for text in texts], kind="stable")
        batches = [order[start : start + _BULK_BATCH] for start in range(0, len(order), _BULK_BATCH)]
        found = np.concatenate([self.encode([texts[row] for row in rows]) for rows in batches])
        vectors = np.empty_like(found)
        vectors[order] = found
        return vectors


class CudaClock:
    """A clock that tells when the GPU has come to a point: each call records an event and waits for it.

    Args:
        event: `torch.cuda.Event`.
    """

    def __init__(self, event: Any) -> None:
        self._event = event
        self._last = self._now()
        self._nanoseconds = 0

    def __call__(self) -> int:
        """Nanoseconds of the GPU since the clock was made; two events next to each other keep their full precision."""
        event = self._now()
        self._nanoseconds += round(self._last.elapsed_time(event) * 1e6)
        self._last = event
        return self._nanoseconds

    def _now(self) -> Any:
        event = self._event(enable_timing=True)
        event.record()
        event.synchronize()
        return event


def load(kind: str, folder: str, file: str | None, device: Device, threads: int) -> LoadedEngine:
    """Load the engine that `workers.Engine` describes."""
    place = Path(folder)
    if kind == "torch":
        return TorchEngine(place, device, threads)
    if kind == "static":
        return StaticEngine(place, threads)
    if kind == "onnx-file":
        return OnnxFileEngine(place / (file or ""), device, threads)
    return OnnxEngine(place, file, device, threads)


def clocks_of(engine: Any) -> list[Any]:
    """The clocks that an engine is timed with: the one on the wall, after that of its GPU where it has one."""
    own = getattr(engine, "clock", None)
    return [time.perf_counter_ns] if own is None else [own, time.perf_counter_ns]
