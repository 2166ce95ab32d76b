"""A transformers Trainer around the distiller: terms logged one by one, held-out fidelity, students as checkpoints."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from distillabse import layout
from distillabse.errors import ConfigurationError, TrainingError
from distillabse.models.folder import save_encoder
from distillabse.models.teacher import transformer_of
from distillabse.storage import storage_errors
from distillabse.training.cache import TeacherCache
from distillabse.training.data import PaddingCollator
from distillabse.training.distiller import Distiller
from distillabse.training.router_health import PREFIX, RouterMonitor

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)


class DistillationTrainer(Trainer):
    """Trains `distiller.student`; every checkpoint is a folder that SentenceTransformer loads."""

    def __init__(
        self,
        distiller: Distiller,
        arguments: TrainingArguments,
        sentences: Dataset,
        held_out_fidelity: Callable[[SentenceTransformer], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        cache: TeacherCache | None = None,
    ) -> None:
        """Prepare training.

        Args:
            distiller: student, teacher and objectives.
            arguments: as in any transformers training.
            sentences: columns input_ids, length and row.
            held_out_fidelity: figures of the student on held-out text; called at every evaluation.
            callbacks: further callbacks, such as early stopping.
            cache: the teacher's signals, if they were computed beforehand.

        Raises:
            ConfigurationError: one process sees several GPUs.
        """
        if arguments.n_gpu > 1:
            raise ConfigurationError(
                f"{arguments.n_gpu} GPUs are visible, but a job trains on one: choose it with CUDA_VISIBLE_DEVICES=0."
            )
        multiple = 8 if arguments.device.type == "cuda" else 1
        super().__init__(
            model=distiller,
            args=arguments,
            train_dataset=sentences,
            # The Trainer wants a dataset to evaluate on; `evaluate` measures fidelity instead of iterating over it.
            eval_dataset=sentences.select([0]) if held_out_fidelity else None,
            data_collator=PaddingCollator(distiller.student.tokenizer.pad_token_id, multiple, cache),
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        self.add_callback(SentenceProgress())
        self.held_out_fidelity = held_out_fidelity
        self._terms: dict[str, torch.Tensor] = {}
        self._batches = 0
        self._routers = RouterMonitor(transformer_of(distiller.student))

    @property
    def distiller(self) -> Distiller:
        """The module under training, without the wrappers of DDP or DeepSpeed."""
        distiller: Distiller = self.accelerator.unwrap_model(self.model)
        return distiller

    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **_: Any) -> Any:
        """The distiller's loss; its terms are summed on the device until the next log."""
        outputs = model(**inputs)
        for name, term in outputs["terms"].items():
            self._terms[name] = self._terms[name] + term if name in self._terms else term
        self._batches += 1
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of every loss term, and what the routers of a Switch student did, since the last log."""
        if "loss" in logs:
            logs = {**logs, **self._mean_terms(), **self._routers.figures(self.accelerator.reduce)}
            self._terms, self._batches = {}, 0
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out fidelity of the student as it is now."""
        if self.held_out_fidelity is None:
            return {}
        student = self.distiller.student
        student.eval()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.held_out_fidelity(student).items()}
        student.train()
        self.log(dict(metrics))
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _mean_terms(self) -> dict[str, float]:
        """Mean of each term since the last log.

        Raises:
            TrainingError: a term is no longer a number. Nothing is saved after that, so the last checkpoint is good.
        """
        means = {name: float(total / self._batches) for name, total in self._terms.items()}
        broken = [name for name, mean in means.items() if not torch.isfinite(torch.tensor(mean))]
        if broken:
            raise TrainingError(
                f"The loss is no longer a number at step {self.state.global_step} (terms: {', '.join(broken)}). Lower "
                "training.learning_rate, set training.max_grad_norm, or set training.bf16: false; the last checkpoint "
                "is good and `distillabse distill --resume` goes on from it."
            )
        return means

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._mean_terms()
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            with storage_errors(folder):
                super()._save_checkpoint(model, trial)
        except BaseException:
            # Half a checkpoint must never be taken for one.
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            save_encoder(self.distiller.student, folder)
            # What objectives learn, such as a map to the teacher's width, is needed to go on; no part of the student.
            if learnt := self.distiller.objectives.state_dict():
                save_file(learnt, folder / layout.OBJECTIVES)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        from distillabse.models.teacher import load_encoder

        # A Dense head is first made with random weights; drawing them must not change the order of the sentences.
        with torch.random.fork_rng():
            saved = load_encoder(resume_from_checkpoint, device=str(self.args.device))
        self.distiller.student.load_state_dict(saved.state_dict())
        objectives = Path(resume_from_checkpoint) / layout.OBJECTIVES
        if objectives.is_file():
            self.distiller.objectives.load_state_dict(load_file(objectives))

    def _load_best_model(self) -> None:
        logger.info("Taking the best checkpoint, %s", self.state.best_model_checkpoint)
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


class SentenceProgress(TrainerCallback):
    """A progress bar with sentences per second and time left; a line at every log where there is no terminal."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.progress: Progress | None = None
        self.started = 0.0
        self.first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.started, self.first_step = time.monotonic(), state.global_step
        if state.is_world_process_zero and self.console.is_terminal:
            self.progress = Progress(
                TextColumn("Distilling"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(), console=self.console,
            )  # fmt: skip
            self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step, figures="")
            self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Show the newest figures."""
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        steps, seconds = state.global_step - self.first_step, time.monotonic() - self.started
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        figures = " ".join(f"{name} {value:.4g}" for name, value in logs.items() if _is_for_people(name))
        figures += f" | {steps * per_step / max(seconds, 1e-9):,.0f} sentences/s"
        if self.progress is not None:
            self.progress.update(self.task, figures=figures)
        else:
            left = seconds / max(steps, 1) * (state.max_steps - state.global_step)
            logger.info(
                "step %d/%d %s, %d:%02d left", state.global_step, state.max_steps, figures, left // 60, left % 60
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self.progress is not None:
            self.progress.stop()


def _is_for_people(name: str) -> bool:
    return name != "epoch" and not name.startswith(PREFIX)
