"""Fine-tuning one model with one seed, and its predictions."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distillabse.errors import InputError, TrainingError
from distillabse.finetuning.answers import answer_scores
from distillabse.finetuning.data import tokenised
from distillabse.finetuning.heads import tokenizer_of, with_head
from distillabse.finetuning.settings import FinetuningSettings, training_arguments
from distillabse.finetuning.spans import Span, predicted_spans, question_windows
from distillabse.finetuning.tasks import Task

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray
    from sentence_transformers import SentenceTransformer
    from transformers import Trainer

logger = logging.getLogger(__name__)


class FineTuned:
    """A model that has been fine-tuned on a task.

    Attributes:
        trainer: with the trained model.
        figures: steps, windows or pairs trained on, seconds, and the mean loss of the run.
    """

    def __init__(
        self, encoder: SentenceTransformer, task: Task, train: Dataset, settings: FinetuningSettings, seed: int,
        work: Path, title: str,
    ) -> None:  # fmt: skip
        """Fine-tune; `encoder` itself is not changed.

        Args:
            encoder: what is under the head in the beginning.
            task: says which head.
            train: rows of the task.
            settings: hyper-parameters.
            seed: of the head's weights, the order of rows and dropout.
            work: folder for checkpoints, where any are asked for.
            title: what the progress bar calls it.

        Raises:
            InputError: no question has its answer in its context.
            TrainingError: the loss is not a number.
        """
        from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, set_seed

        from distillabse.finetuning.progress import PredictionProgress
        from distillabse.training.progress import SentenceProgress

        self._task, self._settings = task, settings
        self._tokenizer = tokenizer_of(encoder)
        arguments = training_arguments(settings, work, seed)
        set_seed(seed)
        inputs = self._training_inputs(train)
        progress = SentenceProgress(title, task.kind)
        self.trainer: Trainer = Trainer(
            model=with_head(encoder, task, settings.dropout),
            args=arguments,
            train_dataset=inputs,
            # Every batch is padded to its own longest row.
            data_collator=DataCollatorWithPadding(self._tokenizer, padding="longest"),
            callbacks=[progress, PredictionProgress(title)],
        )
        self.trainer.remove_callback(PrinterCallback)
        started = time.monotonic()
        try:
            trained = self.trainer.train()
        finally:
            progress.close()
        if not np.isfinite(trained.training_loss):
            raise TrainingError(f"{title}: the loss is not a number any more. Lower training.learning_rate.")
        self.figures = {
            "rows": len(train),
            "inputs": len(inputs),
            "steps": trained.global_step,
            "loss": round(trained.training_loss, 4),
            "seconds": round(time.monotonic() - started, 1),
            "device": str(arguments.device),
            "precision": "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "fp32",
        }

    def judged(self, test: Dataset) -> tuple[list[dict[str, Any]], dict[str, NDArray[np.float64]]]:
        """Predict every row and score it.

        Returns:
            What was predicted of every row, and for each metric of the task its scores, float64 [rows], 0 to 100.
        """
        if self._task.kind == "pairs":
            return self._judged_pairs(test)
        return self._judged_questions(test)

    def _training_inputs(self, train: Dataset) -> Dataset:
        if self._task.kind == "pairs":
            return self._pairs(train)
        has_answer = np.asarray(train["answer_start"]) >= 0
        if not has_answer.any():
            raise InputError("No training question has its answer in its context: are the columns the right ones?")
        if not has_answer.all():
            logger.warning("%d training questions lack their answer in the context: left out", (~has_answer).sum())
        rows = train.select(np.flatnonzero(has_answer))
        return question_windows(rows, self._tokenizer, self._settings, targets=True)

    def _pairs(self, rows: Dataset) -> Dataset:
        names = self._tokenizer.model_input_names

        def tokenise(batch: Mapping[str, list[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
            encoded = self._tokenizer(
                batch["first"], batch["second"], truncation="longest_first", max_length=self._settings.max_length
            )
            return {**{name: encoded[name] for name in names}, "labels": batch["label"]}

        return tokenised(rows, tokenise)

    def _logits(self, inputs: Dataset) -> Any:
        return self.trainer.predict(inputs.select_columns(self._tokenizer.model_input_names)).predictions

    def _judged_pairs(self, test: Dataset) -> tuple[list[dict[str, Any]], dict[str, NDArray[np.float64]]]:
        predicted = self._logits(self._pairs(test)).argmax(axis=1)
        right = 100.0 * (predicted == np.asarray(test["label"]))
        return [{"label": self._task.labels[index]} for index in predicted], {"accuracy": right}

    def _judged_questions(self, test: Dataset) -> tuple[list[dict[str, Any]], dict[str, NDArray[np.float64]]]:
        windows = question_windows(test, self._tokenizer, self._settings, targets=False)
        start_logits, end_logits = self._logits(windows)
        spans = predicted_spans(windows, start_logits, end_logits, len(test), self._settings)
        predictions = [_answer(context, own) for context, own in zip(test["context"], spans, strict=True)]
        scores = [
            answer_scores(prediction["answer"], answers, language)
            for prediction, answers, language in zip(predictions, test["answers"], test["language"], strict=True)
        ]
        return predictions, {metric: np.asarray([row[metric] for row in scores]) for metric in self._task.metrics}


def _answer(context: str, spans: list[Span]) -> dict[str, Any]:
    """The best answer and the other candidates; empty where the context has no tokens."""
    texts = [context[span.start : span.end] for span in spans]
    others = [{"answer": text, "score": round(span.score, 4)} for text, span in zip(texts, spans, strict=True)]
    return {"answer": texts[0] if texts else "", "n_best": others}
