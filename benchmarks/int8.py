"""INT8 of every kind beside fp32 and plain dynamic INT8: what is kept of the vectors, size and speed, in one run.

    python benchmarks/int8.py STUDENT --data data [--quantized FOLDER] [--name NAME] [--keep FOLDER]

STUDENT is a folder, a name of the hub, or packaged:all-MiniLM-L6-v2. Kinds: those of `export.quantization.kind`, plain
dynamic INT8 of ONNX Runtime (one activation scale for the whole batch), INT8 without calibration, float16, and with
`--quantized` the static graph after quantisation-aware distillation, from a run's `quantized` folder.

Scales are calibrated on 1024 texts of mono_train and parallel_train. The cosine of every vector to that of the fp32
graph is taken on the texts of eval/: banking77, tweets, and Tatoeba in eight scripts. Re-batched: the least cosine of a
vector alone with the same in a mixed batch and padded. Speed: one process for each graph, one active at a time, in
alternating rounds, at batch 1 and 32, from text to vector. Writes benchmarks/results/int8.json, an entry for each
student.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from quantization_aware import judged_texts, training_text

RESULTS = Path(__file__).parent / "results"
CALIBRATION, SEED = 1024, 0
REBATCHED = 96
FP32, DYNAMIC = "fp32", "plain dynamic"
KINDS = ("per_token", "static", "block_weights")


def main() -> None:
    """Make the graphs, judge and time them, print a table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--quantized", type=Path, help="what quantisation-aware distillation of this student made")
    parser.add_argument("--name", help="of the student in the result; by default the folder's")
    parser.add_argument("--keep", type=Path, help="a folder for the graphs, which are thrown away otherwise")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    from distillabse.environment import describe_environment
    from distillabse.storage import read_json, write_json

    name = arguments.name or arguments.student.strip("/").split("/")[-1]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        graphs = make_graphs(arguments, folder)
        judged = judged_texts(arguments.data, SEED)
        if arguments.keep:
            shutil.copytree(folder, arguments.keep, dirs_exist_ok=True)
        rows = {kind: {"size_bytes": (folder / file).stat().st_size} for kind, file in graphs.items()}
        fidelity(folder, graphs, judged, rows)
        speed(folder, graphs, [text for texts in judged.values() for text in texts], arguments, rows)
    result = {
        "command": f"python benchmarks/int8.py {arguments.student} --data {arguments.data} --rounds {arguments.rounds}"
        f" --threads {arguments.threads}" + (f" --quantized {arguments.quantized}" if arguments.quantized else ""),
        "rows": rows,
        "environment": describe_environment(),
    }
    path = RESULTS / "int8.json"
    write_json(path, {**(read_json(path) if path.is_file() else {}), name: result})
    show(name, rows)


