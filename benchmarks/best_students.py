"""The best students of all-MiniLM-L6-v2 that one CPU core makes in hours: fidelity at the speeds that they reach.

    python benchmarks/open_text.py                               # fetch more English text, once
    python benchmarks/best_students.py prepare --data data       # gather, filter, write data/broad
    python benchmarks/best_students.py train [NAME ...]          # configs/minilm-broad.yaml, with another shape each
    python benchmarks/best_students.py measure                   # fidelity and speed: results/best_students.json

`prepare` reads mono_train/en.tsv.gz and the English side of parallel_train/*.tsv.gz, holds out the dev and test
sentences of configs/minilm-english.yaml, and drops every text that equals a held-out text or any text under eval/, but
for case and punctuation. `train` goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import logging
import os
import random
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from augmentation import augmented
from real_text import RECIPE, places
from stages import run_missing

AUGMENTED, AUGMENTED_AGAIN = 120_000, 150_000
# Half of Webster 1913 is about words that nobody uses any more.
AT_MOST = {"dict-gcide": 80_000}
SEED = 0
RESULTS = Path(__file__).parent / "results"
TORCH, ONNX = "teacher-torch", "teacher-onnx"


def main() -> None:
    """Gather, train or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["prepare", "train", "measure"])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(STUDENTS)}; by default all")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--open-text", type=Path, default=Path("data/open_text"))
    parser.add_argument("--broad", type=Path, default=Path("data/broad"))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("distillabse").setLevel(logging.INFO)
    if arguments.step == "prepare":
        prepare(arguments.data, arguments.open_text, arguments.broad)
        return
    chosen = arguments.names or list(STUDENTS)
    if arguments.step == "train":
        for name in chosen:
            train(name, arguments.data, arguments.broad, arguments.runs)
        return

    from distillabse.storage import write_json

    write_json(RESULTS / "best_students.json", measure(chosen, arguments.data, arguments.broad, arguments.runs))


# The smallest learn the sentence vector alone, from one cache of the teacher.
LIGHT: dict[str, Any] = {
    "objectives": [{"kind": "cosine"}],
    "cache": "broad-teacher-cache",
    "sentences": 150_000,
    "training": {"per_device_train_batch_size": 64, "num_train_epochs": 3},
    "gates": {"teacher_cosine_mean": 0.8},
}
# Of the student of thirty languages that `distillabse run multilingual-minilm` trains.
MULTILINGUAL: dict[str, Any] = {
    "teacher": "multilingual-minilm/student",
    "cache": "multilingual-best-cache",
    "sentences": 200_000,
    "training": {"per_device_train_batch_size": 64, "num_train_epochs": 3},
}
SMALLEST: dict[str, Any] = {
    "layers": 1,
    "hidden_size": 256,
    "intermediate_size": 256,
    "attention_heads": 8,
    "head": "dense",
}
# A table that is trained along costs nothing when it is served, and makes up for layers that are not there.
STUDENTS: dict[str, dict[str, Any]] = {
    "3x384": {"student": {"layers": 3, "freeze_embeddings": True}},
    # Goes on from the first, with made-up text that it has not seen.
    "3x384-longer": {
        "student": {"layers": 3, "freeze_embeddings": True},
        "continue_from": "best-3x384/student",
        "text": ["train-english.txt", "train-wordnet-base.txt", "train-fortunes.txt", "again-augmented.txt"],
        "training": {"learning_rate": 5e-4, "num_train_epochs": 1},
    },
    "2x384-192": {"student": {"layers": 2, "intermediate_size": 192}, **LIGHT},
    "1x256-256": {
        "student": SMALLEST,
        **LIGHT,
        "training": {"per_device_train_batch_size": 64, "num_train_epochs": 8},
    },
    "multilingual-1x384-192": {"student": {"layers": 1, "intermediate_size": 192}, **LIGHT, **MULTILINGUAL},
    "multilingual-1x256-256": {
        "student": SMALLEST,
        **LIGHT,
        **MULTILINGUAL,
    },
}
# The same student with another INT8 graph: static, its scales trained along.
STATIC = {
    "3x384-longer": {
        "kind": "static",
        "training": {"training": {"max_steps": 600, "learning_rate": 3e-5, "report_to": []}},
    }
}


