"""The measured tables of docs/scaling.md, from the results of three benchmarks.

    python benchmarks/scaling_tables.py

Text of any size: streaming_corpus.py. The teacher's cache: teacher_cache.py. Training beside peers:
training_throughput.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Print them."""
    print("\n\n".join([streaming_table(), cache_table(), throughput_table()]))


def streaming_table() -> str:
    """Memory and CPU time of corpora of several sizes."""
    rows = []
    for size in result("streaming_corpus")["rows"]:
        corpus, training = size["corpus"], size.get("training")
        row = [f"{size['millions']:g}", f"{corpus['peak_mb']:,.0f}", f"{corpus['cpu_seconds'] / size['millions']:.1f}"]
        if training:
            row += [f"{training['peak_mb']:,.0f}", f"{training['rows_per_second']['tokenising']:,}"]
            row += [f"{training['rows_per_second']['batches']:,}"]
        rows.append(row + [""] * (6 - len(row)))
    headings = [
        "million sentences", "building: peak MB", "CPU seconds a million", "tokenising and reading: peak MB",
        "tokenised a second", "read a second",
    ]  # fmt: skip
    return markdown(headings, rows)


def cache_table() -> str:
    """How much longer an epoch takes without the cache."""
    rows = []
    for name, measured in result("teacher_cache")["teachers"].items():
        low, high = measured["quartiles"]
        rows.append([name, f"{measured['times_as_long']:.2f}", f"{low:.2f} to {high:.2f}"])
    return markdown(["teacher of a 3 x 384 student, `cosine`", "times as long without the cache", "quartiles"], rows)


def throughput_table() -> str:
    """This project beside TextBrewer and sentence-transformers."""
    rows = []
    for group, measured in result("training_throughput")["groups"].items():
        for side, figures in measured["sides"].items():
            low, high = figures["ci95"]
            rows.append(
                [
                    group, str(measured["batch"]), measured["precision"], side,
                    f"{figures['sentences_per_second']:,.0f}",
                    "" if side == "distillabse" else f"{figures['distillabse_is_times_as_fast']:.2f} "
                    f"({low:.2f} to {high:.2f})",
                ]
            )  # fmt: skip
    return markdown(["objective", "batch", "precision", "side", "sentences/s", "distillabse: times as fast"], rows)


def result(name: str) -> dict[str, Any]:
    """A benchmark's result."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    """A table; all columns but the first are figures."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
