"""An encoder of LaBSE's exact shape with random weights, to measure speed and size where LaBSE itself is not at hand.

    python benchmarks/labse_stand_in.py --data data [--runs runs]

Its tokenizer is real: a cased WordPiece of 501,153 rows like LaBSE's, trained on mono_train/*.tsv.gz and
parallel_train/*.tsv.gz, so that sentences of many languages have realistic lengths. Writes runs/labse-stand-in, a
folder that SentenceTransformer loads, unless it is there, and prints the lengths of eval/tatoeba_test.tsv.gz.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

    from distillabse.corpus.records import Record, Sentence

FOLDER = "labse-stand-in"
SEED = 0
VOCABULARY_ROWS = 501_153
MAX_LENGTH = 256
LABSE = {
    "num_hidden_layers": 12,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
}
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ENGLISH = "eng"


def main() -> None:
    """Build the encoder if it is missing, then show how it cuts the evaluation text."""
    from rich.console import Console
    from rich.table import Table

    from distillabse.encoder import load_tokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()

    folder = stand_in(arguments.data, arguments.runs)
    lengths = token_lengths(load_tokenizer(folder), evaluation_sentences(arguments.data))
    table = Table("language", "sentences", "tokens per sentence", "tokens per word", "unknown", title=str(folder))
    for language, row in lengths.items():
        table.add_row(
            language, f"{row['sentences']:,}", f"{row['tokens_per_sentence']:.1f}", f"{row['tokens_per_word']:.2f}",
            f"{row['unknown_rate']:.2%}",
        )  # fmt: skip
    Console().print(table)


def stand_in(data: Path, runs: Path) -> Path:
    """The folder of the stand-in, built from the training text unless it is there."""
    folder = runs / FOLDER
    if not folder.is_dir():
        build_stand_in(folder, (sentence.text for sentence in training_sentences(data)))
    return folder


def build_stand_in(folder: Path, texts: Iterable[str], rows: int = VOCABULARY_ROWS, **shape: int) -> None:
    """Write a sentence encoder with LaBSE's modules and random weights.

    Args:
        folder: a folder that SentenceTransformer loads: Transformer, CLS pooling, Dense with tanh, Normalize.
        texts: what the tokenizer is trained on.
        rows: vocabulary rows.
        shape: fields of BertConfig in place of LaBSE's.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import BertConfig, BertModel

    from distillabse.models.folder import save_encoder
    from distillabse.models.teacher import no_progress_bars
    from distillabse.storage import new_folder

    torch.manual_seed(SEED)
    settings = BertConfig(vocab_size=rows, **{**LABSE, **shape})
    tokenizer = train_tokenizer(texts, rows)
    with new_folder(folder) as product, tempfile.TemporaryDirectory(dir=folder.parent) as backbone, no_progress_bars():
        BertModel(settings).save_pretrained(backbone)
        tokenizer.save_pretrained(backbone)
        width = settings.hidden_size
        modules = [
            Transformer(backbone, max_seq_length=min(MAX_LENGTH, settings.max_position_embeddings)),
            Pooling(width, pooling_mode="cls"),
            Dense(width, width, activation_function=torch.nn.Tanh()),
            Normalize(),
        ]
        save_encoder(SentenceTransformer(modules=modules, device="cpu"), product)


def train_tokenizer(texts: Iterable[str], rows: int) -> PreTrainedTokenizerBase:
    """A cased BERT tokenizer of exactly `rows` rows; rows that the text does not fill are [unused0], [unused1], ..."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=rows, min_frequency=2, special_tokens=list(SPECIAL_TOKENS))
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = tokenizer.get_vocab()
    vocabulary |= {f"[unused{row - len(vocabulary)}]": row for row in range(len(vocabulary), rows)}
    return BertTokenizerFast(vocab=vocabulary, do_lower_case=False, model_max_length=MAX_LENGTH)


def training_sentences(data: Path) -> list[Sentence]:
    """The distinct sentences of the training text, both sides of the parallel files."""
    from distillabse.corpus.records import sentences

    monolingual = read(data / "mono_train/*.tsv.gz", text="text", language_column="lang")
    parallel = read(
        data / "parallel_train/*.tsv.gz", text="en", language="en", translation="xx", translation_language_column="lang"
    )
    return sentences(chain(monolingual, parallel))


def evaluation_sentences(data: Path) -> list[Sentence]:
    """The distinct sentences of the Tatoeba evaluation text: for measuring speed, nothing is chosen on them."""
    from distillabse.corpus.records import sentences

    columns = {"text": "src", "language_column": "lang", "translation": "eng", "translation_language": ENGLISH}
    return sentences(read(data / "eval/tatoeba_test.tsv.gz", **columns))


def read(path: Path, **columns: str) -> Iterable[Record]:
    """The usable rows of tables."""
    from distillabse.config import FileSource
    from distillabse.corpus.records import Record
    from distillabse.corpus.sources import read_source

    return (row for row in read_source(FileSource(path=str(path), **columns), SEED) if isinstance(row, Record))


def token_lengths(tokenizer: Tokenizer, sentences: Iterable[Sentence]) -> dict[str, dict[str, float]]:
    """For every language: sentences, tokens per sentence with [CLS] and [SEP], tokens per word, share of unknown."""
    texts: dict[str, list[str]] = {}
    for sentence in sentences:
        texts.setdefault(sentence.language, []).append(sentence.text)
    unknown = tokenizer.token_to_id("[UNK]")
    lengths = {}
    for language, group in sorted(texts.items()):
        rows = [encoding.ids for encoding in tokenizer.encode_batch_fast(group, add_special_tokens=False)]
        tokens = sum(map(len, rows))
        lengths[language] = {
            "sentences": len(group),
            "tokens_per_sentence": tokens / len(group) + 2,
            "tokens_per_word": tokens / sum(len(text.split()) for text in group),
            "unknown_rate": sum(row.count(unknown) for row in rows) / tokens,
        }
    return lengths


if __name__ == "__main__":
    main()
