"""The process of one side of `training_throughput.py`: trains a student with one library, a round at a time.

The first line on stdin is a `Task`. The side first trains a copy of the student for a few steps on one batch, which
warms up and gives losses to compare, and answers {"losses": [...]}. Each further line on stdin starts one round, an epoch
over the texts, answered with {"seconds": s}; between rounds the library's own training loop waits inside `Gate.wait`.
"""

from __future__ import annotations

import json
import math
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
        precision: "fp32", or "bf16" for bfloat16 autocast.
        freeze_embeddings: whether the student's embedding layer stays as it is.
        teacher, student: folders that SentenceTransformer loads.
        texts: JSON file with a list of texts, a multiple of `batch`.
        output: an empty folder to work in.
        rounds: how many rounds will be asked for.
    """

    library: Literal["distillabse", "textbrewer", "sentence-transformers"]
    objective: Objective
    grouped: bool
    batch: int
    precision: Literal["fp32", "bf16"]
    freeze_embeddings: bool
    teacher: str
    student: str
    texts: str
    output: str
    rounds: int
    threads: int
    seed: int


class Finished(Exception):
    """No further round is asked for."""


class Gate:
    """Stands between rounds: answers how long one took, and waits until the next may start."""

    def __init__(self, answers: Any) -> None:
        self.answers = answers
        self.started: float | None = None

    def answer(self, **figures: Any) -> None:
        """Write one line, once the threads of this process have come to rest."""
        from distillabse.evaluation.latency_worker import come_to_rest

        come_to_rest()
        self.answers.write(json.dumps(figures) + "\n")
        self.answers.flush()

    def wait(self) -> None:
        """End the round, if one was running, and wait for the next.

        Raises:
            Finished: stdin is closed.
        """
        if self.started is not None:
            self.answer(seconds=time.perf_counter() - self.started)
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
    gate = Gate(answers)
    gate.answer(losses=run(task, texts[: task.batch], None))
    try:
        run(task, texts, gate.wait)
    except Finished:
        pass


def distillabse(task: Task, texts: list[str], between_rounds: Callable[[], None] | None) -> list[float]:
    """This project, through the function that its stages call.

    Args:
        task: what to train.
        texts: what to train on.
        between_rounds: called before the first epoch and after each; None: train `WARM_UP_STEPS` steps instead.

    Returns:
        The losses of the warm-up steps.
    """
    from transformers import TrainingArguments

    from distillabse.config import CosineObjective, MiniLMObjective, MSEObjective, TrainingConfig
    from distillabse.models.teacher import load_encoder
    from distillabse.training.stage import distill

    teacher, student = load_encoder(task.teacher), load_student(task)
    if task.objective == "relations":
        config = TrainingConfig(objectives=[MiniLMObjective(), CosineObjective()])
    else:
        # sentence-transformers averages over dimensions where this project sums.
        dimension = teacher.get_embedding_dimension()
        config = TrainingConfig(objectives=[MSEObjective(weight=1 / dimension)], teacher_cache=True)

    def held_out(_: Any) -> dict[str, float]:
        if between_rounds is not None:
            between_rounds()
        return {}

    gates = {"eval_on_start": True, "eval_strategy": "epoch"} if between_rounds else {}
    arguments = TrainingArguments(
        **trainer_arguments(task, warm_up=between_rounds is None),
        **gates,
        train_sampling_strategy="group_by_length" if task.grouped else "random",
        remove_unused_columns=False,
    )
    log = distill(config, teacher, student, texts, held_out, arguments)["log"]
    return [row["loss"] for row in log if "loss" in row]


def sentence_transformers(task: Task, texts: list[str], between_rounds: Callable[[], None] | None) -> list[float]:
    """The documented recipe: MSELoss to the teacher's vectors as labels; arguments as for `distillabse`."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MSELoss
    from transformers import TrainerCallback

    from distillabse.models.teacher import load_encoder

    class Rounds(TrainerCallback):
        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            if between_rounds is not None:
                between_rounds()

        on_train_begin = on_epoch_end

    teacher, student = load_encoder(task.teacher), load_student(task)
    sentences = Dataset.from_dict({"sentence": texts})
    sentences = sentences.map(lambda rows: {"label": teacher.encode(rows["sentence"], batch_size=64)}, batched=True)
    trainer = SentenceTransformerTrainer(
        model=student,
        args=SentenceTransformerTrainingArguments(**trainer_arguments(task, warm_up=between_rounds is None)),
        train_dataset=sentences,
        loss=MSELoss(student),
        callbacks=[Rounds()],
    )
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def trainer_arguments(task: Task, *, warm_up: bool) -> dict[str, Any]:
    """What both Trainers are told: plain AdamW with a constant rate, no evaluation and no checkpoint."""
    length = {"max_steps": WARM_UP_STEPS, "logging_steps": 1} if warm_up else {"num_train_epochs": task.rounds + 1}
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
        **length,
    }


