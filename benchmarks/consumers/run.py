"""Does every consumer read the bundle, and give its vectors? Each runs in an environment of its own.

    python benchmarks/consumers/run.py BUNDLE [--only NAME] [--data data]

The fp32 graph must give the vectors of the torch encoder, INT8 those of our own INT8: text by text, and in batches. In
WebAssembly the float kernels are others; there INT8 must be as close to torch as our own INT8 is.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from distillabse.errors import DistillabseError

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

RESULT = HERE.parent / "results" / "consumers.json"
LEAST = {"fp32": 0.99999, "fp16": 0.9999, "int8": 0.9999}
# How much farther from torch than our own INT8 the INT8 of another build may be, in mean cosine.
OTHER_KERNELS = 0.0005
LANGUAGES = ("rus", "ara", "hin", "jpn", "kor", "tha", "ell", "cmn", "heb", "kat", "deu", "vie")
ODD_TEXTS = ("", "😀 👩\u200d👩\u200d👧 🇫🇷", "word " * 700, "日本語" * 300, "tab\tand\nline", "ÉCOLE naïve Straße")


@dataclass(frozen=True)
class Consumer:
    """One program that loads the bundle.

    Attributes:
        name: as the table calls it.
        environment: name of a list in benchmarks/environments, "node", "browser", or None for this interpreter.
        script: in python/ or node/.
        flavor: the flavor that it reads; None is the bundle itself.
        kinds: fp32, fp16, int8.
        other_kernels: whether its float arithmetic is that of another build of ONNX Runtime.
    """

    name: str
    environment: str | None
    script: str
    flavor: str | None = None
    kinds: tuple[str, ...] = ("fp32", "int8")
    other_kernels: bool = False


CONSUMERS = (
    Consumer("sentence-transformers", None, "st_torch.py", kinds=("fp32",)),
    Consumer("sentence-transformers 5", "optimum", "st_torch.py", kinds=("fp32",)),
    Consumer("sentence-transformers onnx", "optimum", "st_onnx.py", "optimum"),
    Consumer("optimum", "optimum", "optimum_ort.py", "optimum"),
    Consumer("fastembed", "fastembed", "fastembed_custom.py"),
    Consumer("onnxruntime", "fastembed", "bare_onnxruntime.py"),
    Consumer("onnxruntime, single file", "single-file", "text_graph.py", "single-file"),
    Consumer("onnxruntime-node", "node", "onnxruntime_node.mjs"),
    Consumer("transformers.js, node", "node", "transformers_js.mjs", "transformers-js", ("fp32", "fp16", "int8")),
    Consumer("onnxruntime-web, Chromium", "browser", "", other_kernels=True),
)


def main() -> None:
    """Run the consumers and print and write what they gave."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--only", action="append", help="a consumer's name; may be given again; the result keeps what it has of others"
    )
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--result", type=Path, default=RESULT)
    arguments = parser.parse_args()
    chosen = [consumer for consumer in CONSUMERS if not arguments.only or consumer.name in arguments.only]
    if not chosen:
        parser.error(f"--only: choose from {', '.join(consumer.name for consumer in CONSUMERS)}")
    from distillabse.environment import describe_environment
    from distillabse.storage import read_json, write_json

    texts = read_texts(arguments.data)
    names = {consumer.name for consumer in chosen}
    earlier = read_json(arguments.result)["rows"] if arguments.only and arguments.result.is_file() else []
    others = [row for row in earlier if row["consumer"] not in names]
    with tempfile.TemporaryDirectory() as folder:
        work = Work(arguments.bundle.resolve(), Path(folder), texts)
        rows: list[dict[str, Any]] = []
        for consumer in chosen:
            rows += work.run(consumer)
            every = in_order([*others, *rows])
            write_json(arguments.result, {"texts": len(texts), "rows": every, "environment": describe_environment()})
    console = Console()
    console.print(results_table(rows, len(texts)))
    console.print(f"Written to {arguments.result}")
    sys.exit(0 if all(row.get("passed") for row in rows) else 1)


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows in the order of the consumers."""
    names = [consumer.name for consumer in CONSUMERS]
    return sorted(rows, key=lambda row: names.index(row["consumer"]))


def read_texts(data: Path) -> list[str]:
    """A few hundred real texts in many scripts, and some odd ones."""
    tatoeba = _rows(data / "eval" / "tatoeba_test.tsv.gz")
    texts = [row["src"] for language in LANGUAGES for row in [r for r in tatoeba if r["lang"] == language][:12]]
    texts += [row["eng"] for row in tatoeba[:12]]
    texts += [row["text"] for row in _rows(data / "eval" / "tweeteval_emotion.tsv.gz")[:30]]
    texts += [row["text"] for row in _rows(data / "eval" / "banking77.tsv.gz")[::600]]
    return [*texts, *ODD_TEXTS]


def _rows(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


class Work:
    """The references, and the folders and environments that consumers run in."""

    def __init__(self, bundle: Path, folder: Path, texts: Sequence[str]) -> None:
        from distillabse import layout
        from distillabse.encoder import Encoder
        from distillabse.export.pooled import pooling_is_enough
        from distillabse.models.teacher import load_encoder

        self.bundle, self.folder, self.texts = bundle, folder, list(texts)
        self.pooled = not pooling_is_enough(bundle)
        self.graphs = {"fp32": layout.ONNX_FP32, "int8": layout.int8_graph(bundle)}
        encoder = load_encoder(str(bundle))
        torch = np.stack([encoder.encode([text], show_progress_bar=False)[0] for text in texts])
        self.references = {"fp32": torch, "fp16": torch}
        if self.graphs["int8"] is not None:
            ours = Encoder(bundle, file=self.graphs["int8"])
            self.references["int8"] = np.concatenate([ours.encode([text]) for text in texts])
        pooling = json.loads((bundle / "1_Pooling" / "config.json").read_text())
        self.pooling = "mean" if pooling["pooling_mode_mean_tokens"] else "cls"

    def run(self, consumer: Consumer) -> list[dict[str, Any]]:
        """A row for every kind of graph."""
        return [self._row(consumer, kind) for kind in consumer.kinds if kind in self.references]

    def _row(self, consumer: Consumer, kind: str) -> dict[str, Any]:
        print(f"{consumer.name}, {kind}", file=sys.stderr, flush=True)
        row: dict[str, Any] = {"consumer": consumer.name, "flavor": consumer.flavor, "kind": kind}
        started = time.perf_counter()
        try:
            vectors, versions = self._vectors(consumer, kind)
        except (DistillabseError, subprocess.CalledProcessError, OSError, RuntimeError, ValueError) as error:
            return {**row, "passed": False, "error": str(error)[-500:]}
        cosines = {name: _cosines(found, self.references[kind]) for name, found in vectors.items()}
        measured = {f"{name}_{statistic}": float(getattr(values, statistic)())
                    for name, values in cosines.items() for statistic in ("min", "mean")}  # fmt: skip
        to_torch = float(_cosines(vectors["alone"], self.references["fp32"]).mean())
        passed = min(measured["alone_min"], measured["batched_min"]) >= LEAST[kind]
        if consumer.other_kernels and kind == "int8":
            ours = float(_cosines(self.references["int8"], self.references["fp32"]).mean())
            passed = to_torch >= ours - OTHER_KERNELS
        seconds = round(time.perf_counter() - started, 1)
        return {**row, **measured, "to_torch_mean": to_torch, "passed": passed, "versions": versions,
                "seconds": seconds}  # fmt: skip

    def _vectors(self, consumer: Consumer, kind: str) -> tuple[dict[str, Any], dict[str, str]]:
        if consumer.environment == "browser":
            return self._browser(kind)
        output = Path(tempfile.mkdtemp(dir=self.folder))
        job = output / "job.json"
        job.write_text(json.dumps({**self._source(consumer, kind), "texts": self.texts, "output": str(output)}))
        # Nothing of this interpreter's packages may be seen from another environment.
        seen = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" or not consumer.environment}
        command = [*self._command(consumer), str(job)]
        subprocess.run(command, check=True, stdout=sys.stderr, cwd=output, env={**seen, "HF_HUB_OFFLINE": "1"})
        vectors = {name: np.fromfile(output / f"{name}.f32", dtype=np.float32).reshape(len(self.texts), -1)
                   for name in ("alone", "batched")}  # fmt: skip
        return vectors, json.loads((output / "versions.json").read_text())

    def _source(self, consumer: Consumer, kind: str) -> dict[str, Any]:
        """The folder, the graph, and how it is pooled."""
        from distillabse import layout
        from distillabse.export.flavors import make_flavor

        folder, file = self.bundle, self.graphs.get(kind)
        pooling = self.pooling
        if consumer.flavor is not None:
            folder = self.folder / consumer.flavor
            file = layout.ONNX_QUANTIZED if kind == "int8" else layout.ONNX_FP32
            if not folder.is_dir():
                make_flavor(self.bundle, consumer.flavor, folder, self.texts)
        elif consumer.name == "fastembed" and self.pooled:
            file, pooling = layout.pooled_graph(str(file)), "none"
        dtype = {"int8": "q8"}.get(kind, kind)
        dimension = self.references["fp32"].shape[1]
        return {"folder": str(folder), "file": file, "pooling": pooling, "dimension": dimension, "dtype": dtype}

    def _command(self, consumer: Consumer) -> list[str]:
        from environments import interpreter

        if consumer.environment == "node":
            return ["node", str(node_folder() / consumer.script)]
        python = sys.executable if consumer.environment is None else interpreter(consumer.environment)
        return [str(python), str((HERE / "python" / consumer.script).resolve())]

    def _browser(self, kind: str) -> tuple[dict[str, Any], dict[str, str]]:
        from chromium import browser_page, find_chromium

        from distillabse.demo.assets import PACKAGES, fetch
        from distillabse.demo.server import demo_server

        program = find_chromium()
        if program is None:
            raise ValueError("Chromium is not installed")
        with demo_server(self.bundle, 0, assets=fetch(), file=self.graphs[kind]) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            with browser_page(program) as page:
                page.open(f"http://127.0.0.1:{server.server_port}/")
                page.wait_for("self.encoder !== undefined", 120)
                browser = page.call("Browser.getVersion")["product"]
                texts = json.dumps(self.texts)
                encoded = "(async () => (await self.encoder.encode({}, {})).map((row) => [...row]))()"
                vectors = {name: np.array(page.evaluate(encoded.format(texts, size)), dtype=np.float32)
                           for name, size in (("alone", 1), ("batched", 32))}  # fmt: skip
            server.shutdown()
        return vectors, {"browser": browser, **{package.name: package.version for package in PACKAGES}}


def node_folder() -> Path:
    """The folder with what node/package-lock.json lists, which is installed first where it is not there."""
    from environments import FOLDER

    from distillabse.storage import sha256_of_file

    folder = (FOLDER / "node").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    made_from, digest = folder / "made-from.txt", sha256_of_file(HERE / "node" / "package-lock.json")
    for source in (*(HERE / "node").iterdir(), HERE.parents[1] / "distillabse" / "demo" / "page" / "encoder.mjs"):
        shutil.copy(source, folder)
    if not made_from.is_file() or made_from.read_text() != digest:
        # Their install scripts fetch CUDA, which is not needed here.
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        subprocess.run(command, check=True, stdout=sys.stderr, cwd=folder)
        made_from.write_text(digest)
    return folder


def results_table(rows: Sequence[dict[str, Any]], texts: int) -> Table:
    """What every consumer gave."""
    table = Table(title=f"Cosine to the reference vectors of {texts} texts: torch for fp32, our INT8 for INT8")
    for name in ("consumer", "flavor", "graph"):
        table.add_column(name)
    for name in ("least, alone", "least, batched", "mean", "mean to torch", "passed"):
        table.add_column(name, justify="right")
    for row in rows:
        figures = (row.get(key) for key in ("alone_min", "batched_min", "alone_mean", "to_torch_mean"))
        table.add_row(
            row["consumer"], row["flavor"] or "", row["kind"],
            *("-" if value is None else f"{value:.6f}" for value in figures), "yes" if row["passed"] else "NO",
        )  # fmt: skip
    return table


def _cosines(a: Any, b: Any) -> Any:
    a, b = (np.asarray(rows, dtype=np.float64) for rows in (a, b))
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


if __name__ == "__main__":
    main()
