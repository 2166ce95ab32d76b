"""The tasks: where their data is, what its columns and labels are, and how XTREME fine-tunes on them.

XTREME: Hu et al. 2020, arXiv:2003.11080; the hyper-parameters are those of its scripts train_xnli.sh, train_pawsx.sh
and train_qa.sh. Its 500 warm-up steps on SQuAD are 6 % of the run; as a share they fit smaller data as well.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any, Literal

from distillabse.errors import ConfigurationError

_PAIRS: dict[str, Any] = {
    "learning_rate": 2e-5,
    "num_train_epochs": 5,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
}
_QUESTIONS: dict[str, Any] = {
    "learning_rate": 3e-5,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 32,
    "warmup_steps": 0.06,
    "weight_decay": 1e-4,
}


@dataclass(frozen=True)
class HubSplit:
    """One split of a dataset of the hub; `{language}` stands in the name of its configuration for a code."""

    dataset: str
    configuration: str
    split: str


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: what the command line calls it.
        title: what people call it.
        kind: "pairs" are classified, to "questions" an answer is found in a context.
        train: what models are fine-tuned on.
        test: what they are judged on.
        languages: codes of the test set's languages.
        max_length: tokens of an input.
        training: TrainingArguments that differ from transformers' own.
        columns: the two columns of texts; of questions, the question and the context.
        labels: names of the classes in the order of their numbers.
    """

    name: str
    title: str
    kind: Literal["pairs", "questions"]
    train: HubSplit
    test: HubSplit
    languages: tuple[str, ...]
    max_length: int
    training: dict[str, Any]
    columns: tuple[str, str]
    labels: tuple[str, ...] = field(default=())

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is measured of every row, the main figure first."""
        if self.kind == "pairs":
            return ("accuracy",)
        return ("f1", "exact_match", "squad_f1", "squad_exact_match")


TASKS = {
    task.name: task
    for task in (
        Task(
            name="xnli",
            title="XNLI",
            kind="pairs",
            train=HubSplit("facebook/xnli", "{language}", "train"),
            test=HubSplit("facebook/xnli", "{language}", "test"),
            languages=tuple("ar bg de el en es fr hi ru sw th tr ur vi zh".split()),
            max_length=128,
            training=_PAIRS,
            columns=("premise", "hypothesis"),
            labels=("entailment", "neutral", "contradiction"),
        ),
        Task(
            name="paws-x",
            title="PAWS-X",
            kind="pairs",
            train=HubSplit("google-research-datasets/paws-x", "{language}", "train"),
            test=HubSplit("google-research-datasets/paws-x", "{language}", "test"),
            languages=tuple("de en es fr ja ko zh".split()),
            max_length=128,
            training=_PAIRS,
            columns=("sentence1", "sentence2"),
            labels=("not_paraphrase", "paraphrase"),
        ),
        Task(
            name="xquad",
            title="XQuAD",
            kind="questions",
            train=HubSplit("rajpurkar/squad", "plain_text", "train"),
            test=HubSplit("google/xquad", "xquad.{language}", "validation"),
            languages=tuple("ar de el en es hi ro ru th tr vi zh".split()),
            max_length=384,
            training=_QUESTIONS,
            columns=("question", "context"),
        ),
    )
}


def find_task(name: str) -> Task:
    """The task of this name.

    Raises:
        ConfigurationError: there is none; names the nearest one.
    """
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name.lower(), TASKS, n=1, cutoff=0.4)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ConfigurationError(f"{name!r} is not a fine-tuning task{hint}. Tasks: {', '.join(TASKS)}.")
