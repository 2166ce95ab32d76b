"""What small students of different shapes keep of a real teacher, for the same text and the same number of sentences.

    python benchmarks/small_students.py --data data [--runs runs] [--only NAME ...]

Four questions, one teacher (all-MiniLM-L6-v2), one seed: fidelity against size and latency for six shapes; starting
from the teacher's weights or anew; what narrower widths are best projected onto; and whether to train a narrower table.
Beside them stands the teacher itself, untrained, with a vocabulary trimmed to all the text there is, and trimmed to the
training text alone.

`--data` holds mono_train/en.tsv.gz, parallel_train/*.tsv.gz, and under eval/ banking77.tsv.gz and
tweeteval_emotion.tsv.gz. Stages that are there already are not run again; with `--only`, those students are trained and
nothing is measured. Writes benchmarks/results/small_students.json and small_students.svg.
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import Any

from real_text import places
from stages import run_missing

RESULTS = Path(__file__).parent / "results"
SENTENCES, EPOCHS = 25_000, 2.0
TRIMMED, BARELY_COUNTED = "6x384 trimmed teacher", "6x384 teacher trimmed to the training text"
BATCH_SIZES = [1, 32]

# A narrower student gets a Dense head that leads back to the teacher's 384 dimensions.
STUDENTS: dict[str, dict[str, Any]] = {
    TRIMMED: {"kind": "teacher"},
    "4x384": {"layers": 4, "freeze_embeddings": True},
    "3x384": {"layers": 3, "freeze_embeddings": True},
    "2x384": {"layers": 2, "freeze_embeddings": True},
    "6x192": {"layers": 6, "hidden_size": 192, "head": "dense"},
    "4x256 factorised to 128": {"layers": 4, "hidden_size": 256, "embedding_size": 128, "head": "dense"},
    "3x384 factorised to 96": {"layers": 3, "embedding_size": 96},
    "6x192 frozen": {"layers": 6, "hidden_size": 192, "head": "dense", "freeze_embeddings": True},
    "4x256 factorised to 128 frozen": {
        "layers": 4,
        "hidden_size": 256,
        "embedding_size": 128,
        "head": "dense",
        "freeze_embeddings": True,
    },
    "3x384 factorised to 96 frozen": {"layers": 3, "embedding_size": 96, "freeze_embeddings": True},
    BARELY_COUNTED: {"kind": "teacher"},
    "3x384 random start": {"layers": 3, "initialisation": "random"},
    "6x192 random start": {"layers": 6, "hidden_size": 192, "head": "dense", "initialisation": "random"},
    "6x192 svd": {"layers": 6, "hidden_size": 192, "head": "dense", "projection": "svd"},
    "6x192 pca": {"layers": 6, "hidden_size": 192, "head": "dense", "projection": "pca"},
    "6x192 random directions": {"layers": 6, "hidden_size": 192, "head": "dense", "projection": "random"},
    "3x384 factorised to 96 svd": {"layers": 3, "embedding_size": 96, "projection": "svd"},
    "3x384 factorised to 96 pca": {"layers": 3, "embedding_size": 96, "projection": "pca"},
    "3x384 factorised to 96 random directions": {"layers": 3, "embedding_size": 96, "projection": "random"},
}
SHAPES = list(STUDENTS)[:7]
JUDGED = list(STUDENTS)[:11]
STARTS = [("3x384", "3x384 random start"), ("6x192", "6x192 random start")]
PROJECTIONS = ["6x192", "3x384 factorised to 96"]


def main() -> None:
    """Train what is missing, measure all shapes side by side, then write the result and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--only", nargs="*", choices=STUDENTS)
    arguments = parser.parse_args()
    # One core for training; `measure` starts workers that set their own threads.
    os.environ["OMP_NUM_THREADS"] = "1"
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("distillabse").setLevel(logging.INFO)
    results = {
        name: train(name, arguments.data, arguments.runs) for name in STUDENTS if name in (arguments.only or STUDENTS)
    }
    if arguments.only:
        return

    from distillabse.storage import write_json

    result = {
        "command": f"python benchmarks/small_students.py --data {arguments.data}",
        "sentences": SENTENCES,
        "epochs": EPOCHS,
        "students": results,
        **speed(arguments.runs),
    }
    write_json(RESULTS / "small_students.json", result)
    plot(result, RESULTS / "small_students.svg")


def job(name: str, data: Path, runs: Path) -> Any:
    """The configuration of one student."""
    from distillabse.settings import load_config, validate

    values = load_config("minilm-english", [f"output={runs}", *places(data)]).model_dump(mode="json")
    values["name"] = "small-" + "".join(character if character.isalnum() else "-" for character in name)
    values["student"] = STUDENTS[name]
    values["corpus"]["max_sentences"] = None if name == TRIMMED else SENTENCES
    if STUDENTS[name].get("kind") == "teacher":
        values["vocabulary"] = {"kind": "trim"}
    values["training"] |= {"num_train_epochs": EPOCHS, "eval_steps": 0.25, "save_steps": 0.25, "report_to": []}
    values["gates"]["teacher_cosine_mean"] = 0.0
    return validate(values)


