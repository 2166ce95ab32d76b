"""A transformers Trainer around the distiller: terms logged one by one, held-out fidelity, students as checkpoints."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Subset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_callback import PrinterCallback

from distillabse import layout
from distillabse.checksums import broken_checksums
from distillabse.errors import ConfigurationError, TrainingError
from distillabse.models.folder import save_encoder
from distillabse.models.teacher import load_encoder, transformer_of
from distillabse.storage import storage_errors
from distillabse.training.batches import SentenceBatches, SentenceLoader
from distillabse.training.cache import TeacherCache
from distillabse.training.checkpoints import Topology, checkpoint_path, commit_checkpoint, remove_older_checkpoints
from distillabse.training.data import TokenisedSentences
from distillabse.training.deepspeed import is_universal, mend_universal_state, trained_weights, zero_stage
from distillabse.training.distiller import Distiller
from distillabse.training.interruption import StopOnSignal, forget_workers, leave_signals_to_trainer
from distillabse.training.pairs import TranslationPairs, collator_for
from distillabse.training.progress import SentenceProgress
from distillabse.training.router_health import RouterMonitor

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

# What torch says where another process, or one that reads data, is gone.
_GONE = ("closed by peer", "reset by peer", "Broken pipe", "DataLoader worker", "Connection refused")


def topology_of(arguments: TrainingArguments) -> Topology:
    """How the steps of a job are shared out among its processes."""
    per_process = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    stage = zero_stage(arguments.deepspeed) if isinstance(arguments.deepspeed, dict) else None
    return Topology(arguments.world_size, arguments.world_size * per_process, stage)


class DistillationTrainer(Trainer):
    """Trains `distiller.student`; every checkpoint is a folder that SentenceTransformer loads.

    Every process has the same data and takes its own share of each step. Under DeepSpeed no process may hold the whole
    student, so the main one keeps a copy of it, which is brought up to date where it is measured and saved.
    """

    def __init__(
        self,
        distiller: Distiller,
        arguments: TrainingArguments,
        sentences: TokenisedSentences | TranslationPairs,
        held_out_fidelity: Callable[[SentenceTransformer], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        cache: TeacherCache | None = None,
        copy: SentenceTransformer | None = None,
    ) -> None:
        """Prepare training.

        Args:
            distiller: student, teacher and objectives.
            arguments: as in any transformers training.
            sentences: what to train on.
            held_out_fidelity: figures of the student on held-out text; the main process needs it, where there are
                evaluations.
            callbacks: further callbacks, such as early stopping.
            cache: the teacher's signals, if they were computed beforehand.
            copy: of the student, on the CPU; the main process of a DeepSpeed job needs it.

        Raises:
            ConfigurationError: one process sees several GPUs, or there are fewer sentences than a step takes.
        """
        if arguments.n_gpu > 1:
            raise ConfigurationError(
                f"{arguments.n_gpu} GPUs are visible to one process. Start a process for each: `torchrun "
                f"--nproc_per_node {arguments.n_gpu} -m distillabse ...`, or choose one with CUDA_VISIBLE_DEVICES=0."
            )
        self.topology = topology_of(arguments)
        if arguments.max_steps <= 0:
            # Batches do not end with an epoch: the last one of all is the only one that takes sentences of another.
            epochs = arguments.num_train_epochs
            arguments.max_steps = math.ceil(epochs * len(sentences) / self.topology.sentences_per_step)
        multiple = 8 if arguments.device.type == "cuda" else 1
        # transformers removes the newest checkpoint of 1 when training ends, and an interrupted job goes on from that.
        self.checkpoints_to_keep, arguments.save_total_limit = arguments.save_total_limit, None
        self.stop = StopOnSignal()
        self.progress = SentenceProgress(unit="pairs" if isinstance(sentences, TranslationPairs) else "sentences")
        super().__init__(
            model=distiller,
            args=arguments,
            train_dataset=sentences,
            # The Trainer wants a dataset to evaluate on; `evaluate` measures fidelity instead of iterating over it.
            eval_dataset=Subset(sentences, [0]) if arguments.eval_strategy != "no" else None,
            data_collator=collator_for(sentences, distiller, multiple, cache),
            callbacks=[*(callbacks or []), self.stop],
        )
        self.remove_callback(PrinterCallback)
        self.add_callback(self.progress)
        self.held_out_fidelity = held_out_fidelity
        self._copy = copy
        self._best_learnt: dict[str, Tensor] | None = None
        self._terms: dict[str, Tensor] = {}
        self._batches = 0
        self._routers = RouterMonitor(transformer_of(distiller.student))

    @property
    def distiller(self) -> Distiller:
        """The module under training, without the wrappers of DDP or DeepSpeed."""
        distiller: Distiller = self.accelerator.unwrap_model(self.model)
        return distiller

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in any Trainer.

        Raises:
            TrainingError: the loss is no longer a number, or another process of the job is gone.
            StorageError: the disk is full; earlier checkpoints are intact.
        """
        try:
            with storage_errors(Path(self.args.output_dir)):  # what is logged is written, too
                return super().train(*args, **kwargs)
        except (RuntimeError, ConnectionError, EOFError) as error:
            if not isinstance(error, RuntimeError) or any(sign in str(error) for sign in _GONE):
                forget_workers()
                raise TrainingError(
                    f"A process that this one works with is gone at step {self.state.global_step} ({error!r}). See "
                    "what it printed; then start the job again with --resume: it goes on from its last checkpoint."
                ) from error
            raise
        finally:
            self.stop.stop_listening()
            self.progress.close()

    def get_train_dataloader(self) -> SentenceLoader:
        """This process's share of every batch; the order depends on the seed alone, not on how it is shared."""
        args = self.args
        batches = SentenceBatches(
            self.train_dataset,
            batch_size=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            rank=args.process_index,
            processes=args.world_size,
            seed=args.seed,
            by_length=args.train_sampling_strategy == "group_by_length",
        )
        return SentenceLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            persistent_workers=args.dataloader_persistent_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            worker_init_fn=leave_signals_to_trainer,
        )

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """As in any Trainer; scales of a quantisation are never pulled towards anything."""
        return [name for name in super().get_decay_parameter_names(model) if "quantization." not in name]

    def create_optimizer(self, model: Any = None) -> Any:
        """As in any Trainer."""
        optimizer = super().create_optimizer(model)
        self._weight_decays = [group["weight_decay"] for group in optimizer.param_groups]
        return optimizer

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
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
        """Held-out fidelity of the student as it is now, measured in the main process and told to the others."""
        student, learnt = self._whole()
        told: list[Any] = [{}]
        if self.args.should_save and self.held_out_fidelity is not None:
            device = student.device
            student.eval().to(self.args.device)  # the copy rests on the CPU
            with self.distiller.measured(student, learnt):
                figures = self.held_out_fidelity(student)
            told = [{f"{metric_key_prefix}_{name}": value for name, value in figures.items()}]
            student.to(device)
        self.distiller.student.train()
        metrics: dict[str, float] = broadcast_object_list(told)[0]
        self.log(dict(metrics))
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the student as a folder of its own, and what the objectives learnt beside it."""
        student, learnt = self._whole()
        if self.args.should_save:
            self._require_numbers(student)
            folder = Path(output_dir or self.args.output_dir)
            save_encoder(student, folder)
            # What objectives learn, such as a map to the teacher's width, is needed to go on; no part of the student.
            if learnt:
                save_file(learnt, folder / layout.OBJECTIVES)

    def take_trained_weights(self) -> None:
        """After training under DeepSpeed: give the student whole weights, in the main process; all must call this."""
        if self.is_deepspeed_enabled:
            learnt = self._whole()[1] if self._best_learnt is None else self._best_learnt
            self.deepspeed.destroy()
            if self._copy is not None:
                self.distiller.student.load_state_dict(self._copy.state_dict(), assign=True)
                self.distiller.load_learnt(learnt, assign=True)

    def _whole(self) -> tuple[SentenceTransformer, dict[str, Tensor]]:
        """The student as it is now, and what the objectives learnt; all processes must call this.

        Under DeepSpeed the student is the copy, which only the main process has.
        """
        distiller = self.distiller
        if not self.is_deepspeed_enabled:
            return distiller.student, distiller.divided(distiller.state_dict())[1]
        weights, learnt = distiller.divided(trained_weights(distiller))
        if self._copy is None:
            return distiller.student, learnt
        # What is frozen is not among the weights, and as it was.
        self._copy.load_state_dict(weights, strict=False)
        return self._copy, learnt

    def _mean_terms(self) -> dict[str, float]:
        """Mean of each term since the last log, over all processes.

        Raises:
            TrainingError: a term is no longer a number. Nothing is saved after that, so the last checkpoint is good.
        """
        if not self._batches:
            return {}
        means = self.accelerator.reduce(torch.stack(list(self._terms.values())) / self._batches, "mean").tolist()
        terms = dict(zip(self._terms, means, strict=True))
        broken = [name for name, mean in terms.items() if not math.isfinite(mean)]
        if broken:
            raise self._no_number("The loss is no longer a number", f"terms: {', '.join(broken)}")
        return terms

    def _require_numbers(self, student: SentenceTransformer) -> None:
        """Refuse to save what no training could go on from: a loss shows only one step later that weights are broken.

        Raises:
            TrainingError: a weight is no longer a number.
        """
        broken = [name for name, weight in student.named_parameters() if not weight.isfinite().all()]
        if broken:
            raise self._no_number("Weights are no longer numbers", f"{broken[0]}, {len(broken)} in all")

    def _no_number(self, what: str, where: str) -> TrainingError:
        return TrainingError(
            f"{what} at step {self.state.global_step} ({where}). Lower training.learning_rate, set "
            "training.max_grad_norm, or set training.bf16: false; the last checkpoint is good and `distillabse distill "
            "--resume` goes on from it."
        )

    def _run_epoch(self, **kwargs: Any) -> None:
        """As in any Trainer, which takes one more step where it goes on from the checkpoint of the last one."""
        patience = [(c.early_stopping_patience_counter, c.early_stopping_patience) for c in self._early_stopping()]
        if self.state.global_step >= self.state.max_steps or any(waited >= limit for waited, limit in patience):
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)

    def _early_stopping(self) -> list[EarlyStoppingCallback]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, EarlyStoppingCallback)]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._mean_terms()
        checkpoints = Path(self.args.output_dir)
        folder = checkpoint_path(checkpoints, self.state.global_step)
        try:
            with storage_errors(folder):
                if self.args.should_save:
                    shutil.rmtree(folder, ignore_errors=True)
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    commit_checkpoint(folder, self.topology)
                # A process that left earlier would have the launcher end this one while it commits.
                self.accelerator.wait_for_everyone()
        except BaseException:
            # Half a checkpoint must never be taken for one. Another process cannot know whether it is half.
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        if self.args.should_save:
            # No old one goes before the new one counts.
            remove_older_checkpoints(checkpoints, self.checkpoints_to_keep, self.state.best_global_step)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint and self.topology.zero_stage == 3 and is_universal(Path(checkpoint)):
            mend_universal_state(self.deepspeed.optimizer.optimizer, self._weight_decays)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._load_student(Path(resume_from_checkpoint), self.distiller.student)
        self.distiller.load_learnt(self._learnt_of(Path(resume_from_checkpoint)))

    def _load_best_model(self) -> None:
        best = checkpoint_path(Path(self.args.output_dir), self.state.best_global_step)
        if self.stop.requested:
            return
        if broken := broken_checksums(best):
            logger.warning("The best checkpoint, %s, is damaged (%s): keeping the last weights", best, broken[0])
            return
        logger.info("Taking the best checkpoint, %s", best)
        student = self._copy if self.is_deepspeed_enabled else self.distiller.student
        if student is not None:
            self._load_student(best, student)
        self._best_learnt = self._learnt_of(best)
        if not self.is_deepspeed_enabled:
            self.distiller.load_learnt(self._best_learnt)

    @staticmethod
    def _learnt_of(checkpoint: Path) -> dict[str, Tensor]:
        path = checkpoint / layout.OBJECTIVES
        return load_file(path) if path.is_file() else {}

    def _load_student(self, folder: Path, student: SentenceTransformer) -> None:
        unset_hf_deepspeed_config()  # with stage 3 transformers would split what it loads
        # A Dense head is first made with random weights; drawing them must not change the order of the sentences.
        with torch.random.fork_rng():
            saved = load_encoder(str(folder), device="cpu")
        student.load_state_dict(saved.state_dict())
