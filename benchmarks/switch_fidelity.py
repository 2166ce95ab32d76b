"""What a Switch student keeps beside the dense student of equal active FLOPs: same teacher, text, steps, three seeds.

    python benchmarks/switch_fidelity.py --data data [--runs runs] [--only NAME ...] [--seeds 0 1 2]

The teacher is all-MiniLM-L6-v2, the students have three layers, and a token passes feed-forward blocks of width 384,
a quarter of the teacher's: one block (dense), or one of 4 or 8 experts. A seed also chooses the sentences and the
split, so differences are paired: between students of one seed, sentence by sentence. Two more stand beside them: a
dense student with blocks twice as wide, and one distilled from the trained Switch student. All cosines are to MiniLM's
vectors, in PyTorch; of one student the INT8 graph is judged, too.

`--data` holds mono_train/en.tsv.gz, parallel_train/*.tsv.gz, and under eval/ banking77.tsv.gz and
tweeteval_emotion.tsv.gz. What is trained already is not trained again; with `--only`, nothing is written. Writes
benchmarks/results/switch_fidelity.json and switch_fidelity.svg.
"""

from __future__ import annotations

import argparse
import logging
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from real_text import places
from stages import run_missing

RESULTS = Path(__file__).parent / "results"
SENTENCES, EPOCHS = 25_000, 2.0
DENSE = "dense"
STUDENTS: dict[str, dict[str, Any]] = {
    DENSE: {"intermediate_size": 384},
    "8 experts": {"intermediate_size": 384, "kind": "switch", "experts": 8, "sparse_layers": "all"},
    "4 experts": {"intermediate_size": 384, "kind": "switch", "experts": 4, "sparse_layers": "all"},
    "dense, twice as wide": {"intermediate_size": 768},
}
SPARSE = "8 experts"
EXPORTED = (0, SPARSE)
BOOTSTRAP_SAMPLES = 2000


def main() -> None:
    """Train what is missing, compare, and write the result and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--only", nargs="*", choices=STUDENTS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")

    from distillabse.environment import describe_environment
    from distillabse.storage import write_json

    chosen = arguments.only or list(STUDENTS)
    for name in chosen:
        for seed in arguments.seeds:
            train(name, seed, arguments.data, arguments.runs)
    if arguments.only:
        return
    result = {
        "command": f"python benchmarks/switch_fidelity.py --data {arguments.data}",
        "sentences": SENTENCES,
        "epochs": EPOCHS,
        "seeds": arguments.seeds,
        **compare(arguments.seeds, arguments.data, arguments.runs),
        "environment": describe_environment(),
    }
    write_json(RESULTS / "switch_fidelity.json", result)
    plot(result, RESULTS / "switch_fidelity.svg")


def job(name: str, seed: int, data: Path, runs: Path) -> Any:
    """The configuration of one student."""
    from distillabse.layout import RunFolder
    from distillabse.settings import load_config, validate

    values = load_config("minilm-english", [f"output={runs}", *places(data)]).model_dump(mode="json")
    values["name"] = f"switch-{seed}-" + "".join(letter if letter.isalnum() else "-" for letter in name)
    values["seed"] = seed
    values["gates"]["teacher_cosine_mean"] = 0.0
    values["student"] = {"layers": 3, "freeze_embeddings": True, **STUDENTS[name]}
    values["corpus"]["max_sentences"] = SENTENCES
    values["training"] |= {"num_train_epochs": EPOCHS, "eval_steps": 0.25, "save_steps": 0.25, "report_to": []}
    if "experts" in STUDENTS[name]:
        values["objectives"].append({"kind": "routing"})
    if name == f"dense from {SPARSE}":
        values["teacher"]["model"] = str(RunFolder(job(SPARSE, seed, data, runs).run_folder).student)
    return validate(values)


def train(name: str, seed: int, data: Path, runs: Path) -> None:
    """Corpus, vocabulary and training of one student, where they are not there yet; one is exported and judged."""
    exported = (seed, name) == EXPORTED
    run_missing(
        job(name, seed, data, runs), ("corpus", "vocabulary", "distill", *(("export", "verify") if exported else ()))
    )


def compare(seeds: list[int], data: Path, runs: Path) -> dict[str, Any]:
    """Fidelity of every student, and its paired difference to the dense one, by set."""
    students: dict[str, dict[str, Any]] = {}
    dense: dict[str, list[Any]] = {}
    for name in STUDENTS:
        judged = [judge(name, seed, data, runs) for seed in seeds]
        cosines = {key: [rows[key] for _, rows in judged] for key in judged[0][1]}
        dense = dense or cosines
        students[name] = {
            "student": STUDENTS[name],
            "seeds": [figures for figures, _ in judged],
            "fidelity": {key: mean_and_spread(values) for key, values in cosines.items()},
            "above_dense": {key: difference(values, dense[key]) for key, values in cosines.items()},
        }
    return {"students": students}


def judge(name: str, seed: int, data: Path, runs: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """One student's figures, and the cosine to MiniLM of every sentence by set."""
    from distillabse.evaluation.bench import count_parameters
    from distillabse.evaluation.fidelity import fidelity, row_cosines
    from distillabse.layout import RunFolder
    from distillabse.models.teacher import load_encoder
    from distillabse.storage import read_json

    run = RunFolder(job(name, seed, data, runs).run_folder)
    student = load_encoder(str(run.student)).eval()
    keys = ("cosine_mean", "cosine_p05", "constant_baseline", "skill", "ci95", "neighbour_top1", "n")
    history = read_json(run.training_history)
    figures: dict[str, Any] = {
        "seed": seed,
        "parameters": count_parameters(student),
        "sentences_per_second": history["sentences_per_second"],
        "dev_curve": [[entry["step"], entry["eval_cosine"]] for entry in history["log"] if "eval_cosine" in entry],
        "routers": last_routers(history["log"]),
        "fidelity": {},
    }
    rows = {}
    for key, (texts, target) in targets(seed, data, runs).items():
        output = student.encode(texts, batch_size=64, show_progress_bar=False)
        found = fidelity(target, output, languages=["en"] * len(texts), lengths=[1] * len(texts),
                         bootstrap_samples=200, seed=seed)  # fmt: skip
        figures["fidelity"][key] = {field: found[field] for field in keys}
        rows[key] = row_cosines(target, output)
    if (seed, name) == EXPORTED:
        verified = read_json(run.verification)
        figures["parity"] = verified["parity"]
        figures["int8"] = {key: row["cosine_mean"] for key, row in verified["fidelity"]["onnx-int8"].items()}
    return figures, rows


