"""Students of many shapes beside their teachers and static models: size, speed, fidelity, tasks. One table a teacher.

    python benchmarks/comparison.py train [NAME ...]      # students of MiniLM; half an hour on one core, kept in runs/
    python benchmarks/comparison.py judge                 # fidelity and tasks; a busy machine will do
    python benchmarks/comparison.py measure               # speed, on a quiet machine; writes results/comparison.json

all-MiniLM-L6-v2 is the teacher for fidelity, and its students are trained, all on the same sentences. For LaBSE's size
there is a teacher of its exact shape and its students with random weights (labse_stand_in.py): speed and size only.
Students run as INT8 graphs in ONNX Runtime; teachers in PyTorch and as fp32 graphs. Speed is measured in several
sittings with new processes (sittings.py), on a quiet machine.

`--data` holds mono_train/, parallel_train/ and eval/; the tasks' tables are in ./data/eval. Needs `pip install
'distillabse[floor]'` for the static models.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comparison_students import LABSE, MINILM, STATIC, job, train
from sittings import SITTINGS, sit

RESULTS = Path(__file__).parent / "results"
BATCH_SIZES = [1, 32, 128]
LABSE_PRODUCTS, JUDGED = "comparison-labse", "comparison-judged.json"
TEACHER, TORCH, ONNX = "teacher", "teacher-torch", "teacher-onnx"
SEED = 42
TASKS = ("tatoeba", "stsb", "banking77", "massive")
TEXTS_OF_A_SET = 2000


def main() -> None:
    """Train, judge or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["train", "judge", "measure"])
    parser.add_argument("names", nargs="*", help="students to train; by default all")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--output", type=Path, default=RESULTS / "comparison.json")
    parser.add_argument("--tables", nargs="+", choices=["minilm", "labse"], default=["minilm", "labse"])
    parser.add_argument("--sittings", type=int, default=SITTINGS)
    arguments = parser.parse_args()
    if arguments.step == "train":
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        for name in arguments.names or MINILM:
            train(name, arguments.data, arguments.runs)
        if not arguments.names:
            labse_products(arguments.data, arguments.runs)
    elif arguments.step == "judge":
        judge(arguments.data, arguments.runs)
    else:
        measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    """The tables that are asked for; another one stays in the result as it is."""
    from distillabse.environment import describe_environment
    from distillabse.storage import read_json, write_json

    earlier = read_json(arguments.output) if arguments.output.is_file() else {}
    made = {"minilm": minilm, "labse": labse}
    tables = {name: made[name](arguments.data, arguments.runs, arguments.sittings) for name in arguments.tables}
    result = {
        "command": f"python benchmarks/comparison.py measure --data {arguments.data}",
        "environment": describe_environment(),
    }
    write_json(arguments.output, {**earlier, **result, **tables})


def minilm(data: Path, runs: Path, sittings: int) -> dict[str, Any]:
    """The trained students of all-MiniLM-L6-v2."""
    from distillabse import layout
    from distillabse.evaluation.latency import Engine
    from distillabse.storage import read_json

    if not (runs / JUDGED).is_file():
        judge(data, runs)
    teacher, bundles, static = minilm_products(data, runs)
    texts = judged_texts(data, runs)
    engines = [
        Engine(TORCH, "torch", teacher),
        Engine(ONNX, "onnx", teacher, layout.ONNX_FP32),
        Engine(STATIC, "static", static),
        *(Engine(name, "onnx", bundle, layout.int8_graph(bundle)) for name, bundle in bundles.items()),
    ]
    speed = sit(engines, texts["in-domain"], settings(), SEED, (TORCH, ONNX), sittings)
    students = {
        name: {**size_of(bundle), "latency": speed["latency"][name], "shape": read_json(bundle / layout.MODEL_SETTINGS)}
        for name, bundle in bundles.items()
    }
    students[STATIC] = {**static_size(static), "latency": speed["latency"][STATIC]}
    return {
        "teacher": {**size_of(teacher), "latency": {name: speed["latency"][name] for name in (TORCH, ONNX)}},
        "students": students,
        **read_json(runs / JUDGED),
        **{key: speed[key] for key in ("tokens", "threads", "sittings", "cores_used_by_others")},
    }


