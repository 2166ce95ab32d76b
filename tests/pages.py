"""Small but complete contents of the files that pages are made of, and a reader of pages."""

from html.parser import HTMLParser
from pathlib import Path

import yaml

from distillabse import layout
from distillabse.config import JobConfig
from distillabse.layout import RunFolder
from distillabse.storage import write_json

JOB = {
    "name": "tiny-labse", "teacher": {"model": "sentence-transformers/LaBSE", "revision": "0123abc"},
    "corpus": {"sources": [{"kind": "phrasebook"}]}, "student": {"layers": [1, 6, 11]},
    "objectives": [{"kind": "minilm", "weight": 0.5}, {"kind": "cosine"}],
}  # fmt: skip


def row(mean, skill, n=1234):
    return {"n": n, "cosine_mean": mean, "skill": skill}


def fidelity(mean):
    return {
        **row(mean, 0.9448), "cosine_p01": 0.7011, "cosine_p05": 0.8022, "ci95": [mean - 0.001, mean + 0.001],
        "constant_baseline": 0.3112, "shuffled_baseline": 0.2954,
        "neighbour_top1": 0.8123, "similarity_spearman": 0.9321,
        "slices": {
            "language": {"en": row(0.9543, 0.9, 634), "de": row(0.97, 0.95, 600)},
            "length": {"17-32 tokens": row(0.91, 0.8), "9-16 tokens": row(0.96, 0.9)},
        },
        "histogram": {
            "edges": [-1.0, -0.5, 0.0, 0.5, 0.75, 1.0], "student": [0, 0, 0, 34, 1200],
            "constant": [0, 34, 1200, 0, 0], "shuffled": [0, 200, 1034, 0, 0],
        },
    }  # fmt: skip


def gate(name, where, value, limit):
    figures = {"set": where, "value": value, "limit": limit, "passed": value >= limit}
    return {"gate": name, "artefact": "onnx-int8", **figures}


VERIFY = {
    "fidelity": {
        "torch": {"test": fidelity(0.9651)},
        "onnx-fp32": {"test": fidelity(0.9650)},
        "onnx-int8": {"test": fidelity(0.9619), "tatoeba": fidelity(0.9402)},
    },
    "parity": {"onnx-fp32": {"min": 0.9999991, "mean": 0.9999997}, "onnx-int8": {"min": 0.9912, "mean": 0.9987}},
    "invariance": {"onnx-int8": {"batch_min": 0.9999973, "padding_min": 0.9999982}},
    "gates": [gate("invariance_min", None, 0.9999973, 0.99999), gate("teacher_skill", "test", 0.9448, 0.5)],
    "worst": [{"text": "<script>alert('x')</script> & co", "language": None, "cosine": 0.4321}],
}  # fmt: skip


def latency(batch, p50, vs_torch, vs_onnx):
    return {
        "batch": batch, "p50_ms": p50, "p95_ms": p50 * 1.1, "p99_ms": p50 * 1.2, "rounds": 30,
        "sentences_per_second": 1000 * batch / p50,
        "speedup_vs_teacher_torch": vs_torch, "speedup_vs_teacher_torch_ci95": [vs_torch - 0.1, vs_torch + 0.1],
        "speedup_vs_teacher_onnx": vs_onnx, "speedup_vs_teacher_onnx_ci95": [vs_onnx - 0.1, vs_onnx + 0.1],
    }  # fmt: skip


BENCH = {
    "latency": {
        "teacher-torch": [latency(1, 20.0, 1.0, 0.8), latency(32, 400.0, 1.0, 0.9)],
        "teacher-onnx": [latency(1, 16.0, 1.25, 1.0), latency(32, 360.0, 1.11, 1.0)],
        "torch": [latency(1, 6.0, 3.33, 2.67)],
        "onnx-fp32": [latency(1, 5.0, 4.0, 3.2)],
        "onnx-int8": [latency(32, 90.0, 4.44, 4.0), latency(1, 3.48, 5.75, 4.6)],
    },
    "size_bytes": {"teacher": 1_883_730_160, "fp32": 1_621_000_000, "int8": 480_500_000},
    "parameters": {"teacher": 470_926_848, "student": 406_544_640},
    "tokens": {"mean": 11.8, "p95": 21}, "threads": 2, "device": "cpu", "random_weights": False,
    "environment": {
        "cpu": {"model": "Xeon <Gold>", "flags": ["avx2", "avx512_vnni"], "governor": None}, "gpus": [],
        "versions": {"onnxruntime": "1.31.0", "deepspeed": None},
    },
}  # fmt: skip
HISTORY = {
    "log": [
        {"step": 50, "epoch": 0.5, "loss": 2.0, "learning_rate": 1e-4, "minilm/attention": 1.5, "cosine": 0.5},
        {"step": 50, "epoch": 0.5, "eval_cosine": 0.8, "eval_skill": 0.6},
        {"step": 100, "epoch": 1.0, "loss": 1.0, "train_runtime": 9.0, "minilm/attention": 0.8, "cosine": 0.2},
    ],
    "training_seconds": 90.0, "sentences": 5000, "sentences_per_second": 111.1, "device": "cpu", "precision": "fp32",
}  # fmt: skip
CORPUS = {
    "sources": [{"source": "phrasebook", "read": 6000, "kept": 5432, "rejected": {"duplicate": 500, "too short": 68}}],
    "splits": {
        "train": {"rows": 5000, "sentences": 5000, "languages": {"en": 2500, "de": 2500, "null": 3}},
        "test": {"rows": 432, "sentences": 432, "languages": {"en": 216, "de": 216}},
    },
}
ENGLISH = {"sentences": 2500, "tokens": 29500, "tokens_per_sentence": 11.8, "unknown_rate": 0.0012, "rows_used": 4321}
VOCABULARY = {
    "rows": 501153, "coverage": 0.999, "rows_for_coverage": 7654,
    "languages": {"en": {**ENGLISH, "rows_for_coverage": 4000}},
}  # fmt: skip
FILES = {
    "verification": VERIFY, "measurements": BENCH, "training_history": HISTORY, "corpus_counts": CORPUS,
    "vocabulary_counts": VOCABULARY, "record": {"versions": {"torch": "2.13.0"}},
}  # fmt: skip


