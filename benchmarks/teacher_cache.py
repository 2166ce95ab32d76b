"""How long an epoch takes with the teacher's vectors on disk, beside running the teacher.

    python benchmarks/teacher_cache.py --data data [--runs runs] [--rounds 5]

Two teachers, the same 3x384 student with frozen embeddings, the cosine objective, on one core: all-MiniLM-L6-v2 on
English text, and LaBSE's shape with random weights (labse_stand_in.py) on text of all languages. Epochs with the cache
filled and without it alternate in one process; what filling it takes is measured once. Sentences are drawn at random
from the training text in `--data`, so their lengths are real.

Writes benchmarks/results/teacher_cache.json. Takes under ten minutes where the stand-in is there already.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SEED = 42
SENTENCES = {"all-MiniLM-L6-v2": 1600, "LaBSE's shape": 640}
STUDENT = {"layers": 3, "hidden_size": 384, "freeze_embeddings": True}


def main() -> None:
    """Measure both teachers and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"

    import torch
    from labse_stand_in import stand_in, training_sentences

    from distillabse.config import PACKAGED_TEACHER
    from distillabse.environment import describe_environment
    from distillabse.storage import write_json

    torch.set_num_threads(1)
    sentences = training_sentences(arguments.data)
    texts = {
        "all-MiniLM-L6-v2": [sentence.text for sentence in sentences if sentence.language == "en"],
        "LaBSE's shape": [sentence.text for sentence in sentences],
    }
    # LaBSE's vectors have 768 dimensions: a head takes the student's 384 there.
    teachers = {
        "all-MiniLM-L6-v2": (PACKAGED_TEACHER, STUDENT),
        "LaBSE's shape": (str(stand_in(arguments.data, arguments.runs)), {**STUDENT, "head": "dense"}),
    }
    result: dict[str, Any] = {
        "command": f"python benchmarks/teacher_cache.py --data {arguments.data} --rounds {arguments.rounds}",
        "threads": 1,
        "teachers": {},
    }
    for name, (model, student) in teachers.items():
        drawn = random.Random(SEED).sample(texts[name], SENTENCES[name])
        result["teachers"][name] = measured = measure(model, student, drawn, arguments.rounds)
        print(f"{name}: {measured['times_as_long']:.2f} times as long without the cache", flush=True)
    result["environment"] = describe_environment()
    write_json(RESULTS / "teacher_cache.json", result)


def measure(model: str, student: dict[str, Any], texts: Sequence[str], rounds: int) -> dict[str, Any]:
    """Seconds of epochs with and without the cache, in turns, and of filling it."""
    import numpy as np

    from distillabse.config import CosineObjective, DenseStudentConfig, TeacherConfig
    from distillabse.models.student import build_student
    from distillabse.models.teacher import load_teacher
    from distillabse.training.cache import cache_identity, teacher_cache
    from distillabse.training.data import tokenised_sentences
    from distillabse.training.distiller import Distiller

    teacher = load_teacher(TeacherConfig(model=model))
    sentences = tokenised_sentences(teacher, texts)
    counts = np.bincount(np.asarray(sentences.ids), minlength=len(teacher.tokenizer))
    distiller = Distiller(build_student(teacher, DenseStudentConfig(**student), counts), teacher, [CosineObjective()])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = training_settings(folder / "training")
        started = time.perf_counter()
        identity = cache_identity(distiller, sentences, settings.bf16, model)
        cache = teacher_cache(distiller, sentences, folder / "cache", identity, settings.device)
        fill = time.perf_counter() - started
        size = sum(path.stat().st_size for path in (folder / "cache").iterdir())
        ways = {"with the cache": cache, "without it": None}
        epoch(distiller, sentences, settings, cache)  # warm-up
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(rounds):
            for way in sorted(ways, reverse=number % 2 == 1):
                seconds[way].append(epoch(distiller, sentences, settings, ways[way]))
    ratios = [without / filled for filled, without in zip(*(seconds[way] for way in ways), strict=True)]
    return {
        "sentences": len(sentences),
        "tokens_per_sentence": len(sentences.ids) / len(sentences),
        "batch_size": settings.train_batch_size,
        "precision": identity.precision,
        "student": student,
        "seconds_of_an_epoch": {way: statistics.median(values) for way, values in seconds.items()},
        "times_as_long": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios)[::2] if rounds > 1 else None,
        "rounds": seconds,
        "seconds_to_fill": fill,
        "cache_bytes": size,
    }


def training_settings(folder: Path) -> Any:
    """The project's own defaults for one epoch without evaluation or checkpoints."""
    from distillabse.config import JobConfig
    from distillabse.settings import training_arguments

    training = {
        "num_train_epochs": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "report_to": [],
    }
    # Teacher and text are measure's own; the job only gives the arguments.
    values = {
        "name": "benchmark",
        "seed": SEED,
        "teacher": {"model": "none"},
        "corpus": {"sources": [{"kind": "phrasebook"}]},
        "objectives": [{"kind": "cosine"}],
        "training": training,
    }
    return training_arguments(JobConfig.model_validate(values), folder)


def epoch(distiller: Any, sentences: Any, settings: Any, cache: Any) -> float:
    """Seconds of one epoch, as the Trainer counts them."""
    from distillabse.training.trainer import DistillationTrainer

    trainer = DistillationTrainer(distiller, settings, sentences, cache=cache)
    return float(trainer.train().metrics["train_runtime"])


if __name__ == "__main__":
    main()
