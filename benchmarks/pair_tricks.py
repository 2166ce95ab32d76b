"""What helps before or around distillation on translation pairs: one question at a time, at equal steps.

    python benchmarks/pair_tricks.py --data data [--runs runs] [--steps 300] [--seeds 0 1 2]

The teacher, all-MiniLM-L6-v2, knows English alone; a student of 2 layers x 384 with a vocabulary of its own learns from
pairs with German, French, Dutch, Swedish and Spanish. Every arm has the same pairs and number of steps, and differs in
the start of the table, in the objectives, or in how batches are composed (pair_batches.py). A seed decides the
student's start, the order of pairs and the groups; arms of one seed share them.

Figures are of 1,000 held-out pairs cut from the training text, whose English occurs on neither side of training.
The weight of `contrastive` was chosen on them beforehand, by a seed and a third of the steps of its own (`pilot`).
Arms that are there already are not trained again. Writes benchmarks/results/pair_tricks.json after every arm, and
prints the table of docs/pair-objectives.md.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
LANGUAGES = ("de", "fr", "nl", "sv", "es")
PAIRS_OF_A_LANGUAGE, DEV = 12_000, 1_000
ROWS, BATCH, STEPS = 16_000, 64, 300
PILOT_SEED, WEIGHTS = 42, (0.05, 0.2)
TIMED_STEPS, ROUNDS = 20, 3
STUDENT = {"layers": 2, "intermediate_size": 768, "initialisation": "random"}
NO_START, START, CONTRASTIVE = "no static start", "static start", "static start, contrastive"
ARMS: dict[str, dict[str, Any]] = {
    NO_START: {"static": False},
    START: {},
    CONTRASTIVE: {"contrastive": True},
    "static start, contrastive, hard negatives": {"contrastive": True, "batches": "neighbours"},
    "static start, short pairs first": {"batches": "short first"},
}
MEASURES = {
    "cosine": "cosine to the teacher",
    "retrieval": "top-1, own vectors",
    "teacher_retrieval": "top-1, teacher's vectors",
}


def main() -> None:
    """Prepare text, vocabulary and cache once, train what is missing, and write and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")

    import torch

    from distillabse.environment import describe_environment
    from distillabse.storage import write_json

    torch.set_num_threads(1)
    bench = Bench(arguments.data, arguments.runs / "pair-tricks")
    steps = arguments.steps
    pilot = {
        weight: bench.trained(f"pilot {weight}", {"contrastive": weight}, PILOT_SEED, steps // 3) for weight in WEIGHTS
    }
    weight = max(WEIGHTS, key=lambda weight: pilot[weight]["teacher_retrieval"])
    result: dict[str, Any] = {
        "command": f"python benchmarks/pair_tricks.py --data {arguments.data} --steps {steps}",
        "pairs": len(bench.pairs),
        "dev_pairs": len(bench.dev),
        "vocabulary": ROWS,
        "student": STUDENT,
        "batch_size": BATCH,
        "steps": steps,
        "pilot": {"seed": PILOT_SEED, "steps": steps // 3, "weights": {str(key): pilot[key] for key in WEIGHTS}},
        "contrastive_weight": weight,
        "static_start_cpu_seconds": bench.start(PILOT_SEED)[1],
        "cache": {"cpu_seconds_to_fill": bench.filled_in, **bench.timed()},
        "environment": describe_environment(),
        "arms": {name: [] for name in ARMS},
    }
    for seed in arguments.seeds:
        for name, settings in ARMS.items():
            arm = {**settings, "contrastive": weight if settings.get("contrastive") else 0.0}
            result["arms"][name].append({"seed": seed, **bench.trained(name, arm, seed, steps)})
            print(name, result["arms"][name][-1], flush=True)
            write_json(RESULTS / "pair_tricks.json", result)
    print(table(result), costs(result), sep="\n\n")


def split(data: Path) -> tuple[list[Any], list[Any]]:
    """Training pairs and dev pairs, as records: no English text, and no translation, of dev is in training."""
    from labse_stand_in import read

    from distillabse.corpus.cleaning import normalised_key

    drawn = random.Random(0)
    records = []
    for language in LANGUAGES:
        columns = {"text": "en", "language": "en", "translation": "xx", "translation_language_column": "lang"}
        rows = list(read(data / f"parallel_train/{language}.tsv.gz", **columns))
        records += drawn.sample(rows, min(PAIRS_OF_A_LANGUAGE, len(rows)))
    drawn.shuffle(records)
    keys = [[normalised_key(side) for side in (record.text, str(record.translation))] for record in records]
    dev: dict[str, Any] = {}
    for (source, _), record in zip(keys, records, strict=True):
        if len(dev) < DEV:
            dev.setdefault(source, record)
    held_out = {normalised_key(side) for record in dev.values() for side in (record.text, str(record.translation))}
    train = [record for sides, record in zip(keys, records, strict=True) if held_out.isdisjoint(sides)]
    return train, list(dev.values())


class Bench:
    """Text, vocabulary, token ids and the teacher's vectors, which all arms share; and what was trained already."""

    def __init__(self, data: Path, folder: Path) -> None:
        import numpy as np
        from tokenizers import Tokenizer

        from distillabse.config import PACKAGED_TEACHER, MultilingualObjective, TeacherConfig
        from distillabse.models.teacher import load_teacher
        from distillabse.storage import new_file, read_json, write_json
        from distillabse.training.cache import cache_identity, teacher_cache
        from distillabse.training.distiller import Distiller
        from distillabse.training.pairs import TranslationPairs, prepare_pairs
        from distillabse.vocabulary.making import make_tokenizer, with_tokenizer

        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.teacher = load_teacher(TeacherConfig(model=PACKAGED_TEACHER), "cpu")
        train, self.dev = split(data)
        tokenizer = folder / "tokenizer.json"
        if not tokenizer.is_file():
            texts = (side for record in train for side in (record.text, str(record.translation)))
            with new_file(tokenizer) as temporary:
                make_tokenizer(texts, ROWS, "wordpiece", lower_case=True).save(str(temporary))
        self.base = with_tokenizer(self.teacher, Tokenizer.from_file(str(tokenizer)), 0)
        if not (folder / "pairs").is_dir():
            prepare_pairs(self.base, self.teacher, lambda: train, folder / "pairs", False, ["en"], distinct=True)
        self.pairs = TranslationPairs.open(folder / "pairs")
        sources, seconds = self.pairs.teacher, folder / "cache-seconds.json"
        distiller = Distiller(self.student(0), self.teacher, [MultilingualObjective()])
        identity = cache_identity(distiller, sources, True, PACKAGED_TEACHER)
        started = time.process_time()
        self.cache = teacher_cache(distiller, sources, folder / "cache", identity, self.teacher.device)
        if not seconds.is_file():
            write_json(seconds, round(time.process_time() - started, 1))
        self.filled_in = read_json(seconds)
        known = self.pairs.pair_rows(np.arange(len(self.pairs)))[:, 0]
        self.vectors = np.asarray(self.cache.sentence, dtype=np.float32)[known]
        self.targets = self.teacher.encode([record.text for record in self.dev], show_progress_bar=False)

    def student(self, seed: int) -> Any:
        """An untrained student."""
        from transformers import set_seed

        from distillabse.config import DenseStudentConfig
        from distillabse.models.student import build_student

        set_seed(seed)
        return build_student(self.base, DenseStudentConfig(**STUDENT))

    def start(self, seed: int) -> tuple[Any, float]:
        """A student whose table learned alone first, and the CPU seconds that took."""
        from safetensors.torch import load_file, save_file

        from distillabse.config import StaticWarmupConfig
        from distillabse.storage import new_file, read_json, write_json
        from distillabse.training.static_warmup import warm_up_table

        weights, seconds = (self.folder / f"start-{seed}.{ending}" for ending in ("safetensors", "json"))
        student = self.student(seed)
        if not seconds.is_file():
            started = time.process_time()
            warm_up_table(student, self.pairs, self.cache, StaticWarmupConfig(), seed, self.teacher.device)
            took = round(time.process_time() - started, 1)
            with new_file(weights) as temporary:
                save_file({name: tensor.clone() for name, tensor in student.state_dict().items()}, temporary)
            write_json(seconds, took)
        student.load_state_dict(load_file(weights))
        return student, read_json(seconds)

    def trained(self, name: str, arm: dict[str, Any], seed: int, steps: int) -> dict[str, Any]:
        """Figures of one arm, which is trained unless they are there."""
        from distillabse.storage import read_json, write_json

        path = self.folder / "arms" / f"{''.join(c if c.isalnum() else '-' for c in name)}-{steps}-{seed}.json"
        made_from = {"arm": arm, "seed": seed, "steps": steps, "pairs": len(self.pairs)}
        if path.is_file() and (kept := read_json(path))["made_from"] == made_from:
            figures: dict[str, Any] = kept["figures"]
            return figures
        student = self.start(seed)[0] if arm.get("static", True) else self.student(seed)
        started = time.process_time()
        self.train(student, arm, seed, steps)
        figures = {"cpu_seconds": round(time.process_time() - started, 1), **self.measured(student.eval())}
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"made_from": made_from, "figures": figures})
        return figures

    def train(self, student: Any, arm: dict[str, Any], seed: int, steps: int, cached: bool = True) -> float:
        """Train a student in place; returns the CPU seconds that its steps took."""
        from transformers import set_seed

        from distillabse.config import ContrastiveObjective, MultilingualObjective
        from distillabse.training.cpu import fast_on_cpu
        from distillabse.training.distiller import Distiller

        objectives: list[Any] = [MultilingualObjective()]
        if weight := arm.get("contrastive"):
            objectives.append(ContrastiveObjective(weight=weight))
        set_seed(seed)
        settings = training_settings(self.folder / "training", seed, steps)
        distiller = Distiller(student, self.teacher, objectives)
        trainer = trainer_class()(distiller, settings, self.pairs, cache=self.cache if cached else None)
        trainer.own_batches = self.batches(arm.get("batches"), seed, steps)
        with fast_on_cpu(student, settings):
            started = time.process_time()
            trainer.train()
            return time.process_time() - started

    def batches(self, kind: str | None, seed: int, steps: int) -> Any:
        """How an arm's batches are composed; None as everywhere in the package."""
        from pair_batches import NeighbourBatches, ShortPairsFirst

        if kind == "neighbours":
            return NeighbourBatches(self.pairs, BATCH, self.vectors, seed=seed)
        return ShortPairsFirst(self.pairs, BATCH, steps, seed=seed) if kind == "short first" else None

    def measured(self, student: Any) -> dict[str, float]:
        """Mean cosine of translations to the teacher's vectors of sources, and top-1 of translations among sources."""
        import numpy as np

        from distillabse.tasks.retrieval import credits

        sources, translations = (
            student.encode(side, batch_size=BATCH, show_progress_bar=False)
            for side in zip(*((record.text, record.translation) for record in self.dev), strict=True)
        )
        each = np.arange(len(self.dev))
        return {
            "cosine": float((translations * self.targets).sum(axis=1).mean()),
            "retrieval": float(credits(translations @ sources.T, each).mean()),
            "teacher_retrieval": float(credits(translations @ self.targets.T, each).mean()),
        }

    def timed(self) -> dict[str, Any]:
        """Pairs a CPU second with the teacher's vectors on disk and with the teacher running, in turns."""
        from distillabse.storage import read_json, write_json

        path = self.folder / "timed.json"
        if not path.is_file():
            student = self.start(0)[0]
            ways = {"cached": True, "live": False}
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            self.train(student, {}, 0, TIMED_STEPS)  # warm-up
            for number in range(ROUNDS):
                for way in sorted(ways, reverse=number % 2 == 1):
                    seconds[way].append(self.train(student, {}, 0, TIMED_STEPS, ways[way]))
            write_json(path, seconds)
        seconds = read_json(path)
        ratios = [live / cached for cached, live in zip(seconds["cached"], seconds["live"], strict=True)]
        return {
            "pairs_per_cpu_second": {
                way: round(TIMED_STEPS * BATCH / statistics.median(values), 1) for way, values in seconds.items()
            },
            "live_takes_times_as_long": statistics.median(ratios),
            "range": [min(ratios), max(ratios)],
            "cpu_seconds": seconds,
        }


