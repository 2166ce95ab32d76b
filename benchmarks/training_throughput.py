"""How fast training is beside peers: the same student, objective, texts and optimiser, in sentences per second.

    python benchmarks/training_throughput.py --data data [--runs runs] [--rounds 4] [--groups relations ...]

TextBrewer's GeneralDistiller for attention and value relations of the last layer and the sentence cosine; the trainer
of sentence-transformers with its MSELoss for the embedding alone. The student has 3 of the 6 layers of the packaged
MiniLM, no dropout, and every library starts from the same folder. All use fused AdamW with the same rate, weight decay
and clipping; the losses of the first steps on one batch are compared and are part of the result.

Every side has a process of its own and one works at a time. They alternate in rounds of a fixed number of optimiser
steps, as many as this project sorts by length together, so that all rounds hold equally long sentences.
Nothing of preparation (tokenising, a cache, the teacher's vectors as labels) is inside a round. With relations the
teacher runs in every step, on both sides, unless a side is named "teacher cached"; for the embedding alone neither
side runs it in a step.

TextBrewer is installed without dependencies into <runs>/peers, so that both sides use the same PyTorch and
transformers. Writes benchmarks/results/training_throughput.json.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from training_sides import Task

from distillabse.training.batches import WINDOW

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SEED = 0
SENTENCES = 6400
STEPS = WINDOW  # of a round
TARGETS = {"textbrewer": 2.0, "sentence-transformers": 1.3}
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
OURS = "distillabse"


@dataclass(frozen=True)
class Group:
    """Sides that alternate: `sides` says in what each differs from the first, by name; the last is the peer to beat."""

    objective: str
    text: str
    batch: int
    precision: str
    sides: dict[str, dict[str, Any]]
    freeze_embeddings: bool = False


RELATIONS: dict[str, dict[str, Any]] = {OURS: {}, "textbrewer": {"library": "textbrewer", "grouped": False}}
EMBEDDING: dict[str, dict[str, Any]] = {
    OURS: {"cached": True},
    "sentence-transformers": {"library": "sentence-transformers", "grouped": False},
}
RANDOM = "distillabse, random batches"
GROUPS = {
    "relations": Group(
        "relations", "sentences", 32, "fp32",
        {
            OURS: {},
            RANDOM: {"grouped": False},
            "distillabse, teacher cached": {"cached": True},
            "textbrewer, grouped batches": {"library": "textbrewer"},
            "textbrewer": RELATIONS["textbrewer"],
        },
    ),
    "relations-batch-64": Group("relations", "sentences", 64, "fp32", RELATIONS),
    "relations-passages": Group("relations", "passages", 16, "fp32", RELATIONS),
    "relations-bf16": Group("relations", "sentences", 32, "bf16", RELATIONS),
    "embedding": Group(
        "embedding", "sentences", 32, "fp32",
        {OURS: EMBEDDING[OURS], RANDOM: {"cached": True, "grouped": False},
         "sentence-transformers": EMBEDDING["sentence-transformers"]},
    ),
    "embedding-batch-64": Group("embedding", "sentences", 64, "fp32", EMBEDDING),
    "embedding-bf16": Group("embedding", "sentences", 32, "bf16", EMBEDDING),
    "relations-frozen": Group("relations", "sentences", 32, "fp32", RELATIONS, freeze_embeddings=True),
    "embedding-frozen": Group("embedding", "sentences", 32, "fp32", EMBEDDING, freeze_embeddings=True),
}  # fmt: skip
DEFAULT_GROUPS = [name for name in GROUPS if not name.endswith("frozen")]


def main() -> None:
    """Measure the groups that are asked for, print a table, write the result; other groups keep their figures."""
    from distillabse.environment import describe_environment, usable_cores
    from distillabse.storage import read_json, write_json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where TextBrewer is installed: <runs>/peers")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=DEFAULT_GROUPS)
    parser.add_argument("--result", type=Path, default=RESULTS / "training_throughput.json")
    arguments = parser.parse_args()

    peers = install_peers(arguments.runs / "peers")
    result = read_json(arguments.result) if arguments.result.is_file() else {"groups": {}}
    with tempfile.TemporaryDirectory() as folder:
        base = prepare(arguments.data, Path(folder), {GROUPS[name].text for name in arguments.groups})
        base = replace(base, rounds=arguments.rounds, threads=arguments.threads)
        for name in arguments.groups:
            print(f"{name} ...", flush=True)
            measured = measure(GROUPS[name], base, peers)
            result["groups"][name] = {**measured, "environment": environment(peers, describe_environment())}
            result["command"] = f"python benchmarks/training_throughput.py {' '.join(sys.argv[1:])}".rstrip()
            result["targets"] = TARGETS
            write_json(arguments.result, result)
    show(result["groups"])


def install_peers(folder: Path) -> Path:
    """The folder that TextBrewer is imported from, filled unless it is; everything else it needs is there already."""
    if not (folder / "textbrewer").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*pip, "--requirement", str(HERE / "peers" / "textbrewer.txt")], check=True)
    return folder.resolve()


def environment(peers: Path, described: dict[str, Any]) -> dict[str, Any]:
    """What the project records of a machine, and the version of the peer that it does not know."""
    found = importlib.metadata.distributions(name="textbrewer", path=[str(peers)])
    described["versions"]["textbrewer"] = next(iter(found)).version
    return described


def prepare(data: Path, folder: Path, kinds: set[str]) -> Task:
    """Write the texts, the teacher's vectors of them and the student into `folder`; what all sides have in common."""
    from distillabse.config import PACKAGED_TEACHER, DenseStudentConfig, TeacherConfig
    from distillabse.models.folder import save_encoder
    from distillabse.models.student import build_student
    from distillabse.models.teacher import load_teacher, resolve_model

    teacher = load_teacher(TeacherConfig(model=PACKAGED_TEACHER))
    save_encoder(build_student(teacher, DenseStudentConfig(layers=3)), folder / "student")
    sentences = english(data)
    for kind in kinds:
        texts = sentences[:SENTENCES] if kind == "sentences" else passages(sentences)
        (folder / f"{kind}.json").write_text(json.dumps(texts), encoding="utf-8")
        np.save(folder / f"{kind}.npy", teacher.encode(texts, batch_size=64))
    return Task(
        library=OURS, objective="relations", grouped=True, cached=False, batch=64, precision="fp32",
        freeze_embeddings=False, teacher=resolve_model(PACKAGED_TEACHER), student=str(folder / "student"),
        texts=str(folder), vectors=str(folder), output=str(folder), steps=0, rounds=0, threads=1, seed=SEED,
    )  # fmt: skip


