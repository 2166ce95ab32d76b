"""Any task of mteb over a bundle's graphs and over the teacher they come from, side by side.

mteb: Muennighoff et al. 2023, arXiv:2210.07316; Enevoldsen et al. 2025, arXiv:2502.13595.
"""

from __future__ import annotations

import difflib
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from distillabse import layout
from distillabse.config import TeacherConfig
from distillabse.console import figures_table
from distillabse.encoder import Encoder
from distillabse.errors import ConfigurationError, InputError, first_line
from distillabse.storage import read_json, write_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.table import Table

logger = logging.getLogger(__name__)

TEACHER = "teacher"


class BundleEncoder:
    """A bundle's graph as mteb's `EncoderProtocol`: it gets texts, and no prompt but the bundle's own default.

    Args:
        encoder: the graph.
        name: what mteb calls it.
    """

    def __init__(self, encoder: Encoder, name: str) -> None:
        self._encoder, self._name = encoder, name

    @cached_property
    def mteb_model_meta(self) -> Any:
        """What mteb wants to know of a model: `mteb.models.ModelMeta`."""
        from mteb.models.model_meta import ModelMeta, ScoringFunction

        return ModelMeta.create_empty(
            {
                "name": f"distillabse/{self._name}",
                "framework": ["ONNX"],
                "max_tokens": self._encoder.max_length,
                "embed_dim": self._encoder.dimension,
                "similarity_fn_name": ScoringFunction.COSINE,
            }
        )

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        batch_size: int = 32,
        show_progress_bar: bool = False,
        **kwargs: Any,
    ) -> NDArray[np.float32]:
        """Encode the texts of all batches; returns float32 [number of texts, dimension], rows of length 1."""
        texts = [text for batch in inputs for text in batch["text"]]
        return self._encoder.encode(texts, batch_size=batch_size, show_progress=show_progress_bar)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosines of all rows of one with all of the other."""
        from mteb.similarity_functions import cos_sim

        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosines of rows in the same place."""
        from mteb.similarity_functions import pairwise_cos_sim

        return pairwise_cos_sim(embeddings1, embeddings2)


def run_mteb(config_or_bundle: str, overrides: Sequence[str], names: Sequence[str]) -> Table:
    """Evaluate a job's bundle, or a bundle by its folder, and its teacher on tasks of mteb.

    Every graph of the bundle is evaluated; with bench.device=cuda the fp32 one alone, and all on the GPU. Every task is
    written to mteb/TASK.json beside the bundle, and mteb's own cache of results is not read: these are the figures of
    these files.

    Raises:
        ConfigurationError: mteb is not installed, or has no such task.
        InputError: there is no bundle, it does not say what its teacher is, or a task's data cannot be had.
    """
    from distillabse.environment import describe_environment
    from distillabse.models.teacher import load_teacher

    tasks = find_tasks(names)
    bundle, teacher_config, device = _bundle_and_teacher(config_or_bundle, overrides)
    quantised = layout.ONNX_INT8.values() if device == "cpu" else ()
    files = [layout.ONNX_FP32, *(file for file in quantised if (bundle / file).is_file())]
    models: dict[str, Any] = {TEACHER: load_teacher(teacher_config, device)}
    for file in files:
        models[Path(file).stem] = BundleEncoder(Encoder(bundle, file=file, device=device), Path(file).stem)
    results = []
    for task in tasks:
        result = {**evaluate_task(task, models), "bundle": str(bundle), "teacher": teacher_config.model}
        write_json(bundle.parent / "mteb" / f"{result['task']}.json", {**result, "environment": describe_environment()})
        results.append(result)
    return mteb_table(results)


def find_tasks(names: Sequence[str]) -> list[Any]:
    """Find tasks of mteb by their names.

    Raises:
        ConfigurationError: mteb is not installed, or a task does not exist or is not about texts alone.
    """
    try:
        import mteb
    except ImportError as error:
        raise ConfigurationError(
            f"mteb cannot be imported ({error}). Install it: `pip install 'distillabse[eval]'`."
        ) from error
    tasks = []
    for name in names:
        try:
            task = mteb.get_task(name)
        except KeyError:
            known = {task.metadata.name.lower(): task.metadata.name for task in mteb.get_tasks()}
            near = [known[match] for match in difflib.get_close_matches(name.lower(), known, n=5, cutoff=0.5)]
            hint = f" Near: {', '.join(near)}." if near else ""
            raise ConfigurationError(f"mteb has no task {name!r}.{hint} `mteb available-tasks` lists all.") from None
        if any(modality != "text" for modality in task.metadata.modalities):
            raise ConfigurationError(f"The mteb task {name!r} is not about texts alone: {task.metadata.modalities}.")
        tasks.append(task)
    return tasks


