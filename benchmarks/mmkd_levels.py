"""Which of the MMKD-style levels help retrieval, and which help transfer: each on, off, alone and together.

    python benchmarks/mmkd_levels.py --data data [--runs runs] [--seeds 0 1 2]
    python benchmarks/mmkd_levels.py --table          # print what was measured

One student shape, one corpus of seven languages beside English, the same number of steps for every row; the teacher is
all-MiniLM-L6-v2, which knows English alone. All rows of a seed start from the same weights: layers drawn at random on a
table that learnt alone (static_warmup), whose own scores stand beside them, as a static model and under untrained
layers, and those of model2vec's static distillation of the teacher. Judged on Tatoeba (top-1 retrieval, both
directions) and on MASSIVE (a probe of intents that learns in English and reads the other languages).

Rows that are in benchmarks/results/mmkd_levels.json already are kept: it can be stopped at any time.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling_tables import markdown

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

RESULT = Path(__file__).parent / "results" / "mmkd_levels.json"
LANGUAGES = ["de", "fr", "es", "it", "pt", "nl", "sv"]
RETRIEVED = LANGUAGES[:-1]  # LASER's selection of Tatoeba has no Swedish
PAIRS, STEPS, BATCH = 60_000, 250, 64
SENTENCE: dict[str, Any] = {"kind": "multilingual"}
TOKEN: dict[str, Any] = {"kind": "token_level", "weight": 1.0}
WORD: dict[str, Any] = {"kind": "word_level", "weight": 0.1}
STRUCTURE: dict[str, Any] = {"kind": "structure_level", "weight": 0.3}
ROWS = {
    "sentence": [SENTENCE],
    "sentence, token": [SENTENCE, TOKEN],
    "sentence, word": [SENTENCE, WORD],
    "sentence, structure": [SENTENCE, STRUCTURE],
    "all four": [SENTENCE, TOKEN, WORD, STRUCTURE],
    "all but sentence": [TOKEN, WORD, STRUCTURE],
    "all but token": [SENTENCE, WORD, STRUCTURE],
    "all but word": [SENTENCE, TOKEN, STRUCTURE],
    "all but structure": [SENTENCE, TOKEN, WORD],
    "token": [TOKEN],
    "word": [WORD],
    "structure": [STRUCTURE],
}
UNTRAINED, STATIC, FLOOR = "untrained layers", "static model", "model2vec of the teacher"


def main() -> None:
    """Train and judge what is missing, and write every row as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print(levels_table())
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("distillabse").setLevel(logging.INFO)

    from distillabse.environment import describe_environment
    from distillabse.storage import read_json, write_json

    result = read_json(RESULT) if RESULT.is_file() else {"rows": []}
    result |= {
        "command": f"python benchmarks/mmkd_levels.py --data {arguments.data}",
        "languages": LANGUAGES,
        "pairs": PAIRS,
        "steps": STEPS,
        "batch": BATCH,
        "objectives": ROWS,
        "environment": describe_environment(),
    }
    there = {(row["row"], row["seed"]) for row in result["rows"]}
    bench = Bench(arguments.data, arguments.runs)
    if ("teacher", 0) not in there:
        result["rows"].append({"row": "teacher", "seed": 0, **bench.judge(bench.reference)})
        write_json(RESULT, result)
    if (FLOOR, 0) not in there:
        result["rows"].append({"row": FLOOR, "seed": 0, **bench.judge(bench.floor())})
        write_json(RESULT, result)
    for seed in arguments.seeds:
        missing = [name for name in (STATIC, UNTRAINED, *ROWS) if (name, seed) not in there]
        start = bench.start(seed) if missing else None
        for name in missing:
            result["rows"].append({"row": name, "seed": seed, **bench.row(name, start, seed)})
            write_json(RESULT, result)
            print(name, seed, {key: round(result["rows"][-1][key], 4) for key in ("tatoeba", "massive")}, flush=True)


