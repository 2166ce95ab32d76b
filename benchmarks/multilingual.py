"""One student for thirty languages from an English teacher: the tasks it is judged by, and how it grows with data.

    distillabse run multilingual-minilm --until export
    python benchmarks/multilingual.py floor      # the static model of the same pairs, as a folder
    distillabse bench multilingual-minilm --tasks --only tatoeba --against static-pairs=runs/multilingual-minilm-static
    distillabse verify multilingual-minilm
    python benchmarks/multilingual.py tasks      # keeps the scores; the same for all other tasks, tasks.max_pairs=500
    python benchmarks/multilingual.py curve      # the same recipe on fewer pairs

With tasks.baselines=[random,static] model2vec's distillation of the teacher stands beside.

`floor` writes what a table alone learns from the same pairs: the fair floor beside model2vec's distillation of the
English teacher, which never sees another language. `curve` trains the recipe for the same short time on more and more
pairs, and writes benchmarks/results/multilingual_curve.json; points that are there are kept. The scores of
`bench --tasks` go to benchmarks/results/multilingual_tasks.json with `python benchmarks/multilingual.py tasks`, and
`figures` prints the tables of docs/multilingual.md and draws its plot.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from pathlib import Path
from typing import Any

from scaling_tables import markdown

RESULTS = Path(__file__).parent / "results"
CURVE, TASKS, PLOT = (RESULTS / f"multilingual_{name}" for name in ("curve.json", "tasks.json", "curve.svg"))
PAIRS: list[int | None] = [3_000, 20_000, 100_000, None]
STEPS = 300
# Of LASER's selection of Tatoeba, the languages of the training pairs.
LANGUAGES = "ar bn de el es fa fi fr he hi hu id it ja ko nl pt ru sw th tr ur vi zh".split()
EVERYDAY = ["de", "fr", "es", "it", "pt", "nl"]


def main() -> None:
    """Do what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["floor", "curve", "tasks", "figures"])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("distillabse").setLevel(logging.INFO)
    if arguments.what == "floor":
        floor(arguments.runs)
    elif arguments.what == "curve":
        curve(arguments.data, arguments.runs)
    elif arguments.what == "tasks":
        tasks(arguments.runs)
    else:
        print("\n\n".join([tasks_table(), held_out_sentence(), retrieval_table(), curve_table()]))
        plot()


