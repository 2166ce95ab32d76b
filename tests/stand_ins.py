"""What documented commands meet instead of the hub, large teachers and hours of training: small models and texts.

Commands run as they are written. Every configuration is first checked in full, then made small: widths are an eighth,
depths a quarter of what it says, and two steps are trained.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from tiny import JOB_WORDS, tiny_encoder

from distillabse import layout

# Encoders of the hub, and the packaged one, by the folder that stands in for each.
ENCODERS = {
    "sentence-transformers/LaBSE": "labse",
    "packaged:all-MiniLM-L6-v2": "minilm",
    "intfloat/multilingual-e5-small": "minilm",
}
LANGUAGES = ("de", "fr", "ja")


def make_encoders(folder: Path) -> None:
    """LaBSE's layout and proportions, and MiniLM's: an eighth as wide, and of a few layers."""
    tiny_encoder(folder / "labse", layers=3, hidden=96, heads=12, pooling="cls", dense=True, max_length=384)
    tiny_encoder(folder / "minilm", layers=2, hidden=48, heads=12, max_length=384, seed=1)
    for name in ("labse", "minilm"):  # as many positions as fine-tuning wants, but shorter texts are quicker
        settings = folder / name / layout.TRANSFORMER_SETTINGS
        shorter = {**json.loads(settings.read_text(encoding="utf-8")), "max_seq_length": 64}
        settings.write_text(json.dumps(shorter), encoding="utf-8")


# Of `bench`: timings mean nothing here.
QUICK = {
    "batch_sizes": [1],
    "rounds": 5,
    "interval": None,
    "seconds_per_round": 0.001,
    "threads": 1,
    "cold_starts": 1,
    "throughput_runs": 1,
}
# Guards that look at this machine, or at how long was measured.
OF_THE_MACHINE = ("few pairs", "CPU throttling", "other processes")


def shrunk(values: dict[str, Any]) -> dict[str, Any]:
    """A job's values made small. What it is made of (kinds, heads, objectives, stages) stays."""
    values = json.loads(json.dumps(values))
    trained = [values, *filter(None, (values["assistant"], values["export"]["quantization"]["training"]))]
    for block in trained:
        block["training"] = _short(block["training"])
        if isinstance(block.get("student"), dict):
            block["student"] = _narrow(block["student"])
    for source in values["corpus"]["sources"]:
        if source["kind"] == "phrasebook":
            source.update(languages=["en", "de"], expansions_per_pattern=1)
    values["corpus"]["split"] = {"dev": 0.1, "test": 0.2, "max_dev": 30, "max_test": 40}
    if values["corpus"]["max_sentences"]:
        values["corpus"]["max_sentences"] = 200
    if values["vocabulary"]["size"]:
        values["vocabulary"]["size"] = max(values["vocabulary"]["size"] // 100, 320)
    if values["static_warmup"]:
        values["static_warmup"].update(epochs=1, batch_size=64)
    values["export"]["quantization"]["calibration_sentences"] = 32
    values["evaluation"].update(bootstrap_samples=100, max_sentences=40)
    values["tasks"]["bootstrap_samples"] = 100
    values["gates"] = open_gates(values["gates"])
    values["bench"].update(QUICK)
    values["plan"].update(layers=[1], hidden_size=[24], embedding_size=[None], rounds=5)
    values["plan"]["speedup"] /= 1000
    return values


def open_gates(gates: dict[str, Any]) -> dict[str, Any]:
    """Gates that a student of two steps meets, where how good it is decides; the others stay as they are."""
    return {
        **gates,
        "int8_to_fp32_mean": 0.9,
        "int8_to_fp32_p1": 0.8,
        "int8_to_fp32_language_mean": 0.9,
        "teacher_cosine_mean": -1.0,
        "teacher_skill": -1000.0,
    }


def _short(training: dict[str, Any]) -> dict[str, Any]:
    steps = {"max_steps": 2, "per_device_train_batch_size": 8, "eval_steps": 1, "save_steps": 1, "logging_steps": 1}
    machine = {"dataloader_num_workers": 0, "bf16": False, "report_to": []}
    return {**training, **steps, **machine}


def _narrow(student: dict[str, Any]) -> dict[str, Any]:
    if student["kind"] == "teacher":
        return student
    widths = ("hidden_size", "intermediate_size", "embedding_size", "expert_size")
    narrow = {name: student[name] // 8 for name in widths if student.get(name)}
    depth = student["layers"] if isinstance(student["layers"], list) else max(student["layers"] // 4, 1)
    return {**student, **narrow, "layers": depth}


def make_texts(folder: Path) -> None:
    """Every file of text that the pages name, with the columns that they say."""
    lines = sentences(24, seed=1)
    for name in ("texts.txt", "sentences.txt", "mine.txt"):
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = [{"text": text, "language": ("en", "de")[row % 2]} for row, text in enumerate(lines)]
    write_table(folder / "mine.tsv", rows)
    for code in LANGUAGES:
        pairs = zip(sentences(60, seed=2), sentences(60, seed=3), strict=True)
        table = [{"en": en, "xx": f"{xx} {code}", "lang": code} for en, xx in pairs]
        write_table(folder / "data" / "parallel_train" / f"{code}.tsv.gz", table)
    _make_evaluation_data(folder / "data" / "eval")


def _make_evaluation_data(folder: Path) -> None:
    codes = ("eng", "deu", "fra")
    texts = sentences(12, seed=4)
    others = sentences(12, seed=5)
    pairs = list(zip(texts, others, strict=True))
    write_table(
        folder / "tatoeba_test.tsv.gz", [{"lang": code, "src": b, "eng": a} for code in codes[1:] for a, b in pairs]
    )
    aligned = [(code, row, f"{text} {code}") for code in codes for row, text in enumerate(texts)]
    write_table(folder / "ntrex_001_500.tsv.gz", [{"lang": c, "line": row, "text": text} for c, row, text in aligned])
    write_table(folder / "sib200_devtest.tsv.gz", [{"lang": c, "id": row, "text": text} for c, row, text in aligned])
    scored = [{"lang": "en", "sentence1": a, "sentence2": b, "score": row % 6} for row, (a, b) in enumerate(pairs)]
    write_table(folder / "stsb_dev.tsv.gz", scored)
    labelled = [{"split": split, "label": f"class {row % 2}", "text": text}
                for split, some in (("train", texts), ("test", others)) for row, text in enumerate(some)]  # fmt: skip
    for name in ("banking77", "tweeteval_emotion"):
        write_table(folder / f"{name}.tsv.gz", labelled)
    intents = [{"lang": "en", "id": row, "intent": f"intent {row % 2}", "text": text} for row, text in enumerate(texts)]
    write_table(folder / "massive_probe_train_en.tsv.gz", intents)
    write_table(folder / "massive_dev.tsv.gz", [{**row, "text": f"{row['text']} now"} for row in intents])
    write_table(folder / "xquad.tsv.gz", [
        {"lang": code, "id": row, "question": f"Where is the {word} {row}?", "context": f"{text} {row} {code}",
         "answer": text.split()[0]}
        for code in ("en", "de") for row, (text, word) in enumerate(zip(texts, JOB_WORDS, strict=False))
    ])  # fmt: skip


def sentences(count: int, seed: int) -> list[str]:
    """Different sentences of a few words."""
    random = np.random.default_rng(seed)
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[" ".join(random.choice(JOB_WORDS, size=random.integers(4, 9)))] = None
    return list(drawn)


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join("\t".join(map(str, row)) for row in [list(rows[0]), *(row.values() for row in rows)]) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def hub_dataset(name: str, configuration: str | None = None, *, split: str, **options: Any) -> Any:
    """A dataset of the hub with the columns that it has there; any other name is an error, as on the hub."""
    import datasets

    seed = sum(map(ord, f"{name}{split}"))
    first, second = sentences(80, seed), sentences(80, seed + 1)
    if name.startswith("sentence-transformers/parallel-sentences-"):
        columns: dict[str, Any] = {"english": first, "non_english": [f"{text} {configuration}" for text in second]}
    elif name == "facebook/xnli":
        columns = {"premise": first[:12], "hypothesis": second[:12], "label": [row % 3 for row in range(12)]}
    elif name == "google-research-datasets/paws-x":
        columns = {"sentence1": first[:12], "sentence2": second[:12], "label": [row % 2 for row in range(12)]}
    elif name in ("rajpurkar/squad", "google/xquad"):
        answers = [{"text": [text.split()[0]], "answer_start": [0]} for text in first[:12]]
        ids = [f"{name} {row}" for row in range(12)]
        questions = [f"Where is the {text}?" for text in second[:12]]
        columns = {"id": ids, "question": questions, "context": first[:12], "answers": answers}
    else:
        raise FileNotFoundError(f"the hub has no dataset {name!r}")
    return datasets.Dataset.from_dict(columns)


class Hub:
    """In the place of `huggingface_hub.HfApi`: takes a bundle, and remembers it."""

    token = "a token"

    def __init__(self, **settings: Any) -> None:
        self.repositories: dict[str, Path] = {}

    def create_repo(self, repo_id: str, **options: Any) -> None:
        from huggingface_hub.utils import validate_repo_id

        validate_repo_id(repo_id)

    def create_branch(self, repo_id: str, **options: Any) -> None:
        """As on the hub, where it is there already."""

    def upload_folder(self, repo_id: str, folder_path: Path, create_pr: bool, **options: Any) -> Any:
        from types import SimpleNamespace

        assert (folder_path / "README.md").is_file()
        address = f"https://huggingface.co/{repo_id}"
        return SimpleNamespace(
            commit_url=f"{address}/commit/1", pr_url=f"{address}/discussions/1" if create_pr else None
        )


def mteb_task(get_task: Callable[[str], Any]) -> Callable[[str], Any]:
    """mteb's tasks with two rows of each subset instead of the hub's data; a name that mteb lacks is its KeyError."""

    def found(name: str) -> Any:
        import datasets

        task = get_task(name)
        kind = task.metadata.type
        first, second = sentences(3, 6), sentences(3, 7)
        columns: dict[str, Any] = {"sentence1": first, "sentence2": second}
        if kind == "STS":
            columns["score"] = [1.0, 3.0, 2.0]
        split = task.metadata.eval_splits[0]
        subsets = list(task.hf_subsets)[:2]

        def load_data(*arguments: Any, **options: Any) -> None:
            task.dataset = {subset: {split: datasets.Dataset.from_dict(columns)} for subset in subsets}
            task.data_loaded = True

        task.hf_subsets, task.load_data = subsets, load_data
        return task

    return found


def use_stand_ins(monkeypatch: Any, folder: Path) -> None:
    """Put all this in its place, and the working directory and caches into `folder`; encoders are in its `encoders`."""
    import datasets
    import huggingface_hub

    from distillabse import environment, settings
    from distillabse.config import BenchConfig, GatesConfig
    from distillabse.demo import server
    from distillabse.evaluation import guards
    from distillabse.models import teacher
    from distillabse.verification import texts

    built_in_texts = texts.built_in_texts
    validate, resolve, load_gates, load_bench, demo_server, is_trusted = (
        settings.validate,
        teacher.resolve_model,
        settings.load_gates,
        settings.load_bench,
        server.demo_server,
        guards.is_trusted,
    )

    def validated(values: dict[str, Any], origin: str = "the configuration") -> Any:
        small = shrunk(validate(values, origin).model_dump(mode="json"))
        if Path(small["output"]).is_absolute():  # nothing is written outside
            small["output"] = str(folder / Path(small["output"]).relative_to("/"))
        return validate(small, origin)

    def resolved(model: str) -> str:
        return str(folder / "encoders" / ENCODERS[model]) if model in ENCODERS else resolve(model)

    def opened(overrides: Sequence[str]) -> GatesConfig:
        return GatesConfig.model_validate(open_gates(load_gates(overrides).model_dump()))

    def quick(overrides: Sequence[str]) -> BenchConfig:
        return BenchConfig.model_validate(load_bench(overrides).model_dump() | QUICK)

    def trusted(found: Sequence[dict[str, Any]]) -> bool:
        return is_trusted([guard for guard in found if guard["guard"] not in OF_THE_MACHINE])

    def served(bundle: Path, port: int, **options: Any) -> AbstractContextManager[Any]:
        running = demo_server(bundle, 0, **options)
        monkeypatch.setattr(running, "serve_forever", lambda: None)
        return running

    def few_texts(per_language: int = 4) -> list[Any]:
        return built_in_texts(per_language)

    monkeypatch.chdir(folder)
    monkeypatch.setattr(texts, "built_in_texts", few_texts)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setenv("HF_TOKEN", "a-token")
    monkeypatch.setattr(settings, "validate", validated)
    monkeypatch.setattr(settings, "load_gates", opened)
    monkeypatch.setattr(settings, "load_bench", quick)
    monkeypatch.setattr(guards, "is_trusted", trusted)
    monkeypatch.setattr(teacher, "resolve_model", resolved)
    monkeypatch.setattr(server, "demo_server", served)
    monkeypatch.setattr(environment, "_problems", lambda *found: [])  # of this machine, not of the command
    monkeypatch.setattr(datasets, "load_dataset", hub_dataset)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    try:
        import mteb
    except ImportError:
        return
    monkeypatch.setattr(mteb, "get_task", mteb_task(mteb.get_task))


def make_assets(cache: Path) -> None:
    """The files that the demo's page runs on, as if they had been fetched; nothing here runs them."""
    from distillabse.demo.assets import PACKAGES

    versions = "-".join(package.version for package in PACKAGES)
    folder = cache / "distillabse" / f"demo-{versions}"
    folder.mkdir(parents=True)
    for package in PACKAGES:
        for file in package.files:
            (folder / Path(file).name).write_bytes(b"")


def copy_of(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target, symlinks=True))
