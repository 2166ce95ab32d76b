"""The process of one engine of `encode_throughput.py`, in whatever environment that engine needs.

The first line on stdin is {"engine", "bundle", "file", "threads", "texts": path of a JSON list}. Each further line is
{"start", "stop", "vectors": path or null}: those texts are encoded in one call, the vectors saved where a path is
given, and {"seconds": s} is answered. A timed call starts with strings and ends with one numpy array.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

WARM_UP = 64
OUTPUT = "sentence_embedding"
LONGEST_REST = 1.0

Encode = Callable[[list[str]], Any]


def distillabse(bundle: Path, file: str, threads: int) -> Encode:
    """Ours, with its defaults."""
    from distillabse import Encoder

    return Encoder(bundle, file=file, threads=threads).encode


def distillabse_openvino(bundle: Path, file: str, threads: int) -> Encode:
    """Ours, on OpenVINO."""
    from distillabse import Encoder

    return Encoder(bundle, file=file, threads=threads, engine="openvino").encode


def sentence_transformers(bundle: Path, file: str, threads: int) -> Encode:
    """Its ONNX backend with its defaults: batches of 32, sorted by length."""
    import onnxruntime
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    settings = {"file_name": file, "provider": "CPUExecutionProvider", "session_options": options}
    return SentenceTransformer(str(bundle), backend="onnx", device="cpu", model_kwargs=settings).encode


def fastembed(bundle: Path, file: str, threads: int, **how: Any) -> Encode:
    """Fastembed with its defaults, batches of 256 in the order of the texts, reading our pooled output."""
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    TextEmbedding.add_custom_model(
        model="bundle", pooling=PoolingType.DISABLED, normalization=False, sources=ModelSource(hf="bundle"),
        dim=json.loads((bundle / "config.json").read_text())["hidden_size"], model_file=file, output_name=OUTPUT,
    )  # fmt: skip
    model = TextEmbedding("bundle", specific_model_path=str(bundle), threads=threads, cuda=False)
    return lambda texts: np.stack(list(model.embed(texts, **how)))


def fastembed_32(bundle: Path, file: str, threads: int) -> Encode:
    """Fastembed in batches of 32, which pad less."""
    return fastembed(bundle, file, threads, batch_size=32)


def fastembed_processes(bundle: Path, file: str, threads: int) -> Encode:
    """Fastembed with a process of one thread for each thread of the others; it starts them anew in every call."""
    return fastembed(bundle, file, 1, parallel=threads)


def plain_loop(bundle: Path, file: str, threads: int) -> Encode:
    """What one writes first: ONNX Runtime in batches of 32 in the order of the texts."""
    import onnxruntime
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    limits = json.loads((bundle / "sentence_bert_config.json").read_text())
    tokenizer.enable_truncation(limits["max_seq_length"])
    tokenizer.enable_padding()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(bundle / file), options, providers=["CPUExecutionProvider"])

    def encode(texts: list[str]) -> Any:
        parts = []
        for start in range(0, len(texts), 32):
            batch = tokenizer.encode_batch(texts[start : start + 32])
            feed = {
                "input_ids": np.array([text.ids for text in batch], dtype=np.int64),
                "attention_mask": np.array([text.attention_mask for text in batch], dtype=np.int64),
            }
            parts.append(session.run([OUTPUT], feed)[0])
        return np.concatenate(parts)

    return encode


ENGINES: dict[str, Callable[[Path, str, int], Encode]] = {
    "distillabse": distillabse,
    "distillabse, OpenVINO": distillabse_openvino,
    "fastembed": fastembed,
    "fastembed, batches of 32": fastembed_32,
    "fastembed, processes": fastembed_processes,
    "sentence-transformers": sentence_transformers,
    "plain loop": plain_loop,
}


def come_to_rest() -> None:
    """Wait until this process uses no CPU time: threads of ONNX Runtime spin for a while after their work is done."""
    give_up = time.monotonic() + LONGEST_REST
    used = -1.0
    while time.process_time() - used > 0.001 and time.monotonic() < give_up:
        used = time.process_time()
        time.sleep(0.01)


def main() -> None:
    """Answer the lines on stdin until it is closed."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is not an answer
    task = json.loads(sys.stdin.readline())
    texts = json.loads(Path(task["texts"]).read_text(encoding="utf-8"))
    encode = ENGINES[task["engine"]](Path(task["bundle"]), task["file"], task["threads"])
    encode(texts[:WARM_UP])
    for line in sys.stdin:
        question = json.loads(line)
        started = time.perf_counter()
        vectors = encode(texts[question["start"] : question["stop"]])
        seconds = time.perf_counter() - started
        if question["vectors"]:
            np.save(question["vectors"], vectors)
        come_to_rest()
        answers.write(json.dumps({"seconds": seconds}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
