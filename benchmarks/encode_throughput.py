"""How fast does `Encoder.encode` turn texts into vectors beside fastembed and sentence-transformers on the same graph?

    python benchmarks/encode_throughput.py runs/quickstart/bundle --data data [--rounds 8] [--threads 2]

20,000 real sentences, drawn with a fixed seed, are cut into as many slices as there are rounds. Every engine has a
process of its own with as many threads as the others. In a round, one after the other encodes the same slice, in an
order that rotates; ratios compare engines within a round. All vectors are compared before anything is timed.
fastembed and sentence-transformers get environments of their own (`environments/*.txt`), made at first use in
`runs/environments`.

Also measured: the seconds from starting Python to the first vector.

Writes benchmarks/results/encode_throughput.json, unless the run is smaller than the default.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from environments import interpreter

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SEED = 0
TEXTS = 20_000
ROUNDS = 8
COMPARED = 256
SAME = 0.9999
COLD_STARTS = 10
COLD_SECONDS = 1.5
OURS = "distillabse"
TARGETS = {"fastembed": 1.3, "sentence-transformers": 1.5}
ENVIRONMENTS = {
    "fastembed": "fastembed",
    "fastembed, batches of 32": "fastembed",
    "fastembed, processes": "fastembed",
    "sentence-transformers": "optimum",
}
DEFAULT_ENGINES = (OURS, "fastembed", "fastembed, batches of 32", "sentence-transformers", "plain loop")
OPTIONAL_ENGINES = ("fastembed, processes", "distillabse, OpenVINO")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")


def main() -> None:
    """Measure, print tables, write the result of a full run."""
    from distillabse import layout
    from distillabse.environment import describe_environment
    from distillabse.storage import write_json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--languages", nargs="+", default=["en"], help="those that the bundle knows")
    parser.add_argument("--texts", type=int, default=TEXTS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--engines", nargs="+", default=DEFAULT_ENGINES, choices=DEFAULT_ENGINES + OPTIONAL_ENGINES)
    arguments = parser.parse_args()

    texts = draw(arguments.data, arguments.languages, arguments.texts)
    files = [layout.ONNX_FP32, *(name for name in layout.ONNX_INT8.values() if (arguments.bundle / name).is_file())]
    graphs = {}
    for file in files:
        print(f"{file} ...", flush=True)
        graphs[file] = measure(
            list(arguments.engines), arguments.bundle.resolve(), file, texts, arguments.rounds, arguments.threads
        )
        show(file, graphs[file])
    cold = cold_start(arguments.bundle)
    print(f"From starting Python to the first vector: {cold['median_seconds']:.2f} s (target {COLD_SECONDS} s)")
    if arguments.texts < TEXTS or arguments.rounds < ROUNDS or set(DEFAULT_ENGINES) - set(arguments.engines):
        print("A smaller run: nothing is written.")
        return
    write_json(
        RESULTS / "encode_throughput.json",
        {
            "command": f"python benchmarks/encode_throughput.py BUNDLE {' '.join(sys.argv[2:])}".rstrip(),
            "bundle": arguments.bundle.resolve().name,
            "languages": arguments.languages,
            "texts": len(texts),
            "tokens": token_lengths(arguments.bundle, texts),
            "threads": arguments.threads,
            "rounds": arguments.rounds,
            "targets": {**TARGETS, "cold_start_seconds": COLD_SECONDS},
            "graphs": graphs,
            "cold_start": cold,
            "environment": describe_environment(),
            "environments": {
                name: (HERE / "environments" / f"{name}.txt").read_text().splitlines()
                for name in sorted(set(ENVIRONMENTS.values()))
            },
        },
    )


def draw(data: Path, languages: list[str], count: int) -> list[str]:
    """`count` distinct sentences of the training texts in `languages`, in random order."""
    found: dict[str, None] = {}
    for path in sorted((*data.glob("mono_train/*.tsv.gz"), *data.glob("parallel_train/*.tsv.gz"))):
        language = path.name.partition(".")[0]
        columns = {"text": language, "en": "en", "xx": language}
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
                found.update(
                    {row[name]: None for name, spoken in columns.items() if name in row and spoken in languages}
                )
    chosen = np.random.default_rng(SEED).permutation(len(found))[:count]
    texts = list(found)
    return [texts[index] for index in chosen]


def measure(
    engines: list[str], bundle: Path, file: str, texts: list[str], rounds: int, threads: int
) -> dict[str, dict[str, Any]]:
    """For each engine sentences per second, and how many times faster ours is; all encode the same slices."""
    from distillabse.evaluation.rounds import paired_speedup, rotated

    edges = np.linspace(0, len(texts), rounds + 1).astype(int).tolist()
    seconds: dict[str, list[list[float]]] = {name: [] for name in engines}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
        workers = {name: Worker(name, bundle, file, folder, threads, stack) for name in engines}
        cosines = {name: worker.vectors(folder) for name, worker in workers.items()}
        cosines = {name: float((vectors * cosines[OURS]).sum(axis=1).min()) for name, vectors in cosines.items()}
        for name, cosine in cosines.items():
            if cosine < SAME:
                raise SystemExit(f"{name} gives other vectors than {OURS}: cosine {cosine:.6f}")
        for number in range(rounds):
            for name in rotated(engines, number):
                seconds[name].append([workers[name].time(edges[number], edges[number + 1])])
            print(f"  round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    rows = {}
    for name in engines:
        ratio, interval = paired_speedup(seconds[name], seconds[OURS], SEED)
        spent = [round_[0] for round_ in seconds[name]]
        rows[name] = {
            "texts_per_second": float(np.median(np.diff(edges) / spent)),
            "seconds": spent,
            "ours_is_faster_by": ratio,
            "ours_is_faster_by_ci95": interval,
            "lowest_cosine_to_ours": cosines[name],
        }
    return rows


class Worker:
    """The process of one engine; it ends when `stack` is left."""

    def __init__(self, engine: str, bundle: Path, file: str, folder: Path, threads: int, stack: ExitStack) -> None:
        python = interpreter(ENVIRONMENTS[engine]) if engine in ENVIRONMENTS else Path(sys.executable)
        self.engine = engine
        environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads)), "HF_HUB_OFFLINE": "1"}
        if engine in ENVIRONMENTS:
            environment.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(
            [python, str(HERE / "encode_engines.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            encoding="utf-8", env=environment,
        )  # fmt: skip
        stack.callback(self._process.wait)
        stack.callback(self._process.kill)  # it holds nothing that must be saved
        task = {"engine": engine, "bundle": str(bundle), "file": file, "threads": threads}
        self._write({**task, "texts": str(folder / "texts.json")})

    def vectors(self, folder: Path) -> Any:
        """Vectors of the first texts; an answer also means that the engine is loaded."""
        path = folder / f"{self.engine}.npy"
        self.time(0, COMPARED, path)
        return np.load(path)

    def time(self, start: int, stop: int, vectors: Path | None = None) -> float:
        """Seconds for encoding a slice of the texts."""
        self._write({"start": start, "stop": stop, "vectors": str(vectors) if vectors else None})
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"The process of {self.engine} died; its last words are above.")
        return float(json.loads(answer)["seconds"])

    def _write(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()


def cold_start(bundle: Path) -> dict[str, Any]:
    """Seconds from starting Python to the first vector, in fresh processes."""
    code = "import sys; from distillabse import Encoder; Encoder(sys.argv[1]).encode(['Where is the station?'])"
    seconds = []
    for _ in range(COLD_STARTS + 1):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code, str(bundle)], check=True)
        seconds.append(time.perf_counter() - started)
    warm = seconds[1:]  # the first one reads from the disk
    return {"median_seconds": float(np.median(warm)), "seconds": warm}


def token_lengths(bundle: Path, texts: list[str]) -> dict[str, float]:
    """How long the texts are in tokens."""
    from distillabse.tokenization import BundleTokenizer

    lengths = [len(row) for row in BundleTokenizer(bundle).token_ids(texts)]
    p50, p95 = np.percentile(lengths, [50, 95]).tolist()
    return {"mean": float(np.mean(lengths)), "p50": p50, "p95": p95, "max": max(lengths)}


def show(file: str, rows: dict[str, dict[str, Any]]) -> None:
    """Print one graph's figures."""
    from rich.console import Console

    from distillabse.console import figures_table

    table = figures_table(
        file, None, ["engine"], ["texts/s", "ours is\nfaster by", "95 % interval", "target", "lowest\ncosine"]
    )
    for name, row in rows.items():
        low, high = row["ours_is_faster_by_ci95"]
        table.add_row(
            name, f"{row['texts_per_second']:,.0f}", f"{row['ours_is_faster_by']:.2f}", f"{low:.2f} to {high:.2f}",
            f"{TARGETS[name]:.1f}" if name in TARGETS else "", f"{row['lowest_cosine_to_ours']:.6f}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