def textbrewer(task: Task, texts: list[str], between_rounds: Callable[[], None] | None) -> list[float]:
    """TextBrewer's GeneralDistiller with adaptors and registered losses, as its documentation shows.

    Texts are tokenised once and padded to the longest of their batch. Attention distributions are those that the models
    return (`output_attentions`); values come from a hook on the last layer, since the models do not return them.
    """
    import torch
    from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig, register_new
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

    kind = Recorded if between_rounds is None else GeneralDistiller
    distiller = kind(
        TrainingConfig(output_dir=task.output, device="cpu", ckpt_epoch_frequency=task.rounds + 1),
        DistillationConfig(intermediate_matches=matches),
        teacher,
        student,
        Adaptor(teacher),
        Adaptor(student),
    )
    student.train()
    optimizer = torch.optim.AdamW(decay_groups(student), lr=LEARNING_RATE, fused=True)
    epochs = WARM_UP_STEPS if between_rounds is None else task.rounds + 1
    with distiller:
        distiller.train(optimizer, Rounds(loader, between_rounds), num_epochs=epochs, max_grad_norm=CLIP)
    return first


class Rounds:
    """A data loader that calls a function before every epoch."""

    def __init__(self, loader: Any, before: Callable[[], None] | None) -> None:
        self.loader = loader
        self.before = before

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        if self.before is not None:
            self.before()
        return iter(self.loader)


class Adaptor:
    """What TextBrewer's losses get of one model: attention and values of its last layer, and the sentence vector."""

    def __init__(self, model: Any) -> None:
        model.encoder.layer[-1].attention.self.value.register_forward_hook(self._keep)

    def _keep(self, module: Any, inputs: Any, output: Any) -> None:
        self.values = output

    def __call__(self, batch: dict[str, Any], outputs: Any) -> dict[str, Any]:
        """Only the last layer is matched, so only its features are made."""
        mask = batch["attention_mask"]
        weights = mask[..., None].float()
        sentence = (outputs.last_hidden_state.float() * weights).sum(dim=1) / weights.sum(dim=1)
        return {"attention": [outputs.attentions[-1]], "hidden": [self.values, sentence], "inputs_mask": mask}


def relation_losses(heads: int) -> dict[str, Callable[..., Any]]:
    """The objective of `MiniLMObjective` and `CosineObjective` in the form of TextBrewer's losses."""
    import torch
    from torch.nn import functional

    def over_rows(divergence: Any, mask: Any) -> Any:
        """Mean over heads, real rows and sentences of [batch, heads, tokens]."""
        mask = mask.float()
        return ((divergence.mean(dim=1) * mask).sum(dim=-1) / mask.sum(dim=-1)).mean()

    def attention_kl(student: Any, teacher: Any, mask: Any) -> Any:
        student, teacher = (one.float().clamp_min(1e-30) for one in (student, teacher))
        return over_rows((teacher * (teacher.log() - student.log())).sum(dim=-1), mask)

    def value_relations(values: Any, mask: Any) -> Any:
        values = values.float().unflatten(-1, (heads, -1)).transpose(1, 2)
        scores = values @ values.transpose(-1, -2) / math.sqrt(values.shape[-1])
        lowest = torch.finfo(torch.float32).min
        return scores.masked_fill(mask[:, None, None, :] == 0, lowest).log_softmax(dim=-1)

    def value_kl(student: Any, teacher: Any, mask: Any) -> Any:
        student, teacher = value_relations(student, mask), value_relations(teacher, mask)
        return over_rows((teacher.exp() * (teacher - student)).sum(dim=-1), mask)

    def cosine(student: Any, teacher: Any, mask: Any) -> Any:
        return 1 - functional.cosine_similarity(student, teacher).mean()

    return {"attention_kl": attention_kl, "value_kl": value_kl, "cosine": cosine}


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
