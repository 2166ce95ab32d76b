"""Tiny encoders with random weights, made in a second without a network. What tests run instead of LaBSE."""

from __future__ import annotations

import json
import shutil
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CHARACTERS = string.ascii_letters + string.digits + "äöüßÄÖÜéèêëáàâãåíìîïóòôõúùûçñøæœ" + ".,;:!?'\"()-&%/"
COMMON_WORDS = """
the of and to in is was for on that with as at by it from be are this an have not or were which but had they you he
she we his her their its all one two three more when there been who will would can what so out up about into than
them some could time these people first like other then now only new after also work well way even because any day
most us good man woman child world life hand year house dog cat bird tree water book city street car train night
morning friend sleep eat drink read write walk run small big old young red green blue where how why here very please
thank hello yes no never always
"""
CONTINUATIONS = tuple(f"##{character}" for character in CHARACTERS if character.isalnum())
JOB_WORDS = """man woman dog cat house city street car train night morning friend tree water book day hand year child
world""".split()
VOCABULARY = tuple(dict.fromkeys((*SPECIAL_TOKENS, *CHARACTERS, *CONTINUATIONS, *COMMON_WORDS.split())))


def tiny_encoder(
    path: Path,
    *,
    layers: int = 2,
    hidden: int = 32,
    heads: int = 4,
    pooling: Literal["mean", "cls"] = "mean",
    dense: bool = False,
    seed: int = 0,
    vocabulary: Sequence[str] = VOCABULARY,
    max_length: int = 64,
) -> Path:
    """Save a SentenceTransformer folder: BertModel with random weights, pooling, optionally Dense + tanh, L2 norm.

    `pooling="cls", dense=True` has the layout of LaBSE. Weights are drawn ten times wider than BERT's own
    initialisation, so that different sentences get clearly different vectors.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import BertConfig, BertModel, BertTokenizerFast

    path = Path(path)
    settings = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * hidden,
        max_position_embeddings=max_length,
        initializer_range=0.2,
    )
    tokenizer = BertTokenizerFast(
        vocab={token: row for row, token in enumerate(vocabulary)}, do_lower_case=False, model_max_length=max_length
    )
    backbone = path / "backbone"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        BertModel(settings).save_pretrained(backbone)
        tokenizer.save_pretrained(backbone)
        modules = [Transformer(str(backbone), max_seq_length=max_length), Pooling(hidden, pooling_mode=pooling)]
        if dense:
            modules.append(Dense(hidden, hidden, activation_function=torch.nn.Tanh()))
        modules.append(Normalize())
        SentenceTransformer(modules=modules, device="cpu").save(str(path))
    shutil.rmtree(backbone)
    return path


def tiny_bundle(path: Path, encoder: Path) -> Path:
    """Add the fp32 graph of `encoder` to a copy of its tokenizer files: the least that `Encoder` runs.

    Inputs input_ids and attention_mask, outputs last_hidden_state and sentence_embedding, as in a real bundle.
    """
    import torch
    from sentence_transformers import SentenceTransformer

    from distillabse import layout

    model = SentenceTransformer(str(encoder), device="cpu").eval()

    class Graph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            hidden = self.model[0].model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            features = {"token_embeddings": hidden, "attention_mask": attention_mask}
            for module in list(self.model)[1:]:
                features = module(features)
            return hidden, features["sentence_embedding"]

    graph = path / layout.ONNX_FP32
    graph.parent.mkdir(parents=True)
    example = {"input_ids": torch.tensor([[2, 9, 3], [2, 8, 3]]), "attention_mask": torch.ones(2, 3, dtype=torch.int64)}
    axes = {0: torch.export.Dim("batch_size"), 1: torch.export.Dim("sequence_length", max=64)}
    torch.onnx.export(
        Graph().eval(),
        (),
        str(graph),
        kwargs=example,
        dynamo=True,
        opset_version=18,
        external_data=False,
        output_names=["last_hidden_state", "sentence_embedding"],
        dynamic_shapes={"input_ids": axes, "attention_mask": axes},
        verbose=False,
    )
    for name in (layout.TOKENIZER, layout.TOKENIZER_SETTINGS):
        shutil.copyfile(encoder / name, path / name)
    limits = {"max_seq_length": model.max_seq_length, "do_lower_case": False}
    (path / layout.TRANSFORMER_SETTINGS).write_text(json.dumps(limits), encoding="utf-8")
    return path


def tiny_job(folder: Path, name: str, **blocks: Any) -> dict[str, Any]:
    """The values of a job that takes seconds: a teacher of 3 layers and 300 sentences in `folder`, made at first use.

    Its gates on fidelity are open: six steps teach nothing. `blocks` replace those of the job.
    """
    import numpy as np

    table = folder / "text.tsv"
    if not table.is_file():
        random = np.random.default_rng(0)
        rows = ["text\tlang"]
        for _ in range(300):
            text = " ".join(random.choice(JOB_WORDS, size=random.integers(3, 9)))
            rows.append(f"{text}\t{random.choice(['en', 'de'])}")
        table.write_text("\n".join(rows) + "\n", encoding="utf-8")
        tiny_encoder(folder / "teacher", layers=3)
    source = {"kind": "files", "path": str(table), "text": "text", "language_column": "lang"}
    return {
        "name": name,
        "output": str(folder / "runs"),
        "teacher": {"model": str(folder / "teacher")},
        "corpus": {"sources": [source], "split": {"dev": 0.1, "test": 0.2}},
        "student": {"layers": 2},
        "objectives": [{"kind": "cosine"}],
        "training": {"max_steps": 6, "per_device_train_batch_size": 16, "bf16": False, "report_to": [], "eval_steps": 3,
                     "save_steps": 3, "logging_steps": 1},
        "gates": {"int8_to_fp32_mean": 0.98, "teacher_skill": -100, "teacher_cosine_mean": -1},
        "evaluation": {"bootstrap_samples": 100},
        "bench": {"batch_sizes": [1], "rounds": 5, "seconds_per_round": 0.001, "threads": 1, "interval": None,
                  "cold_starts": 0, "throughput_runs": 1},
        **blocks,
    }  # fmt: skip


class FakeSentences:
    """Any number of sentences, or pairs, that take no memory; row r has 3 to 32 tokens."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def lengths(self, rows: Any) -> Any:
        """Tokens of each of these rows."""
        return 3 + rows * 7919 % 30
