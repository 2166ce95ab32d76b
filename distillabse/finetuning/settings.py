"""How models are fine-tuned: a task's defaults with `key=value` overrides on top, and TrainingArguments from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError, model_validator

from distillabse.config.schema import Schema
from distillabse.errors import ConfigurationError
from distillabse.finetuning.tasks import Task
from distillabse.settings import check_training_keys

if TYPE_CHECKING:
    from transformers import TrainingArguments

_SPECIAL_TOKENS_OF_A_PAIR = 4


class FinetuningSettings(Schema):
    """Everything that decides a result apart from models, data and seeds."""

    max_length: int = Field(ge=8, description="Tokens of an input; contexts that are longer are cut into windows.")
    doc_stride: int = Field(128, ge=0, description="Questions: tokens that neighbouring windows of a context share.")
    max_question_length: int = Field(64, ge=1, description="Questions: longer ones are cut, in tokens.")
    max_answer_length: int = Field(30, ge=1, description="Questions: longest answer that is predicted, in tokens.")
    n_best: int = Field(20, ge=1, description="Questions: candidates that are kept of every window.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Of hidden states and attention, alike for all models.")
    max_train: int | None = Field(None, ge=1, description="At most so many training rows, a seeded sample.")
    max_test: int | None = Field(
        None, ge=1, description="At most so many test rows of a language, the same ids in all."
    )
    bootstrap_samples: int = Field(1000, ge=100, description="Resamples for the 95 % intervals.")
    training: dict[str, Any] = Field(default_factory=dict, description="Fields of transformers.TrainingArguments.")

    @model_validator(mode="after")
    def _windows_advance(self) -> FinetuningSettings:
        context = self.max_length - self.max_question_length - _SPECIAL_TOKENS_OF_A_PAIR
        if context < 1:
            raise ValueError(
                f"max_question_length {self.max_question_length} leaves no room for a context in max_length "
                f"{self.max_length}; lower it"
            )
        if self.doc_stride >= context:
            raise ValueError(
                f"doc_stride {self.doc_stride} is not below the {context} tokens that max_length {self.max_length} and "
                f"max_question_length {self.max_question_length} leave for a context; lower it"
            )
        return self


def finetuning_settings(task: Task, overrides: Sequence[str] = ()) -> FinetuningSettings:
    """The task's settings with `key=value` overrides, e.g. `max_length=256` or `training.learning_rate=1e-4`.

    Raises:
        ConfigurationError: a key or a value that is not accepted; names each one.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for override in overrides:
        if "=" not in override:
            raise ConfigurationError(f"{override!r} is not an override: write key=value, e.g. training.max_steps=100.")
    # Windows belong to questions; short inputs of pairs must not trip over their defaults.
    windows = {} if task.kind == "questions" else {"doc_stride": 0, "max_question_length": 1}
    defaults = {"max_length": task.max_length, **windows, "training": task.training}
    try:
        merged = OmegaConf.merge(defaults, OmegaConf.from_dotlist(list(overrides)))
        values: Any = OmegaConf.to_container(merged, resolve=True)
        settings = FinetuningSettings.model_validate(values)
    except OmegaConfBaseException as error:
        raise ConfigurationError(f"The overrides cannot be read: {error}") from None
    except ValidationError as error:
        raise ConfigurationError("Fine-tuning settings:\n" + "\n".join(map(_explain, error.errors()))) from None
    check_training_keys(settings.training, "The fine-tuning")
    return settings


def training_arguments(settings: FinetuningSettings, output_dir: Path, seed: int) -> TrainingArguments:
    """The settings' TrainingArguments; bf16 on a GPU that has it, no checkpoints and no reports unless asked for.

    Raises:
        ConfigurationError: a value that TrainingArguments refuses, or an evaluation during training.
    """
    import torch
    from transformers import TrainingArguments

    defaults: dict[str, Any] = {
        "lr_scheduler_type": "linear",
        "logging_steps": 50,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        "use_cpu": not torch.cuda.is_available(),
    }
    if not {"bf16", "fp16"} & settings.training.keys():
        defaults["bf16"] = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        arguments = TrainingArguments(output_dir=str(output_dir), seed=seed, **{**defaults, **settings.training})
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigurationError(f"training: {error}") from None
    if arguments.eval_strategy != "no":
        raise ConfigurationError(
            "training.eval_strategy: models are judged once, when their training is over, and the test rows choose no "
            "checkpoint. Leave it out."
        )
    return arguments


def _explain(item: Any) -> str:
    key = ".".join(map(str, item["loc"]))
    if item["type"] == "extra_forbidden":
        return f"  {key}: no such key. Accepted: {', '.join(FinetuningSettings.model_fields)}."
    got = "" if isinstance(item["input"], dict) else f" (got {item['input']!r})"
    message = item["msg"].removeprefix("Value error, ")
    return f"  {key}: {message}{got}." if key else f"  {message}."
