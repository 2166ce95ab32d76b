"""Text, vocabulary, cache and training of one arm of pair_tricks.py."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

LANGUAGES = ("de", "fr", "nl", "sv", "es")
PAIRS_OF_A_LANGUAGE, DEV = 12_000, 1_000
ROWS, BATCH = 16_000, 64
TIMED_STEPS, ROUNDS = 20, 3
STUDENT = {"layers": 2, "intermediate_size": 768, "initialisation": "random"}


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


def arm_file(folder: Path, name: str, steps: int, seed: int) -> Path:
    """Where the figures of a trained arm are."""
    return folder / "arms" / f"{''.join(c if c.isalnum() else '-' for c in name)}-{steps}-{seed}.json"


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

        path = arm_file(self.folder, name, steps, seed)
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
            if trainer.stop.requested:
                raise SystemExit("Stopped by a signal; what was trained of this arm is thrown away.")
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

    def timed(self) -> None:
        """Write CPU seconds of some steps with the teacher's vectors on disk and with the teacher running, in turns."""
        from distillabse.storage import write_json

        path = self.folder / "timed.json"
        if path.is_file():
            return
        student = self.start(0)[0]
        ways = {"cached": True, "live": False}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        self.train(student, {}, 0, TIMED_STEPS)  # warm-up
        for number in range(ROUNDS):
            for way in sorted(ways, reverse=number % 2 == 1):
                seconds[way].append(self.train(student, {}, 0, TIMED_STEPS, ways[way]))
        write_json(path, seconds)


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
