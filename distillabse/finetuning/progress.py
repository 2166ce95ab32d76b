"""How far predictions are."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback


class PredictionProgress(TrainerCallback):
    """A bar over the batches of a prediction, where there is a terminal."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.console = Console(stderr=True)
        self.progress: Progress | None = None

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Move the bar, which is put up at the first batch."""
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        if self.progress is None:
            self.progress = Progress(
                TextColumn(self.title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=self.console
            )
            total = None if eval_dataloader is None else len(eval_dataloader)
            self.task = self.progress.add_task("", total=total)
            self.progress.start()
        self.progress.advance(self.task)

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        """Take the bar away."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