def prepare(data: Path, open_text: Path, broad: Path) -> None:
    """Write train-*.txt and test.txt into `broad`."""
    from distillabse.corpus.build import build_corpus
    from distillabse.corpus.cleaning import near_key
    from distillabse.settings import load_config

    english = build_corpus(load_config(RECIPE, ["corpus.max_sentences=null", *places(data)]).corpus, SEED)
    held_out = [record.text for split in ("dev", "test") for record in english.splits[split]]
    taboo = {near_key(text) for text in (*held_out, *evaluation_texts(data / "eval"))}
    broad.mkdir(parents=True, exist_ok=True)
    (broad / "test.txt").write_text("\n".join(record.text for record in english.splits["test"]) + "\n", "utf-8")
    sources = {"english": [record.text for record in english.splits["train"]]}
    for path in sorted(open_text.glob("*.txt")):
        texts = path.read_text(encoding="utf-8").splitlines()
        sources[path.stem] = random.Random(SEED).sample(texts, min(len(texts), AT_MOST.get(path.stem, len(texts))))
    kept: dict[str, list[str]] = {}
    for name, texts in sources.items():
        kept[name] = []
        for text in texts:
            if (key := near_key(text)) not in taboo:
                taboo.add(key)
                kept[name].append(text)
    real = [text for texts in kept.values() for text in texts]
    words = words_to_show([*kept["english"], *kept["wordnet-base"]])
    files = {f"train-{name}": texts for name, texts in kept.items()}
    for name, rows, seed in (("train", AUGMENTED, SEED), ("again", AUGMENTED_AGAIN, SEED + 1)):
        made = augmented(real, words, rows, seed)
        files[f"{name}-augmented"] = [text for text in made if near_key(text) not in taboo]
    for name, texts in files.items():
        (broad / f"{name}.txt").write_text("\n".join(texts) + "\n", "utf-8")
        print(f"{name}.txt: {len(texts):,} sentences")


def evaluation_texts(folder: Path) -> Iterable[str]:
    """Every field of every evaluation table."""
    for path in sorted(folder.glob("*.tsv.gz")):
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
                yield from row


