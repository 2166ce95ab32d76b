"""What the shipped English recipe keeps on real text, beside plain cosine on the same sentences, on one core.

    python benchmarks/real_text.py --data data [--only minilm-english] [--runs runs]

`--data` holds mono_train/en.tsv.gz and parallel_train/*.tsv.gz to learn from, and under eval/ banking77.tsv.gz and
tweeteval_emotion.tsv.gz. A run that is already there is not trained again. Writes benchmarks/results/real_text.json
and real_text.svg.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
# Plain cosine, with every weight trained and the teacher run in every epoch, is what to beat on the same core.
RECIPES = {
    "minilm-english": [],
    "minilm-english-cosine": [
        "name=minilm-english-cosine",
        "objectives=[{kind: cosine}]",
        "student.freeze_embeddings=false",
        "teacher_cache=false",
        "training.num_train_epochs=3",
        "gates.teacher_cosine_mean=0",
    ],
}


def main() -> None:
    """Run what is missing, then write the result and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--only", choices=list(RECIPES))
    arguments = parser.parse_args()
    # One core for training; `bench` starts workers that set their own threads.
    os.environ["OMP_NUM_THREADS"] = "1"

    from distillabse.storage import read_json, write_json

    result_file = RESULTS / "real_text.json"
    results: dict[str, Any] = read_json(result_file) if result_file.is_file() else {}
    for recipe, overrides in RECIPES.items():
        if arguments.only in (None, recipe):
            results[recipe] = run(arguments.data, arguments.runs, overrides)
            write_json(result_file, results)
            sys.stderr.write(f"{recipe}: written to {result_file}\n")
    plot(results, RESULTS / "real_text.svg")


def run(data: Path, runs: Path, overrides: list[str]) -> dict[str, Any]:
    """Run one recipe and pick what is worth keeping from its report."""
    from distillabse.pipeline import run_job
    from distillabse.settings import load_config
    from distillabse.storage import read_json

    places = [
        f"corpus.sources.0.path={data}/mono_train/en.tsv.gz",
        f"corpus.sources.1.path={data}/parallel_train/*.tsv.gz",
        f"evaluation.sets.banking77.path={data}/eval/banking77.tsv.gz",
        f"evaluation.sets.tweets.path={data}/eval/tweeteval_emotion.tsv.gz",
    ]
    folder = run_job(load_config("minilm-english", [f"output={runs}", *with_paths(places), *overrides]))
    report, history = read_json(folder.report_json), read_json(folder.training_history)
    kept = ("teacher", "student", "size_bytes", "fidelity", "invariance", "latency", "config_hash", "environment")
    return {
        "command": "python benchmarks/real_text.py",
        **{key: report[key] for key in kept},
        "training": {key: value for key, value in history.items() if key != "log"},
        "dev_curve": [
            {"step": entry["step"], "cosine": entry["eval_cosine"], "skill": entry["eval_skill"]}
            for entry in history["log"]
            if "eval_cosine" in entry
        ],
    }


def plot(results: dict[str, Any], path: Path) -> None:
    """Left: held-out cosine while training. Right: the INT8 student on every set, beside the constant baseline."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "distillabse"
    from matplotlib import pyplot

    figure, (curve, bars) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for index, (recipe, result) in enumerate(results.items()):
        points = result["dev_curve"]
        minutes = result["training"]["training_seconds"] / 60
        label = f"{recipe} ({minutes:.0f} min, {result['training']['precision']})"
        curve.plot([point["step"] for point in points], [point["cosine"] for point in points], marker="o", label=label)
        sets = result["fidelity"]["onnx-int8"]
        places = [position + 0.4 * (index - (len(results) - 1) / 2) for position in range(len(sets))]
        bars.bar(places, [row["cosine_mean"] for row in sets.values()], 0.38, label=recipe)
        for position, row in enumerate(sets.values()):
            bars.hlines(row["constant_baseline"], position - 0.4, position + 0.4, colors="black", linestyles="dotted")
        bars.set_xticks(range(len(sets)), list(sets))
    curve.set(xlabel="step", ylabel="mean cosine, dev split", title="While training")
    bars.set(ylabel="mean cosine to the teacher", ylim=(0, 1), title="INT8 student (dotted: constant vector)")
    curve.legend(), bars.legend(loc="lower right")
    figure.savefig(path, metadata={"Date": None})


def with_paths(places: list[str]) -> list[str]:
    """Overrides for the sources, which are a list: OmegaConf replaces lists whole, so they are written out."""
    from omegaconf import OmegaConf

    from distillabse.settings import shipped_configs

    config = OmegaConf.load(shipped_configs()["minilm-english"])
    for place in places:
        key, value = place.split("=", 1)
        OmegaConf.update(config, key, value)
    sources = OmegaConf.to_container(config.corpus.sources)
    rest = [place for place in places if not place.startswith("corpus.sources")]
    return [f"corpus.sources={sources}", *rest]


if __name__ == "__main__":
    main()
