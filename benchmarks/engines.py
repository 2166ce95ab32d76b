"""How fast and how true is a bundle's INT8 in ONNX Runtime and OpenVINO, beside INT8 of other programs?

    python benchmarks/engines.py [BUNDLE] --data data [--file onnx/model_qint8_avx512_vnni.onnx] [--rounds 60]

Every engine has a process of its own, in an environment of its own (`environments/`), and they take turns in an order
that rotates. A timed call starts with strings and ends with unit vectors. Other engines get the same student: OpenVINO
with NNCF's own INT8 (calibrated on training text), CTranslate2 INT8, sentence-transformers with its own ONNX export in
fp32 and dynamic INT8, fastembed with our fp32 graph and with that INT8 file. Texts are those of `eval/` (banking77,
tweets, Tatoeba). Without a BUNDLE one is made of all-MiniLM-L6-v2. Writes benchmarks/results/engines.json.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rich.table import Table

    from distillabse.evaluation.workers import Engine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
WORKER = str(Path(__file__).with_name("engines_worker.py"))
MODELS = str(Path(__file__).with_name("engines_models.py"))
TORCH = "torch-fp32"
NNCF = "nncf-openvino-int8"
SETS = (("banking77", "text"), ("tweeteval_emotion", "text"), ("tatoeba_test", "eng"))
TEXTS_OF_A_SET = 700
CALIBRATION = 1024
ST_INT8 = "onnx/model_qint8_avx512_vnni.onnx"
TOLERANCE = 0.05
TABLE_WIDTH = 140


def main() -> None:
    """Make what is missing, measure, judge, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--file", action="append", help="Graph of the bundle; may be given again. Default: Encoder's.")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cosine-texts", type=int, default=600, help="Texts that cosines to fp32 are taken on.")
    parser.add_argument("--only", action="append", help="Measure engines whose name holds this; may be given again.")
    parser.add_argument("--output", type=Path, default=RESULTS / "engines.json")
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ["HF_HUB_OFFLINE"] = "1"

    from rich.console import Console

    from distillabse.config import BenchConfig
    from distillabse.environment import describe_environment
    from distillabse.evaluation.latency import measure
    from distillabse.storage import write_json

    bundle = (arguments.bundle or default_bundle(arguments.data)).resolve()
    texts = evaluation_texts(arguments.data)
    sample = texts[: arguments.cosine_texts]
    with tempfile.TemporaryDirectory() as temporary:
        engines = all_engines(bundle, arguments.file or [default_graph(bundle)], arguments.data, Path(temporary))
        if arguments.only:
            wanted = [TORCH, *arguments.only]
            engines = [engine for engine in engines if any(part in engine.name for part in wanted)]
        vectors, failed = {}, {}
        for engine in engines:
            try:
                vectors[engine.name] = vectors_of(engine, sample, arguments.threads, Path(temporary))
            except subprocess.CalledProcessError as error:
                failed[engine.name] = error.stdout.strip().splitlines()[-1].replace(f"{ROOT}/", "")
                print(f"{engine.name} is left out: {failed[engine.name]}", file=sys.stderr)
        engines = [engine for engine in engines if engine.name in vectors]
        baselines = [name for name in (TORCH, NNCF) if name in vectors]
        config = BenchConfig(
            batch_sizes=[int(size) for size in arguments.batches.split(",")], rounds=arguments.rounds,
            threads=arguments.threads, interval=None,
        )  # fmt: skip
        measured = measure(engines, texts, config, seed=0, baselines=baselines)
    kept = {name: fidelity_to_torch(found, vectors[TORCH]) for name, found in vectors.items()}
    result = {
        "command": f"python benchmarks/engines.py BUNDLE --rounds {arguments.rounds} --batches {arguments.batches}",
        "bundle": bundle.name,
        "texts": len(texts),
        "texts_for_cosines": len(sample),
        "cosine_to_fp32": kept,
        "failed": failed,
        **measured,
        "claims": claims(measured["latency"], kept),
        "versions": {engine.name: versions(engine.worker[0]) for engine in engines},
        "environment": describe_environment(),
    }
    write_json(arguments.output, result)
    console = Console()
    Console(width=TABLE_WIDTH).print(table(result))
    for claim, holds in result["claims"].items():
        console.print(f"{'yes' if holds else 'no ':3} {claim}", soft_wrap=True)