def words_to_show(texts: Sequence[str]) -> list[str]:
    """Words of the texts and of the teacher's vocabulary, each once."""
    from distillabse.config import TeacherConfig
    from distillabse.models.teacher import load_teacher

    vocabulary = load_teacher(TeacherConfig(model="packaged:all-MiniLM-L6-v2")).tokenizer.get_vocab()
    words = {word for text in texts for word in re.findall(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)?", text.lower())}
    return sorted(words | {word for word in vocabulary if word.isalpha() and len(word) > 1})


def job(name: str, data: Path, broad: Path, runs: Path) -> Any:
    """The configuration of one student."""
    from distillabse.settings import load_config, validate

    sets = {"in_domain": broad / "test.txt", "banking77": data / "eval/banking77.tsv.gz"}
    sets["tweets"] = data / "eval/tweeteval_emotion.tsv.gz"
    values = load_config(
        "minilm-broad", [f"output={runs}", *(f"evaluation.sets.{key}.path={path}" for key, path in sets.items())]
    ).model_dump(mode="json")
    values["name"] = f"best-{name}"
    changed = STUDENTS[name]
    source = values["corpus"]["sources"][0]
    values["corpus"]["sources"] = [
        {**source, "path": f"{broad}/{file}"} for file in changed.get("text", ["train-*.txt"])
    ]
    values["student"] = dict(changed["student"])
    if changed.get("continue_from"):
        values["student"]["continue_from"] = str(runs / changed["continue_from"])
    values["training"] |= changed.get("training", {})
    values["gates"] |= changed.get("gates", {})
    if changed.get("teacher"):
        values["teacher"] = {"model": str(runs / changed["teacher"])}
        values["corpus"]["sources"] = [
            {"kind": "files", "path": f"{data}/parallel_train/*.tsv.gz", "text": "en", "language": "en"},
            {"kind": "files", "path": f"{data}/parallel_train/*.tsv.gz", "text": "xx", "language_column": "lang"},
            {"kind": "files", "path": f"{data}/mono_train/*.tsv.gz", "text": "text", "language_column": "lang"},
        ]
        values["corpus"]["temperature"] = 2.0
        tatoeba = {"kind": "files", "path": f"{data}/eval/tatoeba_test.tsv.gz", "text": "src"}
        values["evaluation"]["sets"] = {"tatoeba": {**tatoeba, "language_column": "lang"}}
    if "objectives" in changed:
        values["objectives"], values["teacher_cache"] = changed["objectives"], str(runs / changed["cache"])
        values["corpus"]["max_sentences"] = changed["sentences"]
    return validate(values)


def train(name: str, data: Path, broad: Path, runs: Path) -> None:
    """Every stage that is not done yet, up to the bundle."""
    run_missing(job(name, data, broad, runs), ("corpus", "vocabulary", "distill", "export", "verify"))


def static_graph(name: str, data: Path, broad: Path, runs: Path) -> Path:
    """The bundle of the same student, trained on with rounding for a static INT8 graph."""
    from distillabse.settings import validate

    trained = job(name, data, broad, runs)
    values = trained.model_dump(mode="json")
    values["name"] += "-static"
    values["export"]["quantization"] |= STATIC[name]
    config = validate(values)
    if not Path(config.run_folder).is_dir():
        shutil.copytree(trained.run_folder, config.run_folder, ignore=shutil.ignore_patterns("bundle", "verify"))
    return Path(run_missing(config, ("quantize", "export")).bundle)


def measure(chosen: Sequence[str], data: Path, broad: Path, runs: Path) -> dict[str, Any]:
    """Fidelity and speed of these students, each beside its own teacher."""
    from distillabse.environment import describe_environment

    groups: dict[str, list[str]] = {}
    for name in chosen:
        groups.setdefault(STUDENTS[name].get("teacher", "all-MiniLM-L6-v2"), []).append(name)
    return {
        "command": f"python benchmarks/best_students.py measure {' '.join(chosen)}",
        "teachers": {teacher: measure_group(names, data, broad, runs) for teacher, names in groups.items()},
        "environment": describe_environment(),
    }


def measure_group(names: Sequence[str], data: Path, broad: Path, runs: Path) -> dict[str, Any]:
    """The students of one teacher, in one alternating run."""
    from comparison import fidelity_of, opened, settings, size_of, teacher_bundle
    from sittings import sit

    from distillabse import layout
    from distillabse.evaluation.latency import Engine
    from distillabse.evaluation.sets import evaluation_sets
    from distillabse.layout import RunFolder

    configs = {name: job(name, data, broad, runs) for name in names}
    config = configs[names[0]]
    bundles = {name: RunFolder(one.run_folder).bundle for name, one in configs.items()}
    bundles |= {f"{name}, static INT8": static_graph(name, data, broad, runs) for name in names if name in STATIC}
    model = Path(config.teacher.model)
    teacher = teacher_bundle(config.teacher, runs / f"best-teacher-{model.parent.name or 'minilm'}")
    sets = evaluation_sets(config, RunFolder(config.run_folder))
    texts = {key: [one.text for one in found] for key, found in sets.items()}
    judged = fidelity_of(opened(str(teacher), {name: str(bundle) for name, bundle in bundles.items()}), texts)
    engines = [
        Engine(TORCH, "torch", teacher),
        Engine(ONNX, "onnx", teacher, layout.ONNX_FP32),
        *(Engine(name, "onnx", bundle, layout.int8_graph(bundle)) for name, bundle in bundles.items()),
    ]
    speed = sit(engines, next(iter(texts.values())), settings(), SEED, (TORCH, ONNX))
    students = {}
    for name, bundle in bundles.items():
        plain = name.partition(",")[0]
        students[name] = {
            **size_of(bundle),
            "fidelity": judged[name],
            "latency": speed["latency"][name],
            "trainings": trainings(configs[plain]),
            "config": configs[plain].model_dump(mode="json", include=EXACT),
        }
    return {
        "teacher": {**size_of(teacher), "latency": {name: speed["latency"][name] for name in (TORCH, ONNX)}},
        "students": students,
        **{key: speed[key] for key in ("tokens", "threads", "sittings", "cores_used_by_others")},
    }


def trainings(config: Any) -> list[dict[str, Any]]:
    """That of the student that this one goes on from, if any, and its own."""
    from distillabse.layout import RunFolder

    earlier = config.student.continue_from
    return [training_of(RunFolder(root)) for root in (*([earlier.parent] if earlier else []), config.run_folder)]


def training_of(run: Any) -> dict[str, Any]:
    """How a student was trained: steps, time and machine, and sentences seen."""
    from distillabse.settings import load_config
    from distillabse.storage import read_json

    history = read_json(run.training_history)
    batch = load_config(str(run.config)).training["per_device_train_batch_size"]
    return {
        **{key: value for key, value in history.items() if key != "log"},
        "sentences_seen": history["steps"] * batch,
    }


EXACT = {"seed", "corpus", "student", "objectives", "training", "export"}

if __name__ == "__main__":
    main()
