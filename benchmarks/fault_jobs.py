"""The small jobs that faults are let loose on, the state of their folders, and whether they came through."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

TESTS = Path(__file__).resolve().parents[1] / "tests"
STEPS, EVERY, BATCH, SENTENCES = 240, 24, 16, 1600
STUDENT = {"layers": 2, "hidden_size": 16, "attention_heads": 4, "head": "dense"}
OBJECTIVES = [{"kind": "cosine"}, {"kind": "minilm_v2", "relation_heads": 8, "weight": 0.1}]
TRAINING = {
    "max_steps": STEPS, "save_steps": EVERY, "eval_steps": EVERY, "logging_steps": 1, "bf16": False,
    "per_device_train_batch_size": BATCH, "dataloader_num_workers": 1, "train_sampling_strategy": "group_by_length",
    # One step too many would show in the weights.
    "lr_scheduler_type": "constant_with_warmup", "learning_rate": 1e-3, "load_best_model_at_end": False,
}  # fmt: skip
TWO = {"per_device_train_batch_size": BATCH // 2}
# What differs from TRAINING and the job's other keys, and how many processes there are.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "live teacher": ({}, {}, 1),
    "teacher cache": ({"load_best_model_at_end": True}, {"teacher_cache": True}, 1),
    "two processes": (TWO, {}, 2),
    "two processes, ZeRO stage 2": ({**TWO, "deepspeed": "zero2"}, {}, 2),
}


@dataclass
class Ended:
    """A command that is over.

    Attributes:
        status: its exit status; negative for a signal.
        seconds: it took, or from the fault to its end.
        log: what it printed.
    """

    status: int
    seconds: float
    log: str

    @property
    def resumed_from(self) -> int:
        """Step of the checkpoint that it says it goes on from; 0 for the start, -1 where training was not reached."""
        found = re.findall(r"Resuming from (?:\S*checkpoint-(\d+)|the start)", self.log)
        return int(found[-1] or 0) if found else -1

    @property
    def last_step(self) -> int:
        """The last step whose loss it printed."""
        found = re.findall(r"step (\d+)/\d+ loss", self.log)
        return int(found[-1]) if found else 0


@dataclass
class Job:
    """A job of one variant with a run folder of its own."""

    folder: Path
    variant: str
    config: Path
    overrides: list[str] = field(default_factory=list)

    @property
    def run(self) -> Path:
        """Its run folder."""
        return self.folder / "job"

    @property
    def checkpoints(self) -> Path:
        """Its checkpoints."""
        return self.run / "checkpoints"

    @property
    def student(self) -> Path:
        """Its product."""
        return self.run / "student"

    def start(self) -> Running:
        """Start the command in a process group of its own."""
        processes = VARIANTS[self.variant][2]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [
            sys.executable, *(launcher if processes > 1 else []), "-m", "distillabse", "run", str(self.config),
            f"output={self.folder}", *self.overrides, "--until", "distill",
        ]  # fmt: skip
        environment = os.environ | {
            "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "COLUMNS": "500",
            "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(TESTS.parent), "TORCH_CPP_LOG_LEVEL": "ERROR",
        }  # fmt: skip
        log = self.folder.with_suffix(f".{len(list(self.folder.parent.glob(f'{self.folder.name}.*.log')))}.log")
        with log.open("w") as file:
            process = subprocess.Popen(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        return Running(process, log)

    def finish(self) -> Ended:
        """Run the command to its end."""
        return self.start().ended()


@dataclass
class Running:
    """A command on its way."""

    process: subprocess.Popen[bytes]
    log: Path
    started: float = field(default_factory=time.monotonic)

    def wait_for(self, moment: Callable[[], bool], pause: float = 0.02) -> bool:
        """Until the moment has come; whether it has come before the command ended."""
        while self.process.poll() is None:
            if moment():
                return True
            time.sleep(pause)
        return False

    def prints(self, pattern: str) -> bool:
        """Whether it has printed this."""
        return re.search(pattern, self.log.read_text(encoding="utf-8", errors="replace")) is not None

    def signal(self, number: signal.Signals, group: bool = True) -> None:
        """Send a signal to all its processes, or to the first one alone."""
        try:
            (os.killpg if group else os.kill)(self.process.pid, number)
        except ProcessLookupError:
            pass

    def children(self) -> list[psutil.Process]:
        """The processes that its first one has started."""
        try:
            return psutil.Process(self.process.pid).children()
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> Ended:
        """End all its processes at once."""
        self.signal(signal.SIGKILL)
        return self.ended()

    def ended(self, limit: float = 900) -> Ended:
        """Wait for the end; what is not over after `limit` seconds is killed."""
        asked = time.monotonic()
        try:
            status = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            status = self.process.wait()
        self.signal(signal.SIGKILL)  # what a launcher left
        return Ended(status, round(time.monotonic() - asked, 1), self.log.read_text(encoding="utf-8", errors="replace"))


class Reference:
    """An uninterrupted run of a variant, from which all others start and to which they are compared."""

    def __init__(self, folder: Path, variant: str) -> None:
        """Run it."""
        self.variant = variant
        self.config = write_config(folder, variant)
        self.job = Job(folder / f"reference-{_slug(variant)}", variant, self.config)
        started = time.monotonic()
        ended = self.job.finish()
        self.seconds = time.monotonic() - started
        if ended.status:
            raise RuntimeError(f"the reference of {variant!r} did not finish:\n{ended.log[-3000:]}")
        self._lock, self._interrupted = threading.Lock(), list[tuple[Job, Ended]]()
        self.digests, self.figures = digests(self.job.student), figures(self.job.student)

    def job_in(self, folder: Path, *overrides: str) -> Job:
        """A new job whose text is prepared and whose training has not begun."""
        job = Job(folder, self.variant, self.config, list(overrides))
        for name in ("corpus", "vocabulary"):
            shutil.copytree(self.job.run / name, job.run / name)
            (job.run / "stamps").mkdir(exist_ok=True)
            shutil.copy(self.job.run / "stamps" / f"{name}.json", job.run / "stamps")
        return job

    def interrupted(self) -> tuple[Job, Ended]:
        """A job that was killed when half of its checkpoints were written; the same at every call."""
        with self._lock:
            if not self._interrupted:
                job = self.job_in(self.job.folder.with_name(f"interrupted-{_slug(self.variant)}"))
                running = job.start()
                running.wait_for(lambda: is_whole(job.checkpoints / f"checkpoint-{STEPS // 2}"))
                self._interrupted.append((job, running.kill()))
            return self._interrupted[0]

    def faults(self, job: Job, ended: Ended, expected: int) -> list[str]:
        """What is wrong with a job that was run again to its end; nothing, it should be."""
        if ended.status:
            return [f"exit status {ended.status}: {ended.log.strip().splitlines()[-1] if ended.log else ''}"]
        wrong = []
        if digests(job.student) != self.digests:
            wrong.append("other weights")
        if figures(job.student) != self.figures:
            wrong.append("other losses")
        if ended.resumed_from != expected:
            wrong.append(f"resumed from {ended.resumed_from}, not {expected}")
        left = [path for path in job.run.rglob(".*") if path.is_dir()]
        left += [path for path in job.checkpoints.iterdir() if path.name in ("training-data", "teacher-cache")]
        left += [path for path in job.checkpoints.glob("checkpoint-*") if not is_whole(path)]
        return wrong + [f"left over: {path.relative_to(job.run)}" for path in left]


def write_config(folder: Path, variant: str) -> Path:
    """The configuration of a variant; teacher and text are made at the first call."""
    sys.path.insert(0, str(TESTS))
    import numpy as np
    from tiny import JOB_WORDS, tiny_encoder, tiny_job

    table = folder / "text.tsv"
    if not table.is_file():
        random = np.random.default_rng(0)
        texts = (" ".join(random.choice(JOB_WORDS, size=random.integers(3, 20))) for _ in range(SENTENCES))
        table.write_text("text\tlang\n" + "".join(f"{text}\ten\n" for text in texts), encoding="utf-8")
        teacher = tiny_encoder(folder / "teacher", layers=3)
        assert json.loads((teacher / "config.json").read_text())["hidden_dropout_prob"] > 0
    training, blocks, _ = VARIANTS[variant]
    job = tiny_job(folder, "job", student=STUDENT, objectives=OBJECTIVES, training={**TRAINING, **training}, **blocks)
    path = folder / f"{_slug(variant)}.yaml"
    path.write_text(yaml.safe_dump(job), encoding="utf-8")
    return path


def is_whole(checkpoint: Path) -> bool:
    """Whether the list of checksums is there, names every file, and every one is as listed."""
    listed = checkpoint / "SHA256SUMS"
    if not listed.is_file():
        return False
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in listed.read_text().splitlines())}
    files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file() and path != listed}
    return files == sums.keys() and all(_sha256(checkpoint / name) == digest for name, digest in sums.items())


def state(job: Job) -> dict[str, Any]:
    """What a fault left: the steps of whole and of other checkpoints, and temporary folders."""
    found = {int(path.name.split("-")[1]): path for path in job.checkpoints.glob("checkpoint-*")}
    whole = sorted(step for step, path in found.items() if is_whole(path))
    temporary = {re.sub(r"\.\w{6,}\.", ".*.", path.name) for path in job.run.rglob(".*") if path.is_dir()}
    return {
        "whole": whole,
        "unfinished": sorted(found.keys() - set(whole)),
        "temporary": sorted(temporary),
        "student": job.student.is_dir(),
    }


def digests(student: Path) -> dict[str, str]:
    """SHA-256 of every file of weights."""
    return {str(path.relative_to(student)): _sha256(path) for path in sorted(student.rglob("*.safetensors"))}


def figures(student: Path) -> list[dict[str, float]]:
    """Every logged figure of every step and evaluation."""
    log = json.loads((student / "training_history.json").read_text(encoding="utf-8"))["log"]
    return [entry for entry in log if "loss" in entry or "eval_skill" in entry]


def pages(folder: Path) -> int:
    """What files take on a tmpfs: whole pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _slug(variant: str) -> str:
    return re.sub(r"\W+", "-", variant)
