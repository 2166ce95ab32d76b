"""The process of one engine: `python -m distillabse.evaluation.latency_worker`, started by `latency.measure`.

The first line on stdin is the engine; each further line is a question, answered with one line on stdout:
{"texts": [...]} with {"tokens": [...]}, and {"batches": [[...], ...], "seconds": s} with {"seconds": [...]}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Device = Literal["cpu", "cuda"]
LONGEST_REST = 1.0


class LoadedEngine(Protocol):
    """What the two kinds of engines have in common."""

    def tokens(self, texts: list[str]) -> list[int]:
        """The length of each text in tokens, special tokens included, as the model cuts it."""
        ...

    def encode(self, batch: list[str]) -> NDArray[np.float32]:
        """Sentence vectors of one batch."""
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


def time_batches(
    encode: Callable[[list[str]], Any],
    batches: list[list[str]],
    seconds: float,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> list[float]:
    """Encode the whole list of batches once, and again until `seconds` are used up; the seconds of every call."""
    spent: list[float] = []
    while not spent or sum(spent) < seconds:
        for batch in batches:
            start = clock()
            encode(batch)
            spent.append((clock() - start) / 1e9)
    return spent


def come_to_rest() -> None:
    """Wait until this process uses no CPU time: ONNX Runtime's threads spin for some 40 ms after their work is done.

    Otherwise they would take a core from the engine whose turn is next.
    """
    give_up = time.monotonic() + LONGEST_REST
    used = -1.0
    while time.process_time() - used > 0.001 and time.monotonic() < give_up:
        used = time.process_time()
        time.sleep(0.01)


def load(kind: str, folder: str, file: str | None, device: Device, threads: int) -> LoadedEngine:
    """Load the engine that `latency.measure` describes."""
    if kind == "torch":
        return TorchEngine(Path(folder), device, threads)
    return OnnxEngine(Path(folder), file, device, threads)


def serve(load: Callable[..., LoadedEngine]) -> None:
    """Answer the lines on stdin until it is closed, with the engine that `load` makes of the first line's values."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is not an answer
    engine = load(**json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        question = json.loads(line)
        answer: dict[str, Any]
        if "texts" in question:
            answer = {"tokens": engine.tokens(question["texts"])}
        else:
            answer = {"seconds": time_batches(engine.encode, question["batches"], question["seconds"])}
        come_to_rest()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(load)
