"""A tokenizer made from the corpus, and an encoder that reads with it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from distillabse.errors import ConfigurationError
from distillabse.models.teacher import transformer_of
from distillabse.models.tokens import tokenise

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer

SPECIAL_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
_WORD_START = "▁"
_CONTINUATION = "##"


def make_tokenizer(
    texts: Iterable[str], size: int, algorithm: Literal["unigram", "wordpiece"], lower_case: bool
) -> Tokenizer:
    """A tokenizer of at most `size` tokens, made from these texts with the tokenizers library.

    unigram (Kudo 2018, arXiv:1804.10959) is what XLM-R uses: texts are normalised to NFKC and cut at spaces and
    punctuation marks; a token that begins a word begins with ▁. wordpiece is what BERT and LaBSE use: Chinese,
    Japanese and Korean ideographs stand alone. Either writes [CLS] text [SEP].

    Raises:
        ConfigurationError: the texts have more characters than `size` tokens can hold.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = list(SPECIAL_TOKENS.values())
    trainer: Any
    if algorithm == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        lower = [normalizers.Lowercase()] if lower_case else []
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), *lower])
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(_WORD_START), pre_tokenizers.Punctuation("isolated")]
        )
        tokenizer.decoder = decoders.Metaspace(_WORD_START)
        trainer = trainers.UnigramTrainer(
            vocab_size=size, special_tokens=special, unk_token=SPECIAL_TOKENS["unk"], show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token=SPECIAL_TOKENS["unk"]))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower_case, strip_accents=False)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece(_CONTINUATION)
        trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() > size:
        raise ConfigurationError(
            f"vocabulary.size: {size} rows cannot hold the {tokenizer.get_vocab_size():,} characters and special "
            "tokens of this corpus; give more."
        )
    ends = [(SPECIAL_TOKENS[name], tokenizer.token_to_id(SPECIAL_TOKENS[name])) for name in ("cls", "sep")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return tokenizer


def with_tokenizer(base: SentenceTransformer, tokenizer: Tokenizer, seed: int) -> SentenceTransformer:
    """The encoder `base` with another tokenizer, and an embedding table for it; its other weights are the same.

    The row of a token is the mean of the rows of the base's own tokens for that piece of text, where it knows them. All
    other rows are drawn at random, with mean and spread of the base's.

    Args:
        base: any sentence encoder whose first module is a Transformer; it is not changed.
        tokenizer: as from `make_tokenizer`.
        seed: of the rows that are drawn.
    """
    import torch
    from transformers import PreTrainedTokenizerFast

    model = transformer_of(base)
    table = model.get_input_embeddings()
    special = {f"{name}_token": token for name, token in SPECIAL_TOKENS.items()}
    own = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=base.max_seq_length, clean_up_tokenization_spaces=False, **special
    )
    pad = own.pad_token_id
    if getattr(getattr(model, "embeddings", None), "padding_idx", None) not in (None, pad):
        raise ConfigurationError(
            "vocabulary.kind: train is for encoders that count positions from 0, as BERT does; RoBERTa and XLM-R count "
            "them from their padding token's number on. Use kind: keep or trim."
        )
    rows = _rows_for(tokenizer, base, table.weight.detach(), seed)
    new_table = torch.nn.Embedding(len(rows), rows.shape[1], padding_idx=None if table.padding_idx is None else pad)
    new_table.weight = torch.nn.Parameter(rows, requires_grad=table.weight.requires_grad)
    # What stands in the memo is taken for the copy already made.
    encoder = copy.deepcopy(base, {id(base.tokenizer): own, id(table): new_table})
    config = transformer_of(encoder).config
    config.vocab_size, config.pad_token_id = len(rows), pad
    for name in ("bos", "eos"):
        setattr(config, f"{name}_token_id", None)
    encoder[0].do_lower_case = False
    return encoder


def _rows_for(tokenizer: Tokenizer, base: SentenceTransformer, table: torch.Tensor, seed: int) -> torch.Tensor:
    """An embedding row for every token: float32 [tokens, width]."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(tokenizer.get_vocab_size(), table.shape[1], generator=generator)
    rows = table.mean(dim=0).cpu() + table.std(dim=0).cpu() * drawn
    for token, ids in _base_tokens(tokenizer, base):
        rows[token] = table[torch.from_numpy(ids).to(table.device)].mean(dim=0).cpu()
    return rows


def _base_tokens(tokenizer: Tokenizer, base: SentenceTransformer) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Each token that the base can spell, with the base's tokens for it."""
    own = base.tokenizer
    known = own.get_vocab()
    special = set(own.all_special_ids)
    made = tokenizer.get_vocab()
    for name, token in SPECIAL_TOKENS.items():
        if (row := getattr(own, f"{name}_token_id", None)) is not None:
            yield made[token], np.array([row])
    pieces = {row: token for token, row in made.items() if token not in SPECIAL_TOKENS.values()}
    texts = [token.replace(_WORD_START, " ").removeprefix(_CONTINUATION).strip() for token in pieces.values()]
    for (row, token), text, ids in zip(pieces.items(), texts, tokenise(base, texts), strict=True):
        begins_word = token.startswith(_WORD_START) or (
            tokenizer.model.__class__.__name__ == "WordPiece" and not token.startswith(_CONTINUATION)
        )
        inside = known.get(_CONTINUATION + text)
        spelled = np.array([inside] if inside is not None and not begins_word else [i for i in ids if i not in special])
        # What the base does not know at all comes out as its unknown token, which is special.
        if text and len(spelled) and own.unk_token_id not in ids:
            yield row, spelled.astype(np.int64)
