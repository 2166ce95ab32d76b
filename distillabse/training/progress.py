"""How far training is: for people at a terminal, and for log files."""

from __future__ import annotations

import logging
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from distillabse.training.router_health import PREFIX

logger = logging.getLogger(__name__)


class SentenceProgress(TrainerCallback):
    """A progress bar with the rate and the time left; a line at every log where there is no terminal.

    Args:
        title: what is being done.
        unit: what a batch consists of.
    """

    def __init__(self, title: str = "Distilling", unit: str = "sentences") -> None:
        self.title, self.unit = title, unit
        self.console = Console(stderr=True)
        self.progress: Progress | None = None
        self.started = 0.0
        self.first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.started, self.first_step = time.monotonic(), state.global_step
        if state.is_world_process_zero and self.console.is_terminal:
            self.progress = Progress(
                TextColumn(self.title), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
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
        figures += f" | {steps * per_step / max(seconds, 1e-9):,.0f} {self.unit}/s"
        if self.progress is not None:
            self.progress.update(self.task, figures=figures)
        else:
            left = seconds / max(steps, 1) * (state.max_steps - state.global_step)
            logger.info(
                "step %d/%d %s, %d:%02d left", state.global_step, state.max_steps, figures, left // 60, left % 60
            )

    def close(self) -> None:
        """Take the bar away."""
        if self.progress is not None:
            self.progress.stop()


def _is_for_people(name: str) -> bool:
    return name != "epoch" and not name.startswith(PREFIX)
