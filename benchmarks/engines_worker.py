"""The process of one engine of `engines.py`, in whatever environment has it.

As a worker it speaks as `distillabse.evaluation.latency_worker` does. `engines_worker.py vectors ENGINE TEXTS TARGET`
(JSON, a JSON file, an .npz file) writes the vectors instead: `together`, in batches of 32 in the order given, and
`alone`, of the first texts one by one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distillabse.evaluation import engines as loaded_engines
from distillabse.evaluation import latency_worker

BATCH = 32
ALONE = 100
Vectors = NDArray[np.float32]
Encode = Callable[[list[str]], Vectors]


class Engine:
    """An engine as its user calls it: strings in, unit vectors out."""

    def __init__(self, encode: Encode, folder: Path) -> None:
        self.encode = encode
        self._folder = folder

    def tokens(self, texts: list[str]) -> list[int]:
        """The length of each text in tokens; all engines read the same tokenizer."""
        from distillabse.tokenization import BundleTokenizer

        return [len(row) for row in BundleTokenizer(self._folder).token_ids(texts)]


def bundle(folder: Path, file: str | None, threads: int, engine: str) -> Encode:
    """`distillabse.Encoder`."""
    from distillabse.encoder import Encoder

    return Encoder(folder, file=file, threads=threads, engine=engine).encode  # type: ignore[arg-type]


def onnxruntime(folder: Path, file: str | None, threads: int) -> Encode:
    """Ours in ONNX Runtime."""
    return bundle(folder, file, threads, "onnxruntime")


def openvino(folder: Path, file: str | None, threads: int) -> Encode:
    """Any graph, an ONNX file or OpenVINO's own, in OpenVINO, called by `distillabse.Encoder`."""
    return bundle(folder, file, threads, "openvino")


def torch(folder: Path, file: str | None, threads: int) -> Encode:
    """sentence-transformers in fp32."""
    return loaded_engines.TorchEngine(folder, "cpu", threads).encode


def ctranslate2(folder: Path, file: str | None, threads: int) -> Encode:
    """CTranslate2 has no pooling: mean over the tokens, then length 1, by us."""
    import ctranslate2 as library

    from distillabse.tokenization import BundleTokenizer

    assert file is not None
    tokenizer = BundleTokenizer(folder)
    encoder = library.Encoder(str(folder / file), device="cpu", compute_type="int8", intra_threads=threads)

    def encode(texts: list[str]) -> Vectors:
        rows = tokenizer.token_ids(texts)
        states = np.array(encoder.forward_batch([row.tolist() for row in rows]).last_hidden_state)
        lengths = np.array([len(row) for row in rows])
        mask = np.arange(states.shape[1]) < lengths[:, None]
        means = np.einsum("btd,bt->bd", states, mask.astype(np.float32)) / lengths[:, None]
        vectors: Vectors = means / np.linalg.norm(means, axis=1, keepdims=True)
        return vectors.astype(np.float32)

    return encode


def sentence_transformers(folder: Path, file: str | None, threads: int) -> Encode:
    """The ONNX backend of sentence-transformers."""
    import onnxruntime
    from sentence_transformers import SentenceTransformer

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = SentenceTransformer(
        str(folder), backend="onnx", device="cpu", local_files_only=True,
        model_kwargs={"file_name": file, "provider": "CPUExecutionProvider", "session_options": options},
    )  # fmt: skip

    def encode(texts: list[str]) -> Vectors:
        return np.asarray(
            model.encode(texts, batch_size=max(1, len(texts)), show_progress_bar=False, normalize_embeddings=True)
        )

    return encode


def fastembed(folder: Path, file: str | None, threads: int) -> Encode:
    """A model of one's own in fastembed."""
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    assert file is not None
    settings = json.loads((folder / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
    pooling = PoolingType.MEAN if settings["pooling_mode_mean_tokens"] else PoolingType.CLS
    TextEmbedding.add_custom_model(
        model="benchmarks/student", pooling=pooling, normalization=True, sources=ModelSource(hf="benchmarks/student"),
        dim=settings["word_embedding_dimension"], model_file=file,
    )  # fmt: skip
    model = TextEmbedding("benchmarks/student", specific_model_path=str(folder), threads=threads)

    def encode(texts: list[str]) -> Vectors:
        return np.stack(list(model.embed(texts, batch_size=max(1, len(texts)))))

    return encode


ENGINES: dict[str, Callable[[Path, str | None, int], Encode]] = {
    function.__name__: function
    for function in (onnxruntime, openvino, torch, ctranslate2, sentence_transformers, fastembed)
}


def load(kind: str, folder: str, file: str | None, device: str, threads: int) -> Engine:
    """Load the engine that `latency.measure` describes."""
    return Engine(ENGINES[kind](Path(folder), file, threads), Path(folder))


def write_vectors(settings: dict[str, Any], texts: list[str], target: Path) -> None:
    """Encode all texts in batches, and the first one by one."""
    encode = load(**settings).encode
    together = np.concatenate([encode(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)])
    alone = np.concatenate([encode([text]) for text in texts[:ALONE]])
    np.savez(target, together=together.astype(np.float32), alone=alone.astype(np.float32))


if __name__ == "__main__":
    if sys.argv[1:2] == ["vectors"]:
        write_vectors(json.loads(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text("utf-8")), Path(sys.argv[4]))
    else:
        latency_worker.serve(load)
