"""How small and how fast students of LaBSE can be: vocabulary trimmed to 60,000 rows, nine shapes, INT8.

    python benchmarks/student_shapes.py --data data [--runs runs] [--rounds 30]

The teacher has LaBSE's shape and random weights (labse_stand_in.py), and so have the students: this measures speed and
size only. All engines alternate in one run, on sentences of eval/tatoeba_test.tsv.gz; nothing is trained or chosen on
them. Models are built in processes of their own, so that their memory is free again while speed is measured. Writes
benchmarks/results/student_shapes.json and student_shapes.svg.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from labse_stand_in import SEED, evaluation_sentences, stand_in, token_lengths, training_sentences

RESULTS = Path(__file__).parent / "results"
BATCH_SIZES = [1, 32]
ROWS = 60_000
SENTENCES_PER_LANGUAGE = 100
# Languages that the training text, and so the tokenizer, knows nothing of: their sentences would be a few [UNK].
MOST_UNKNOWN = 0.05

# At width 192 three heads of 64, since the teacher's twelve would be 16 wide, which is slower.
SHAPES: dict[str, dict[str, int]] = {
    "12x192": {"layers": 12, "hidden_size": 192, "attention_heads": 3},
    "6x384": {"layers": 6, "hidden_size": 384},
    "3x384": {"layers": 3, "hidden_size": 384},
    "2x384": {"layers": 2, "hidden_size": 384},
    "6x192": {"layers": 6, "hidden_size": 192, "attention_heads": 3},
    "3x192": {"layers": 3, "hidden_size": 192, "attention_heads": 3},
    "4x256 of 128": {"layers": 4, "hidden_size": 256, "embedding_size": 128},
    "2x256 of 128": {"layers": 2, "hidden_size": 256, "embedding_size": 128},
    "3x768 of 192": {"layers": 3, "hidden_size": 768, "embedding_size": 192},
}
TARGETS = {
    "served_bytes": 40_000_000,
    "speedup_vs_teacher_onnx": 10,
    "speedup_vs_teacher_torch": 20,
    "trimming_seconds": 180,
    "trimming_peak_bytes": 8 * 2**30,
}
BASELINES = {"teacher_onnx": "ONNX Runtime fp32", "teacher_torch": "PyTorch"}


def main() -> None:
    """Measure, then write the result and the plot."""
    from distillabse.storage import write_json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    result = run(arguments.data, arguments.runs, arguments.rounds)
    write_json(RESULTS / "student_shapes.json", result)
    plot(result, RESULTS / "student_shapes.svg")


def run(data: Path, runs: Path, rounds: int) -> dict[str, Any]:
    """Trim the teacher, build and export everything, measure it side by side."""
    from distillabse.environment import describe_environment

    teacher = in_own_process(stand_in, data, runs)
    with tempfile.TemporaryDirectory(prefix="student-shapes-", dir=runs) as temporary:
        work = Path(temporary)
        started = time.perf_counter()
        trimming = in_own_process(trim, teacher, data, work / "trimmed")
        trimming["seconds"] = time.perf_counter() - started
        products = {"teacher": in_own_process(export, teacher, work / "teacher", False)}
        products["trimmed teacher"] = in_own_process(export, work / "trimmed", work / "trimmed teacher", True)
        for name, shape in SHAPES.items():
            products[name] = in_own_process(build, work / "trimmed", shape, work / name)
        texts, description = speed_texts(data, work)
        measured = measure_all(work, texts, rounds)
    students = {name: student(products[name], measured["latency"][name]) for name in SHAPES}
    return {
        "command": f"python benchmarks/student_shapes.py --data data --rounds {rounds}",
        "random_weights": True,
        "note": "Random weights in teacher and students: speed and size only.",
        "targets": TARGETS,
        "met": {
            "students": [name for name, row in students.items() if all(row["meets"].values())],
            "trimming_seconds": trimming["seconds"] <= TARGETS["trimming_seconds"],
            "trimming_peak_bytes": trimming["peak_bytes"] <= TARGETS["trimming_peak_bytes"],
        },
        "teacher": {**products["teacher"], **rows_of(measured, "teacher-torch", "teacher-onnx")},
        "trimming": trimming,
        "trimmed_teacher": {**products["trimmed teacher"], **rows_of(measured, "trimmed-fp32", "trimmed-int8")},
        "students": students,
        "texts": description,
        **{key: measured[key] for key in ("threads", "device", "cores_used_by_others", "rounds", "seconds_per_round")},
        "environment": describe_environment(),
    }


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's value, from a fresh process that ends with it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def trim(teacher: Path, data: Path, folder: Path) -> dict[str, Any]:
    """Trim the teacher to the rows that the training text needs most: seconds of each step and peak memory."""
    import resource

    from distillabse.models.folder import save_encoder
    from distillabse.models.teacher import load_encoder
    from distillabse.vocabulary.stage import trim_vocabulary

    watch = Stopwatch()
    encoder = load_encoder(str(teacher))
    watch.lap("load the teacher")
    corpus = training_sentences(data)
    watch.lap("read the text")
    vocabulary = trim_vocabulary(encoder, corpus, size=ROWS)
    watch.lap("count, select and trim")
    save_encoder(vocabulary.encoder, folder)
    watch.lap("save")
    languages = vocabulary.report["languages"]
    return {
        "rows_before": vocabulary.report["rows"],
        "rows_after": vocabulary.report["rows_kept"],
        "sentences": len(corpus),
        "tokens_kept": {language: row["tokens_kept"] for language, row in languages.items()},
        "seconds_of_each_step": watch.laps,
        # A process begins with its parent's peak; the parent has loaded no model yet. Linux counts in KiB.
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


class Stopwatch:
    """Seconds of one step after the other."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._started = time.perf_counter()

    def lap(self, name: str) -> None:
        """The step that now ends."""
        now = time.perf_counter()
        self.laps[name], self._started = now - self._started, now


