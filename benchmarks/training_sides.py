"""The process of one side of `training_throughput.py`: trains a student with one library, a round at a time.

The first line on stdin is a `Task`. The side first trains a copy of the student for a few steps on one batch, which
warms up and gives losses to compare, and answers {"losses": [...]}. Then it prepares the real training, and answers
{"prepared": seconds}. Each further line on stdin starts one round of `Task.steps` optimiser steps, answered with
{"seconds": s}; between rounds the library's own training loop waits inside `Gate.wait`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

WARM_UP_STEPS = 5
LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.01
CLIP = 1.0
Objective = Literal["relations", "embedding"]


@dataclass(frozen=True)
class Task:
    """What one side trains.

    Attributes:
        library: "distillabse", "textbrewer" or "sentence-transformers".
        objective: "relations" (attention and value relations of the last layer, and the cosine) or "embedding" (mean
            squared error to vectors that the teacher gave beforehand).
        grouped: whether a batch holds sentences of similar length.
        cached: whether distillabse reads the teacher's signals from its cache; else the teacher runs in every step.
        precision: "fp32", or "bf16" for bfloat16 autocast.
        freeze_embeddings: whether the student's embedding layer stays as it is.
        teacher, student: folders that SentenceTransformer loads.
        texts: JSON file with a list of texts, a multiple of `batch`.
        vectors: .npy file with the teacher's vectors of the texts, the labels of sentence-transformers' recipe.
        output: an empty folder to work in.
        steps: optimiser steps of a round.
        rounds: how many rounds will be asked for.
        threads: of PyTorch.
        seed: of the order of the texts.
    """

    library: Literal["distillabse", "textbrewer", "sentence-transformers"]
    objective: Objective
    grouped: bool
    cached: bool
    batch: int
    precision: Literal["fp32", "bf16"]
    freeze_embeddings: bool
    teacher: str
    student: str
    texts: str
    vectors: str
    output: str
    steps: int
    rounds: int
    threads: int
    seed: int


class Finished(Exception):
    """No further round is asked for."""


class Gate:
    """Stands between rounds: answers how long one took, and waits until the next may start."""

    def __init__(self, answers: Any) -> None:
        self.answers = answers
        self.created = time.perf_counter()
        self.started: float | None = None

    def answer(self, **figures: Any) -> None:
        """Write one line, once the threads of this process have come to rest."""
        from distillabse.evaluation.latency_worker import come_to_rest

        come_to_rest()
        self.answers.write(json.dumps(figures) + "\n")
        self.answers.flush()

    def wait(self) -> None:
        """End the preparation or the round that is running, and wait for the next.

        Raises:
            Finished: stdin is closed.
        """
        now = time.perf_counter()
        if self.started is None:
            self.answer(prepared=now - self.created)
        else:
            self.answer(seconds=now - self.started)
        if not sys.stdin.readline():
            raise Finished
        self.started = time.perf_counter()


def main() -> None:
    """Train as the task says until stdin is closed."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is not an answer
    task = Task(**json.loads(sys.stdin.readline()))
    import torch

    torch.set_num_threads(task.threads)
    texts = json.loads(Path(task.texts).read_text(encoding="utf-8"))
    run: Callable[[Task, list[str], Callable[[], None] | None], list[float]] = {
        "distillabse": distillabse,
        "textbrewer": textbrewer,
        "sentence-transformers": sentence_transformers,
    }[task.library]
    Gate(answers).answer(losses=run(task, texts[: task.batch], None))
    try:
        run(task, texts, Gate(answers).wait)
    except Finished:
        pass


def distillabse(task: Task, texts: list[str], between_rounds: Callable[[], None] | None) -> list[float]:
    """This project, through the function that its stages call.

    Args:
        task: what to train.
        texts: what to train on.
        between_rounds: called before the first step and after every `task.steps`; None: train
            `WARM_UP_STEPS` steps instead.

    Returns:
        The losses of the warm-up steps.
    """
    from transformers import TrainingArguments

    from distillabse.config import CosineObjective, MiniLMObjective, MSEObjective, TrainingConfig
    from distillabse.models.teacher import load_encoder
    from distillabse.training.data import tokenised_sentences
    from distillabse.training.distillation import distill

    teacher, student = load_encoder(task.teacher), load_student(task)
    if task.objective == "relations":
        config = TrainingConfig(objectives=[MiniLMObjective(), CosineObjective()], teacher_cache=task.cached)
    else:
        # sentence-transformers averages over dimensions where this project sums.
        dimension = teacher.get_embedding_dimension()
        config = TrainingConfig(objectives=[MSEObjective(weight=1 / dimension)], teacher_cache=task.cached)

    def held_out(_: Any) -> dict[str, float]:
        if between_rounds is not None:
            between_rounds()
        return {}

    # An evaluation is the place where training stops between rounds.
    gates = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": task.steps} if between_rounds else {}
    arguments = TrainingArguments(
        **trainer_arguments(task, warm_up=between_rounds is None),
        **gates,
        train_sampling_strategy="group_by_length" if task.grouped else "random",
        remove_unused_columns=False,
    )
    log = distill(config, teacher, student, tokenised_sentences(student, texts), held_out, arguments)["log"]
    return [row["loss"] for row in log if "loss" in row]


