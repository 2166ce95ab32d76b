"""Which graph and session settings are fastest on this CPU, and what INT8 costs beside plain dynamic INT8.

Fused attention: scores, mask, softmax and averages of each layer as one MultiHeadAttention of ONNX Runtime.

    python benchmarks/session_settings.py runs/quickstart/bundle [--rounds 60]

All variants alternate in one process with one thread each, so no thread pool of one spins while another works.
Writes benchmarks/results/session_settings.json.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
BATCHES = ((1, 12), (32, 12), (32, 32))
BASELINE = "fp32"
NO_FUSION = {"": "", " without SkipLayerNormFusion": "SkipLayerNormFusion"}


def main() -> None:
    """Measure, print a table, write the result."""
    from rich.console import Console
    from rich.table import Table

    from distillabse import layout
    from distillabse.environment import describe_environment
    from distillabse.storage import read_json, write_json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        graphs = {
            "fp32": arguments.bundle / layout.ONNX_FP32,
            "int8": arguments.bundle / str(layout.int8_graph(arguments.bundle)),
            "int8 plain dynamic": plain_dynamic(arguments.bundle / layout.ONNX_FP32, Path(folder)),
        }
        heads = read_json(arguments.bundle / layout.MODEL_SETTINGS)["num_attention_heads"]
        for name in ("fp32", "int8"):
            target = Path(folder) / f"{name}_fused.onnx"
            graphs[f"{name}, fused attention"] = fused_attention(graphs[name], target, heads)
        rows = measure(graphs, arguments.rounds)
    write_json(
        RESULTS / "session_settings.json",
        {
            "command": f"python benchmarks/session_settings.py BUNDLE --rounds {arguments.rounds}",
            "threads": 1,
            "baseline": BASELINE,
            "rows": rows,
            "environment": describe_environment(),
        },
    )
    table = Table("variant", "batch", "tokens", "p50 ms", "times fp32", "95 % interval")
    for row in rows:
        low, high = row["speedup_ci95"]
        table.add_row(
            row["variant"], str(row["batch"]), str(row["tokens"]), f"{row['p50_ms']:.2f}", f"{row['speedup']:.2f}",
            f"{low:.2f} to {high:.2f}",
        )  # fmt: skip
    Console().print(table)


def plain_dynamic(graph: Path, folder: Path) -> Path:
    """ONNX Runtime's own dynamic INT8 of the same products: one activation scale for the whole batch."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = folder / "dynamic.onnx"
    quantize_dynamic(
        graph, target, per_channel=True, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"],
        extra_options={"MatMulConstBOnly": True},
    )  # fmt: skip
    return target


def fused_attention(source: Path, target: Path, heads: int) -> Path:
    """The same graph with one MultiHeadAttention in each layer."""
    import onnx
    from onnx import TensorProto

    from distillabse.export.editing import MICROSOFT, GraphEditor

    edit = GraphEditor(onnx.load(str(source)))
    dropped: set[str] = set()
    fused: dict[str, tuple[list[str], str]] = {}
    for softmax in (node for node in edit.graph.node if node.op_type == "Softmax"):
        masked = edit.made_by[softmax.input[0]]
        scaled = edit.made_by[masked.input[0]]
        scores = edit.made_by[scaled.input[0]]
        (averages,) = edit.read_by[softmax.output[0]]
        (turned,) = edit.read_by[averages.output[0]]
        (joined,) = edit.read_by[turned.output[0]]
        turns = [edit.made_by[name] for name in (*scores.input, averages.input[1])]
        parts = [edit.made_by[turn.input[0]] for turn in turns]
        fused[joined.output[0]] = [part.input[0] for part in parts], joined.input[1]
        between = (softmax, masked, scaled, scores, averages, turned, joined, *turns, *parts)
        dropped |= {node.output[0] for node in between}
    edit.add("Cast", ["attention_mask"], "mask", to=TensorProto.INT32)
    edit.add("Concat", [edit.add("Shape", ["input_ids"]), edit.integers("rest", [-1])], "heads_together", axis=0)
    for node in edit.graph.node:
        if node.output[0] in fused:
            inputs, shape = fused[node.output[0]]
            whole = [edit.add("Reshape", [name, "heads_together"]) for name in inputs]
            attention = edit.add("MultiHeadAttention", [*whole, "", "mask"], domain=MICROSOFT, num_heads=heads)
            edit.add("Reshape", [attention, shape], node.output[0])
        elif node.output[0] not in dropped:
            edit.keep(node, {})
    edit.finish()
    onnx.save(edit.model, str(target))
    return target


def measure(graphs: dict[str, Path], rounds: int) -> list[dict[str, Any]]:
    """Median milliseconds and speed-up over the fp32 graph with default settings, for every variant and shape."""
    from distillabse.evaluation.rounds import paired_speedup

    sessions = {
        f"{name}{suffix}": load(path, off) for name, path in graphs.items() for suffix, off in NO_FUSION.items()
    }
    random = np.random.default_rng(0)
    rows = []
    for batch, tokens in BATCHES:
        ids = random.integers(1000, 20000, size=(batch, tokens))
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        repeats = max(1, 60 // batch)
        medians: dict[str, list[float]] = {name: [] for name in sessions}
        for number in range(rounds + 1):
            names = list(sessions)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                seconds = [once(sessions[name], feed) for _ in range(repeats)]
                if number:  # the first round warms up
                    medians[name].append(float(np.median(seconds)))
        for name, values in medians.items():
            speedup, interval = paired_speedup([[v] for v in medians[BASELINE]], [[v] for v in values], seed=0)
            rows.append(
                {"variant": name, "batch": batch, "tokens": tokens, "rounds": rounds,
                 "p50_ms": 1000 * float(np.median(values)), "speedup": speedup, "speedup_ci95": interval}
            )  # fmt: skip
    return rows


def load(path: Path, disabled: str) -> Any:
    """A session with one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if disabled:
        options.add_session_config_entry("optimization.disable_specified_optimizers", disabled)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def once(session: Any, feed: dict[str, Any]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    session.run(["sentence_embedding"], feed)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
