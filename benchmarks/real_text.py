"""What the shipped English recipe keeps on real text, trained on one core.

    python benchmarks/real_text.py --data data [--runs runs]

`--data` holds mono_train/en.tsv.gz and parallel_train/*.tsv.gz to learn from, and under eval/ banking77.tsv.gz and
tweeteval_emotion.tsv.gz. Stages that are already there are not run again. Writes benchmarks/results/real_text.json and
real_text.svg.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
RECIPE = "minilm-english"


def main() -> None:
    """Run what is missing, then write the result and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    # One core for training; `bench` starts workers that set their own threads.
    os.environ["OMP_NUM_THREADS"] = "1"

    from distillabse.storage import write_json

    result = run(arguments.data, arguments.runs)
    write_json(RESULTS / "real_text.json", result)
    plot(result, RESULTS / "real_text.svg")


def run(data: Path, runs: Path) -> dict[str, Any]:
    """Run the recipe and pick what is worth keeping from its report."""
    from distillabse.pipeline import run_job
    from distillabse.settings import load_config
    from distillabse.storage import read_json

    folder = run_job(load_config(RECIPE, [f"output={runs}", *places(data)]))
    report, history = read_json(folder.report_json), read_json(folder.training_history)
    kept = ("teacher", "student", "size_bytes", "fidelity", "invariance", "latency", "config_hash", "environment")
    return {
        "command": f"python benchmarks/real_text.py --data {data}",
        **{key: report[key] for key in kept},
        "training": {key: value for key, value in history.items() if key != "log"},
        "dev_curve": [
            {"step": entry["step"], "cosine": entry["eval_cosine"], "skill": entry["eval_skill"]}
            for entry in history["log"]
            if "eval_cosine" in entry
        ],
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Left: held-out cosine while training. Right: the INT8 student on every set, beside the constant baseline."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "distillabse"
    from matplotlib import pyplot

    figure, (curve, bars) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    points, minutes = result["dev_curve"], result["training"]["training_seconds"] / 60
    curve.plot([point["step"] for point in points], [point["cosine"] for point in points], marker="o")
    curve.set(xlabel="step", ylabel="mean cosine, dev split", title=f"{minutes:.0f} minutes of training on one core")
    sets = result["fidelity"]["onnx-int8"]
    shown = bars.bar(range(len(sets)), [row["cosine_mean"] for row in sets.values()], 0.6)
    bars.bar_label(shown, fmt="%.3f")
    for position, row in enumerate(sets.values()):
        bars.hlines(row["constant_baseline"], position - 0.4, position + 0.4, colors="black", linestyles="dotted")
    bars.set_xticks(range(len(sets)), list(sets))
    bars.set(ylabel="mean cosine to the teacher", ylim=(0, 1.05), title="INT8 student (dotted: constant vector)")
    figure.savefig(path, metadata={"Date": None})


def places(data: Path) -> list[str]:
    """Overrides that say where the text is; the list of sources is replaced whole, as OmegaConf replaces lists."""
    from omegaconf import OmegaConf

    from distillabse.settings import shipped_configs

    sources = OmegaConf.to_container(OmegaConf.load(shipped_configs()[RECIPE]).corpus.sources)
    for source, path in zip(sources, ("mono_train/en.tsv.gz", "parallel_train/*.tsv.gz"), strict=True):
        source["path"] = f"{data}/{path}"
    return [
        f"corpus.sources={sources}",
        f"evaluation.sets.banking77.path={data}/eval/banking77.tsv.gz",
        f"evaluation.sets.tweets.path={data}/eval/tweeteval_emotion.tsv.gz",
    ]


if __name__ == "__main__":
    main()