def sentence_transformers(task: Task, texts: list[str], between_rounds: Callable[[], None] | None) -> list[float]:
    """The documented recipe: MSELoss to the teacher's vectors as labels; arguments as for `distillabse`."""
    import numpy as np
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MSELoss
    from transformers import TrainerCallback

    class RoundCallback(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if between_rounds is not None and state.global_step % task.steps == 0:
                between_rounds()

        on_step_end = on_train_begin

    student = load_student(task)
    vectors = np.load(task.vectors, allow_pickle=False)[: len(texts)]
    sentences = Dataset.from_dict({"sentence": texts, "label": vectors})
    trainer = SentenceTransformerTrainer(
        model=student,
        args=SentenceTransformerTrainingArguments(**trainer_arguments(task, warm_up=between_rounds is None)),
        train_dataset=sentences,
        loss=MSELoss(student),
        callbacks=[RoundCallback()],
    )
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def trainer_arguments(task: Task, *, warm_up: bool) -> dict[str, Any]:
    """What both Trainers are told: plain AdamW with a constant rate, no evaluation and no checkpoint."""
    steps = WARM_UP_STEPS if warm_up else task.steps * (task.rounds + 1)
    logging_steps = 1 if warm_up else 50
    return {
        "output_dir": task.output,
        "per_device_train_batch_size": task.batch,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": CLIP,
        "optim": "adamw_torch_fused",
        "bf16": task.precision == "bf16",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": task.seed,
        "max_steps": steps,
        "logging_steps": logging_steps,
    }


def textbrewer(task: Task, texts: list[str], between_rounds: Callable[[], None] | None) -> list[float]:
    """TextBrewer's GeneralDistiller with adaptors and registered losses, as its documentation shows.

    Texts are tokenised once and padded to the longest of their batch. Attention distributions are those that the models
    return (`output_attentions`); values come from a hook on the last layer, since the models do not return them.
    """
    import torch
    from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig, register_new
    from textbrewer_objective import Adaptor, relation_losses
    from torch.utils.data import DataLoader
    from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding
    from transformers.trainer_pt_utils import LengthGroupedSampler

    def load(folder: str) -> Any:
        model = AutoModel.from_pretrained(
            folder, attn_implementation="eager", output_attentions=True, add_pooling_layer=False
        )
        if task.precision == "bf16":
            model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
        return model

    teacher, student = load(task.teacher), load(task.student)
    if task.freeze_embeddings:
        student.embeddings.requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(task.student)
    limits = json.loads((Path(task.student) / "sentence_bert_config.json").read_text(encoding="utf-8"))
    rows = tokenizer(texts, truncation=True, max_length=limits["max_seq_length"], return_token_type_ids=False)
    sentences = [{"input_ids": ids} for ids in rows["input_ids"]]
    pad = DataCollatorWithPadding(tokenizer)
    torch.manual_seed(task.seed)
    sampler = LengthGroupedSampler(task.batch, lengths=[len(ids) for ids in rows["input_ids"]])
    order = {"sampler": sampler} if task.grouped else {"shuffle": True}
    loader = DataLoader(sentences, task.batch, collate_fn=lambda batch: dict(pad(batch)), **order)

    losses = relation_losses(student.config.num_attention_heads)
    for name, loss in losses.items():
        register_new("match_Loss", name, loss)
    features = {"attention_kl": ("attention", 0), "value_kl": ("hidden", 0), "cosine": ("hidden", 1)}
    matches = [
        {"layer_T": layer, "layer_S": layer, "feature": feature, "loss": name, "weight": 1}
        for name, (feature, layer) in features.items()
    ]
    first: list[float] = []

    class Recorded(GeneralDistiller):
        def write_loss(self, total_loss: Any, *arguments: Any) -> None:
            super().write_loss(total_loss, *arguments)
            first.append(float(total_loss))

    steps = WARM_UP_STEPS if between_rounds is None else task.steps * (task.rounds + 1)
    distiller = (Recorded if between_rounds is None else GeneralDistiller)(
        TrainingConfig(output_dir=task.output, device="cpu", ckpt_steps=steps),
        DistillationConfig(intermediate_matches=matches),
        teacher,
        student,
        Adaptor(teacher),
        Adaptor(student),
    )
    optimizer = torch.optim.AdamW(decay_groups(student), lr=LEARNING_RATE, fused=True)
    with distiller:
        distiller.train(optimizer, Rounds(loader, task.steps, between_rounds), num_steps=steps, max_grad_norm=CLIP)
    return first


class Rounds:
    """A data loader that calls a function before the first batch and after every `steps` batches."""

    def __init__(self, loader: Any, steps: int, between: Callable[[], None] | None) -> None:
        self.loader = loader
        self.steps = steps
        self.between = between
        self.given = 0
        self.next_stop = 0

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        while True:
            # TextBrewer asks for a batch when the step before is done.
            if self.between is not None and self.given == self.next_stop:
                self.next_stop += self.steps
                self.between()
            batch = next(batches, None)
            if batch is None:
                return
            self.given += 1
            yield batch


def decay_groups(model: Any) -> list[dict[str, Any]]:
    """Parameters with and without weight decay, as transformers' Trainer splits them."""
    named = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
    spared = ("bias", "LayerNorm.weight")
    return [
        {"params": [one for name, one in named if not name.endswith(spared)], "weight_decay": WEIGHT_DECAY},
        {"params": [one for name, one in named if name.endswith(spared)], "weight_decay": 0.0},
    ]


def load_student(task: Task) -> Any:
    """A fresh copy of the student."""
    from distillabse.models.teacher import load_encoder, transformer_of

    student = load_encoder(task.student)
    if task.freeze_embeddings:
        transformer_of(student).embeddings.requires_grad_(False)
    return student.train()


if __name__ == "__main__":
    main()