def evaluate_task(task: Any, models: Mapping[str, Any], batch_size: int = 32) -> dict[str, Any]:
    """Evaluate models, each a SentenceTransformer or a `BundleEncoder`, on one task.

    Args:
        task: an `mteb.AbsTask`.
        models: by the names that the result calls them.
        batch_size: texts that are encoded at once.

    Returns:
        task, type, metric (the main score's name), dataset, and for each model its main score, the mean over splits
        and subsets, and all scores by split and subset with their languages, as mteb gives them.

    Raises:
        InputError: the task's data cannot be had.
    """
    import mteb
    from mteb.abstasks.aggregated_task import AbsTaskAggregate

    metadata = task.metadata
    parts = metadata.tasks if isinstance(task, AbsTaskAggregate) else [task]
    for part in parts:
        try:
            part.load_data()
        except Exception as error:  # `datasets` and the hub's client share no base class of errors
            raise InputError(
                f"The data of the mteb task {part.metadata.name!r} cannot be had ({type(error).__name__}: "
                f"{first_line(error)}). mteb takes it from the hub: check the network, or set HF_HOME to a cache that "
                "holds it."
            ) from error
    found = {}
    for name, model in models.items():
        started = time.monotonic()
        logger.info("mteb %s: %s", metadata.name, name)
        run = mteb.evaluate(
            model, task, cache=None, co2_tracker=False, overwrite_strategy="always", show_progress_bar=False,
            encode_kwargs={"batch_size": batch_size, "show_progress_bar": False},
        ).task_results[0]  # fmt: skip
        found[name] = {
            "main_score": float(run.get_score()),
            "seconds": round(time.monotonic() - started, 1),
            "scores": {
                split: {scores["hf_subset"]: scores for scores in subsets}
                for split, subsets in run.model_dump(mode="json")["scores"].items()
            },
        }
    for part in parts:
        part.unload_data()
    return {
        "task": metadata.name,
        "type": metadata.type,
        "metric": metadata.main_score,
        "dataset": dict(metadata.dataset),
        "models": found,
    }


def mteb_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Main scores of every task, and of its subsets where it has several; columns: the models."""
    names = list(results[0]["models"])
    caption = "Main scores as mteb gives them; a task's is the mean over its subsets and splits."
    table = figures_table("mteb", caption, ["task", "subset", "metric"], names)
    for result in results:
        models = result["models"]
        table.add_row(result["task"], "", result["metric"], *(f"{models[name]['main_score']:.4f}" for name in names))
        rows = [(split, subset) for split, own in models[names[0]]["scores"].items() for subset in own]
        for split, subset in rows if len(rows) > 1 else []:
            figures = [models[name]["scores"][split][subset]["main_score"] for name in names]
            table.add_row("", f"{subset} ({split})", "", *(f"{figure:.4f}" for figure in figures))
    return table


def _bundle_and_teacher(
    config_or_bundle: str, overrides: Sequence[str]
) -> tuple[Path, TeacherConfig, Literal["cpu", "cuda"]]:
    from distillabse.layout import RunFolder
    from distillabse.settings import load_config

    folder = Path(config_or_bundle)
    if not folder.is_dir():
        job = load_config(config_or_bundle, overrides)
        bundle = RunFolder(job.run_folder).bundle
        if not (bundle / layout.ONNX_FP32).is_file():
            raise InputError(f"{bundle} holds no bundle. Run `distillabse export` first.")
        return bundle, job.teacher, job.bench.device
    if overrides:
        raise ConfigurationError(f"{folder} is a bundle, which takes no overrides: {' '.join(overrides)}.")
    try:
        teacher = read_json(folder / layout.PROVENANCE)["config"]["teacher"]
    except KeyError:
        raise InputError(
            f"{folder / layout.PROVENANCE} does not say what the teacher is. Give the job's configuration instead."
        ) from None
    return folder, TeacherConfig.model_validate(teacher), "cpu"
