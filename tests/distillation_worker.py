"""Processes that distil a tiny student, as a job does, and the same training in one process.

    python -m torch.distributed.run --standalone --nproc_per_node 2 tests/distillation_worker.py JOBS.json

JOBS.json says what to train, one after another; the main process writes what came of it into JOBS.result.json.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import JOB_WORDS

from distillabse import processes
from distillabse.config import JobConfig, TeacherConfig
from distillabse.corpus.records import Record
from distillabse.models.student import build_student
from distillabse.models.teacher import load_teacher, transformer_of
from distillabse.training.pairs import TranslationPairs, prepare_pairs

OBJECTIVES = [
    {"kind": "cosine"}, {"kind": "minilm", "weight": 0.5}, {"kind": "hidden", "weight": 2.0},
    {"kind": "minilm_v2", "relation_heads": 8, "weight": 0.1},
]  # fmt: skip
# On translation pairs: all but the first compare the pairs of all processes with each other.
PAIR_OBJECTIVES = [
    {"kind": "multilingual"}, {"kind": "contrastive", "scale": 5.0}, {"kind": "structure_level"},
    {"kind": "logit", "temperature": 1.0},
]  # fmt: skip
TRAINING = {
    "per_device_train_batch_size": 8, "learning_rate": 2e-3, "max_steps": 30, "logging_steps": 1, "eval_steps": 10,
    "save_steps": 10, "bf16": False, "report_to": [], "load_best_model_at_end": False,
    # So large that rounding errors of near-zero gradients move nothing.
    "adam_epsilon": 1e-3,
}  # fmt: skip


def corpus(n, seed=0):
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(JOB_WORDS, size=random.integers(2, 14))) for _ in range(n)]


def pairs(n):
    """Sentences and their words backwards, as if that were another language."""
    return [Record(text, "en", " ".join(reversed(text.split())), "de") for text in corpus(n)]


def job(teacher, output, **settings):
    """What a worker is told: `settings` are of `training`, or one of these."""
    others = ("student", "shard_teacher", "checkpoint", "shared_weight", "on_pairs")
    blocks = {name: settings.pop(name) for name in others if name in settings}
    return {"teacher": str(teacher), "output": str(output), "training": {**TRAINING, **settings}, **blocks}


def train(job):
    """Train as `job` says, in as many processes as there are; what came of it, in the main process."""
    from distillabse.training.data import tokenised_sentences
    from distillabse.training.distillation import distill, held_out_fidelity, trainer_arguments

    config = JobConfig.model_validate(
        {
            "name": "tiny",
            "teacher": {"model": job["teacher"]},
            "corpus": {"sources": [{"kind": "phrasebook"}]},
            "student": job.get("student", {"layers": 2, "hidden_size": 16, "attention_heads": 4, "head": "dense"}),
            "objectives": PAIR_OBJECTIVES if job.get("on_pairs") else OBJECTIVES,
            "training": job["training"],
            "shard_teacher": job.get("shard_teacher", False),
        }
    )
    arguments = trainer_arguments(config, Path(job["output"]))
    teacher = load_teacher(TeacherConfig(model=job["teacher"]))
    student = build_student(teacher, config.student)
    if job.get("shared_weight"):
        first, second = transformer_of(student).encoder.layer
        second.attention.self.query.weight = first.attention.self.query.weight
    held_out = held_out_fidelity(teacher, corpus(30, seed=1)) if processes.is_main() else None
    data = (
        translation_pairs(student, teacher, Path(job["output"]).with_suffix(".pairs"))
        if job.get("on_pairs")
        else tokenised_sentences(teacher, corpus(100))
    )
    return student, distill(config, teacher, student, data, held_out, arguments, job.get("checkpoint"))


def translation_pairs(student, teacher, folder):
    def prepare():
        prepare_pairs(student, teacher, lambda: pairs(100), folder, True, None, True)

    processes.agreed(prepare)
    return TranslationPairs.open(folder)


def in_one_process(job):
    student, history = train(job)
    return result(student, history)


def result(student, history):
    return {
        "losses": [entry["loss"] for entry in history["log"] if "loss" in entry],
        "cosines": [entry["cosine"] for entry in history["log"] if "cosine" in entry],
        "skills": [entry["eval_skill"] for entry in history["log"] if "eval_skill" in entry],
        "vectors": student.encode(corpus(10, seed=2)).tolist() if processes.is_main() else None,
        "history": {name: history[name] for name in ("processes", "zero_stage", "precision", "resumed_from")},
    }


def launch(jobs, folder, processes=2, name="jobs"):
    """What came of each of these jobs, by name, one after another in `processes`.

    A process may abort while it exits, after its work, so there is one more try.
    """
    if shutil.which("c++") is None and any(job["training"].get("deepspeed") for job in jobs.values()):
        pytest.skip("DeepSpeed builds an operator with a C++ compiler, and there is no c++")
    file = folder / f"{name}.json"
    file.write_text(json.dumps(jobs), encoding="utf-8")
    done = file.with_suffix(".result.json")
    for _ in range(2):
        completed = subprocess.run(
            [*launcher(processes), __file__, str(file)],
            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400, check=False,
        )  # fmt: skip
        if done.is_file():
            return json.loads(done.read_text(encoding="utf-8"))
        if "Error" in completed.stdout:
            break
    raise AssertionError(f"the processes did not finish:\n{completed.stdout[-6000:]}")


def launcher(processes):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]


OF_A_LAUNCHER = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")


def environment():
    folder = Path(__file__).parent
    paths = f"{folder}{os.pathsep}{folder.parent}"  # this package, and no other that is installed
    # What a launcher, or a library in its place, told this process is not for those that it starts.
    own = {name: value for name, value in os.environ.items() if name not in OF_A_LAUNCHER}
    return own | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths}


def main(file):
    torch.set_num_threads(1)
    jobs = json.loads(Path(file).read_text(encoding="utf-8"))
    results = {name: result(*train(job)) for name, job in jobs.items()}
    if processes.is_main():
        temporary = Path(file).with_suffix(".partial")
        temporary.write_text(json.dumps(results), encoding="utf-8")
        temporary.rename(Path(file).with_suffix(".result.json"))


if __name__ == "__main__":
    main(*sys.argv[1:])