def minilm_products(data: Path, runs: Path) -> tuple[Path, dict[str, Path], Path]:
    """The teacher's folder, the bundles of the students by name, and the static model's folder."""
    from distillabse.layout import RunFolder

    config = job("3x384", data, runs).teacher
    bundles = {name: RunFolder(train(name, data, runs)).bundle for name in MINILM}
    return (
        teacher_bundle(config, runs / "comparison-teacher"),
        bundles,
        static_model(config, runs / "comparison-static"),
    )


def judge(data: Path, runs: Path) -> None:
    """Fidelity and tasks of MiniLM's students, kept for `measure`."""
    from distillabse.storage import write_json

    teacher, bundles, static = minilm_products(data, runs)
    places = {**{name: str(bundle) for name, bundle in bundles.items()}, STATIC: str(static)}
    encoders = opened(str(teacher), places)
    judged = {"fidelity": fidelity_of(encoders, judged_texts(data, runs))}
    write_json(runs / JUDGED, judged)
    write_json(runs / JUDGED, {**judged, "tasks": tasks_of(encoders)})


def labse(data: Path, runs: Path, sittings: int) -> dict[str, Any]:
    """Students of LaBSE's shape, random weights."""
    from student_shapes import int8_graph, speed_texts

    from distillabse import layout
    from distillabse.evaluation.latency import Engine

    products = labse_products(data, runs)
    work = runs / LABSE_PRODUCTS
    texts, description = speed_texts(data, work)
    engines = [
        Engine(TORCH, "torch", work / TEACHER),
        Engine(ONNX, "onnx", work / TEACHER, layout.ONNX_FP32),
        Engine(STATIC, "static", work / STATIC),
        *(Engine(name, "onnx", work / name, int8_graph()) for name in ("trimmed teacher", *LABSE)),
    ]
    speed = sit(engines, texts, settings(), SEED, (TORCH, ONNX), sittings)
    return {
        "random_weights": True,
        "teacher": {**products.pop(TEACHER), "latency": {name: speed["latency"][name] for name in (TORCH, ONNX)}},
        "students": {name: {**product, "latency": speed["latency"][name]} for name, product in products.items()},
        "texts": description,
        **{key: speed[key] for key in ("tokens", "threads", "sittings", "cores_used_by_others")},
    }


def labse_products(data: Path, runs: Path) -> dict[str, dict[str, Any]]:
    """Build and export LaBSE's stand-in and its students, each in a process of its own, where that is not done."""
    from labse_stand_in import stand_in
    from student_shapes import build, export, in_own_process, trim

    from distillabse.storage import read_json, remove_folder, write_json

    work = runs / LABSE_PRODUCTS
    work.mkdir(parents=True, exist_ok=True)
    teacher, trimmed = in_own_process(stand_in, data, runs), work / "trimmed"
    steps: dict[str, tuple[Any, ...]] = {
        "trimmed": (trim, teacher, data),
        TEACHER: (export, teacher, False),
        "trimmed teacher": (export, trimmed, True),
        STATIC: (random_static, trimmed),
        **{name: (build, trimmed, shape) for name, shape in LABSE.items()},
    }
    found = {}
    for name, (make, source, *rest) in steps.items():
        record = work / f"{name}.json"
        if not record.is_file():
            print(f"LaBSE's shape, {name}", flush=True)
            remove_folder(work / name)
            arguments = (source, *rest, work / name) if make is not export else (source, work / name, *rest)
            write_json(record, in_own_process(make, *arguments))
        found[name] = read_json(record)
    del found["trimmed"]
    return found


def settings() -> Any:
    """How a sitting is measured."""
    from distillabse.config import BenchConfig

    return BenchConfig(batch_sizes=BATCH_SIZES, rounds=6, seconds_per_round=0.05, interval=None)


def teacher_bundle(config: Any, folder: Path) -> Path:
    """The teacher as a folder for PyTorch, with its fp32 graph."""
    from distillabse import layout
    from distillabse.config import ExportConfig, QuantizationConfig
    from distillabse.export.bundle import write_bundle
    from distillabse.models.teacher import load_teacher
    from distillabse.storage import new_folder

    if not (folder / layout.PROVENANCE).is_file():
        with new_folder(folder) as product:
            write_bundle(load_teacher(config), product, ExportConfig(quantization=QuantizationConfig(kind="none")), {})
    return folder