def trainer_class() -> Any:
    """The package's Trainer with batches of its own, where an arm has them; imported late, as threads are set first."""
    from distillabse.training.batches import SentenceLoader
    from distillabse.training.trainer import DistillationTrainer

    class OwnBatches(DistillationTrainer):
        own_batches: Any = None

        def get_train_dataloader(self) -> SentenceLoader:
            if self.own_batches is None:
                return super().get_train_dataloader()
            return SentenceLoader(self.train_dataset, batch_sampler=self.own_batches, collate_fn=self.data_collator)

    return OwnBatches


def training_settings(folder: Path, seed: int, steps: int) -> Any:
    """The training block of configs/multilingual-minilm.yaml, for so many steps without evaluation or checkpoints."""
    from distillabse.config import JobConfig
    from distillabse.settings import training_arguments

    nothing_else = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "report_to": []}
    training = {"learning_rate": 1e-3, "warmup_steps": steps // 10, "max_steps": steps, "bf16": True, **nothing_else}
    values = {
        "name": "benchmark",
        "seed": seed,
        "teacher": {"model": "none"},
        "corpus": {"sources": [{"kind": "phrasebook"}]},
        "objectives": [{"kind": "cosine"}],
        "training": {"per_device_train_batch_size": BATCH, **training},
    }
    return training_arguments(JobConfig.model_validate(values), folder)


def table(result: dict[str, Any]) -> str:
    """Every arm: mean of the seeds and their range, and the CPU seconds of its steps."""
    from scaling_tables import markdown

    rows = []
    for name, seeds in result["arms"].items():
        if not seeds:
            continue
        figures = [spread([seed[measure] for seed in seeds]) for measure in MEASURES]
        rows.append(
            [name, *figures, f"{statistics.median(seed['cpu_seconds'] for seed in seeds):.0f}", str(len(seeds))]
        )
    return markdown(["arm", *MEASURES.values(), "CPU seconds", "seeds"], rows)


def spread(values: list[float]) -> str:
    """Mean, and of several the lowest and highest."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def costs(result: dict[str, Any]) -> str:
    """What cached vectors save and what the static start takes, in a sentence each."""
    cache, (low, high) = result["cache"], result["cache"]["range"]
    rates, start = cache["pairs_per_cpu_second"], result["static_start_cpu_seconds"]
    step = statistics.median(seed["cpu_seconds"] for seed in result["arms"][START]) / result["steps"]
    return (
        f"With the teacher's vectors cached, {rates['cached']:.0f} pairs are trained on in a CPU second; with the "
        f"teacher running {rates['live']:.0f}: {cache['live_takes_times_as_long']:.2f} times as long "
        f"({low:.2f} to {high:.2f}). Filling the cache took {cache['cpu_seconds_to_fill']:.0f} CPU seconds, a static "
        f"start {start:.0f}, as much as {start / step:.0f} steps."
    )


if __name__ == "__main__":
    main()