def all_engines(bundle: Path, files: Sequence[str], data: Path, temporary: Path) -> list[Engine]:
    """Every engine with the model it needs, which is made in `temporary`."""
    from environments import interpreter

    from distillabse.evaluation.workers import Engine

    python = {name: str(interpreter(name)) for name in ("openvino", "ctranslate2", "optimum", "fastembed")}
    python["own"] = sys.executable

    def engine(name: str, environment: str, kind: str, folder: Path, file: str | None = None) -> Engine:
        return Engine(name, kind, folder, file, (python[environment], WORKER))

    calibration = temporary / "calibration.json"
    calibration.write_text(json.dumps(training_texts(data)), encoding="utf-8")
    nncf = make("nncf", python["openvino"], bundle, temporary, calibration)
    ctranslate2 = make("ctranslate2", python["ctranslate2"], bundle, temporary)
    exported = make("sentence_transformers", python["optimum"], bundle, temporary)
    ours = []
    for file in files:
        label = f"ours, {Path(file).stem.removeprefix('model_')}"
        ours += [
            engine(f"{label}, ONNX Runtime", "own", "onnxruntime", bundle, file),
            engine(f"{label}, OpenVINO", "openvino", "openvino", bundle, file),
        ]
    return [
        engine(TORCH, "own", "torch", bundle),
        *ours,
        engine(NNCF, "openvino", "openvino", nncf, "model.xml"),
        engine("CTranslate2 INT8", "ctranslate2", "ctranslate2", ctranslate2, "ctranslate2"),
        engine("sentence-transformers, ONNX fp32", "optimum", "sentence_transformers", exported, "onnx/model.onnx"),
        engine("sentence-transformers, ONNX INT8", "optimum", "sentence_transformers", exported, ST_INT8),
        engine("fastembed, our ONNX fp32", "fastembed", "fastembed", bundle, "onnx/model.onnx"),
        engine("fastembed, dynamic ONNX INT8", "fastembed", "fastembed", exported, ST_INT8),
    ]


