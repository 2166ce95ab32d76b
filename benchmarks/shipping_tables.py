"""The measured tables of docs/int8.md, docs/encoder.md and docs/shipping.md, from the results of the benchmarks.

python benchmarks/shipping_tables.py            # prints them
python benchmarks/shipping_tables.py --write    # and puts them into the documents, between their markers
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scaling_tables import RESULTS, markdown, result

DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    """Print the tables that have results; with --write, put them into the documents."""
    print(readme_sentence())
    for (document, marker), table in TABLES.items():
        if not (RESULTS / f"{SOURCES[table]}.json").is_file():
            continue
        print(f"docs/{document}: {marker}\n\n{table()}\n")
        if "--write" in sys.argv:
            path = DOCS / document
            path.write_text(with_table(path.read_text(encoding="utf-8"), marker, table()), encoding="utf-8")


def with_table(text: str, marker: str, table: str) -> str:
    """A document with another table between `<!-- marker -->` and `<!-- end of marker -->`."""
    pattern = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- end of {marker} -->)", flags=re.DOTALL)
    return pattern.sub(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", text)


def kinds_table() -> str:
    """Size, fidelity and speed of every kind, student by student."""
    rows = []
    for student, measured in result("int8").items():
        kinds = measured["rows"]
        for kind, row in kinds.items():
            cosine = row["cosine_to_fp32"]["all"]
            cells = [student, kind, f"{row['size_bytes'] / kinds['fp32']['size_bytes']:.1%}"]
            cells += [f"{cosine['mean']:.4f}", f"{cosine['p01']:.4f}", f"{row['rebatched_min']:.6f}"]
            for timed in row["latency"]:
                cells.append(f"{timed['p50_ms']:.2f}")
                for other in ("fp32", "plain dynamic"):
                    low, high = timed[f"speedup_vs_{other}_ci95"]
                    ratio = timed[f"speedup_vs_{other}"]
                    cells.append("1" if kind == other else f"{ratio:.2f} ({low:.2f} to {high:.2f})")
            rows.append(cells)
    headings = ["student", "kind", "size", "cosine to fp32", "1st percentile", "least, re-batched"]
    for batch in (1, 32):
        headings += [f"batch {batch}, ms", "times fp32", "times dynamic"]
    return markdown(headings, rows)


def training_table() -> str:
    """What quantisation-aware distillation brings, over seeds."""
    rows = []
    for student, measured in result("quantization_aware").items():
        for name, found in measured["sets"].items():
            before, after, above = found["post_training"], found["quantization_aware"], found["above_mean"]
            rows.append(
                [student, name, str(len(measured["seeds"])), f"{before['mean']:.5f}", f"{before['p01']:.5f}",
                 f"{after['mean']:.5f}", f"{after['p01']:.5f}",
                 f"{above['mean']:+.5f}" + (f" ± {above['half_ci95']:.5f}" if above["half_ci95"] else "")]
            )  # fmt: skip
    return markdown(
        ["student", "texts", "seeds", "calibrated: mean", "1st percentile", "trained: mean", "1st percentile",
         "difference of means (95 %)"], rows,
    )  # fmt: skip


def consumers_table() -> str:
    """Which consumer gives which cosine to the reference."""
    rows = [
        [row["consumer"], row["flavor"] or "bundle", row["kind"], f"{row['alone_min']:.6f}",
         f"{row['batched_min']:.6f}", f"{row['to_torch_mean']:.6f}"]
        for row in result("consumers")["rows"]
    ]  # fmt: skip
    return markdown(["consumer", "reads", "graph", "least cosine, alone", "in batches", "mean cosine to torch"], rows)


def throughput_table() -> str:
    """From texts to vectors beside other programs."""
    measured = result("encode_throughput")
    rows = []
    for graph, engines in measured["graphs"].items():
        for engine, row in engines.items():
            low, high = row["ours_is_faster_by_ci95"]
            ratio = "" if engine == "distillabse" else f"{row['ours_is_faster_by']:.2f} ({low:.2f} to {high:.2f})"
            rows.append([graph, engine, f"{row['texts_per_second']:,.0f}", ratio])
    return markdown(["graph", "program", "texts a second", "distillabse is times as fast"], rows)


def engines_table() -> str:
    """INT8 of a bundle beside that of other programs."""
    measured = result("engines")
    rows = []
    for engine, timed in measured["latency"].items():
        cosine = measured["cosine_to_fp32"][engine]
        cells = [engine, f"{cosine['mean']:.5f}", f"{cosine['p01']:.5f}", f"{cosine['alone_to_batch_min']:.5f}"]
        for row in timed:
            low, high = row["speedup_vs_nncf_openvino_int8_ci95"]
            ratio = f"{row['speedup_vs_nncf_openvino_int8']:.2f} ({low:.2f} to {high:.2f})"
            cells += [f"{row['p50_ms']:.2f}", "1" if engine.startswith("nncf") else ratio]
        rows.append(cells)
    headings = ["engine", "cosine to fp32", "1st percentile", "least, alone and in a batch"]
    return markdown([*headings, "batch 1, ms", "times NNCF", "batch 32, ms", "times NNCF"], rows)


def readme_sentence() -> str:
    """What README.md says of INT8 and of the encoder."""
    kinds = result("int8")["all-MiniLM-L6-v2"]["rows"]
    int8, throughput = kinds["per_token"], result("encode_throughput")["graphs"]
    cosine, size = int8["cosine_to_fp32"]["all"], int8["size_bytes"] / kinds["fp32"]["size_bytes"]
    speed = [row["speedup_vs_fp32"] for row in int8["latency"]]
    fastembed, others = (
        [f"{engines[name]['ours_is_faster_by']:.1f}" for engines in throughput.values()]
        for name in ("fastembed", "sentence-transformers")
    )
    return (
        f"all-MiniLM-L6-v2 as INT8 has a mean cosine of {cosine['mean']:.4f} to fp32 (1st percentile "
        f"{cosine['p01']:.4f}), {size:.0%} of its size and {speed[0]:.1f} and {speed[1]:.1f} times its speed at batch "
        f"1 and 32. From 20,000 sentences to vectors the encoder is {fastembed[0]} (fp32) and {fastembed[1]} (INT8) "
        f"times as fast as fastembed, and {others[0]} and {others[1]} times as sentence-transformers, on the same ONNX "
        "files."
    )


TABLES: dict[tuple[str, str], Callable[[], str]] = {
    ("int8.md", "kinds"): kinds_table,
    ("int8.md", "training"): training_table,
    ("int8.md", "engines"): engines_table,
    ("encoder.md", "throughput"): throughput_table,
    ("shipping.md", "consumers"): consumers_table,
}
SOURCES: dict[Any, str] = {
    kinds_table: "int8", training_table: "quantization_aware", engines_table: "engines",
    throughput_table: "encode_throughput", consumers_table: "consumers",
}  # fmt: skip


if __name__ == "__main__":
    main()