def train(name: str, data: Path, runs: Path) -> dict[str, Any]:
    """Train one student. A shape is exported and judged, too; a comparison only has its curve on the dev split."""
    from distillabse.evaluation.bench import count_parameters
    from distillabse.models.teacher import load_encoder
    from distillabse.storage import read_json

    stages = ("corpus", "vocabulary", "distill", "export", "verify")
    run = run_missing(job(name, data, runs), stages if name in JUDGED else stages[:3])
    history = read_json(run.training_history) if run.training_history.is_file() else {"log": []}
    return {
        "student": STUDENTS[name],
        "vocabulary": read_json(run.vocabulary_counts),
        "parameters": count_parameters(load_encoder(str(run.student))),
        "dev_curve": [
            {"step": entry["step"], "cosine": entry["eval_cosine"]}
            for entry in history["log"]
            if "eval_cosine" in entry
        ],
        **(judged(run) if name in JUDGED else {}),
    }


def judged(run: Any) -> dict[str, Any]:
    """Size of the INT8 graph, and fidelity of every artefact."""
    from distillabse import layout
    from distillabse.evaluation.bench import graph_bytes
    from distillabse.storage import read_json

    keys = ("cosine_mean", "cosine_p05", "constant_baseline", "skill", "ci95", "neighbour_top1", "n")
    return {
        "int8_bytes": graph_bytes(run.bundle / layout.ONNX_INT8["avx512_vnni"]),
        "fidelity": {
            artefact: {key: {field: row[field] for field in keys} for key, row in sets.items()}
            for artefact, sets in read_json(run.verification)["fidelity"].items()
        },
    }


def speed(runs: Path) -> dict[str, Any]:
    """The INT8 graphs of all shapes beside the teacher, in PyTorch and in ONNX Runtime, in one alternating run."""
    import tempfile

    from distillabse import layout
    from distillabse.config import BenchConfig, ExportConfig, QuantizationConfig
    from distillabse.environment import describe_environment
    from distillabse.evaluation.latency import measure
    from distillabse.evaluation.sets import corpus_test_set
    from distillabse.evaluation.workers import Engine
    from distillabse.export.bundle import write_bundle
    from distillabse.layout import RunFolder
    from distillabse.models.teacher import load_teacher

    config = job(SHAPES[1], Path("data"), runs)
    texts = [sentence.text for sentence in corpus_test_set(config, RunFolder(config.run_folder))]
    with tempfile.TemporaryDirectory() as folder:
        write_bundle(
            load_teacher(config.teacher), Path(folder), ExportConfig(quantization=QuantizationConfig(kind="none")), {}
        )
        engines = [
            Engine("teacher-torch", "torch", Path(folder)),
            Engine("teacher-onnx", "onnx", Path(folder), layout.ONNX_FP32),
        ]
        for name in SHAPES:
            bundle = RunFolder(job(name, Path("data"), runs).run_folder).bundle
            engines.append(Engine(name, "onnx", bundle, layout.ONNX_INT8["avx512_vnni"]))
        return {
            **measure(engines, texts, BenchConfig(batch_sizes=BATCH_SIZES, interval=None), seed=42),
            "environment": describe_environment(),
        }


def plot(result: dict[str, Any], path: Path) -> None:
    """Fidelity against size and latency by shape; the curves of training from different starts."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "distillabse"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    students = result["students"]
    for name in SHAPES:
        cosine = students[name]["fidelity"]["onnx-int8"]["test"]["cosine_mean"]
        latency = {row["batch"]: row for row in result["latency"][name]}[1]["p50_ms"]
        for panel, value in ((axes[0, 0], students[name]["int8_bytes"] / 1e6), (axes[0, 1], latency)):
            panel.plot(value, cosine, "o")
            side = {"xytext": (-6, -12), "ha": "right"} if name == TRIMMED else {"xytext": (6, -12)}
            panel.annotate(name, (value, cosine), textcoords="offset points", fontsize=8, **side)
    axes[0, 0].set(
        xlabel="INT8 graph, MB", ylabel="mean cosine to the teacher", title="Fidelity and size, held-out text"
    )
    axes[0, 1].set(xlabel="INT8, batch 1, median ms", ylabel="mean cosine to the teacher", title="Fidelity and latency")
    for panel in axes[0]:
        panel.margins(x=0.25, y=0.15)
    for start, anew in STARTS:
        line = curve(axes[1, 0], students[start], f"{start}, from the teacher")
        curve(axes[1, 0], students[anew], f"{start}, random", color=line.get_color(), linestyle="--")
    axes[1, 0].set(title="Where a student starts")
    kinds = {"": "token states", " svd": "rows, weighted SVD", " pca": "rows, PCA", " random directions": "random"}
    for shape, style in zip(PROJECTIONS, ("-", "--"), strict=True):
        for colour, (suffix, label) in enumerate(kinds.items()):
            curve(axes[1, 1], students[shape + suffix], f"{shape}: {label}", color=f"C{colour}", linestyle=style)
    axes[1, 1].set(title="What narrower widths are projected onto")
    for panel in axes[1]:
        panel.set(xlabel="step", ylabel="mean cosine, dev split")
        panel.set_ylim(bottom=0.55)
        panel.legend(fontsize=7, loc="lower right", ncols=2)
    figure.savefig(path, metadata={"Date": None})


def curve(panel: Any, student: dict[str, Any], label: str, **style: Any) -> Any:
    """Held-out cosine by step."""
    points = student["dev_curve"]
    return panel.plot(
        [point["step"] for point in points], [point["cosine"] for point in points], marker=".", label=label, **style
    )[0]


if __name__ == "__main__":
    main()