def export(source: Path, folder: Path, int8: bool) -> dict[str, Any]:
    """Export an encoder as it is."""
    from distillabse.models.teacher import load_encoder

    return write_product(load_encoder(str(source)), folder, int8)


def build(source: Path, shape: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Export a student of the given shape, with random weights and a head that gives the teacher's dimension."""
    import torch

    from distillabse.config import DenseStudentConfig, SwitchStudentConfig
    from distillabse.models.student import build_student
    from distillabse.models.teacher import load_encoder

    torch.manual_seed(SEED)
    kind = SwitchStudentConfig if shape.get("kind") == "switch" else DenseStudentConfig
    config = kind(**shape, head="dense", initialisation="random")
    return write_product(build_student(load_encoder(str(source)), config).eval(), folder, True)


def write_product(encoder: Any, folder: Path, int8: bool) -> dict[str, Any]:
    """Write a bundle; its shape, parameters and sizes."""
    from distillabse import layout
    from distillabse.config import ExportConfig, QuantizationConfig
    from distillabse.evaluation.bench import count_parameters, graph_bytes
    from distillabse.export.bundle import write_bundle
    from distillabse.models.shape import transformer_shape
    from distillabse.models.teacher import transformer_of

    folder.mkdir()
    write_bundle(
        encoder, folder, ExportConfig(quantization=QuantizationConfig(kind="per_token" if int8 else "none")), {}
    )
    settings = transformer_of(encoder).config
    product = {
        "shape": vars(transformer_shape(settings.to_dict())),
        "vocabulary_rows": settings.vocab_size,
        "parameters": count_parameters(encoder),
        "fp32_graph_bytes": graph_bytes(folder / layout.ONNX_FP32),
    }
    if int8:
        product |= {"int8_graph_bytes": graph_bytes(folder / int8_graph()), "served_bytes": served_bytes(folder)}
    return product


def served_bytes(bundle: Path) -> int:
    """What a service with a bare ONNX Runtime copies: the smallest graph, the tokenizer and the settings."""
    from distillabse import layout
    from distillabse.evaluation.bench import graph_bytes

    settings = (layout.TOKENIZER_SETTINGS, layout.TRANSFORMER_SETTINGS, layout.SENTENCE_TRANSFORMERS_SETTINGS)
    beside = sum((bundle / name).stat().st_size for name in (layout.TOKENIZER, *settings))
    return graph_bytes(bundle / layout.served_graph(bundle, "cpu")) + beside


def int8_graph() -> str:
    """Path of the INT8 graph in a bundle."""
    from distillabse.config import QuantizationConfig
    from distillabse.export.bundle import int8_file

    return int8_file(QuantizationConfig())


def speed_texts(data: Path, work: Path) -> tuple[list[str], dict[str, Any]]:
    """Equally many sentences of every language that the tokenizer knows, and what they are."""
    from distillabse.encoder import load_tokenizer

    tokenizer = load_tokenizer(work / "teacher")
    sentences = evaluation_sentences(data)
    unknown = {name: row["unknown_rate"] for name, row in token_lengths(tokenizer, sentences).items()}
    known = [language for language, rate in unknown.items() if rate <= MOST_UNKNOWN]
    generator = random.Random(SEED)
    chosen = []
    for language in known:
        available = [sentence for sentence in sentences if sentence.language == language]
        chosen += generator.sample(available, min(SENTENCES_PER_LANGUAGE, len(available)))
    trimmed = load_tokenizer(work / "trimmed teacher")
    return [sentence.text for sentence in chosen], {
        "source": "eval/tatoeba_test.tsv.gz",
        "sentences": len(chosen),
        "languages": known,
        "left_out_as_unknown": {name: rate for name, rate in unknown.items() if name not in known},
        "tokens": {"teacher": lengths(tokenizer, chosen), "students": lengths(trimmed, chosen)},
    }


def lengths(tokenizer: Any, sentences: Iterable[Any]) -> dict[str, float]:
    """Tokens per sentence, special tokens included."""
    import numpy as np

    counts = [len(encoding.ids) for encoding in tokenizer.encode_batch_fast([one.text for one in sentences])]
    p50, p95 = np.percentile(counts, [50, 95]).tolist()
    return {"mean": float(np.mean(counts)), "p50": p50, "p95": p95, "max": max(counts)}


def measure_all(work: Path, texts: list[str], rounds: int) -> dict[str, Any]:
    """One alternating measurement of both teachers and all students."""
    from distillabse import layout
    from distillabse.config import BenchConfig
    from distillabse.evaluation.latency import measure
    from distillabse.evaluation.workers import Engine

    config = BenchConfig(batch_sizes=BATCH_SIZES, rounds=rounds, seconds_per_round=0.5, interval=None)
    engines = [
        Engine("teacher-torch", "torch", work / "teacher"),
        Engine("teacher-onnx", "onnx", work / "teacher", layout.ONNX_FP32),
        Engine("trimmed-fp32", "onnx", work / "trimmed teacher", layout.ONNX_FP32),
        Engine("trimmed-int8", "onnx", work / "trimmed teacher", int8_graph()),
        *(Engine(name, "onnx", work / name, int8_graph()) for name in SHAPES),
    ]
    return {**measure(engines, texts, config, SEED), **config.model_dump(include={"rounds", "seconds_per_round"})}


def rows_of(measured: dict[str, Any], *names: str) -> dict[str, Any]:
    """The measurements of some engines."""
    return {"latency": {name: measured["latency"][name] for name in names}}


def student(product: dict[str, Any], latency: list[dict[str, Any]]) -> dict[str, Any]:
    """A student's figures, and which targets it meets: a speedup with the lower end of its interval, at every batch."""
    meets = {"served_bytes": product["served_bytes"] <= TARGETS["served_bytes"]}
    for baseline in BASELINES:
        key = f"speedup_vs_{baseline}"
        meets[key] = min(row[f"{key}_ci95"][0] for row in latency) >= TARGETS[key]
    return {**product, "latency": latency, "meets": meets}


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Speedup at batch 1 and batch 32 against served size, one panel for each baseline; the targets dotted."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "distillabse"
    from matplotlib import pyplot
    from matplotlib.ticker import FormatStrFormatter, NullFormatter

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axes, (baseline, title) in zip(panels, BASELINES.items(), strict=True):
        key = f"speedup_vs_{baseline}"
        for index, (name, one) in enumerate(result["students"].items()):
            size, colour = one["served_bytes"] / 1e6, f"C{index}"
            for row, marker in zip(one["latency"], "os", strict=True):
                axes.plot(size, row[key], marker, color=colour)
                axes.vlines(size, *row[f"{key}_ci95"], color=colour)
            axes.plot([], [], "o", color=colour, label=f"{name}: {size:.0f} MB")
        for batch, marker in zip(BATCH_SIZES, "os", strict=True):
            axes.plot([], [], marker, color="black", label=f"batch {batch}")
        axes.axhline(TARGETS[key], color="black", linestyle="dotted")
        axes.axvline(TARGETS["served_bytes"] / 1e6, color="black", linestyle="dotted")
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set(xlim=(0, None), xlabel="MB served: INT8 graph, tokenizer, settings", ylabel="times as fast")
        axes.set_title(f"Speed-up over LaBSE's shape in {title}", fontsize=10)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.suptitle("Random weights: speed and size only. Students: layers x width (of embedding width)", fontsize=10)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