def floor(runs: Path) -> None:
    """Train the table of the student alone, and write it as a static encoder that sentence-transformers loads."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding

    from distillabse.config import StaticWarmupConfig
    from distillabse.corpus.records import iterate_records
    from distillabse.models.teacher import base_encoder, load_teacher
    from distillabse.pipeline import prepare
    from distillabse.settings import load_config
    from distillabse.storage import new_folder
    from distillabse.training.cache import cache_identity, teacher_cache
    from distillabse.training.distiller import Distiller
    from distillabse.training.pairs import TranslationPairs, prepare_pairs
    from distillabse.training.static_warmup import train_static_model

    config = load_config("multilingual-minilm", [f"output={runs}"])
    run, cpu = prepare(config), torch.device("cpu")
    kept = runs / "multilingual-kept"
    teacher, base = load_teacher(config.teacher), base_encoder(config, run)
    split = run.split("train")
    if (kept / "training-data").is_dir():
        pairs = TranslationPairs.open(kept / "training-data")
    else:
        pairs = prepare_pairs(
            base, teacher, lambda: iterate_records(split), kept / "training-data", False, config.teacher.languages, True
        )
    distiller = Distiller(base, teacher, config.objectives)
    identity = cache_identity(distiller, pairs.teacher, bf16=True)
    cache = teacher_cache(distiller, pairs.teacher, kept / "teacher-cache", identity, cpu)
    rows = base[0].auto_model.config.vocab_size
    warmup = config.static_warmup or StaticWarmupConfig()
    # Static encoders read texts without [CLS] and [SEP].
    words = TranslationPairs(without_ends(pairs.student), pairs.teacher, pairs.rows)
    static, _ = train_static_model(rows, teacher.get_embedding_dimension(), words, cache, warmup, config.seed, cpu)
    module = StaticEmbedding(base.tokenizer.backend_tokenizer, embedding_weights=static.table.weight.detach())
    with new_folder(runs / "multilingual-minilm-static") as folder:
        SentenceTransformer(modules=[module, Normalize()], device="cpu").save(str(folder), create_model_card=False)


def without_ends(sentences: Any) -> Any:
    """The same sentences without their first and last token."""
    import numpy as np

    from distillabse.training.data import TokenisedSentences

    starts = sentences.starts[0 : len(sentences) + 1]
    inside = np.ones(int(starts[-1]), bool)
    inside[starts[:-1]] = inside[starts[1:] - 1] = False
    ids = sentences.ids[0 : int(starts[-1])][inside]
    return TokenisedSentences(ids, starts - 2 * np.arange(len(starts)), sentences.digest)


def curve(data: Path, runs: Path) -> None:
    """Train and judge what is missing."""
    from distillabse.environment import describe_environment
    from distillabse.models.teacher import load_encoder
    from distillabse.pipeline import is_current, prepare, run_stage
    from distillabse.settings import load_config, validate
    from distillabse.storage import read_json, write_json
    from distillabse.tasks.run import load_tasks, run_tasks

    result = read_json(CURVE) if CURVE.is_file() else {"points": []}
    result |= {
        "command": "python benchmarks/multilingual.py curve",
        "steps": STEPS,
        "languages": LANGUAGES,
        "environment": describe_environment(),
    }
    for size in PAIRS:
        if size in [point["max_pairs"] for point in result["points"]]:
            continue
        values = load_config("multilingual-minilm", [f"output={runs}"]).model_dump(mode="json")
        values["name"] = f"multilingual-curve-{size or 'all'}"
        values["corpus"]["max_sentences"] = size
        values["corpus"]["sources"][0]["path"] = str(data / "parallel_train" / "*.tsv.gz")
        if size is None:
            values["teacher_cache"] = str(runs / "multilingual-kept" / "teacher-cache")
        else:
            values["vocabulary"]["size"] = min(32_000, 8_000 + size // 4)
        values["training"] |= {
            "max_steps": STEPS, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False,
            "warmup_steps": 60, "report_to": [],
        }  # fmt: skip
        values["tasks"] = {
            "tasks": [
                {
                    "kind": "retrieval", "name": "tatoeba", "languages": LANGUAGES, "margin": False,
                    "max_pairs": 500,
                    "pairs": {
                        "kind": "files", "path": str(data / "eval" / "tatoeba_test.tsv.gz"), "text": "src",
                        "language_column": "lang", "translation": "eng", "translation_language": "en",
                    },
                }
            ]
        }  # fmt: skip
        config = validate(values)
        run = prepare(config)
        for stage in ("corpus", "vocabulary", "distill"):
            if not is_current(stage, config, run):
                run_stage(stage, config, run, resume=True)
        student = load_encoder(str(run.student))
        scores = run_tasks({"student": student}, load_tasks(config.tasks, 0))["tasks"]["tatoeba"]["encoders"]["student"]
        result["points"].append(
            {
                "max_pairs": size,
                "pairs": read_json(run.corpus_counts)["splits"]["train"]["rows"],
                "tatoeba": scores["accuracy"]["mean"],
                "languages": {name: score["value"] for name, score in scores["accuracy"]["languages"].items()},
            }
        )
        write_json(CURVE, result)
        print(size, result["points"][-1]["tatoeba"], flush=True)


def tasks(runs: Path) -> None:
    """Keep what `bench --tasks` has measured, and what the training took."""
    from distillabse.layout import RunFolder
    from distillabse.storage import read_json, write_json

    run = RunFolder(runs / "multilingual-minilm")
    history = read_json(run.training_history)
    scores = read_json(run.task_scores)
    for task in scores["tasks"].values():
        for encoder in task["encoders"].values():
            for measure in set(encoder) - KEPT:
                del encoder[measure]
    if TASKS.is_file():  # tasks of an earlier call, e.g. with other bounds
        earlier = read(TASKS)
        if earlier["export"] == scores["export"]:
            scores["tasks"] = earlier["tasks"] | scores["tasks"]
    scores["training"] = {key: value for key, value in history.items() if key != "log"}
    scores["dev_curve"] = [entry for entry in history["log"] if "eval_cosine" in entry]
    found = read_json(run.verification)["fidelity"]["onnx-int8"]["test"]
    scores["held_out"] = {
        "cosine_mean": found["cosine_mean"],
        "languages": found["slices"]["language"],
    }
    write_json(TASKS, scores)


ENCODERS = {
    "student": "student (INT8)",
    "teacher": "teacher",
    "static-pairs": "static model of the pairs",
    "static": "model2vec of the teacher",
    "random": "random vectors",
}
SCORES = [
    ("tatoeba", "accuracy", LANGUAGES, "Tatoeba, 24 trained languages, top-1"),
    ("tatoeba", "accuracy", EVERYDAY, "Tatoeba, de fr es it pt nl, top-1"),
    ("tatoeba", "margin_accuracy", LANGUAGES, "Tatoeba, 24 trained languages, top-1 by margin"),
    ("tatoeba", "teacher_cosine_other", EVERYDAY, "Tatoeba, de fr es it pt nl, cosine to the teacher's English"),
    ("ntrex", "accuracy", None, "NTREX (news), top-1"),
    ("flores", "accuracy", None, "FLORES of SIB-200, top-1"),
    ("stsb", "spearman", None, "STS-b dev, Spearman"),
    ("stsb", "cross_spearman", None, "STS-b dev across languages, Spearman"),
    ("massive", "accuracy", None, "MASSIVE intents, probe learns in English, accuracy"),
    ("banking77", "accuracy", None, "Banking77, accuracy"),
    ("emotion", "accuracy", None, "TweetEval emotion, accuracy"),
]


KEPT = {measure for _, measure, _, _ in SCORES} | {"mixed_accuracy", "teacher_cosine_pivot"}


def tasks_table() -> str:
    """Every task's mean over languages, for every encoder, in percent."""
    scores = read(TASKS)
    present = [name for name in ENCODERS if name in scores["encoders"]]
    rows = []
    for task, measure, languages, label in SCORES:
        cells = [mean(scores, task, name, measure, languages) for name in present]
        rows.append([label, *(f"{100 * value:.1f}" if value is not None else "-" for value in cells)])
    return markdown(["", *(ENCODERS[name] for name in present)], rows)


