"""What quantisation-aware distillation brings beside post-training quantisation: same student, texts and graph.

    python benchmarks/quantization_aware.py STUDENT --data data [--seeds 0 1 2] [--steps 300] [--work runs/quantization]

STUDENT is a folder, a name of the hub, or packaged:all-MiniLM-L6-v2. For each seed its static INT8 form is calibrated
on 1024 texts, and trained from there with the fp32 student as its teacher. A seed chooses the texts: English, and a few
of every other language there is. Both forms are run in PyTorch as their graphs compute them, and judged by the cosine
of every vector to that of the fp32 student.

`--data` holds mono_train/*.tsv.gz and parallel_train/*.tsv.gz to learn from, and under eval/ banking77.tsv.gz,
tweeteval_emotion.tsv.gz and tatoeba_test.tsv.gz to be judged on. Finished seeds are kept in `--work`, each
with the quantised student, and not run again.
Writes benchmarks/results/quantization_aware.json, with an entry for each student.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
ENGLISH, TRANSLATED, OF_EACH_LANGUAGE = 12_000, 6_000, 300
DEV, CALIBRATION, JUDGED = 600, 1024, 1000
# Cyrillic, Greek, Arabic, Hebrew, Devanagari, Thai, kana and Chinese characters, Hangul.
SCRIPTS = ("rus", "ell", "ara", "heb", "hin", "tha", "jpn", "kor")


def main() -> None:
    """Run the seeds that are missing, print a table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=3e-5)
    parser.add_argument("--name", help="of the student in the result; by default the folder's")
    parser.add_argument("--work", type=Path, default=Path("runs/quantization"))
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    from distillabse.environment import describe_environment
    from distillabse.storage import read_json, write_json

    name = arguments.name or arguments.student.strip("/").split("/")[-1]
    work = arguments.work / f"{name.replace(':', '-')}-{arguments.steps}-{arguments.learning_rate:g}"
    seeds = []
    for seed in arguments.seeds:
        finished = work / f"seed-{seed}.json"
        if not finished.is_file():
            work.mkdir(parents=True, exist_ok=True)
            write_json(finished, run(arguments, seed, work / f"seed-{seed}"))
        seeds.append(read_json(finished))
    result = {
        "command": f"python benchmarks/quantization_aware.py {name} --data {arguments.data} --steps {arguments.steps} "
        f"--learning-rate {arguments.learning_rate:g}",
        "seeds": seeds,
        "sets": {key: summary([seed["sets"][key] for seed in seeds]) for key in seeds[0]["sets"]},
        "environment": describe_environment(),
    }
    path = RESULTS / "quantization_aware.json"
    write_json(path, {**(read_json(path) if path.is_file() else {}), name: result})
    show(name, result)


def run(arguments: argparse.Namespace, seed: int, work: Path) -> dict[str, Any]:
    """Calibrate, train and judge one seed."""
    import time

    from distillabse.config import JobConfig
    from distillabse.models.teacher import load_encoder, resolve_model
    from distillabse.quantization import calibrate
    from distillabse.quantization.fake import quantized_forward
    from distillabse.settings import training_arguments
    from distillabse.storage import new_folder
    from distillabse.training.data import tokenised_sentences
    from distillabse.training.distillation import held_out_fidelity
    from distillabse.training.quantization_aware import quantization_aware_distill, save_quantized_encoder

    print(f"seed {seed}: calibrating", flush=True)
    student = load_encoder(resolve_model(arguments.student)).eval()
    texts = training_text(arguments.data, seed)
    dev, calibration, train = texts[:DEV], texts[DEV : DEV + CALIBRATION], texts[DEV + CALIBRATION :]
    started = time.monotonic()
    calibrated = calibrate(student, calibration, static=True)
    seconds = time.monotonic() - started
    training = {"max_steps": arguments.steps, "learning_rate": arguments.learning_rate}
    training |= {"report_to": [], "eval_steps": 0.5, "save_steps": 0.5, "save_total_limit": 1}
    values = {
        "name": "quantization",
        "seed": seed,
        "teacher": {"model": arguments.student},
        "corpus": {"sources": [{"kind": "phrasebook"}]},
        "objectives": [{"kind": "cosine"}],
        "export": {"quantization": {"kind": "static", "training": {"training": training}}},
    }
    job = JobConfig.model_validate(values).of_quantization()
    measure = held_out_fidelity(student, dev)
    with quantized_forward(student, calibrated):
        start = measure(student)
    print(f"seed {seed}: post-training {start['cosine']:.5f} on dev; training", flush=True)
    trained, linears, history = quantization_aware_distill(
        job, student, student, calibrated, tokenised_sentences(student, train), measure, training_arguments(job, work)
    )
    with new_folder(work / "quantized") as folder:
        save_quantized_encoder(trained, linears, folder)
    sets = {}
    for key, judged in judged_texts(arguments.data, seed).items():
        target = student.encode(judged, batch_size=64)
        with quantized_forward(student, calibrated):
            before = student.encode(judged, batch_size=64)
        with quantized_forward(trained, linears):
            after = trained.encode(judged, batch_size=64)
        sets[key] = {"post_training": cosines(target, before), "quantization_aware": cosines(target, after)}
    curve = [[entry["step"], entry["eval_cosine"]] for entry in history["log"] if "eval_cosine" in entry]
    return {
        "seed": seed,
        "training": job.training,
        "objectives": [objective.model_dump() for objective in job.objectives],
        "calibration_seconds": round(seconds, 1),
        "training_seconds": history["training_seconds"],
        "dev_curve": [[0, start["cosine"]], *curve],
        "sets": sets,
    }


