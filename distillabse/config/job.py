"""The whole job as one typed schema."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from distillabse.config.corpus import CorpusConfig, PhrasebookSource
from distillabse.config.models import (
    AssistantConfig,
    DenseStudentConfig,
    EncoderConfig,
    StudentConfig,
    SwitchStudentConfig,
    TeacherConfig,
    TrainedStudentConfig,
    TrainingConfig,
    VocabularyConfig,
)
from distillabse.config.objectives import (
    HiddenObjective,
    MiniLMObjective,
    MiniLMv2Objective,
    RoutingObjective,
    learn_from_pairs,
    need_teacher_of_translations,
)
from distillabse.config.product import (
    SWITCH_CONSUMERS,
    BenchConfig,
    EvaluationConfig,
    ExportConfig,
    GatesConfig,
    PlanConfig,
)
from distillabse.config.tasks import TasksConfig

# Unlike a job's own training, this one is short and starts almost where it ends.
_QUANTIZATION_TRAINING = {
    "max_steps": 600,
    "per_device_train_batch_size": 32,
    "learning_rate": 3e-5,
    "weight_decay": 0.0,
    "bf16": False,
}


class JobConfig(TrainingConfig):
    """One compression job."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the job, used for its folder.")
    output: Path = Field(Path("runs"), description="Folder that holds the run folder <output>/<name>.")
    seed: int = 42
    teacher: TeacherConfig
    corpus: CorpusConfig
    base_model: EncoderConfig | None = Field(
        None,
        description="What the student starts from instead of the teacher, e.g. FacebookAI/xlm-roberta-base. Pooled by "
        "the mean where it does not say how.",
    )
    vocabulary: VocabularyConfig = Field(default_factory=VocabularyConfig)
    assistant: AssistantConfig | None = Field(None, description="A teacher assistant between teacher and student.")
    student: StudentConfig = Field(default_factory=DenseStudentConfig)
    export: ExportConfig = Field(default_factory=ExportConfig)
    gates: GatesConfig = Field(default_factory=GatesConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    bench: BenchConfig = Field(default_factory=BenchConfig)
    plan: PlanConfig = Field(default_factory=PlanConfig)
    tasks: TasksConfig = Field(default_factory=TasksConfig)

    @model_validator(mode="after")
    def _parts_fit(self) -> JobConfig:
        if isinstance(self.student, TrainedStudentConfig):
            for name, trained in (("", self), ("assistant.", self.assistant)):
                if trained is not None:
                    _require_objectives(name, trained)
            if self.assistant is not None:
                self.assistant.require_larger_than(self.student)
                if self.student.continue_from is not None:
                    raise ValueError(
                        "assistant: it leads a student to its start, and student.continue_from is a later one; remove "
                        "the assistant"
                    )
        elif self.assistant is not None:
            raise ValueError("assistant: with student.kind: teacher nothing is trained; remove the assistant")
        return self

    @model_validator(mode="after")
    def _teacher_can_teach(self) -> JobConfig:
        if learn_from_pairs(self.objectives):
            _require_pairs(self)
        if not self.shares_tokenizer:
            _require_no_common_tokens(self)
        return self

    @model_validator(mode="after")
    def _student_can_be_quantized(self) -> JobConfig:
        trained = self.export.quantization.training
        if trained is None:
            return self
        if isinstance(self.student, SwitchStudentConfig):
            raise ValueError(
                "export.quantization.training: it is for dense students, and the experts of a Switch student are no "
                "linear layers. Leave it out, or distil the Switch student back into a dense one"
            )
        if trained.target == "teacher" and (not self.shares_tokenizer or self.teacher.languages is not None):
            raise ValueError(
                "export.quantization.training.target: the teacher does not read all that the student reads; set "
                "target: student"
            )
        return self

    @model_validator(mode="after")
    def _consumers_can_load(self) -> JobConfig:
        if isinstance(self.student, SwitchStudentConfig):
            unable = [name for name in self.export.consumers if name not in SWITCH_CONSUMERS]
            if unable:
                raise ValueError(
                    f"export.consumers: {', '.join(unable)} cannot load a Switch student, whose class is not one of "
                    f"transformers' own; {', '.join(SWITCH_CONSUMERS)} can. Leave them out, or distil the Switch "
                    "student back into a dense one (`distillabse configs cp minilm-switch-dense`)"
                )
        return self

    def of_assistant(self) -> JobConfig:
        """The same job with the assistant as its student.

        Raises:
            ValueError: the job has no assistant.
        """
        if self.assistant is None:
            raise ValueError("the job has no assistant")
        own = {name: getattr(self.assistant, name) for name in AssistantConfig.model_fields}
        return self.model_copy(update={**own, "assistant": None})

    def of_quantization(self) -> JobConfig:
        """The same job with its quantisation-aware distillation as its training.

        Raises:
            ValueError: the job has none.
        """
        trained = self.export.quantization.training
        if trained is None:
            raise ValueError("the job has no quantisation-aware distillation")
        defaults = dict(_QUANTIZATION_TRAINING)
        if "num_train_epochs" in trained.training:
            del defaults["max_steps"]
        if "fp16" in trained.training:
            del defaults["bf16"]
        none = {"assistant": None, "teacher_cache": False, "shard_teacher": False, "static_warmup": None}
        own = {"objectives": trained.objectives, "early_stopping": trained.early_stopping}
        return self.model_copy(update={**none, **own, "training": {**defaults, **trained.training}})

    @property
    def shares_tokenizer(self) -> bool:
        """Whether a token of the student is one of the teacher's."""
        return self.base_model is None and self.vocabulary.kind != "train"

    @property
    def run_folder(self) -> Path:
        """Where everything of this job goes."""
        return self.output / self.name


def _require_pairs(job: JobConfig) -> None:
    """Every source of text has translations, of languages that the teacher knows as far as can be told now."""
    known = job.teacher.languages
    for number, source in enumerate(job.corpus.sources):
        if isinstance(source, PhrasebookSource):
            language: str | None = "en" if "en" in source.languages else source.languages[0]
            is_pairs = len(set(source.languages)) > 1
        else:
            language, is_pairs = source.language, getattr(source, "translation", True) is not None
        if not is_pairs:
            raise ValueError(
                f"corpus.sources.{number}: the objectives learn from translation pairs, and this source is "
                "monolingual. Name its `translation` column, or remove the source"
            )
        if known is not None and language is not None and language not in known:
            raise ValueError(
                f"corpus.sources.{number}: its sources are {language!r}, which the teacher does not know "
                f"(teacher.languages: {', '.join(known)}). Exchange `text` and `translation`, or add the language to "
                "teacher.languages if the teacher does know it"
            )
    for name, judged in job.evaluation.sets.items():
        language = getattr(judged, "language", None)
        if known is not None and language is not None and language not in known:
            raise ValueError(
                f"evaluation.sets.{name}: its texts are {language!r}, which the teacher does not know, so nothing can "
                f"be compared with it (teacher.languages: {', '.join(known)}). Name a side that it knows as `text` and "
                "this as `translation`, or remove the set"
            )
    if known is not None and need_teacher_of_translations(job.objectives):
        reading = next(objective for objective in job.objectives if need_teacher_of_translations([objective]))
        raise ValueError(
            f"objectives: {reading.kind} needs the teacher's vectors of translations, but it knows only "
            f"{', '.join(known)} (teacher.languages). Remove the objective, or choose a teacher of all languages"
        )
    if job.assistant is not None:
        raise ValueError("assistant: none can stand between teacher and student with objectives on translation pairs")


def _require_no_common_tokens(job: JobConfig) -> None:
    """A student with a tokenizer of its own learns from pairs, and from nothing that compares token by token."""
    reason = "base_model" if job.base_model is not None else "vocabulary.kind: train"
    if not isinstance(job.student, TrainedStudentConfig):
        raise ValueError(f"{reason}: with student.kind: teacher nothing is trained; choose kind: dense or switch")
    if not learn_from_pairs(job.objectives):
        raise ValueError(
            f"{reason}: a student with a tokenizer of its own learns from translation pairs; add an objective that "
            "compares them, such as {kind: multilingual}"
        )
    for objective in job.objectives:
        if isinstance(objective, (MiniLMObjective, MiniLMv2Objective, HiddenObjective)):
            raise ValueError(
                f"objectives: {objective.kind} compares token by token, and with {reason} student and teacher cut "
                "texts differently. Remove it, or keep the teacher's tokenizer (vocabulary.kind: keep or trim)"
            )


def _require_objectives(block: str, trained: TrainingConfig) -> None:
    """A student has something to learn from, and a router something that keeps its experts alive."""
    if not any(objective.weight > 0 for objective in trained.objectives):
        raise ValueError(f"{block}objectives: a student needs at least one objective to learn from")
    routing = any(isinstance(objective, RoutingObjective) for objective in trained.objectives)
    is_switch = isinstance(getattr(trained, "student", None), SwitchStudentConfig)
    if is_switch and not routing:
        raise ValueError(
            f"{block}objectives: a Switch student without load balancing sends all tokens to a few experts; add "
            "{kind: routing}"
        )
    if routing and not is_switch:
        raise ValueError(f"{block}objectives: routing balances the experts of a Switch student, and this one is dense")
