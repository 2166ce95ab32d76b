"""Engines in processes of their own, pinned to CPUs, and what other processes take meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import psutil

from distillabse.cores import cpus_for, usable_cores
from distillabse.environment import require_device
from distillabse.errors import DistillabseError

if TYPE_CHECKING:
    from distillabse.config import BenchConfig
    from distillabse.evaluation.fidelity import Vectors

# Every library that brings threads: OpenMP and MKL (PyTorch), Rayon (tokenizers).
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")


@dataclass(frozen=True)
class Engine:
    """Something that encodes texts.

    Attributes:
        name: what results call it.
        kind: "torch" for a SentenceTransformer folder, "onnx" for a graph of a bundle, "onnx-file" for any ONNX file of
            a sentence encoder, "static" for token vectors without a transformer; or what another worker knows.
        folder: where it is.
        file: the graph inside the folder.
        worker: the command of its process, which speaks as `latency_worker` does.
        device: where it runs, if that is not for all to choose: "cpu", "cuda" or "tensorrt".
    """

    name: str
    kind: str
    folder: Path
    file: str | None = None
    worker: Sequence[str] = (sys.executable, "-m", "distillabse.evaluation.latency_worker")
    device: str | None = None


class Turn(NamedTuple):
    """What one engine did in one round: seconds of every batch, and wall-clock seconds where those were a GPU's."""

    seconds: list[float]
    wall_seconds: list[float] | None
    sentences: int


class CpuTimes(NamedTuple):
    """Seconds since some moment: on the clock, of CPU use of the whole machine, and of this process and its workers."""

    clock: float
    machine: float
    own: float


class Worker:
    """The process of one engine: one JSON line in, one JSON line out. It ends when `stack` is left.

    Args:
        engine: what it loads.
        device: "cpu" or "cuda", where the engine does not say.
        threads: how many it uses.
        stack: ends it.
    """

    def __init__(self, engine: Engine, device: str, threads: int, stack: ExitStack) -> None:
        self.engine, self.device = engine, engine.device or device
        log = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")
        self._log = stack.enter_context(log)
        self._process = subprocess.Popen(
            list(engine.worker),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            encoding="utf-8",
            env={**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads))},
        )
        stack.callback(self._process.communicate)
        stack.callback(self._process.kill)  # it holds nothing that must be saved
        settings = {"kind": engine.kind, "folder": str(engine.folder), "file": engine.file}
        self._send({**settings, "device": self.device, "threads": threads, "cpus": cpus_for(threads)})

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def time(self, batches: list[list[str]], seconds: float) -> Turn:
        """Time every batch; all batches are encoded once, and again until `seconds` are used up."""
        answer = self.ask({"batches": batches, "seconds": seconds})
        times = answer["seconds"]
        again = len(times) // len(batches)
        return Turn(times, answer.get("wall_seconds"), again * sum(map(len, batches)))

    def tokens(self, texts: list[str]) -> list[int]:
        """The length of each text in tokens, as the engine cuts it."""
        return list(self.ask({"texts": texts})["tokens"])

    def vectors(self, batches: list[list[str]]) -> Vectors:
        """Vectors of texts that are run in exactly these batches: float32 [texts, dimension]."""
        return self._array({"encode": batches})[0]

    def bulk_vectors(self, texts: list[str]) -> tuple[Vectors, float]:
        """Vectors of texts in the engine's own order and batches, float32 [texts, dimension], and its seconds."""
        vectors, answer = self._array({"bulk": texts})
        return vectors, float(answer["seconds"])

    def bulk_seconds(self, texts: list[str]) -> float:
        """Seconds for all texts in the engine's own order and batches."""
        return float(self.ask({"bulk": texts})["seconds"])

    def first_vector(self, text: str) -> float:
        """The moment, by `time.monotonic`, at which the vector of a text was there."""
        return float(self.ask({"first": [text]})["finished"])

    def memory(self) -> dict[str, int | None]:
        """Bytes that the process holds: "loaded_bytes" after loading, "peak_bytes" so far, "gpu_peak_bytes"."""
        return self.ask({"memory": True})

    def cpu_seconds(self) -> float:
        """CPU time that the process has used."""
        used = psutil.Process(self._process.pid).cpu_times()
        return float(used.user + used.system)

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Send one line and wait for the answer."""
        self._send(question)
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            raise self._death()
        return dict(json.loads(answer))

    def _array(self, question: dict[str, Any]) -> tuple[Vectors, dict[str, Any]]:
        with tempfile.TemporaryDirectory(prefix="distillabse-vectors-") as folder:
            file = Path(folder) / "vectors.npy"
            answer = self.ask({**question, "file": str(file)})
            vectors: Vectors = np.load(file, allow_pickle=False)
        return vectors, answer

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None

    def _death(self) -> DistillabseError:
        status = self._process.wait()
        self._log.seek(0)
        tail = "".join(self._log.readlines()[-15:])
        return DistillabseError(
            f"The process that measures {self.engine.name} ({self.engine.folder}) ended with status {status} "
            f"(-9: the machine ran out of memory). Its last words:\n{tail}"
        )


@contextmanager
def started(engines: Sequence[Engine], config: BenchConfig) -> Iterator[list[Worker]]:
    """The processes of the engines, all of them loaded: none may be loading while another is timed.

    Raises:
        ConfigurationError: the device cannot be used.
        DistillabseError: an engine's process died.
    """
    require_device(config.device)
    with ExitStack() as stack:
        threads = config.threads or usable_cores()
        workers = [Worker(engine, config.device, threads, stack) for engine in engines]
        for worker in workers:
            worker.memory()  # an answer means that the engine is loaded
        yield workers


def cpu_times(workers: Sequence[Worker]) -> CpuTimes:
    """The clocks of this moment."""
    machine = psutil.cpu_times()
    # Steal is time that the neighbours of a virtual machine took.
    busy = sum(getattr(machine, kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq", "steal"))
    own = time.process_time() + sum(worker.cpu_seconds() for worker in workers)
    return CpuTimes(time.monotonic(), busy, own)


def cores_used_by_others(start: CpuTimes, end: CpuTimes) -> float:
    """Mean number of cores that other processes used between two moments."""
    used = (end.machine - start.machine) - (end.own - start.own)
    return max(0.0, used / (end.clock - start.clock))