def levels_table() -> str:
    """Every row's scores: mean over seeds, and their range."""
    found = json.loads(RESULT.read_text(encoding="utf-8"))["rows"]
    rows = []
    for name in ("teacher", FLOOR, STATIC, UNTRAINED, *ROWS):
        scores = [row for row in found if row["row"] == name]
        if scores:
            keys = ("tatoeba", "cosine", "massive")
            cells = [spread([row[key] for row in scores if row[key] is not None]) for key in keys]
            rows.append([name, str(len(scores)), *cells])
    headings = [
        "levels", "seeds", "Tatoeba, top-1", "cosine of translations to the teacher's English", "MASSIVE intents",
    ]  # fmt: skip
    return markdown(headings, rows)


def spread(values: list[float]) -> str:
    """Mean and range of shares, in percent."""
    if not values:
        return "-"
    shown = f"{100 * sum(values) / len(values):.1f}"
    return shown if len(values) == 1 else f"{shown} ({100 * min(values):.1f} to {100 * max(values):.1f})"


class Bench:
    """Corpus, vocabulary, teacher and tasks, which all rows share."""

    def __init__(self, data: Path, runs: Path) -> None:
        from distillabse.models.teacher import load_teacher
        from distillabse.pipeline import is_current, prepare, run_stage
        from distillabse.tasks.run import load_tasks

        self.data, self.runs = data, runs
        self.config = self.job(ROWS["all four"])
        self.run = prepare(self.config)
        for stage in ("corpus", "vocabulary"):
            if not is_current(stage, self.config, self.run):
                run_stage(stage, self.config, self.run)
        self.teacher = load_teacher(self.config.teacher)
        self.reference = Remembered(self.teacher)
        self.tasks = load_tasks(self.config.tasks, 0)
        self.pairs = self.prepared()

    def job(self, objectives: list[dict[str, Any]], seed: int = 0) -> Any:
        """The configuration of one row."""
        from distillabse.settings import load_config, validate

        values = load_config("multilingual-minilm", [f"output={self.runs}"]).model_dump(mode="json")
        source = values["corpus"]["sources"][0]
        with_states = any(objective["kind"] == "token_level" for objective in objectives)
        evaluation = self.data / "eval"
        values |= {
            "name": "mmkd-levels",
            "seed": seed,
            "objectives": objectives,
            "student": {"layers": 2, "intermediate_size": 768, "initialisation": "random"},
            "static_warmup": None,
            "teacher_cache": str(self.runs / "mmkd-levels" / ("cache-states" if with_states else "cache")),
            "tasks": {
                "tasks": [
                    {
                        "kind": "retrieval", "name": "tatoeba", "languages": RETRIEVED, "margin": False,
                        "max_pairs": 500,
                        "pairs": {
                            "kind": "files", "path": str(evaluation / "tatoeba_test.tsv.gz"), "text": "src",
                            "language_column": "lang", "translation": "eng", "translation_language": "en",
                        },
                    },
                    {
                        "kind": "probe", "name": "massive", "languages": LANGUAGES, "max_pairs": 500,
                        "train": {
                            "path": str(evaluation / "massive_probe_train_en.tsv.gz"), "label": "intent",
                            "language": "en",
                        },
                        "test": {
                            "path": str(evaluation / "massive_dev.tsv.gz"), "label": "intent",
                            "language_column": "lang",
                        },
                    },
                ]
            },
        }  # fmt: skip
        values["corpus"] |= {
            "sources": [
                {**source, "path": str(self.data / "parallel_train" / f"{language}.tsv.gz")} for language in LANGUAGES
            ],
            "max_sentences": PAIRS,
            "temperature": 2.0,
        }
        values["vocabulary"] |= {"size": 16_000}
        values["training"] = {
            "per_device_train_batch_size": BATCH, "learning_rate": 1e-3, "max_steps": STEPS, "warmup_steps": 50,
            "bf16": True, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False,
            "logging_steps": 50, "report_to": [],
        }  # fmt: skip
        return validate(values)

    def prepared(self) -> Any:
        """The pairs, with links of words."""
        from distillabse.corpus.records import iterate_records
        from distillabse.models.teacher import base_encoder
        from distillabse.training.pairs import TranslationPairs, prepare_pairs

        folder = self.run.root / "pairs"
        if folder.is_dir():
            return TranslationPairs.open(folder)
        base, split = base_encoder(self.config, self.run), self.run.split("train")
        return prepare_pairs(
            base, self.teacher, lambda: iterate_records(split), folder, False, ["en"], True, self.config.aligner
        )

    def floor(self) -> Any:
        """The teacher distilled into a static encoder by model2vec (pip install 'distillabse[floor]')."""
        from distillabse.tasks.run import static_floor

        return static_floor(self.config, self.run)

    def start(self, seed: int) -> tuple[SentenceTransformer, Any]:
        """What all rows of a seed start from: the student, and its table as a static model."""
        import torch

        from distillabse.config import MultilingualObjective, StaticWarmupConfig
        from distillabse.models.student import build_student
        from distillabse.models.teacher import base_encoder, transformer_of
        from distillabse.training.cache import cache_identity, teacher_cache
        from distillabse.training.distiller import Distiller
        from distillabse.training.static_warmup import warm_up_table

        torch.manual_seed(seed)
        config = self.job(ROWS["sentence"], seed)
        student = build_student(base_encoder(config, self.run), config.student)
        distiller = Distiller(student, self.teacher, [MultilingualObjective()])
        identity = cache_identity(distiller, self.pairs.teacher, bf16=True)
        cpu = torch.device("cpu")
        cache = teacher_cache(distiller, self.pairs.teacher, config.teacher_cache, identity, cpu)
        warm_up_table(student, self.pairs, cache, StaticWarmupConfig(), seed, cpu)
        return student, transformer_of(student).get_input_embeddings().weight.detach().clone()

    def row(self, name: str, start: Any, seed: int) -> dict[str, Any]:
        """Train one row from the start of its seed, and judge it."""
        from distillabse.training.distillation import distill, trainer_arguments

        student, table = copy.deepcopy(start[0]), start[1]
        if name == STATIC:
            return self.judge(StaticEncoder(student, table))
        if name == UNTRAINED:
            return self.judge(student.eval())
        config = self.job(ROWS[name], seed)
        checkpoints = self.run.root / "checkpoints"
        shutil.rmtree(checkpoints, ignore_errors=True)
        started = time.process_time()
        history = distill(config, self.teacher, student, self.pairs, None, trainer_arguments(config, checkpoints))
        terms = [row for row in history["log"] if "loss" in row][-1]
        scores = self.judge(student)
        return {**scores, "cpu_seconds": round(time.process_time() - started, 1), "last_log": terms}

    def judge(self, encoder: Any) -> dict[str, Any]:
        """Mean scores over the languages, and each language's."""
        from distillabse.tasks.run import run_tasks

        found = run_tasks({"student": encoder, "teacher": self.reference}, self.tasks, teacher="teacher")["tasks"]
        tatoeba, massive = (found[task]["encoders"]["student"] for task in ("tatoeba", "massive"))
        return {
            "tatoeba": tatoeba["accuracy"]["mean"]["value"],
            "massive": massive["accuracy"]["mean"]["value"],
            # None for vectors of other dimensions than the teacher's.
            "cosine": tatoeba["teacher_cosine_other"]["mean"]["value"] if "teacher_cosine_other" in tatoeba else None,
            "languages": {
                "tatoeba": tatoeba["accuracy"]["languages"],
                "massive": massive["accuracy"]["languages"],
            },
        }


class Remembered:
    """An encoder that is asked for the same texts again and again."""

    def __init__(self, encoder: SentenceTransformer) -> None:
        self.encoder = encoder
        self.vectors: dict[str, Any] = {}

    def encode(self, texts: list[str], **_: Any) -> Any:
        """float32 [texts, dimension]."""
        import numpy as np

        new = [text for text in dict.fromkeys(texts) if text not in self.vectors]
        self.vectors.update(zip(new, self.encoder.encode(new, show_progress_bar=False), strict=True))
        return np.stack([self.vectors[text] for text in texts])


class StaticEncoder:
    """Mean of the rows of a text's tokens."""

    def __init__(self, student: SentenceTransformer, table: Any) -> None:
        self.student = student
        self.table = table.numpy()

    def encode(self, texts: list[str], **_: Any) -> Any:
        """float32 [texts, dimension]."""
        import numpy as np

        from distillabse.models.tokens import tokenise

        return np.stack([self.table[ids].mean(axis=0) for ids in tokenise(self.student, texts)])


if __name__ == "__main__":
    main()
