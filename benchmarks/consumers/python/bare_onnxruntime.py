"""ONNX Runtime and tokenizers alone, in an environment that has no torch."""

import importlib.util
import json
from pathlib import Path

from job import answer


def load(folder, job):
    if importlib.util.find_spec("torch") is not None:
        raise SystemExit("torch is installed here, so this proves nothing")
    graph = job["file"]
    pad_token = json.loads((Path(folder) / "special_tokens_map.json").read_text())["pad_token"]
    max_length = json.loads((Path(folder) / "sentence_bert_config.json").read_text())["max_seq_length"]
    # snippet
    import numpy as np
    import onnxruntime
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad_token), pad_token=pad_token)
    session = onnxruntime.InferenceSession(f"{folder}/{graph}")

    def encode(texts):
        encodings = tokenizer.encode_batch(texts)
        inputs = {
            "input_ids": np.array([encoding.ids for encoding in encodings], dtype=np.int64),
            "attention_mask": np.array([encoding.attention_mask for encoding in encodings], dtype=np.int64),
        }
        return session.run(["sentence_embedding"], inputs)[0]

    # end
    return encode


answer(load, ["onnxruntime", "tokenizers"])