def retrieval_table() -> str:
    """Tatoeba language by language."""
    scores = read(TASKS)
    encoders = scores["tasks"]["tatoeba"]["encoders"]
    rows = []
    for language in LANGUAGES:
        score = encoders["student"]["accuracy"]["languages"][language]
        low, high = score["ci95"]
        cells = [f"{score['n']:,}", f"{100 * score['value']:.1f} ({100 * low:.1f} to {100 * high:.1f})"]
        for name, measure in (
            ("student", "mixed_accuracy"),
            ("student", "teacher_cosine_other"),
            ("static-pairs", "accuracy"),
            ("teacher", "accuracy"),
        ):
            value = encoders[name][measure]["languages"][language]["value"] if name in encoders else None
            cells.append("-" if value is None else f"{value:.3f}" if "cosine" in measure else f"{100 * value:.1f}")
        rows.append([language, *cells])
    headings = [
        "", "pairs", "student top-1 (95 %)", "against the teacher's English", "cosine to the teacher's English",
        "static model of the pairs", "teacher",
    ]  # fmt: skip
    return markdown(headings, rows)


def held_out_sentence() -> str:
    """Cosines on held-out pairs of the corpus."""
    languages = dict(read(TASKS)["held_out"]["languages"])
    english = languages.pop("en")
    translations = sum(row["n"] for row in languages.values())
    mean = sum(row["n"] * row["cosine_mean"] for row in languages.values()) / translations
    return (
        f"On held-out pairs of the corpus the INT8 student's mean cosine to the teacher's English vector is {mean:.3f} "
        f"for {translations:,} translations and {english['cosine_mean']:.3f} for {english['n']:,} English sides."
    )


def curve_table() -> str:
    """Accuracy by the number of training pairs."""
    rows = [
        [f"{point['pairs']:,}", f"{100 * point['tatoeba']['value']:.1f}", f"{100 * everyday(point):.1f}"]
        for point in read(CURVE)["points"]
    ]
    return markdown(["training pairs", "24 languages, top-1", "de fr es it pt nl, top-1"], rows)


def everyday(point: dict[str, Any]) -> float:
    """Mean over the six languages with sources in everyday use."""
    return sum(point["languages"][language] for language in EVERYDAY) / len(EVERYDAY)


def mean(scores: dict[str, Any], task: str, encoder: str, measure: str, languages: list[str] | None) -> float | None:
    """Mean of a measure over languages, by default all that the task has; None where it was not measured."""
    measures = scores["tasks"].get(task, {}).get("encoders", {}).get(encoder, {})
    if measure not in measures:
        return None
    if languages is None:
        return float(measures[measure]["mean"]["value"])
    values = [measures[measure]["languages"][language]["value"] for language in languages]
    return float(sum(values) / len(values))


def plot() -> None:
    """Accuracy against the number of pairs, for every language."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    points = read(CURVE)["points"]
    pairs = [point["pairs"] for point in points]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for language in LANGUAGES:
        axes.plot(pairs, [100 * point["languages"][language] for point in points], color="0.8", linewidth=0.8)
    axes.plot(pairs, [100 * point["tatoeba"]["value"] for point in points], "o-", label="mean of 24 languages")
    axes.plot(pairs, [100 * everyday(point) for point in points], "s-", label="mean of de fr es it pt nl")
    axes.set(xscale="log", xlabel="training pairs", ylabel="Tatoeba, top-1 accuracy in %", ylim=(0, 100))
    axes.legend()
    figure.savefig(PLOT)


def read(path: Path) -> Any:
    """A result."""
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
