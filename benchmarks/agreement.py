"""Does a second run of the comparison say the same: does every ratio lie in the range that the first run states?

python benchmarks/comparison.py measure                                        # the first run
python benchmarks/comparison.py measure --output runs/comparison-again.json
python benchmarks/agreement.py benchmarks/results/comparison.json runs/comparison-again.json
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
RANGE = "_range95"
ENOUGH = 0.95


def main() -> None:
    """Compare, write, and end with status 1 where fewer than 95 % of the cells agree."""
    from distillabse.storage import read_json, write_json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--output", type=Path, default=RESULTS / "agreement.json")
    arguments = parser.parse_args()
    first, second = read_json(arguments.first), read_json(arguments.second)
    found = agreement(first, second)
    command = f"python benchmarks/agreement.py {arguments.first} {arguments.second}"
    write_json(arguments.output, {**found, "command": command, "environment": first["environment"]})
    print(f"{found['agree']} of {found['cells']} ratios agree ({found['share']:.1%}); widths {found['half_widths']}")
    for cell in found["outside"]:
        print(f"  {cell['cell']}: {cell['second']:.2f}, first run {cell['first']:.2f} ({cell['range'][0]:.2f} to "
              f"{cell['range'][1]:.2f})")  # fmt: skip
    raise SystemExit(found["share"] < ENOUGH)


def agreement(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """How many ratios of the second run lie in the first run's ranges, which do not, and how wide the ranges are.

    A teacher's ratio to itself is no cell.
    """
    import numpy as np

    again = dict(cells(second))
    found = {name: cell for name, cell in cells(first) if name in again}
    outside = [
        {"cell": name, "first": ratio, "range": [low, high], "second": again[name][0]}
        for name, (ratio, low, high) in found.items()
        if not low <= again[name][0] <= high
    ]
    widths = [(high - low) / (2 * ratio) for ratio, low, high in found.values()]
    return {
        "cells": len(found),
        "agree": len(found) - len(outside),
        "share": (len(found) - len(outside)) / max(len(found), 1),
        "half_widths": {key: float(np.percentile(widths, at)) for key, at in (("p50", 50), ("p90", 90))},
        "outside": outside,
    }


def cells(result: Mapping[str, Any]) -> Iterator[tuple[str, tuple[float, float, float]]]:
    """Every ratio of a result, with its range: "table / engine / batch / ratio"."""
    for table in ("minilm", "labse"):
        if table not in result:
            continue
        latency = dict(result[table]["teacher"]["latency"])
        latency |= {name: student["latency"] for name, student in result[table]["students"].items()}
        for name, rows in latency.items():
            for row in rows:
                for key in [key.removesuffix(RANGE) for key in row if key.endswith(RANGE)]:
                    if key.removeprefix("speedup_vs_").replace("_", "-") != name:
                        low, high = row[key + RANGE]
                        yield f"{table} / {name} / batch {row['batch']} / {key}", (row[key], low, high)


if __name__ == "__main__":
    main()
