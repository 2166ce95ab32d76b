"""What a process of a training holds in memory: DDP and ZeRO's stages, measured.

    python benchmarks/zero_memory.py

Measured are two processes on a CPU (gloo, fp32), a teacher of LaBSE's layers with a table of 30,000 rows and a 6-layer
student of it, random weights, short sentences, small batches: so activations are small beside weights, gradients and
AdamW's state. Every way starts processes of its own. Memory does not depend on how busy the machine is. Needs 8 GB, and
ten minutes.

Writes benchmarks/results/zero_memory.json. zero_paper.py reckons the same for larger jobs and more processes.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from zero_paper import FP32, bytes_per_parameter

RESULTS = Path(__file__).parent / "results"
PROCESSES = 2
STEPS = 4
ACCUMULATION = 2
ROWS = 30_000
STUDENT = {"layers": 6}
# The way, training.deepspeed, and whether the teacher is spread over the processes.
WAYS = {
    "DDP": (None, False), "zero0": ("zero0", False), "zero1": ("zero1", False), "zero2": ("zero2", False),
    "zero3": ("zero3", False), "zero2, shard_teacher": ("zero2", True), "zero3, shard_teacher": ("zero3", True),
}  # fmt: skip
# Between two batches of one step, before the optimizer moves the weights, after it, and the most of all.
MOMENTS = ("between", "before", "after", "peak")
KINDS = ("weights", "gradients", "moments", "float32 copy", "teacher", "other")


def main() -> None:
    """Measure every way and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        measure(arguments.worker[0], Path(arguments.worker[1]))
    else:
        measure_all()


def measure_all() -> None:
    """Start the processes of every way, one after another; write and show what they held."""
    from labse_stand_in import build_stand_in
    from rich.console import Console
    from rich.progress import track

    from distillabse.environment import describe_environment
    from distillabse.storage import write_json

    ways: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_stand_in(folder / "teacher", texts(), ROWS)
        for way in track(WAYS, "measuring", console=Console(stderr=True)):
            ways[way] = started(way, folder)
    for measured in ways.values():
        for process, alone in zip(measured["processes"], ways["DDP"]["processes"], strict=True):
            process["resident_to_ddp"] = {
                moment: process["resident"][moment] / alone["resident"][moment] for moment in MOMENTS
            }
    result = {
        "command": "python benchmarks/zero_memory.py",
        "setting": {
            "processes": PROCESSES,
            "steps": STEPS,
            "gradient_accumulation_steps": ACCUMULATION,
            "precision": "fp32",
            "rows": ROWS,
            "student": STUDENT,
        },
        "ways": ways,
        "environment": describe_environment(),
    }
    write_json(RESULTS / "zero_memory.json", result)
    Console(width=150).print(measured_table(result))


