"""Reading a configuration: YAML, then key=value overrides, then the schema; and TrainingArguments from it."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from distillabse.config import BenchConfig, GatesConfig, JobConfig, ProbeTask, RetrievalTask, SimilarityTask, TaskSuite
from distillabse.errors import ConfigurationError
from distillabse.storage import sha256_of_json

if TYPE_CHECKING:
    from transformers import TrainingArguments

# Set by the job itself; a second place to set them would contradict the first.
_OWNED_TRAINING_FIELDS = {
    "output_dir": "set the job's own `output` instead",
    "seed": "set the job's own `seed` instead",
    "data_seed": "set the job's own `seed` instead",
    "push_to_hub": "not offered; push the finished bundle instead",
    "fsdp": "not offered; shard with training.deepspeed instead, e.g. zero3",
    "auto_find_batch_size": "not offered: what a step holds is part of the job; lower per_device_train_batch_size and "
    "raise gradient_accumulation_steps instead",
}
Block = typing.TypeVar("Block", bound=BaseModel)

_SAMPLING = ("group_by_length", "random")


def shipped_configs() -> dict[str, Path]:
    """Every configuration that comes with the package, by file name without .yaml."""
    return {path.stem: path for path in sorted(_configs_folder().glob("*.yaml"))}


def shipped_deepspeed_settings() -> dict[str, Path]:
    """Every file of DeepSpeed settings that comes with the package, by file name without .json."""
    return {path.stem: path for path in sorted(_configs_folder().glob("deepspeed/*.json"))}


def shipped_suites() -> dict[str, Path]:
    """Every suite of tasks that comes with the package, by file name without .yaml."""
    return {path.stem: path for path in sorted(_configs_folder().glob("tasks/*.yaml"))}


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """The job described by a YAML file, or by the name of a shipped configuration, with `key=value` overrides.

    Raises:
        ConfigurationError: no such file, not YAML, or a key or value that the schema refuses; names each one.
    """
    path = _path_of(source, shipped_configs(), "configuration")
    for override in overrides:
        if "=" not in override:
            raise ConfigurationError(f"{override!r} is not an override: write key=value, e.g. training.max_steps=100.")
    return validate(_read_yaml(path, overrides), str(path))


def load_suite(source: str | Path) -> list[RetrievalTask | SimilarityTask | ProbeTask]:
    """The tasks of a YAML file, or of a shipped suite.

    Raises:
        ConfigurationError: no such file, not YAML, or a key or value that the schema refuses; names each one.
    """
    path = _path_of(source, shipped_suites(), "suite of tasks")
    try:
        return TaskSuite.model_validate(_read_yaml(path)).tasks
    except ValidationError as error:
        problems = "\n".join(f"  {_explain({**item, 'loc': ('tasks', *item['loc'])})}" for item in error.errors())
        raise ConfigurationError(f"{path} is not valid:\n{problems}") from None


def validate(values: dict[str, Any], origin: str = "the configuration") -> JobConfig:
    """Check values against the schema, and the training block against TrainingArguments' fields.

    Raises:
        ConfigurationError: lists every wrong key with what it got, what it accepts and the nearest name.
    """
    try:
        config = JobConfig.model_validate(values)
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(item)}" for item in error.errors())
        raise ConfigurationError(f"{origin} is not valid:\n{problems}") from None
    check_training_keys(config.training, origin)
    if config.assistant is not None:
        check_training_keys(config.assistant.training, origin, "assistant.")
    if (quantization := config.export.quantization.training) is not None:
        check_training_keys(quantization.training, origin, "export.quantization.training.")
    return config


def is_config(source: str) -> bool:
    """Whether this is the name of a shipped configuration, or of a file that may be one: YAML, and no graph."""
    path = Path(source)
    return (
        source in shipped_configs() or path.suffix in (".yaml", ".yml") or (path.is_file() and path.suffix != ".onnx")
    )


def load_gates(overrides: Sequence[str]) -> GatesConfig:
    """The gates of a bundle that stands alone: defaults with `gates.key=value` overrides.

    Raises:
        ConfigurationError: another key, or a value that the schema refuses; names each one.
    """
    if wrong := next((override for override in overrides if not re.match(r"gates\.\w+=", override)), None):
        raise ConfigurationError(f"{wrong!r}: a bundle takes gates.key=value alone, e.g. gates.int8_to_fp32_mean=0.99.")
    return _load_block(GatesConfig, "gates", overrides)


def load_bench(overrides: Sequence[str]) -> BenchConfig:
    """How encoders without a job are measured: defaults with `key=value` or `bench.key=value` overrides.

    Raises:
        ConfigurationError: another key, or a value that the schema refuses; names each one.
    """
    return _load_block(BenchConfig, "bench", [f"bench.{override.removeprefix('bench.')}" for override in overrides])


def _load_block(schema: type[Block], name: str, overrides: Sequence[str]) -> Block:
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    try:
        return schema.model_validate(typing.cast("dict[str, Any]", values).get(name, {}))
    except ValidationError as error:
        problems = "\n".join(f"  {_explain({**item, 'loc': (name, *item['loc'])})}" for item in error.errors())
        raise ConfigurationError(f"`{name}` is not valid:\n{problems}") from None


def config_hash(config: JobConfig) -> str:
    """SHA-256 of the resolved configuration: the same job, the same hash."""
    return sha256_of_json(config.model_dump(mode="json"))


def training_arguments(config: JobConfig, output_dir: Path) -> TrainingArguments:
    """The job's `training` block as TrainingArguments, over this project's defaults.

    `deepspeed` may also be the name of a shipped file, such as zero2. Where several processes were started, they find
    each other here.

    Defaults that differ from transformers': length-grouped batches, bf16 where the device has it, an evaluation and a
    checkpoint each tenth of the run, the best checkpoint by held-out skill, TensorBoard.

    Raises:
        ConfigurationError: a value that TrainingArguments refuses, or DeepSpeed settings that contradict it.
    """
    import torch
    from transformers import TrainingArguments

    from distillabse.environment import bf16_is_fast
    from distillabse.training import deepspeed

    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 64,
        "learning_rate": 5e-4,
        "num_train_epochs": 3,
        "warmup_steps": 0.05,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.01,
        "train_sampling_strategy": "group_by_length",
        "logging_steps": 50,
        "eval_strategy": "steps",
        "eval_steps": 0.1,
        "save_strategy": "steps",
        "save_steps": 0.1,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "skill",
        "greater_is_better": True,
        "report_to": ["tensorboard"],
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "restore_callback_states_from_checkpoint": True,  # for how long early stopping has waited
    }
    asked = dict(config.training)
    if asked.get("deepspeed"):
        deepspeed.prepare_environment()
        asked["deepspeed"] = deepspeed.read_settings(asked["deepspeed"], shipped_deepspeed_settings())
    if not torch.cuda.is_available():
        defaults["use_cpu"] = True
    if not {"bf16", "fp16"} & asked.keys():
        fast = bf16_is_fast()
        defaults["bf16"] = deepspeed.default_bf16(asked["deepspeed"], fast) if asked.get("deepspeed") else fast
    try:
        arguments = TrainingArguments(output_dir=str(output_dir), seed=config.seed, **{**defaults, **asked})
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigurationError(f"training: {error}") from None
    if arguments.deepspeed:
        deepspeed.require_agreement(arguments, asked["deepspeed"])
    return arguments


def trainings_of(config: JobConfig) -> list[JobConfig]:
    """The job once for each training that it has, with that as its own."""
    assistant = [config.of_assistant()] if config.assistant is not None else []
    quantization = [config.of_quantization()] if config.export.quantization.training is not None else []
    return [*assistant, config, *quantization]


def _configs_folder() -> Path:
    packaged = Path(str(files("distillabse"))) / "configs"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[1] / "configs"


def _path_of(source: str | Path, shipped: dict[str, Path], what: str) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    if str(source) in shipped:
        return shipped[str(source)]
    raise ConfigurationError(
        f"{source} is neither a file nor a shipped {what}{_nearest(path.stem, shipped)}. Shipped: {', '.join(shipped)}."
    )


def _read_yaml(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The values of a YAML file with `key=value` overrides."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        loaded = OmegaConf.load(path)
        loaded.merge_with_dotlist(list(overrides))
        values = OmegaConf.to_container(loaded, resolve=True)
    except (OmegaConfBaseException, YAMLError, TypeError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read as YAML with the given overrides: {error}") from None
    if not isinstance(values, dict) or not values:
        raise ConfigurationError(f"{path} holds no keys. `distillabse configs ls` names configurations to start from.")
    return typing.cast("dict[str, Any]", values)


def check_training_keys(training: dict[str, Any], origin: str, block: str = "") -> None:
    """Refuse keys that TrainingArguments does not have, or that a job sets itself.

    Raises:
        ConfigurationError: names the key, and the nearest one.
    """
    import dataclasses

    if not training:
        return
    from transformers import TrainingArguments

    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    for key in training:
        if key in _OWNED_TRAINING_FIELDS:
            raise ConfigurationError(f"{origin} is not valid:\n  {block}training.{key}: {_OWNED_TRAINING_FIELDS[key]}.")
        if key not in known:
            raise ConfigurationError(
                f"{origin} is not valid:\n  {block}training.{key}: no such field of transformers.TrainingArguments"
                f"{_nearest(key, known)}."
            )
    sampling = training.get("train_sampling_strategy", _SAMPLING[0])
    if sampling not in _SAMPLING:
        raise ConfigurationError(
            f"{origin} is not valid:\n  {block}training.train_sampling_strategy: got {sampling!r}. Accepted: "
            f"{', '.join(_SAMPLING)}."
        )


def _explain(item: Any) -> str:
    """One line for one pydantic error: the key, what it got, what it accepts."""
    location = [part for part in item["loc"] if not (isinstance(part, str) and _is_union_tag(part, item["loc"]))]
    key = ".".join(str(part) for part in location)
    got = item["input"]
    shown = "" if isinstance(got, (dict, list)) or item["type"] == "missing" else f" (got {got!r})"
    if item["type"] == "extra_forbidden":
        siblings = _fields_at(JobConfig, item["loc"][:-1])
        return (
            f"{key}: no such key{_nearest(str(location[-1]), siblings)}. Accepted here: {', '.join(sorted(siblings))}."
        )
    if item["type"] == "union_tag_invalid":
        context = item["ctx"]
        tags = [tag.strip(" '") for tag in str(context["expected_tags"]).split(",")]
        return f"{key}.kind: got {context['tag']!r}{_nearest(str(context['tag']), tags)}. Accepted: {', '.join(tags)}."
    if item["type"] == "union_tag_not_found":
        return f"{key}.kind: say which kind this is."
    return f"{key}: {item['msg'].removeprefix('Value error, ')}{shown}."


def _is_union_tag(part: str, location: tuple[Any, ...]) -> bool:
    """Pydantic puts a discriminated union's tag into the location: after an index, or one of a few keys."""
    index = location.index(part)
    before = location[:index]
    if part not in _KINDS or index == 0:
        return False
    return isinstance(before[-1], int) or before[-1] in ("student", "pairs") or "sets" in before


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Every schema inside an annotation, through lists, dicts, unions and Annotated."""
    if (
        isinstance(annotation, type)
        and not isinstance(annotation, types.GenericAlias)
        and issubclass(annotation, BaseModel)
    ):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models(argument)


def _fields_at(model: type[BaseModel], location: tuple[Any, ...]) -> set[str]:
    """Names of the fields that are accepted at a location of the schema."""
    models = [model]
    for part in location:
        inner = [
            found
            for current in models
            if part in current.model_fields
            for found in _models(current.model_fields[str(part)].annotation)
        ]
        tagged = [found for found in models if _kind_of(found) == part]
        models = inner or tagged or models
    return {name for found in models for name in found.model_fields}


def _kind_of(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("kind")
    return str(field.default) if field else None


def _all_kinds(model: type[BaseModel], seen: set[type[BaseModel]]) -> set[str]:
    if model in seen:
        return set()
    seen.add(model)
    kinds = {kind} if (kind := _kind_of(model)) else set()
    for field in model.model_fields.values():
        for inner in _models(field.annotation):
            kinds |= _all_kinds(inner, seen)
    return kinds


_KINDS = _all_kinds(JobConfig, set())


def _nearest(name: str, choices: Sequence[str] | set[str] | dict[str, Any]) -> str:
    match = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""
