"""What helps before or around distillation on translation pairs: one question at a time, at equal steps.

    python benchmarks/pair_tricks.py --data data [--runs runs] [--steps 300] [--seeds 0 1 2] [--report]

The teacher, all-MiniLM-L6-v2, knows English alone; a student of 2 layers x 384 with a vocabulary of its own learns from
pairs with German, French, Dutch, Swedish and Spanish. Every arm has the same pairs and number of steps, and differs in
the start of the table, in the objectives, or in how batches are composed (pair_batches.py). A seed decides the
student's start, the order of pairs and the groups; arms of one seed share them.

Figures are of 1,000 held-out pairs cut from the training text, whose English occurs on neither side of training.
The weight of `contrastive` was chosen on them beforehand, by a seed and a third of the steps of its own (`pilot`).
Arms that are there already are not trained again. Writes benchmarks/results/pair_tricks.json and prints the
table of docs/pair-objectives.md; with `--report` of what is there so far.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
from pathlib import Path
from typing import Any

from pair_arms import BATCH, DEV, ROWS, STUDENT, TIMED_STEPS, Bench, arm_file

RESULTS = Path(__file__).parent / "results"
STEPS = 300
PILOT_SEED, WEIGHTS = 42, (0.05, 0.2)
START = "static start"
ARMS: dict[str, dict[str, Any]] = {
    "no static start": {"static": False},
    START: {},
    "static start, contrastive": {"contrastive": True},
    "static start, contrastive, hard negatives": {"contrastive": True, "batches": "neighbours"},
    "static start, short pairs first": {"batches": "short first"},
}
MEASURES = {
    "cosine": "cosine to the teacher",
    "retrieval": "top-1, own vectors",
    "teacher_retrieval": "top-1, teacher's vectors",
}


def main() -> None:
    """Prepare text, vocabulary and cache once, train what is missing, and write and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--report", action="store_true", help="train nothing, report what is there")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")

    folder, steps, seeds = arguments.runs / "pair-tricks", arguments.steps, arguments.seeds
    if not arguments.report:
        train(arguments.data, folder, steps, seeds)

    from distillabse.storage import write_json

    result = {
        "command": f"python benchmarks/pair_tricks.py --data {arguments.data} --steps {steps}",
        **assembled(folder, steps, seeds),
    }
    write_json(RESULTS / "pair_tricks.json", result)
    print(table(result), costs(result), sep="\n\n")


def train(data: Path, folder: Path, steps: int, seeds: list[int]) -> None:
    """Whatever is not there yet: the pilot, all arms seed by seed, and the teacher beside its cache."""
    import torch

    torch.set_num_threads(1)
    bench = Bench(data, folder)
    for weight in WEIGHTS:
        bench.trained(f"pilot {weight}", {"contrastive": weight}, PILOT_SEED, steps // 3)
    chosen, _ = pilot(folder, steps)
    for seed in seeds:
        for name, settings in ARMS.items():
            arm = {**settings, "contrastive": chosen if settings.get("contrastive") else 0.0}
            print(name, seed, bench.trained(name, arm, seed, steps), flush=True)
    bench.timed()


def pilot(folder: Path, steps: int) -> tuple[float, dict[float, Any]]:
    """The weight of `contrastive` that retrieves best among the teacher's vectors, and the figures of all weights."""
    from distillabse.storage import read_json

    tried = {
        weight: read_json(arm_file(folder, f"pilot {weight}", steps // 3, PILOT_SEED))["figures"] for weight in WEIGHTS
    }
    return max(WEIGHTS, key=lambda weight: tried[weight]["teacher_retrieval"]), tried


def assembled(folder: Path, steps: int, seeds: list[int]) -> dict[str, Any]:
    """The result of all that was trained so far."""
    from distillabse.environment import describe_environment
    from distillabse.storage import read_json

    arms: dict[str, list[dict[str, Any]]] = {}
    for name in ARMS:
        found = {seed: arm_file(folder, name, steps, seed) for seed in seeds}
        kept = {seed: read_json(path) for seed, path in found.items() if path.is_file()}
        if kept:
            arms[name] = [{"seed": seed, **arm["figures"]} for seed, arm in kept.items()]
            pairs = next(iter(kept.values()))["made_from"]["pairs"]
    chosen, tried = pilot(folder, steps)
    timed = folder / "timed.json"
    return {
        "pairs": pairs,
        "dev_pairs": DEV,
        "vocabulary": ROWS,
        "student": STUDENT,
        "batch_size": BATCH,
        "steps": steps,
        "pilot": {"seed": PILOT_SEED, "steps": steps // 3, "weights": {str(key): tried[key] for key in WEIGHTS}},
        "contrastive_weight": chosen,
        "arms": arms,
        "static_start_cpu_seconds": read_json(folder / f"start-{PILOT_SEED}.json"),
        "cache_cpu_seconds_to_fill": read_json(folder / "cache-seconds.json"),
        "cpu_seconds_of_steps": {"steps": TIMED_STEPS, **read_json(timed)} if timed.is_file() else None,
        "environment": describe_environment(),
    }


def table(result: dict[str, Any]) -> str:
    """Every arm: mean of the seeds and their range, and the CPU seconds of its steps."""
    from scaling_tables import markdown

    rows = []
    for name, seeds in result["arms"].items():
        figures = [spread([seed[measure] for seed in seeds]) for measure in MEASURES]
        rows.append(
            [name, *figures, f"{statistics.median(seed['cpu_seconds'] for seed in seeds):.0f}", str(len(seeds))]
        )
    return markdown(["arm", *MEASURES.values(), "CPU seconds", "seeds"], rows)


def spread(values: list[float]) -> str:
    """Mean, and of several the lowest and highest."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def costs(result: dict[str, Any]) -> str:
    """What cache and static start take, and what the cache saves if that was timed, in a sentence each."""
    start, step = result["static_start_cpu_seconds"], result["arms"][START][0]["cpu_seconds"] / result["steps"]
    said = (
        f"Filling the cache took {result['cache_cpu_seconds_to_fill']:.0f} CPU seconds, a static start {start:.0f}, as "
        f"much as {start / step:.0f} steps."
    )
    if (timed := result["cpu_seconds_of_steps"]) is None:
        return said
    ratios = [live / cached for cached, live in zip(timed["cached"], timed["live"], strict=True)]
    return (
        f"{said} With the teacher running, steps take {statistics.median(ratios):.2f} times as long as with its "
        f"vectors cached ({min(ratios):.2f} to {max(ratios):.2f})."
    )


if __name__ == "__main__":
    main()