def started(way: str, folder: Path) -> dict[str, Any]:
    """What the processes of one way held, and what ZeRO's reckoning says of it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES)]
    # glibc otherwise keeps what was freed, which would count as held.
    allocator = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    on_cpu = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, __file__, "--worker", way, str(folder)],
        env={**os.environ, **allocator, **on_cpu}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=False,
    )  # fmt: skip
    files = [folder / f"{way}-{rank}.json" for rank in range(PROCESSES)]
    if not all(file.is_file() for file in files):
        raise SystemExit(f"{way}: the processes did not finish:\n{done.stdout[-4000:]}")
    processes = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    stage = int((WAYS[way][0] or "zero0")[-1])
    per_parameter = bytes_per_parameter(stage, PROCESSES, **FP32)
    trained, teacher = processes[0]["trained_parameters"], processes[0]["teacher_bytes"]
    return {
        "zero_stage": stage if WAYS[way][0] else None,
        "paper_bytes_per_parameter": per_parameter,
        "paper_bytes": per_parameter * trained + teacher / (PROCESSES if WAYS[way][1] else 1),
        "processes": processes,
    }


def texts() -> list[str]:
    """Short sentences; which ones does not matter here."""
    return [f"{number} {number % 7} {number % 11}" for number in range(200)]


def measure(way: str, folder: Path) -> None:
    """Train as a job does, in every process that torchrun started, and write what this one held at the last step."""
    from distillabse import processes
    from distillabse.config import JobConfig, TeacherConfig
    from distillabse.models.student import build_student
    from distillabse.models.teacher import load_teacher
    from distillabse.storage import write_json
    from distillabse.training.data import tokenised_sentences
    from distillabse.training.deepspeed import announce_checkpoint
    from distillabse.training.distillation import trainer_arguments
    from distillabse.training.distiller import Distiller
    from distillabse.training.trainer import DistillationTrainer

    torch.set_num_threads(1)
    stage, shards_teacher = WAYS[way]
    model = str(folder / "teacher")
    training = {
        "max_steps": STEPS, "per_device_train_batch_size": 4, "gradient_accumulation_steps": ACCUMULATION,
        "eval_strategy": "no", "save_strategy": "no",
        "load_best_model_at_end": False, "report_to": [], "bf16": False, **({"deepspeed": stage} if stage else {}),
    }  # fmt: skip
    values = {
        "name": "memory", "teacher": {"model": model}, "corpus": {"sources": [{"kind": "phrasebook"}]},
        "student": STUDENT, "objectives": [{"kind": "cosine"}], "training": training, "shard_teacher": shards_teacher,
    }  # fmt: skip
    config = JobConfig.model_validate(values)
    arguments = trainer_arguments(config, folder / way)
    teacher = load_teacher(TeacherConfig(model=model))
    student = build_student(teacher, config.student)  # type: ignore[arg-type]
    for parameter in [*teacher.parameters(), *student.parameters()]:
        parameter.data = parameter.data.clone()  # pages of the file would come one by one, later
    sentences = tokenised_sentences(teacher, texts())
    gc.collect()
    probe = Probe(student, teacher)
    # From here on as `distill` does it.
    copied = None
    if arguments.deepspeed:
        announce_checkpoint(arguments, None)
        copied = copy.deepcopy(student) if processes.is_main() else None
    distiller = Distiller(student, teacher, config.objectives)
    if shards_teacher:
        distiller.shard_teacher(arguments.hf_deepspeed_config.config)
    trainer = DistillationTrainer(distiller, arguments, sentences, None, [probe], None, copied)
    probe.trainer = trainer
    trainer.train()
    write_json(folder / f"{way}-{processes.rank()}.json", probe.result)


class Probe(TrainerCallback):
    """Takes the memory of its process in the last step, at every one of MOMENTS.

    Attributes:
        trainer: whose training it watches; to be set before that begins.
        result: bytes. `held` is what tensors hold, by KINDS. `resident` is counted from what the process had before it
            began to prepare training, apart from student and teacher, which are in it.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        self.trainer: Any = None
        self._student, self._teacher = student, teacher
        models = {"student_bytes": weight_bytes(student), "teacher_bytes": weight_bytes(teacher)}
        trained = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
        self.result: dict[str, Any] = {"trained_parameters": trained, **models, "held": {}, "resident": {}}
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is counted from now on
        self._before = resident("VmRSS") - sum(models.values())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Watch for the moment before the optimizer's step."""
        if self.trainer.is_deepspeed_enabled:
            engine = self.trainer.deepspeed
            step = engine.step

            def watched(*arguments: Any, **named: Any) -> Any:
                self._before_step()
                return step(*arguments, **named)

            engine.step = watched
        else:
            self._torch_optimizer().register_step_pre_hook(lambda *_: self._before_step())

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take what is kept while gradients are summed up."""
        if state.global_step == STEPS - 1:
            self._take("between")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take what is left after a step, and the peak so far."""
        self._take("after")
        self.result["resident"]["peak"] = resident("VmHWM") - self._before

    def _before_step(self) -> None:
        if self.trainer.state.global_step == STEPS - 1 and self.trainer.accelerator.sync_gradients:
            self._take("before")

    def _take(self, moment: str) -> None:
        gc.collect()
        self.result["resident"][moment] = resident("VmRSS") - self._before
        self.result["held"][moment] = self._held()

    def _held(self) -> dict[str, int]:
        """Bytes of the tensors of this process by what they are for; memory that several share counts once."""
        optimizer = self._torch_optimizer()
        partitioned = getattr(self.trainer.deepspeed, "optimizer", None) if self.trainer.is_deepspeed_enabled else None
        student, learnt = list(parts(self._student)), list(optimizer.state)
        owners: dict[str, Iterable[Any]] = {
            "weights": student,
            "teacher": parts(self._teacher),
            "moments": (value for state in optimizer.state.values() for value in state.values()),
            "float32 copy": learnt,
            "gradients": [
                *(tensor.grad for tensor in [*student, *learnt]),
                *tensors(getattr(partitioned, "averaged_gradients", None)),
                *tensors(getattr(partitioned, "all_grad_tensors", None)),
                *tensors(getattr(partitioned, "grad_partitions_flat_buffer", None)),
            ],
            "other": [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)],
        }
        seen: set[int] = set()
        held: dict[str, int] = {}
        for kind, things in owners.items():
            held[kind] = 0
            for tensor in things:
                if not isinstance(tensor, Tensor) or tensor.device.type != "cpu":
                    continue
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in seen:
                    seen.add(storage.data_ptr())
                    held[kind] += storage.nbytes()
        return held

    def _torch_optimizer(self) -> Any:
        """The AdamW inside what DeepSpeed and accelerate wrapped around it."""
        optimizer = self.trainer.deepspeed.optimizer if self.trainer.is_deepspeed_enabled else self.trainer.optimizer
        while not type(optimizer).__module__.startswith("torch.optim"):
            optimizer = optimizer.optimizer
        return optimizer


def parts(model: nn.Module) -> Iterator[Tensor]:
    """The parameters, and under stage 3 also this process's part of each."""
    for parameter in model.parameters():
        yield parameter
        if hasattr(parameter, "ds_tensor"):
            yield parameter.ds_tensor


def tensors(thing: Any) -> Iterator[Tensor]:
    """Every tensor in nested lists and dictionaries."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, (list, tuple, dict)):
        for inner in thing.values() if isinstance(thing, dict) else thing:
            yield from tensors(inner)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def resident(field: str) -> int:
    """Bytes that /proc says of this process: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}: this benchmark needs Linux.")


def measured_table(result: dict[str, Any]) -> Any:
    """The figures of the last process, which under DeepSpeed has no copy of the student, in MB."""
    from rich.table import Table

    table = Table(title="MB of a process; resident memory beside DDP's in brackets")
    for column in ("", *KINDS, "held", "paper", *MOMENTS, "main's peak"):
        table.add_column(column, justify="right" if column else "left")
    for way, measured in result["ways"].items():
        main, *_, process = measured["processes"]
        held = process["held"]["before"]
        counted = [*(held[kind] for kind in KINDS), sum(held.values()), measured["paper_bytes"]]
        resident = [
            f"{process['resident'][moment] / 1e6:,.0f} ({process['resident_to_ddp'][moment]:.2f})" for moment in MOMENTS
        ]
        table.add_row(
            way, *(f"{size / 1e6:,.0f}" for size in counted), *resident, f"{main['resident']['peak'] / 1e6:,.0f}"
        )
    return table


if __name__ == "__main__":
    main()
