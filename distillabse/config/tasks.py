"""What sentence encoders are judged by beside fidelity: retrieval of translations, similarity scores, probes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distillabse.config.corpus import Source
from distillabse.config.schema import Schema


class TextTable(Schema):
    """Local tables, of which each row holds a text and says its language, or all rows have one."""

    path: str = Field(description="A file, or a glob such as data/*.tsv.gz.")
    format: Literal["auto", "tsv", "csv", "jsonl", "parquet"] = Field(
        "auto", description="By default taken from the file name."
    )
    language: str | None = Field(None, description="Language of every row, unless `language_column` names it.")
    language_column: str | None = Field(None, description="Column that holds the language code.")
    where: dict[str, str] = Field(default_factory=dict, description="Keep only rows whose column has this value.")

    @model_validator(mode="after")
    def _has_one_language(self) -> TextTable:
        if (self.language is None) == (self.language_column is None):
            raise ValueError("set exactly one of language and language_column")
        return self


class AlignedTable(TextTable):
    """The same sentences in several languages: rows with the same id are translations of each other."""

    id: str = Field("id", description="Column with the number or name of the sentence.")
    text: str = Field("text", description="Column with the sentence.")


class ScoredTable(TextTable):
    """Pairs of sentences with a score of how alike they are."""

    sentence1: str = Field("sentence1", description="Column with the first sentence.")
    sentence2: str = Field("sentence2", description="Column with the second sentence.")
    score: str = Field("score", description="Column with the score, a number on any scale.")


class LabelledTable(TextTable):
    """Texts with a class each."""

    text: str = Field("text", description="Column with the text.")
    label: str = Field("label", description="Column with its class.")


class _Task(Schema):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name in tables and with --only.")
    languages: list[str] | None = Field(None, description="Only these; ISO 639-1 or 639-3. By default all of the file.")
    max_pairs: int | None = Field(None, ge=2, description="At most this many rows of each language, drawn by the seed.")


class RetrievalTask(_Task):
    """Bitext retrieval: is a sentence's translation its nearest neighbour?"""

    kind: Literal["retrieval"] = "retrieval"
    pairs: Source | None = Field(None, description="A parallel source: text in any language, translation in `pivot`.")
    aligned: AlignedTable | None = Field(None, description="Instead of pairs: one table of sentences by id.")
    pivot: str = Field("en", description="The language that all others are paired with.")
    margin: bool = Field(True, description="Score by ratio margin, too (Artetxe and Schwenk, 2019).")
    neighbours: int = Field(4, ge=1, description="k of the margin.")

    @model_validator(mode="after")
    def _has_one_table(self) -> RetrievalTask:
        if (self.pairs is None) == (self.aligned is None):
            raise ValueError("set exactly one of pairs and aligned")
        if self.pairs is not None and self.pairs.kind in ("files", "hub") and self.pairs.translation is None:
            raise ValueError("pairs: name the column of the translations: `translation`")
        if self.pairs is not None and self.pairs.kind == "phrasebook":
            raise ValueError("pairs: the phrasebook is text to train on; give files, moses or hub")
        return self


class SimilarityTask(_Task):
    """Semantic textual similarity: does the cosine order pairs of sentences as people do?"""

    kind: Literal["similarity"] = "similarity"
    table: ScoredTable
    pivot: str = Field("en", description="Language of the first sentence in the cross-lingual figure.")


class ProbeTask(_Task):
    """Classification by a logistic probe on frozen vectors, in the language it was trained on and in others."""

    kind: Literal["probe"] = "probe"
    train: LabelledTable
    test: LabelledTable
    regularisation: float = Field(0.01, gt=0, description="C of scikit-learn's LogisticRegression: small is strong.")


Task = Annotated[RetrievalTask | SimilarityTask | ProbeTask, Field(discriminator="kind")]


class TaskSuite(Schema):
    """A YAML file of tasks that several jobs share."""

    tasks: list[Task] = Field(min_length=1)


Baseline = Literal["random", "static"]


class TasksConfig(Schema):
    """What `bench --tasks` measures."""

    suite: str | None = Field(None, description="A YAML file of tasks, or the name of a shipped one: evaluation-data.")
    tasks: list[Task] = Field(default_factory=list, description="More tasks.")
    max_pairs: int | None = Field(
        None, ge=2, description="At most this many rows of each language, for tasks that do not say themselves."
    )
    baselines: list[Baseline] = Field(
        ["random"],
        description="Columns beside teacher and student. static: the teacher's tokens without context, by model2vec "
        "(pip install 'distillabse[floor]').",
    )
    bootstrap_samples: int = Field(1000, ge=100, description="Resamples for the 95 % intervals.")