def cosines(target: Any, output: Any) -> dict[str, float]:
    """Mean and first percentile of the cosine of unit vectors."""
    found = (target * output).sum(axis=1, dtype=np.float64)
    return {"mean": float(found.mean()), "p01": float(np.percentile(found, 1)), "n": len(found)}


def summary(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, and the difference of the paired means with its 95 % interval (Student's t)."""
    from scipy.stats import t

    forms = ("post_training", "quantization_aware")
    found: dict[str, Any] = {
        form: {key: float(np.mean([seed[form][key] for seed in seeds])) for key in ("mean", "p01")} for form in forms
    }
    for key in ("mean", "p01"):
        paired = np.array([seed[forms[1]][key] - seed[forms[0]][key] for seed in seeds])
        several = len(paired) > 1
        half = float(t.ppf(0.975, len(paired) - 1) * paired.std(ddof=1) / np.sqrt(len(paired))) if several else None
        found[f"above_{key}"] = {"mean": float(paired.mean()), "half_ci95": half, "by_seed": paired.tolist()}
    return found


def training_text(data: Path, seed: int) -> list[str]:
    """English, and a few sentences of every other language, shuffled."""
    texts = drawn(data / "mono_train/en.tsv.gz", "text", ENGLISH, seed)
    texts += drawn(data / "parallel_train/de.tsv.gz", "en", TRANSLATED, seed)
    for path in sorted((data / "mono_train").glob("*.tsv.gz")):
        if path.name != "en.tsv.gz":
            texts += drawn(path, "text", OF_EACH_LANGUAGE, seed)
    texts = list(dict.fromkeys(texts))
    random.Random(seed).shuffle(texts)
    return texts


def judged_texts(data: Path, seed: int) -> dict[str, list[str]]:
    """Texts that nothing was learnt or calibrated on, by set."""
    folder = data / "eval"

    def is_test(row: dict[str, str]) -> bool:
        return row["split"] == "test"

    return {
        "banking77": drawn(folder / "banking77.tsv.gz", "text", JUDGED, seed, is_test),
        "tweets": drawn(folder / "tweeteval_emotion.tsv.gz", "text", JUDGED, seed, is_test),
        "eight scripts": drawn(folder / "tatoeba_test.tsv.gz", "src", JUDGED, seed, lambda row: row["lang"] in SCRIPTS),
    }


def drawn(
    path: Path, column: str, size: int, seed: int, wanted: Callable[[dict[str, str]], bool] = lambda _: True
) -> list[str]:
    """Distinct texts of a column, a seeded sample of at most `size`."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        texts = list(dict.fromkeys(row[column] for row in rows if wanted(row) and row[column]))
    return texts if len(texts) <= size else random.Random(seed).sample(texts, size)


def show(name: str, result: dict[str, Any]) -> None:
    """The table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("set", "post-training mean", "1 %", "quantisation-aware mean", "1 %", "above (95 %)", title=name)
    for key, found in result["sets"].items():
        before, after, above = found["post_training"], found["quantization_aware"], found["above_mean"]
        figures = (before["mean"], before["p01"], after["mean"], after["p01"])
        half = "" if above["half_ci95"] is None else f" ± {above['half_ci95']:.5f}"
        difference = f"{above['mean']:+.5f}{half}"
        table.add_row(key, *(f"{value:.5f}" for value in figures), difference)
    Console().print(table)


if __name__ == "__main__":
    main()