def english(data: Path) -> list[str]:
    """The English training sentences of the data."""
    with gzip.open(data / "mono_train" / "en.tsv.gz", "rt", encoding="utf-8", newline="") as lines:
        return [row["text"] for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)]


def passages(sentences: list[str]) -> list[str]:
    """Texts of mixed lengths: one to eight sentences in line, a quarter as many as there are sentences."""
    counts = np.random.default_rng(SEED).integers(1, 9, size=SENTENCES // 4)
    ends = np.cumsum(counts)
    return [" ".join(sentences[end - count : end]) for end, count in zip(ends, counts, strict=True)]


def measure(group: Group, base: Task, peers: Path) -> dict[str, Any]:
    """Let the sides of a group alternate."""
    from distillabse.evaluation.rounds import paired_speedup, rotated
    from distillabse.evaluation.workers import CpuTimes, cores_used_by_others

    shared = replace(
        base, objective=group.objective, batch=group.batch, steps=STEPS, precision=group.precision,
        freeze_embeddings=group.freeze_embeddings, texts=f"{base.texts}/{group.text}.json",
        vectors=f"{base.vectors}/{group.text}.npy",
    )  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in group.sides}
    with ExitStack() as stack:
        workers = {}
        for name, changes in group.sides.items():
            output = stack.enter_context(tempfile.TemporaryDirectory())
            # One after the other: a side that prepares must not disturb another.
            workers[name] = Worker(name, replace(shared, **changes, output=output), peers, stack)

        def times() -> CpuTimes:
            machine = psutil.cpu_times()
            busy = sum(getattr(machine, kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq", "steal"))
            own = time.process_time() + sum(worker.cpu_seconds() for worker in workers.values())
            return CpuTimes(time.monotonic(), busy, own)

        start = times()
        for number in range(base.rounds):
            for name in rotated(list(workers), number):
                seconds[name].append(workers[name].round())
                print(f"  {number + 1}/{base.rounds} {name}: {seconds[name][-1]:.1f} s", flush=True)
        others = cores_used_by_others(start, times())
    losses = {name: worker.losses for name, worker in workers.items()}
    difference = float(np.max(np.abs(np.array(list(losses.values())) / np.array(losses[OURS]) - 1)))
    if not difference < TOLERANCE[group.precision]:
        raise SystemExit(f"The sides do not train the same: their first losses differ by {difference:.1e}: {losses}")
    sides = {}
    for name, values in seconds.items():
        rates = group.batch * STEPS / np.array(values)
        ratio, interval = paired_speedup([[one] for one in values], [[one] for one in seconds[OURS]], SEED)
        sides[name] = {
            "sentences_per_second": float(np.median(rates)),
            "quartiles": np.percentile(rates, [25, 75]).tolist(),
            "seconds": values,
            "prepared_seconds": workers[name].prepared,
            "losses": losses[name],
            "distillabse_is_times_as_fast": ratio,
            "ci95": interval,
        }
    settings = {key: value for key, value in asdict(group).items() if key != "sides"}
    return {
        **settings, "rounds": base.rounds, "threads": base.threads, "largest_relative_difference_of_losses": difference,
        "cores_used_by_others": others, "sides": sides,
    }  # fmt: skip


class Worker:
    """The process of one side, ready to train. It ends when `stack` is left."""

    def __init__(self, name: str, task: Task, peers: Path, stack: ExitStack) -> None:
        from distillabse.evaluation.workers import THREAD_VARIABLES

        self.name = name
        self._log = stack.enter_context(tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace"))
        path = os.pathsep.join([str(HERE.parent), str(peers)])
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "training_sides.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            encoding="utf-8",
            env={**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(task.threads)), "PYTHONPATH": path},
        )
        stack.callback(self._process.communicate)
        stack.callback(self._process.kill)  # it holds nothing that must be saved
        self._send(json.dumps(asdict(task)))
        self.losses: list[float] = self._answer()["losses"]
        self.prepared: float = self._answer()["prepared"]

    def round(self) -> float:
        """Seconds of the next round."""
        self._send("go")
        return float(self._answer()["seconds"])

    def cpu_seconds(self) -> float:
        """CPU time that the process has used."""
        used = psutil.Process(self._process.pid).cpu_times()
        return float(used.user + used.system)

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise SystemExit(f"{self.name} ended early. Its last words:\n{''.join(self._log.readlines()[-30:])}")
        return dict(json.loads(line))


def show(groups: dict[str, Any]) -> None:
    """A table of all figures."""
    from rich.console import Console

    from distillabse.console import figures_table

    table = figures_table(
        "Training speed",
        f"ratio: distillabse over the side, with its 95 % interval; targets: {TARGETS}",
        ("group", "side"),
        ("sentences/s", "quartiles", "ratio", "95 % interval"),
    )
    for group, measured in groups.items():
        for name, side in measured["sides"].items():
            low, high = side["ci95"]
            quartiles = " to ".join(f"{rate:,.0f}" for rate in side["quartiles"])
            table.add_row(
                group, name, f"{side['sentences_per_second']:,.0f}", quartiles,
                f"{side['distillabse_is_times_as_fast']:.2f}", f"{low:.2f} to {high:.2f}",
            )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
