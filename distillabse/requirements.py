"""What is refused before a job begins, because some stage of it could only fail."""

from __future__ import annotations

from distillabse.alignment import require_aligner
from distillabse.config import JobConfig, SwitchStudentConfig, TrainedStudentConfig, learn_from_pairs, need_links
from distillabse.errors import ConfigurationError
from distillabse.models.shape import resolve_shape, transformer_shape
from distillabse.models.teacher import encoder_settings


def require_fitting_shapes(config: JobConfig) -> None:
    """Refuse widths and layers that do not fit what the student starts from; needs its config.json alone.

    Raises:
        ConfigurationError: names the key and the remedy.
    """
    settings = encoder_settings(config.base_model or config.teacher)
    if settings is None or not isinstance(config.student, TrainedStudentConfig):
        return  # an encoder that cannot be had now is an error of the stage that needs it
    shape = transformer_shape(settings)
    if config.assistant is not None:
        shape, _ = resolve_shape(config.assistant.student, shape)
    resolve_shape(config.student, shape)


def refuse_spread_experts(config: JobConfig) -> None:
    """Refuse experts that are spread over processes: in a job every process has all of them, or ZeRO shares them out.

    Raises:
        ConfigurationError: names the key and the remedy.
    """
    students = (config.student, config.assistant.student if config.assistant else None)
    sizes = [student.expert_parallel_size for student in students if isinstance(student, SwitchStudentConfig)]
    size = max(sizes, default=1)
    if size > 1:
        raise ConfigurationError(
            f"student.expert_parallel_size: {size} is for DeepSpeed scripts of your own, with distillabse.training."
            "expert_parallel (docs/switch.md). In a job set 1; ZeRO (training.deepspeed) shares out optimizer states, "
            "gradients and, in stage 3, the experts themselves."
        )


def require_learnable_pairs(config: JobConfig) -> None:
    """Refuse batches too small to compare pairs with each other, and an aligner that is not installed.

    Raises:
        ConfigurationError: names the key and the remedy.
    """
    if not learn_from_pairs(config.objectives):
        return
    from transformers import TrainingArguments

    from distillabse.objectives import require_enough_pairs

    if need_links(config.objectives):
        require_aligner(config.aligner)
    default = TrainingArguments.__dataclass_fields__["per_device_train_batch_size"].default
    require_enough_pairs(config.objectives, config.training.get("per_device_train_batch_size", default))