def static_model(config: Any, folder: Path) -> Path:
    """The teacher's tokens without context, by model2vec."""
    from distillabse import layout
    from distillabse.models.teacher import load_teacher
    from distillabse.storage import new_folder
    from distillabse.tasks.encoders import distil_static

    if not (folder / layout.MODULES).is_file():
        with new_folder(folder) as product:
            distil_static(load_teacher(config), product)
    return folder


def random_static(source: Path, folder: Path) -> dict[str, Any]:
    """A static model with the tokenizer of `source` and random vectors, 256 wide as model2vec's own are."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import StaticEmbedding

    from distillabse.models.teacher import load_encoder

    torch.manual_seed(SEED)
    tokenizer = load_encoder(str(source)).tokenizer.backend_tokenizer
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=256)], device="cpu").save_pretrained(
        str(folder)
    )
    return static_size(folder)


def size_of(bundle: Path) -> dict[str, Any]:
    """Parameters, and bytes that a service copies."""
    from student_shapes import served_bytes

    from distillabse.evaluation.bench import count_active_parameters, count_parameters
    from distillabse.models.teacher import load_encoder

    encoder = load_encoder(str(bundle))
    return {
        "parameters": count_parameters(encoder),
        "active_parameters": count_active_parameters(encoder),
        "served_bytes": served_bytes(bundle),
    }


def static_size(folder: Path) -> dict[str, Any]:
    """The same of a static model."""
    from distillabse.evaluation.bench import count_parameters
    from distillabse.tasks.encoders import load_static

    parameters = count_parameters(load_static(folder))
    served = sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in {".safetensors", ".json"})
    return {"parameters": parameters, "active_parameters": parameters, "served_bytes": served}


def judged_texts(data: Path, runs: Path) -> dict[str, list[str]]:
    """Texts that no student was trained on: held-out ones of its own sources, and two sets of other kinds."""
    from distillabse.evaluation.sets import evaluation_sets
    from distillabse.layout import RunFolder

    config = job("3x384", data, runs)
    config.evaluation.max_sentences = TEXTS_OF_A_SET
    sets = evaluation_sets(config, RunFolder(config.run_folder))
    return {("in-domain" if name == "test" else name): [one.text for one in found] for name, found in sets.items()}


def opened(teacher: str, places: Mapping[str, str]) -> dict[str, Any]:
    """The teacher and its students, ready to encode."""
    from distillabse.models.teacher import load_encoder
    from distillabse.tasks.encoders import open_encoder

    return {TEACHER: load_encoder(teacher), **{name: open_encoder(place) for name, place in places.items()}}


def fidelity_of(encoders: Mapping[str, Any], texts: Mapping[str, list[str]]) -> dict[str, Any]:
    """Fidelity of every student on every set; None where its vectors have other dimensions than the teacher's."""
    import numpy as np

    from distillabse.evaluation.fidelity import fidelity

    keys = ("n", "cosine_mean", "cosine_p01", "cosine_p05", "ci95", "constant_baseline", "skill", "neighbour_top1")
    vectors = {
        name: {key: np.asarray(encoder.encode(found)) for key, found in texts.items()}
        for name, encoder in encoders.items()
    }
    wanted = vectors.pop(TEACHER)
    judged: dict[str, Any] = {}
    for name, sets in vectors.items():
        if any(sets[key].shape != wanted[key].shape for key in texts):
            judged[name] = None
            continue
        rows = {key: fidelity(wanted[key], sets[key]) for key in texts}
        judged[name] = {key: {field: row[field] for field in keys} for key, row in rows.items()}
    return judged


def tasks_of(encoders: Mapping[str, Any]) -> dict[str, Any]:
    """What the vectors are worth: the headline of every task."""
    from distillabse.config import TasksConfig
    from distillabse.tasks.run import load_tasks, run_tasks

    tasks = load_tasks(TasksConfig(suite="evaluation-data", max_pairs=500), SEED, TASKS)
    found = run_tasks(encoders, tasks, SEED, teacher=TEACHER)["tasks"]
    return {task: {**values, "encoders": headlines(values)} for task, values in found.items()}


def headlines(task: Mapping[str, Any]) -> dict[str, Any]:
    """Of every encoder, the one measure that stands for the task."""
    return {name: {task["headline"]: measures[task["headline"]]} for name, measures in task["encoders"].items()}


if __name__ == "__main__":
    main()