def make(function: str, python: str, bundle: Path, temporary: Path, *more: Path) -> Path:
    """A copy of the bundle without its graphs, where another program has put what it made of the student."""
    target = temporary / function
    shutil.copytree(bundle, target, ignore=shutil.ignore_patterns("onnx", "*.onnx"))
    print(f"{function} makes its model", file=sys.stderr)
    done = subprocess.run(
        [python, MODELS, function, str(bundle), str(target), *map(str, more)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{function} could not make its model:\n{done.stdout[-4000:]}")
    return target


def vectors_of(engine: Engine, texts: list[str], threads: int, temporary: Path) -> dict[str, Any]:
    """What an engine makes of the texts: float32 [texts, dimension] together, and of the first ones alone."""
    source, target = temporary / "texts.json", temporary / "vectors.npz"
    source.write_text(json.dumps(texts), encoding="utf-8")
    settings = {"kind": engine.kind, "folder": str(engine.folder), "file": engine.file, "device": "cpu"}
    print(f"{engine.name} encodes", file=sys.stderr)
    subprocess.run(
        [*engine.worker, "vectors", json.dumps({**settings, "threads": threads}), str(source), str(target)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True,
    )  # fmt: skip
    with np.load(target, allow_pickle=False) as arrays:
        return dict(arrays)


def fidelity_to_torch(found: dict[str, Any], torch: dict[str, Any]) -> dict[str, float]:
    """Mean, 1st percentile and least cosine to PyTorch fp32, and the least of a vector alone to the same in a batch."""
    from distillabse.evaluation.fidelity import row_cosines

    cosines = row_cosines(found["together"], torch["together"])
    return {
        "mean": float(cosines.mean()),
        "p01": float(np.percentile(cosines, 1)),
        "min": float(cosines.min()),
        "alone_to_batch_min": float(row_cosines(found["alone"], found["together"][: len(found["alone"])]).min()),
    }


def claims(latency: dict[str, list[dict[str, Any]]], kept: dict[str, dict[str, float]]) -> dict[str, bool]:
    """What is to hold at every batch size: our fastest beside NNCF's, and our ONNX Runtime path beside the others."""
    ours = [name for name in latency if name.startswith("ours")]
    own_runtime = [name for name in ours if name.endswith("ONNX Runtime")]
    others = [name for name in latency if name.startswith(("fastembed", "sentence-transformers, ONNX"))]
    medians = {name: {row["batch"]: row["p50_ms"] for row in rows} for name, rows in latency.items()}
    found: dict[str, bool] = {}
    for batch in medians[ours[0]] if ours else ():
        fastest = min(ours, key=lambda name: medians[name][batch])
        if NNCF in medians:
            row = next(row for row in latency[fastest] if row["batch"] == batch)
            found[f"batch {batch}: {fastest} is as fast as NNCF's, within 5 %"] = (
                row[f"speedup_vs_{NNCF.replace('-', '_')}"] >= 1 - TOLERANCE
            )
            found[f"batch {batch}: {fastest} is truer than NNCF's"] = kept[fastest]["mean"] > kept[NNCF]["mean"]
        if own_runtime and others:
            first = min(own_runtime, key=lambda name: medians[name][batch])
            found[f"batch {batch}: {first} is ahead of every other user of ONNX Runtime"] = all(
                medians[first][batch] < medians[other][batch] for other in others
            )
    return found


def table(result: dict[str, Any]) -> Table:
    """A row for every engine: cosine to fp32, and for every batch size the median and the speed beside NNCF's."""
    from distillabse.console import figures_table

    batches = [row["batch"] for row in next(iter(result["latency"].values()))]
    columns = [f"{what}\n{batch}" for batch in batches for what in ("ms at", "vs NNCF", "95 % interval")]
    shown = figures_table(
        f"{result['bundle']}, {result['threads']} threads", None, ["engine"],
        ["cosine\nmean", "1st\npercentile", "alone to\nbatch", *columns], narrow=True,
    )  # fmt: skip
    key = f"speedup_vs_{NNCF.replace('-', '_')}"
    for name, rows in result["latency"].items():
        kept = result["cosine_to_fp32"][name]
        cells = [f"{kept[part]:.5f}" for part in ("mean", "p01", "alone_to_batch_min")]
        for row in rows:
            low, high = row.get(f"{key}_ci95", (float("nan"), float("nan")))
            cells += [f"{row['p50_ms']:.2f}", f"{row.get(key, float('nan')):.2f}", f"{low:.2f}-{high:.2f}"]
        shown.add_row(name, *cells)
    return shown


def versions(python: str) -> dict[str, str]:
    """Versions of what an environment has of the programs that are compared."""
    names = ("onnxruntime", "openvino", "nncf", "ctranslate2", "sentence-transformers", "optimum-onnx", "fastembed",
             "transformers", "tokenizers", "torch")  # fmt: skip
    code = (
        "import json, importlib.metadata as m\nfound = {}\n"
        f"for name in {names!r}:\n    try: found[name] = m.version(name)\n    except m.PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    return dict(json.loads(subprocess.run([python, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout))


def evaluation_texts(data: Path) -> list[str]:
    """As many texts of each set, at random, each once."""
    found: list[str] = []
    for name, column in SETS:
        rows = [row[column] for row in rows_of(data / "eval" / f"{name}.tsv.gz")]
        found += random.Random(0).sample(list(dict.fromkeys(rows)), TEXTS_OF_A_SET)
    random.Random(1).shuffle(found)
    return found


def training_texts(data: Path) -> list[str]:
    """Texts to calibrate on, none of which is an evaluation text."""
    rows = [row["text"] for row in rows_of(data / "mono_train" / "en.tsv.gz")]
    return random.Random(0).sample(rows, 300)


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a gzip-compressed table."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def default_bundle(data: Path) -> Path:
    """A bundle of all-MiniLM-L6-v2, calibrated on training text, made once."""
    from quantization_aware import training_text

    from distillabse.config import ExportConfig, TeacherConfig
    from distillabse.export.bundle import write_bundle
    from distillabse.models.teacher import load_teacher
    from distillabse.storage import new_folder

    folder = Path("runs/engines/all-MiniLM-L6-v2")
    if not folder.is_dir():
        with new_folder(folder) as target:
            teacher = load_teacher(TeacherConfig(model="packaged:all-MiniLM-L6-v2"))
            texts = training_text(data, 0)[:CALIBRATION]
            write_bundle(teacher, target, ExportConfig(), {"name": folder.name}, texts)
    return folder


def default_graph(bundle: Path) -> str:
    """The graph that `Encoder` takes."""
    from distillabse.encoder import Encoder

    return Encoder(bundle)._path.relative_to(bundle).as_posix()


if __name__ == "__main__":
    main()