@cache
def targets(seed: int, data: Path, runs: Path) -> dict[str, tuple[list[str], Any]]:
    """Texts and MiniLM's vectors of every set."""
    from distillabse.evaluation.sets import evaluation_sets
    from distillabse.layout import RunFolder
    from distillabse.models.teacher import load_teacher

    config = job(DENSE, seed, data, runs)
    teacher = load_teacher(config.teacher)
    sets = evaluation_sets(config, RunFolder(config.run_folder))
    texts = {key: [sentence.text for sentence in chosen] for key, chosen in sets.items()}
    return {key: (one, teacher.encode(one, batch_size=64, show_progress_bar=False)) for key, one in texts.items()}


def last_routers(log: list[dict[str, float]]) -> dict[str, float]:
    """What the routers did between the last two logs."""
    entries = [entry for entry in log if any(name.startswith("router/") for name in entry)]
    return {name: value for name, value in entries[-1].items() if name.startswith("router/")} if entries else {}


def mean_and_spread(values: list[Any]) -> dict[str, Any]:
    """Mean over seeds of the mean cosine, with the least and the largest seed."""
    means = [float(one.mean()) for one in values]
    return {"mean": float(np.mean(means)), "least": min(means), "largest": max(means)}


def difference(values: list[Any], dense: list[Any]) -> dict[str, Any]:
    """Mean paired difference; its 95 % interval over seeds (Student's t), and over sentences (bootstrap)."""
    from scipy.stats import t

    paired = [one - other for one, other in zip(values, dense, strict=True)]
    means = np.array([one.mean() for one in paired])
    half = float(t.ppf(0.975, len(means) - 1) * means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else None
    generator = np.random.default_rng(0)
    resampled = [np.mean([generator.choice(one, len(one)).mean() for one in paired]) for _ in range(BOOTSTRAP_SAMPLES)]
    return {
        "mean": float(means.mean()),
        "by_seed": means.tolist(),
        "ci95_seeds": None if half is None else [float(means.mean()) - half, float(means.mean()) + half],
        "ci95_sentences": np.percentile(resampled, [2.5, 97.5]).tolist(),
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Curves on the dev split, and paired differences to the dense student by set."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "distillabse"
    from matplotlib import pyplot

    figure, (curves, differences) = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for index, (name, one) in enumerate(result["students"].items()):
        points = np.array([seed["dev_curve"] for seed in one["seeds"]])
        curves.plot(points[0, :, 0], points[:, :, 1].mean(axis=0), marker=".", color=f"C{index}", label=name)
        curves.fill_between(
            points[0, :, 0], points[:, :, 1].min(axis=0), points[:, :, 1].max(axis=0), color=f"C{index}", alpha=0.2
        )
    curves.set(xlabel="step", ylabel="mean cosine, dev split", title="While training: mean and range of the seeds")
    curves.legend(fontsize=7)
    names = [name for name in result["students"] if name != DENSE]
    sets = list(result["students"][DENSE]["fidelity"])
    for index, key in enumerate(sets):
        for row, name in enumerate(names):
            found = result["students"][name]["above_dense"][key]
            place = row + 0.22 * (index - 1)
            differences.plot(found["by_seed"], [place] * len(found["by_seed"]), "|", color=f"C{index}")
            differences.plot(found["mean"], place, "o", color=f"C{index}", label=key if row == 0 else None)
            if found["ci95_seeds"]:
                differences.hlines(place, *found["ci95_seeds"], color=f"C{index}")
    differences.axvline(0, color="black", linewidth=0.8)
    differences.set_yticks(range(len(names)), names)
    differences.invert_yaxis()
    differences.set(xlabel="cosine above the dense student of equal active FLOPs", title="Paired, 95 % over seeds")
    differences.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
