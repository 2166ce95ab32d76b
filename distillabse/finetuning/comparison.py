"""Several models fine-tuned on the same rows with the same settings, and judged on the same rows in every language."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distillabse import processes
from distillabse.errors import ConfigurationError, InputError
from distillabse.finetuning.data import read_hub_split, read_table, select_languages
from distillabse.finetuning.heads import require_stock
from distillabse.finetuning.scores import compare
from distillabse.finetuning.settings import FinetuningSettings
from distillabse.finetuning.splitting import groups_of, held_out_split, sample_rows, shared_rows
from distillabse.finetuning.tasks import Task
from distillabse.finetuning.training import FineTuned
from distillabse.storage import new_file, write_json

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

RESULTS = "results.json"
FEW_SHOT = "Few-shot split of {}: training and test rows are of one file; not comparable with published figures."


@dataclass(frozen=True)
class DataChoice:
    """Where the rows come from.

    Attributes:
        train: a local table instead of the hub's training split.
        test: a local table instead of the hub's test split.
        held_out: share of `train` to test on instead of `test`.
        train_language: what models are fine-tuned on.
        languages: what they are judged in; by default all that the test data has.
        train_revision: of the hub's training data.
        test_revision: of the hub's test data.
    """

    train: Path | None = None
    test: Path | None = None
    held_out: float | None = None
    train_language: str = "en"
    languages: tuple[str, ...] = ()
    train_revision: str | None = None
    test_revision: str | None = None


def finetune_folders(
    task: Task, models: Sequence[str], choice: DataChoice, settings: FinetuningSettings, seeds: Sequence[int],
    output: Path,
) -> dict[str, Any]:  # fmt: skip
    """Fine-tune and judge encoders from folders or the hub; write results.json and predictions into `output`.

    Args:
        task: what for.
        models: folders, bundles, hub names or the packaged teacher; the first is what the others are compared with.
        choice: the data.
        settings: hyper-parameters.
        seeds: every model is fine-tuned once with each; the first also draws the held-out rows and samples.
        output: a folder.

    Returns:
        What results.json holds.

    Raises:
        ConfigurationError: an encoder without such a head, a choice that contradicts itself, or several processes.
        InputError: a model or its data cannot be read, or training rows are among the test rows.
    """
    from distillabse.environment import describe_environment
    from distillabse.models.teacher import load_encoder, resolve_model

    if processes.count() > 1:
        raise ConfigurationError("finetune is one process: start it without torchrun or another launcher.")
    names = _names(models)
    encoders = {}
    for name, model in names.items():
        encoders[name] = load_encoder(resolve_model(model))
        # Before any data is read, and for every model before the first is trained.
        require_stock(encoders[name], task, settings.max_length, model)
    train, test, data = load_rows(task, choice, settings, seeds[0])
    compared, predictions = finetune(task, encoders, train, test, settings, seeds, choice.train_language, output)
    result = {
        "task": task.name,
        "title": task.title,
        "metrics": list(task.metrics),
        "data": data,
        "settings": settings.model_dump(mode="json"),
        "seeds": list(seeds),
        "folders": names,
        **compared,
        "environment": describe_environment(),
    }
    for name, rows in predictions.items():
        with new_file(output / f"predictions-{name}.jsonl") as temporary:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            temporary.write_text(text, encoding="utf-8")
    write_json(output / RESULTS, result)
    return result


def finetune(
    task: Task, encoders: Mapping[str, SentenceTransformer], train: Dataset, test: Dataset,
    settings: FinetuningSettings, seeds: Sequence[int], train_language: str = "en", work: Path | None = None,
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:  # fmt: skip
    """The same on objects: fine-tune every encoder on `train` with every seed, and judge it on `test`.

    Returns:
        Figures by model (see `compare`), and for each model what it predicted of every test row with every seed.
    """
    scores: dict[str, list[dict[str, Any]]] = {name: [] for name in encoders}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in encoders}
    predictions: dict[str, list[dict[str, Any]]] = {name: [] for name in encoders}
    with tempfile.TemporaryDirectory(prefix="distillabse-finetune-") as temporary:
        for seed in seeds:
            for name, encoder in encoders.items():
                title = f"{task.title}: {name}, seed {seed}"
                folder = (work or Path(temporary)) / "checkpoints" / name / f"seed-{seed}"
                tuned = FineTuned(encoder, task, train, settings, seed, folder, title)
                runs[name].append({"seed": seed, **tuned.figures})
                logger.info("%s: trained in %.0f s, loss %.3f", title, tuned.figures["seconds"], tuned.figures["loss"])
                predicted, judged = tuned.judged(test)
                scores[name].append(judged)
                predictions[name].extend(
                    {"seed": seed, "language": language, "id": identity, **row}
                    for language, identity, row in zip(test["language"], test["id"], predicted, strict=True)
                )
    languages = np.asarray(test["language"])
    compared = compare(
        scores, languages, groups_of(test), task.metrics, train_language, settings.bootstrap_samples, seeds[0]
    )
    for name, model in compared["models"].items():
        parameters = sum(parameter.numel() for parameter in encoders[name][0].parameters())
        model.update(encoder_parameters=parameters, runs=runs[name])
    return compared, predictions


def load_rows(
    task: Task, choice: DataChoice, settings: FinetuningSettings, seed: int
) -> tuple[Dataset, Dataset, dict[str, Any]]:
    """The training rows, the test rows, and where they come from.

    Raises:
        ConfigurationError: a choice that contradicts itself.
        InputError: data cannot be read, a language has no rows, or training rows are among the test rows.
    """
    _require_sense(task, choice)
    train = _training_rows(task, choice)
    if choice.held_out is not None:
        train, test = held_out_split(train, choice.held_out, seed)
        origin, revision = f"{share_text(choice.held_out)} of the paragraphs or pairs of {choice.train}", None
    elif choice.test is not None:
        test, origin, revision = read_table(task, choice.test), str(choice.test), None
    else:
        test = read_hub_split(task, task.test, choice.languages or task.languages, choice.test_revision)
        origin, revision = task.test.dataset, choice.test_revision
    if choice.languages:
        test = select_languages(test, choice.languages, origin)
    train = select_languages(train, [choice.train_language], str(choice.train or task.train.dataset))
    train, test = sample_rows(train, settings.max_train, seed), sample_rows(test, settings.max_test, seed)
    shared = shared_rows(train, test)
    if shared and (choice.train or choice.test):
        raise InputError(
            f"{shared:,} test rows have an id or a text that is also among the training rows. Take them out of one "
            "file, or give one file with --train and a share of it with --held-out."
        )
    if shared:
        logger.warning("%d rows of the official test set are also in the official training set", shared)
    data = {
        "train": {
            "origin": str(choice.train) if choice.train else task.train.dataset,
            "revision": choice.train_revision,
            "language": choice.train_language,
            "rows": len(train),
        },
        "test": {"origin": origin, "revision": revision, "rows": len(test), "shared_with_train": shared},
        "note": FEW_SHOT.format(task.title) if choice.held_out is not None else None,
    }
    return train, test, data


def share_text(share: float) -> str:
    """A share as people write it."""
    return f"{100 * share:.3g} %"


def _training_rows(task: Task, choice: DataChoice) -> Dataset:
    if choice.train is not None:
        return read_table(task, choice.train, None if choice.held_out is not None else choice.train_language)
    return read_hub_split(task, task.train, [choice.train_language], choice.train_revision)


def _require_sense(task: Task, choice: DataChoice) -> None:
    if choice.held_out is not None:
        if not 0 < choice.held_out < 1:
            raise ConfigurationError(f"--held-out {choice.held_out}: give a share between 0 and 1, e.g. 0.2.")
        if choice.train is None or choice.test is not None:
            raise ConfigurationError(
                "--held-out takes the test rows out of the file of --train: give it, and no --test."
            )
    if choice.test is None and choice.held_out is None:
        unknown = [language for language in choice.languages if language not in task.languages]
        if unknown:
            raise ConfigurationError(
                f"{task.title} has no test set in {', '.join(map(repr, unknown))}. Its languages: "
                f"{', '.join(task.languages)}."
            )
    has_language = "{language}" in task.train.configuration
    if choice.train is None and choice.train_language not in (task.languages if has_language else ("en",)):
        raise ConfigurationError(
            f"{task.train.dataset} has no training rows in {choice.train_language!r}. Give your own with --train."
        )


def _names(models: Sequence[str]) -> dict[str, str]:
    """A short name for every model that also does for a file: its folder's, numbered where two are the same."""
    names: dict[str, str] = {}
    for model in models:
        stem = Path(model.removeprefix("packaged:")).resolve().name
        count = sum(name == stem or name.startswith(f"{stem}-") for name in names)
        names[f"{stem}-{count + 1}" if stem in names else stem] = model
    return names