NAMES = ("base", "small & <fast>", "middle")


def grid_row(batch, length, p50, speedup=None, **more):
    row = {
        "batch": batch, "length": length, "p50_ms": p50, "p95_ms": p50 * 1.5, "p99_ms": p50 * 2, "rounds": 31,
        "sentences_per_second": 1000 * batch / p50, "converged": True,
    }  # fmt: skip
    if speedup:
        row |= {"speedup": speedup, "speedup_ci95": [speedup - 0.05, speedup + 0.05], "wilcoxon_p": 1e-6}
    return row | more


COMPARISON = {
    "format": 1, "name": "peers", "baseline": "base", "protocol": "thesis",
    "texts": {"file": "news.txt", "sha256": "c0ffee" * 10, "count": 1234,
              "tokens": {"mean": 18.4, "p50": 17, "p95": 33, "max": 64}},
    "encoders": {
        "base": {"kind": "sentence-transformers", "file": None, "runtime": "PyTorch", "dimension": 768,
                 "parameters": 470_926_848, "size_bytes": 1_883_730_160, "sha256": "ab" * 32},
        "small & <fast>": {"kind": "bundle", "file": "onnx/small.onnx", "runtime": "ONNX Runtime CPU",
                           "dimension": 384, "parameters": 17_241_984, "size_bytes": 18_079_553, "sha256": "cd" * 32},
        "middle": {"kind": "static", "file": None, "runtime": "PyTorch", "dimension": 256, "parameters": None,
                   "size_bytes": 512_300_000, "sha256": "ef" * 32},
    },
    "fidelity": {"small & <fast>": fidelity(0.9123), "middle": {**fidelity(0.8765), "skill": 0.7654}},
    "fidelity_pairs": [{"left": "small & <fast>", "right": "middle", "difference": 0.0358, "ci95": [0.0311, 0.0402],
                        "wilcoxon_p": 2.5e-7}],
    "latency": {
        "base": [grid_row(1, None, 14.25), grid_row(64, 128, 4321.0)],
        "small & <fast>": [grid_row(1, None, 1.61, 8.85), grid_row(64, 128, 512.0, 8.44, converged=False)],
        "middle": [grid_row(1, None, 2.22, 6.42, wilcoxon_p=0.31), grid_row(64, 128, 5001.0, 0.86)],
    },
    "throughput": {"base": {"sentences_per_second": 77.7, "spread": [75.5, 79.9], "runs": 5},
                   "middle": {"sentences_per_second": 155.4, "spread": [150.0, 161.0], "runs": 5}},
    "memory": {"base": {"loaded_bytes": 2_345_600_000, "peak_bytes": 3_456_700_000, "gpu_peak_bytes": None}},
    "cold_start": {"base": {"median_seconds": 4.56, "spread": [4.44, 4.78], "runs": 7}},
    "energy": {"unavailable": "RAPL is not readable."},
    "guards": [{"guard": "constant student", "encoder": "middle", "passed": True, "detail": "spread 0.0361"},
               {"guard": "throttling", "encoder": None, "passed": True, "detail": "0 events"}],
    "trusted": True,
    "worst": {"middle": [
        {"text": "<script>alert('x')</script>", "language": "de", "cosine": 0.1357, "teacher_neighbour": "<b>next</b>",
         "teacher_similarity": 0.8642, "student_neighbour": "other", "student_similarity": 0.7531},
    ]},
    "environment": {"cpu": {"model": "Xeon <Gold>"}, "threads": 2, "device": "cpu", "cores_used_by_others": 0.01,
                    "throttling": {"events": 0}, "gpu": None},
    "seconds": 270.0,
}  # fmt: skip


def run_folder(root: Path, job: dict = JOB, **replaced) -> RunFolder:
    """A finished run; `replaced` gives other content for the files of FILES, or None to leave one out."""
    run = RunFolder(root)
    for name, content in (FILES | replaced).items():
        if content is not None:
            write_json(getattr(run, name), content)
    run.config.write_text(yaml.safe_dump(JobConfig.model_validate(job).model_dump(mode="json")), encoding="utf-8")
    write_json(run.bundle / "config.json", {"hidden_size": 768, "model_type": "bert"})
    write_json(run.bundle / layout.TRANSFORMER_SETTINGS, {"max_seq_length": 256})
    write_json(run.bundle / layout.SPECIAL_TOKENS, {"pad_token": "[PAD]"})
    return run


class Page(HTMLParser):
    """Checks that tags are balanced and collects what the tests ask for."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, html: str):
        super().__init__()
        self.open, self.ids, self.links, self.tags = [], [], [], set()
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data", "srcset")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data