def make_graphs(arguments: argparse.Namespace, folder: Path) -> dict[str, str]:
    """Write one bundle with a graph of every kind; their paths in the folder by kind."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from distillabse import layout
    from distillabse.config import ExportConfig, QuantizationConfig
    from distillabse.export.bundle import write_bundle
    from distillabse.export.float16 import to_float16
    from distillabse.export.quantize import quantize, quantize_weights
    from distillabse.models.teacher import load_encoder, resolve_model
    from distillabse.quantization import calibrate

    encoder = load_encoder(resolve_model(arguments.student)).eval()
    write_bundle(encoder, folder, ExportConfig(quantization=QuantizationConfig(kind="none")), {})
    fp32 = folder / layout.ONNX_FP32
    graphs = {FP32: layout.ONNX_FP32, DYNAMIC: "onnx/dynamic.onnx"}
    quantize_dynamic(
        fp32, folder / graphs[DYNAMIC], per_channel=True, weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Gather"], extra_options={"MatMulConstBOnly": True},
    )  # fmt: skip
    graphs["per_token, not calibrated"] = "onnx/plain.onnx"
    quantize(fp32, folder / graphs["per_token, not calibrated"])
    texts = training_text(arguments.data, SEED)[:CALIBRATION]
    for kind in KINDS:
        print(f"making {kind}", flush=True)
        graphs[kind] = f"onnx/{kind}.onnx"
        if kind == "block_weights":
            quantize_weights(fp32, folder / graphs[kind])
        else:
            quantize(fp32, folder / graphs[kind], calibrate(encoder, texts, static=kind == "static"))
    if arguments.quantized:
        graphs["static, trained"] = "onnx/trained.onnx"
        trained_graph(arguments.quantized, folder / graphs["static, trained"])
    graphs["float16"] = "onnx/float16.onnx"
    to_float16(fp32, folder / graphs["float16"])
    return graphs


def trained_graph(source: Path, target: Path) -> None:
    """The static graph of what quantisation-aware distillation made."""
    from distillabse.export.graph import export_graph
    from distillabse.export.quantize import quantize
    from distillabse.training.quantization_aware import load_quantized_encoder

    encoder, linears = load_quantized_encoder(source)
    fp32 = target.with_name("trained_fp32.onnx")
    export_graph(encoder, fp32)
    quantize(fp32, target, linears)
    fp32.unlink()


def fidelity(folder: Path, graphs: dict[str, str], judged: dict[str, list[str]], rows: dict[str, Any]) -> None:
    """Cosines of all graphs to fp32, by set and over all, and to themselves in another batch."""
    from distillabse.encoder import Encoder
    from distillabse.evaluation.fidelity import row_cosines

    reference = Encoder(folder, file=graphs[FP32])
    wanted = {key: reference.encode(texts) for key, texts in judged.items()}
    mixed = [texts[index] for index in range(REBATCHED // len(judged)) for texts in judged.values()]
    for kind, file in graphs.items():
        print(f"judging {kind}", flush=True)
        encoder = Encoder(folder, file=file)
        cosines = {key: row_cosines(encoder.encode(texts), wanted[key]) for key, texts in judged.items()}
        cosines["all"] = np.concatenate(list(cosines.values()))
        alone = np.concatenate([encoder.run(encoder.tokenize([text])) for text in mixed])
        others = [encoder.run(encoder.tokenize(mixed))]
        others.append(np.concatenate([encoder.run(encoder.tokenize([text], pad_to=128)) for text in mixed]))
        rows[kind]["cosine_to_fp32"] = {
            key: {"mean": float(found.mean()), "p01": float(np.percentile(found, 1)), "min": float(found.min())}
            for key, found in cosines.items()
        }
        rows[kind]["rebatched_min"] = min(float(row_cosines(alone, other).min()) for other in others)


def speed(
    folder: Path, graphs: dict[str, str], texts: list[str], arguments: argparse.Namespace, rows: dict[str, Any]
) -> None:
    """Milliseconds at batch 1 and 32, and how many times as fast as fp32 and as plain dynamic INT8."""
    from distillabse.config import BenchConfig
    from distillabse.evaluation.latency import measure
    from distillabse.evaluation.workers import Engine

    engines = [Engine(kind, "onnx", folder, file) for kind, file in graphs.items()]
    config = BenchConfig(batch_sizes=[1, 32], rounds=arguments.rounds, threads=arguments.threads, interval=None)
    measured = measure(engines, texts, config, SEED, baselines=(FP32, DYNAMIC))
    for kind, found in measured["latency"].items():
        rows[kind]["latency"] = found
    rows[FP32]["cores_used_by_others"] = measured["cores_used_by_others"]


def show(name: str, rows: dict[str, Any]) -> None:
    """The table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("kind", "size", "cosine, mean", "1 %", "re-batched", "batch 1, ms", "x fp32", "x dynamic",
                  "batch 32, ms", "x fp32", "x dynamic", title=name)  # fmt: skip
    for kind, row in rows.items():
        overall = row["cosine_to_fp32"]["all"]
        cells = [f"{row['size_bytes'] / rows[FP32]['size_bytes']:.1%}", f"{overall['mean']:.5f}"]
        cells += [f"{overall['p01']:.5f}", f"{row['rebatched_min']:.7f}"]
        for timed in row["latency"]:
            cells.append(f"{timed['p50_ms']:.2f}")
            cells += [f"{timed[f'speedup_vs_{other}']:.2f}" for other in ("fp32", "plain dynamic")]
        table.add_row(kind, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
