"""The text: where it comes from, how it is cleaned and split."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distillabse.config.schema import Fraction, Schema

PhrasebookLanguage = Literal["en", "de", "fr", "es", "it", "pt", "nl", "sv"]
PHRASEBOOK_LANGUAGES: tuple[PhrasebookLanguage, ...] = ("en", "de", "fr", "es", "it", "pt", "nl", "sv")


class TextColumns(Schema):
    """Which columns of a table hold what. `translation` makes the source parallel."""

    text: str = Field("text", description="Column with the sentence.")
    translation: str | None = Field(None, description="Column with its translation.")

    @model_validator(mode="after")
    def _every_column_has_one_language(self) -> TextColumns:
        for prefix, column in (("", self.text), ("translation_", self.translation)):
            keys = [key for key in (f"{prefix}language", f"{prefix}language_column") if key in type(self).model_fields]
            given = sum(getattr(self, key) is not None for key in keys)
            if column is not None and given != 1:
                raise ValueError(f"set exactly one of {' and '.join(keys)} for the column {column!r}")
            if column is None and given:
                raise ValueError(f"{prefix}language is set, but {prefix.rstrip('_')!r} names no column; set it too")
        return self


class FileSource(TextColumns):
    """Local tables or plain text: TSV, CSV, JSONL, Parquet or one sentence a line, plain or as .gz or .zst."""

    kind: Literal["files"] = "files"
    path: str = Field(description="A file, or a glob such as data/*.tsv.gz.")
    format: Literal["auto", "tsv", "csv", "jsonl", "parquet", "text"] = Field(
        "auto", description="By default taken from the file name: .tsv, .csv, .jsonl, .parquet, else plain text."
    )
    language: str | None = Field(
        None, description="ISO 639-1 code of the sentences, unless `language_column` names it."
    )
    language_column: str | None = Field(None, description="Column that holds the language code.")
    translation_language: str | None = Field(None, description="Language of the translations.")
    translation_language_column: str | None = Field(None, description="Column with the language of the translations.")
    where: dict[str, str] = Field(default_factory=dict, description="Keep only rows whose column has this value.")
    limit: int | None = Field(None, ge=1, description="Read at most this many rows in all, after `where`.")


class MosesSource(Schema):
    """An OPUS parallel corpus in Moses format: two line-aligned files, or the .zip that OPUS serves."""

    kind: Literal["moses"] = "moses"
    path: str = Field(description="The OPUS .zip, or the common prefix of the two files: <path>.<language>.")
    language: str = Field(description="Code of the first language, as in the file name.")
    translation_language: str = Field(description="Code of the second language, as in the file name.")
    limit: int | None = Field(None, ge=1, description="Read at most this many pairs.")


class HubSource(TextColumns):
    """A dataset of the Hugging Face hub."""

    kind: Literal["hub"] = "hub"
    dataset: str = Field(description="Hub id, e.g. sentence-transformers/parallel-sentences-opensubtitles.")
    configuration: str | None = Field(None, description="Configuration name, e.g. en-de.")
    split: str = Field("train", description="Split to read.")
    revision: str | None = Field(None, description="Commit or tag; pin it for a reproducible job.")
    streaming: bool = Field(True, description="Read row by row instead of downloading everything first.")
    language: str = Field(description="Code of the sentences' language.")
    translation_language: str | None = Field(None, description="Code of the translations' language.")
    limit: int | None = Field(None, ge=1, description="Read at most this many rows.")


class PhrasebookSource(Schema):
    """The built-in parallel corpus of everyday and subtitle-like sentences; needs no network."""

    kind: Literal["phrasebook"] = "phrasebook"
    languages: list[PhrasebookLanguage] = Field(
        default_factory=lambda: list(PHRASEBOOK_LANGUAGES),
        min_length=1,
        description="Languages to take.",
    )
    expansions_per_pattern: int = Field(90, ge=1, description="Sentences drawn from each pattern, at most.")


Source = Annotated[FileSource | MosesSource | HubSource | PhrasebookSource, Field(discriminator="kind")]


class CleaningConfig(Schema):
    """Rules that a sentence must meet."""

    normalization: Literal["NFC", "NFKC", "none"] = Field("NFC", description="Unicode normal form of the stored text.")
    min_characters: int = Field(2, ge=1, description="Shorter sentences are dropped.")
    max_characters: int = Field(500, ge=1, description="Longer sentences are dropped.")
    max_length_ratio: float = Field(
        4.0, gt=1.0, description="Pairs whose lengths differ by more are dropped as misaligned; ideographs count twice."
    )
    near_duplicates: bool = Field(
        True, description="Drop texts that equal an earlier one but for case, punctuation, spacing and digits."
    )


class SplitConfig(Schema):
    """How much is held out. No text, and neither side of a pair, is ever on two sides of the split."""

    dev: Fraction = Field(0.02, description="Share of rows for early stopping.")
    test: Fraction = Field(0.02, description="Share of rows for the final figures; never used to choose anything.")
    max_dev: int | None = Field(
        2000, ge=1, description="At most this many; what is left of a held-out group is in no split."
    )
    max_test: int | None = Field(2000, ge=1, description="At most this many, likewise.")


class CorpusConfig(Schema):
    """The text to learn from."""

    sources: list[Source] = Field(min_length=1, description="One or more places that text comes from.")
    cleaning: CleaningConfig = Field(default_factory=CleaningConfig)
    split: SplitConfig = Field(default_factory=SplitConfig)
    max_sentences: int | None = Field(None, ge=1, description="Keep at most this many training rows.")
    temperature: float = Field(
        1.0, ge=1.0, description="Languages are drawn in proportion to count^(1/temperature); needs max_sentences."
    )
    streaming: bool = Field(
        False,
        description="Build the corpus on disk, in memory that does not grow with it. Training then reads every side of "
        "every row, repeated texts too, and the vocabulary stage counts a sample of a million rows. Needs "
        "split.max_dev and max_test; all other rows that share a text or group with a held-out row are in no split.",
    )
    rejected_sample: int = Field(20, ge=0, description="Rejected lines kept to look at, of each source and reason.")

    @model_validator(mode="after")
    def _temperature_needs_a_total(self) -> CorpusConfig:
        if self.temperature != 1.0 and self.max_sentences is None:
            raise ValueError("temperature mixes languages within a total: set corpus.max_sentences too")
        return self

    @model_validator(mode="after")
    def _streaming_needs_bounds(self) -> CorpusConfig:
        if self.streaming and None in (self.split.max_dev, self.split.max_test):
            raise ValueError("streaming keeps dev and test in memory: set corpus.split.max_dev and max_test")
        return self
