# ruff: noqa: RUF001 - text in many scripts
import io
import json
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from distillabse.config import CorpusConfig, JobConfig, PhrasebookSource, TeacherConfig, VocabularyConfig
from distillabse.corpus.records import Record, Sentence, write_records
from distillabse.errors import ConfigurationError, InputError
from distillabse.layout import RunFolder
from distillabse.models.folder import save_encoder
from distillabse.models.teacher import load_encoder, load_teacher, transformer_of
from distillabse.models.tokens import tokenise
from distillabse.vocabulary.counting import coverage_thresholds, used_scripts
from distillabse.vocabulary.selection import select_rows
from distillabse.vocabulary.stage import keep_vocabulary, trim_vocabulary, vocabulary_stage, vocabulary_table
from distillabse.vocabulary.tokenizer_document import TokenizerDocument
from distillabse.vocabulary.trimming import trim_encoder

TEXT = """
The old house by the river is where my friend lives, and the river runs through the old town every morning.
Why does the small bird sing so early? Because the morning is warm, said the friend of the bird.
Das alte Haus am Fluss ist größer als der Bahnhof, und der Fluss fließt durch die größte Stadt.
Où est la bibliothèque? Elle est près de la forêt où les élèves étudient l'été.
Старый дом у реки стоит здесь уже сто лет, и река течёт через старый город.
Почему маленькая птица поёт так рано? Потому что утро тёплое.
Το παλιό σπίτι δίπλα στο ποτάμι είναι μεγάλο και το ποτάμι περνά από την πόλη.
البيت القديم بجانب النهر كبير جدا والنهر يمر عبر المدينة القديمة كل صباح.
नदी के पास पुराना घर बहुत बड़ा है और नदी हर सुबह पुराने शहर से होकर बहती है।
บ้านเก่าริมแม่น้ำหลังใหญ่มากและแม่น้ำไหลผ่านเมืองเก่าทุกเช้า
河边的老房子很大,每天早上河水流过老城。为什么小鸟这么早唱歌?
강가의 오래된 집은 아주 크고 강은 매일 아침 오래된 도시를 지나 흐른다.
הבית הישן ליד הנהר גדול מאוד והנהר זורם דרך העיר העתיקה בכל בוקר.
1234567890 100% (yes) 😀 🎉 👍 😀 #tag @name a+b=c ~ 50 €
""".strip().splitlines()
CHARACTERS = sorted(set("".join(TEXT)))
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
ROBERTA_SPECIAL = {
    "cls_token": "<s>", "bos_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "eos_token": "</s>",
    "unk_token": "<unk>", "mask_token": "<mask>",
}  # fmt: skip
FAMILIES = ("wordpiece", "unigram", "bpe", "bpe_prefix", "byte_bpe")


def template(tokenizer, first, last):
    return processors.TemplateProcessing(
        single=f"{first} $A {last}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (first, last)],
    )


def bert_like(model, trainer, normalizer):
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = template(tokenizer, "[CLS]", "[SEP]")
    return tokenizer


def train(family):
    """A tokenizer of about 600 tokens; every single character of TEXT is among them."""
    special = [*SPECIAL.values(), "[MASK]"]
    options = {"special_tokens": special, "vocab_size": 900, "min_frequency": 1, "show_progress": False}
    if family == "wordpiece":
        normalizer = normalizers.BertNormalizer(lowercase=False)
        return bert_like(models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer(**options), normalizer)
    if family == "bpe":
        trainer = trainers.BpeTrainer(end_of_word_suffix="</w>", **options)
        return bert_like(models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"), trainer, normalizers.NFC())
    if family == "bpe_prefix":
        trainer = trainers.BpeTrainer(continuing_subword_prefix="@@", **options)
        return bert_like(models.BPE(unk_token="[UNK]", continuing_subword_prefix="@@"), trainer, normalizers.NFC())
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    if family == "byte_bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            special_tokens=special, vocab_size=900, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(TEXT, trainer)
        pairs = [(token, tokenizer.token_to_id(token)) for token in ("</s>", "<s>")]
        tokenizer.post_processor = processors.RobertaProcessing(*pairs)
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            special_tokens=special, vocab_size=500, unk_token="<unk>", show_progress=False
        )
        tokenizer.train_from_iterator(TEXT, trainer)
        tokenizer.post_processor = template(tokenizer, "<s>", "</s>")
    tokenizer.add_special_tokens(["<mask>"])
    return tokenizer


def make_encoder(path, tokenizer, special, roberta=False, max_length=128):
    """A tiny encoder with random weights around a tokenizer."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import (
        BertConfig,
        BertModel,
        BertTokenizerFast,
        PreTrainedTokenizerFast,
        XLMRobertaConfig,
        XLMRobertaModel,
    )

    rows = tokenizer.get_vocab_size()
    config_class, model_class = (XLMRobertaConfig, XLMRobertaModel) if roberta else (BertConfig, BertModel)
    numbers = {f"{name}_id": tokenizer.token_to_id(token) for name, token in special.items() if name[:3] != "unk"}
    config = config_class(
        vocab_size=rows, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=max_length + 4, initializer_range=0.2, **numbers,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model_class(config).save_pretrained(path / "backbone")
    if isinstance(tokenizer.normalizer, normalizers.BertNormalizer):
        fast = BertTokenizerFast(vocab=tokenizer.get_vocab(), do_lower_case=False, model_max_length=max_length)
    else:
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, **special)
    fast.save_pretrained(path / "backbone")
    transformer = Transformer(str(path / "backbone"), max_seq_length=max_length)
    modules = [transformer, Pooling(16, pooling_mode="mean"), Normalize()]
    return SentenceTransformer(modules=modules, device="cpu").eval()


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    made = {}
    for family in FAMILIES:
        roberta = family in ("unigram", "byte_bpe")
        special = ROBERTA_SPECIAL if roberta else {**SPECIAL, "mask_token": "[MASK]"}
        made[family] = make_encoder(tmp_path_factory.mktemp(family), train(family), special, roberta)
    return made


def whole_ids(encoder, texts):
    """Token ids of texts that are not cut at the maximum length, and the prompt's."""
    prompt = encoder.prompts.get(encoder.default_prompt_name, "")
    return {token for text in texts for token in encoder.tokenizer(prompt + text)["input_ids"]}


def tokens_of(encoder, text):
    return encoder.tokenizer.convert_ids_to_tokens(tokenise(encoder, [text])[0])


def words_of(counts):
    """Counts by token number, as an array of ten rows."""
    row_counts = np.zeros(10, dtype=np.int64)
    row_counts[list(counts)] = list(counts.values())
    return row_counts


# Choosing rows


def test_thresholds_are_the_share_of_more_frequent_rows():
    thresholds = coverage_thresholds(words_of({1: 50, 2: 30, 3: 15, 4: 5}))
    assert thresholds[1:5].tolist() == [0.0, 0.5, 0.8, 0.95]
    assert np.isinf(thresholds[[0, 5, 6, 7, 8, 9]]).all()
    tied = coverage_thresholds(words_of({7: 2, 3: 2, 5: 6}))
    assert (tied[5], tied[3], tied[7]) == (0.0, 0.6, 0.8)
    assert [np.count_nonzero(thresholds < coverage) for coverage in (0.5, 0.8, 0.81, 1.0)] == [1, 2, 3, 4]


def test_used_scripts():
    texts = ["abcdefgh, 123 (ijk)", "абв", "ñ"]
    assert used_scripts(texts, 1.0) == {"Latn", "Cyrl"}
    assert used_scripts(texts, 0.8) == {"Latn"}  # 12 of 15 letters are Latin
    assert used_scripts(texts, 0.81) == {"Latn", "Cyrl"}
    assert used_scripts(["12 !?", ""], 1.0) == set()


PLAIN = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "##a", "б", "##б", "ab", "abba", "##ab", "абба", "баба", "7"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Rows 0 to 13 in the order of PLAIN."""
    tokenizer = Tokenizer(models.WordPiece({token: row for row, token in enumerate(PLAIN)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = template(tokenizer, "[CLS]", "[SEP]")
    return make_encoder(tmp_path_factory.mktemp("plain"), tokenizer, SPECIAL)


def plain_counts(**languages):
    return {
        language: np.array([counts.get(token, 0) for token in PLAIN], dtype=np.int64)
        for language, counts in languages.items()
    }


def kept_tokens(rows):
    return [PLAIN[row] for row in rows]


def test_selection_by_coverage(plain):
    counts = plain_counts(en={"abba": 90, "ab": 9, "##ab": 1}, ru={"баба": 6, "абба": 4})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    assert kept_tokens(select_rows(plain, counts, ["Zyyy"], 0.6)) == [*special, "abba", "баба", "7"]
    assert kept_tokens(select_rows(plain, counts, ["Zyyy"], 0.91)) == [*special, "ab", "abba", "абба", "баба", "7"]
    latin = select_rows(plain, counts, ["Latn"], 0.6)
    assert kept_tokens(latin) == [*special, "a", "##a", "abba", "баба"]
    assert kept_tokens(select_rows(plain, counts, ["Cyrl"], 0.6)) == [*special, "б", "##б", "abba", "баба"]
    assert len(select_rows(plain, counts, [], 1.0)) == 4 + 5


def test_selection_by_size_takes_every_language_in_turn(plain):
    counts = plain_counts(en={"abba": 90, "ab": 9, "##ab": 1}, ru={"баба": 6, "абба": 4})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    assert kept_tokens(select_rows(plain, counts, [], 0.1, size=6)) == [*special, "abba", "баба"]
    assert kept_tokens(select_rows(plain, counts, [], 0.1, size=7)) == [*special, "abba", "абба", "баба"]
    assert kept_tokens(select_rows(plain, counts, [], 0.1, size=8)) == [*special, "ab", "abba", "абба", "баба"]
    assert len(select_rows(plain, counts, [], 0.1, size=100)) == 9
    with pytest.raises(ConfigurationError, match=r"5 rows are too few.*take 6\. Give at least 6"):
        select_rows(plain, counts, [], 0.1, size=5)
    with pytest.raises(ConfigurationError, match=r"Zyyy.*Give at least 7"):
        select_rows(plain, counts, ["Zyyy"], 0.1, size=6)


def test_bpe_size_counts_what_tokens_are_merged_from(tmp_path):
    vocabulary = {token: row for row, token in enumerate([*SPECIAL.values(), "a", "b", "c", "ab", "bc", "abc"])}
    merges = [("a", "b"), ("b", "c"), ("ab", "c")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="[UNK]"))
    encoder = make_encoder(tmp_path, tokenizer, SPECIAL)
    counts = {"en": words_of({9: 5, 8: 1})}  # abc five times, bc once
    assert select_rows(encoder, counts, [], 0.5).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 9]
    assert select_rows(encoder, counts, [], 0.5, size=9).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 9]
    with pytest.raises(ConfigurationError, match="take 9"):
        select_rows(encoder, counts, [], 0.5, size=8)
    counts = {"en": words_of({6: 5, 9: 1})}  # c five times, abc once: a, b and ab would have to come along
    assert select_rows(encoder, counts, [], 0.5, size=8).tolist() == [0, 1, 2, 3, 6]
    trimmed = trim_encoder(encoder, [9])
    content = json.loads(trimmed.tokenizer.backend_tokenizer.to_str())
    assert content["model"]["merges"] == [["a", "b"], ["ab", "c"]]
    assert trimmed.tokenizer.tokenize("abc") == ["abc"] and trimmed.tokenizer.tokenize("bcab") == ["b", "c", "ab"]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["a", "##a", "ab", "##ab", "б", "##б", "é", "7", "##7", "##"], {"a", "##a", "é"}),
        (["▁", "▁a", "a", "▁ab", "б", "▁б", "é", "7"], {"▁a", "a", "é"}),
        (["Ġ", "Ġa", "a", "ab", "Ã", "©", "Ã©", "ĠÃ©", "Ã©a", "Ð±", "7"], {"Ġa", "a", "Ã©", "ĠÃ©"}),
        (["a", "a</w>", "ab</w>", "б</w>", "é", "7</w>"], {"a", "a</w>", "é"}),
    ],
)
def test_single_characters_of_a_script(tokens, expected):
    model = {"type": "BPE", "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": "</w>"}
    model = {**model, "type": "WordPiece", "continuing_subword_prefix": "##"} if "##a" in tokens else model
    pre_tokenizer = {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, {"type": "ByteLevel"}]}
    content = {"model": model, "normalizer": None, "pre_tokenizer": pre_tokenizer if "Ġ" in tokens else None}
    document = TokenizerDocument(content, dict(enumerate(tokens)), frozenset())
    assert {tokens[row] for row in document.characters(["Latn"])} == expected


# The same tokens and the same vectors

words = st.sampled_from(sorted({word for line in TEXT for word in line.split()}))
odd = st.sampled_from(
    [*" \t\u00a0\u2009\u200b\u3000", "\u0301", "\u0e49", "\u093c", "👩\u200d👩\u200d👧", "##", "▁", "Ġ"]
)
characters = st.sampled_from(CHARACTERS)
anything = st.characters(codec="utf-8")
texts = st.lists(
    st.one_of(words, words.map(lambda word: word + " "), st.just(" "), characters, odd, anything), max_size=12
).map("".join)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts, extra=st.sets(st.integers(0, 480), max_size=60))
def test_kept_tokens_stay_and_so_does_the_vector(encoders, family, text, extra):
    teacher = encoders[family]
    extra = {row for row in extra if row < len(teacher.tokenizer)}
    trimmed = trim_encoder(teacher, whole_ids(teacher, [text]) | extra)
    assert tokens_of(trimmed, text) == tokens_of(teacher, text)
    np.testing.assert_allclose(trimmed.encode(text), teacher.encode(text), atol=1e-6)


@pytest.fixture(scope="module")
def half(encoders):
    """Each family with a random half of its rows."""
    rng = np.random.default_rng(0)
    rows = {family: rng.permutation(len(teacher.tokenizer))[::2] for family, teacher in encoders.items()}
    return {family: trim_encoder(teacher, rows[family]) for family, teacher in encoders.items()}


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(text=st.one_of(characters, words, texts))
def test_a_half_vocabulary_keeps_what_it_can(encoders, half, family, text):
    teacher, trimmed = encoders[family], half[family]
    needed = teacher.tokenizer.convert_ids_to_tokens(sorted(whole_ids(teacher, [text])))
    if set(needed) <= trimmed.tokenizer.get_vocab().keys():
        assert tokens_of(trimmed, text) == tokens_of(teacher, text)
        np.testing.assert_allclose(trimmed.encode(text), teacher.encode(text), atol=1e-6)


def test_an_unknown_word_may_become_spellable_to_wordpiece(tmp_path):
    """The one exception to the guarantee: 'c' occurs inside tokens, but ##c is none."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "ab", "##bc"]
    tokenizer = Tokenizer(models.WordPiece({token: row for row, token in enumerate(tokens)}, unk_token="[UNK]"))
    encoder = make_encoder(tmp_path, tokenizer, SPECIAL)
    assert encoder.tokenizer.tokenize("abc") == ["[UNK]"]
    assert trim_encoder(encoder, [4, 6]).tokenizer.tokenize("abc") == ["a", "##bc"]


def test_unigram_keeps_its_lowest_score(tmp_path):
    """Without z an unknown a (-50) and bc (-1) would beat ab and c (-80): unknown costs the lowest score less 10."""
    special = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    pieces = [("▁", -1.0), ("ab", -40.0), ("c", -40.0), ("bc", -1.0), ("a", -90.0), ("z", -100.0)]
    tokenizer = Tokenizer(models.Unigram([*special, *pieces], unk_id=3))
    tokenizer.add_special_tokens(["<mask>"])
    encoder = make_encoder(tmp_path, tokenizer, ROBERTA_SPECIAL, roberta=True)
    assert encoder.tokenizer.tokenize("abc") == ["ab", "c"]
    trimmed = trim_encoder(encoder, [5, 6, 7])
    assert trimmed.tokenizer.tokenize("abc") == ["ab", "c"]
    assert sorted(trimmed.tokenizer.get_vocab()) == sorted(encoder.tokenizer.get_vocab().keys() - {"a"})


def test_unigram_unknown_token_moves_with_its_row(tmp_path):
    pieces = [("[PAD]", 0.0), ("a", -1.0), ("b", -2.0), ("[UNK]", 0.0), ("c", -9.0), ("[CLS]", 0.0), ("[SEP]", 0.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    trimmed = trim_encoder(make_encoder(tmp_path, tokenizer, SPECIAL), [2])
    content = json.loads(trimmed.tokenizer.backend_tokenizer.to_str())
    assert [piece for piece, _ in content["model"]["vocab"]] == ["[PAD]", "b", "[UNK]", "c", "[CLS]", "[SEP]"]
    assert content["model"]["unk_id"] == 2 and trimmed.tokenizer.unk_token_id == 2
    assert tokenise(trimmed, ["bxb"]) == [[1, 2, 1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_trimmed_encoder_has_the_teachers_rows_and_settings(encoders, family):
    teacher = encoders[family]
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    before_tokens = tokens_of(teacher, TEXT[0])
    trimmed = trim_encoder(teacher, whole_ids(teacher, TEXT[:2]))
    table, whole = (transformer_of(encoder).get_input_embeddings() for encoder in (trimmed, teacher))
    tokens = trimmed.tokenizer.get_vocab()
    assert len(tokens) == table.num_embeddings == table.weight.shape[0] < whole.num_embeddings
    old = [teacher.tokenizer.get_vocab()[token] for token in sorted(tokens, key=tokens.get)]
    assert old == sorted(old)
    torch.testing.assert_close(table.weight, whole.weight[old], rtol=0, atol=0)
    assert transformer_of(trimmed).config.vocab_size == len(tokens)
    assert transformer_of(trimmed).config.pad_token_id == trimmed.tokenizer.pad_token_id == table.padding_idx
    assert type(trimmed.tokenizer) is type(teacher.tokenizer)
    assert trimmed.tokenizer.special_tokens_map == teacher.tokenizer.special_tokens_map
    assert trimmed.max_seq_length == teacher.max_seq_length == 128
    assert tokens_of(teacher, TEXT[0]) == before_tokens
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_rows_before_the_padding_row_of_roberta_stay(encoders):
    """XLM-R counts positions from its padding row on: another row there would move every position."""
    teacher = encoders["unigram"]
    trimmed = trim_encoder(teacher, [300])
    model = transformer_of(trimmed)
    assert model.embeddings.padding_idx == trimmed.tokenizer.pad_token_id == 1
    assert trimmed.tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<s>", "<pad>", "</s>"]
    uneven = [TEXT[0], "the", TEXT[4]]
    trimmed = trim_encoder(teacher, whole_ids(teacher, uneven))
    np.testing.assert_allclose(trimmed.encode(uneven), teacher.encode(uneven), atol=1e-6)


LATE = ["a", "b", "##c", "d", "[SEP]", "[PAD]", "e", "[UNK]", "f", "[CLS]"]
PAIRS = (("[SEP]", 4), ("[CLS]", 9))


@pytest.mark.parametrize("roberta", [False, True])
@pytest.mark.parametrize(
    "post_processor",
    [
        processors.BertProcessing(*PAIRS),
        processors.RobertaProcessing(*PAIRS),
        processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=list(PAIRS)),
        processors.Sequence([processors.ByteLevel(), processors.BertProcessing(*PAIRS)]),
    ],
    ids=["bert", "roberta", "template", "sequence"],
)
def test_special_tokens_may_stand_anywhere(tmp_path, roberta, post_processor):
    tokenizer = Tokenizer(models.WordPiece({token: row for row, token in enumerate(LATE)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = post_processor
    encoder = make_encoder(tmp_path, tokenizer, SPECIAL, roberta)
    texts = ["b", "f b f b", "b x"]
    assert tokenise(encoder, texts) == [[9, 1, 4], [9, 8, 1, 8, 1, 4], [9, 1, 7, 4]]
    trimmed = trim_encoder(encoder, [1, 8])
    # Before RoBERTa's padding row every row stays, since positions are counted from its number.
    kept = [0, 1, 2, 3, 4, 5, 7, 8, 9] if roberta else [1, 4, 5, 7, 8, 9]
    assert trimmed.tokenizer.convert_ids_to_tokens(range(len(kept))) == [LATE[row] for row in kept]
    assert [[kept[token] for token in ids] for ids in tokenise(trimmed, texts)] == tokenise(encoder, texts)
    assert transformer_of(trimmed).get_input_embeddings().padding_idx == kept.index(5)
    assert transformer_of(trimmed).config.pad_token_id == kept.index(5)
    np.testing.assert_allclose(trimmed.encode(texts), encoder.encode(texts), atol=1e-6)


def test_padding_row_of_the_table_that_is_not_the_tokenizers(tmp_path, plain):
    encoder = make_encoder(tmp_path, plain.tokenizer.backend_tokenizer, SPECIAL)
    transformer_of(encoder).get_input_embeddings().padding_idx = 9
    trimmed = trim_encoder(encoder, [4])
    assert sorted(trimmed.tokenizer.get_vocab()) == sorted([*SPECIAL.values(), "a", "abba"])
    assert transformer_of(trimmed).get_input_embeddings().padding_idx == 5


def test_bytes_are_always_kept(encoders):
    text = "ß😀 中א\u0301"
    trimmed = trim_encoder(encoders["byte_bpe"], [])
    assert len(trimmed.tokenizer) == 5 + 256
    assert trimmed.tokenizer.decode(tokenise(trimmed, [text])[0], skip_special_tokens=True) == text


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_again(encoders, family, tmp_path):
    teacher = encoders[family]
    corpus = [Sentence(text, "xx") for text in TEXT]
    trimmed = trim_vocabulary(teacher, corpus[:6], coverage=0.9).encoder
    assert len(trimmed.tokenizer) < len(teacher.tokenizer)
    save_encoder(trimmed, tmp_path)
    loaded = load_encoder(str(tmp_path))
    np.testing.assert_allclose(loaded.encode(TEXT), trimmed.encode(TEXT), atol=1e-6)
    assert tokenise(loaded, TEXT) == tokenise(trimmed, TEXT)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == len(trimmed.tokenizer)


@pytest.mark.parametrize("family", FAMILIES)
def test_trimmed_words_fall_back_to_pieces(encoders, family):
    """Trimmed to the tokens of other texts, every word in the kept scripts is still spelled out."""
    teacher = encoders[family]
    latin = TEXT[:4]
    trimmed = trim_vocabulary(teacher, [Sentence(latin[0], "en"), Sentence(latin[2], "de")], coverage=0.5).encoder
    unknown = trimmed.tokenizer.unk_token
    for text in latin:
        before, after = tokens_of(teacher, text), tokens_of(trimmed, text)
        assert unknown not in before and unknown not in after
        assert len(after) > len(before)
    arabic = next(text for text in TEXT if unicodedata.name(text[0]).startswith("ARABIC"))
    assert (unknown in tokens_of(trimmed, arabic)) == (family != "byte_bpe")


def test_dense_head_prompt_and_lower_case_stay(labse_folder, tmp_path):
    teacher = load_encoder(str(labse_folder))
    teacher.prompts, teacher.default_prompt_name = {"query": "the cat: "}, "query"
    teacher.max_seq_length = 12
    texts = ["the dog sleep", "the small house by the water and the tree in the city street"]
    trimmed = trim_encoder(teacher, whole_ids(teacher, texts))
    assert [type(module) for module in trimmed] == [type(module) for module in teacher]
    assert trimmed.max_seq_length == 12 and trimmed.prompts["query"] == "the cat: "
    np.testing.assert_allclose(trimmed.encode(texts), teacher.encode(texts), atol=1e-6)
    save_encoder(trimmed, tmp_path)
    np.testing.assert_allclose(load_encoder(str(tmp_path)).encode(texts), teacher.encode(texts), atol=1e-6)


# Counting and reporting


def encoded(encoder, batch):
    """The token ids that `encoder.encode` sees, without padding."""
    prompt = encoder.prompts.get(encoder.default_prompt_name) if encoder.default_prompt_name else None
    features = encoder.preprocess(batch, prompt=prompt)
    return [
        ids[mask.bool()].tolist() for ids, mask in zip(features["input_ids"], features["attention_mask"], strict=True)
    ]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=20, deadline=None)
@given(batch=st.lists(texts, min_size=1, max_size=5))
def test_token_ids_are_those_of_the_encoder(encoders, family, batch):
    assert tokenise(encoders[family], batch) == encoded(encoders[family], batch)


def test_token_ids_with_prompt_lower_case_and_truncation(tmp_path):
    from sentence_transformers import SentenceTransformer

    folder = tmp_path / "encoder"
    save_encoder(make_encoder(tmp_path, train("wordpiece"), SPECIAL), folder)
    settings_file = folder / "sentence_bert_config.json"
    settings_file.write_text(json.dumps({"max_seq_length": 20, "do_lower_case": True}))
    encoder = SentenceTransformer(
        str(folder), device="cpu", prompts={"query": "The friend, "}, default_prompt_name="query"
    )
    ids = tokenise(encoder, TEXT)
    assert ids == encoded(encoder, TEXT)
    assert max(map(len, ids)) == 20
    assert encoder.tokenizer.decode(ids[0]).startswith("[CLS] the friend, the old house")
    trimmed = trim_encoder(encoder, whole_ids(encoder, TEXT))
    np.testing.assert_allclose(trimmed.encode(TEXT), encoder.encode(TEXT), atol=1e-6)


def sentences_of(**languages):
    return [Sentence(text, language) for language, texts in languages.items() for text in texts]


def test_report_by_hand(plain):
    corpus = sentences_of(en=["abba abba", "abba ab", "x abba"], ru=["баба баба", "абба"])
    held_out = sentences_of(en=["abba", "ab", "abba ab"])
    kept = keep_vocabulary(plain, corpus, 0.75)
    assert kept.encoder is plain
    assert kept.report == {
        "rows": 14, "rows_used": 4, "coverage": 0.75, "rows_for_coverage": 3,
        "languages": {
            "en": {"sentences": 3, "tokens": 6, "tokens_per_sentence": 2.0, "unknown_rate": 1 / 6, "rows_used": 2,
                   "rows_for_coverage": 1},
            "ru": {"sentences": 2, "tokens": 3, "tokens_per_sentence": 1.5, "unknown_rate": 0.0, "rows_used": 2,
                   "rows_for_coverage": 2},
        },
    }  # fmt: skip
    assert kept.token_counts.dtype == np.int64
    assert dict(zip(PLAIN, kept.token_counts.tolist(), strict=True)) == {
        **dict.fromkeys(PLAIN, 0), "[UNK]": 1, "[CLS]": 5, "[SEP]": 5, "ab": 1, "abba": 4, "баба": 2, "абба": 1,
    }  # fmt: skip

    trimmed = trim_vocabulary(plain, corpus, held_out, coverage=0.75)
    english, russian = trimmed.report["languages"]["en"], trimmed.report["languages"]["ru"]
    # ab is not kept, and cannot be spelled: there is no ##b.
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "##a", "б", "##б", "abba", "абба", "баба", "7"]
    assert sorted(trimmed.encoder.tokenizer.get_vocab()) == sorted(tokens)
    assert trimmed.report["rows_kept"] == 12 and trimmed.report["size"] is None
    assert trimmed.report["scripts"] == ["Cyrl", "Latn", "Zinh", "Zyyy"]
    assert (trimmed.report["table_bytes_before"], trimmed.report["table_bytes_after"]) == (14 * 64, 12 * 64)
    assert {name: english[name] for name in english if name not in kept.report["languages"]["en"]} == {
        "rows_kept": 1, "tokens_kept": 0.8, "identical": 1 / 3,
        "tokens_per_sentence_before": 4 / 3, "tokens_per_sentence_after": 4 / 3,
        "unknown_rate_before": 0.0, "unknown_rate_after": 0.5,
    }  # fmt: skip
    assert russian["rows_kept"] == 2 and russian["tokens_kept"] == 1.0
    assert russian["identical"] is None and russian["unknown_rate_after"] is None
    assert {name: english[name] for name in kept.report["languages"]["en"]} == kept.report["languages"]["en"]
    counts = dict(zip(tokens, trimmed.token_counts.tolist(), strict=True))
    assert counts == {**dict.fromkeys(tokens, 0), "[UNK]": 2, "[CLS]": 5, "[SEP]": 5, "abba": 4, "баба": 2, "абба": 1}


def test_pieces_are_counted_again_when_words_lose_their_rows(tmp_path):
    """The stem that all words share has a row of its own, but no text uses it until the words have lost theirs."""
    endings = [f"{a}{b}" for a in "abcdefgh" for b in "abcdefgh"]
    characters = "abcdefghxyz"
    vocabulary = [
        *PLAIN[:4],
        *characters,
        *(f"##{one}" for one in characters),
        "xyz",
        *(f"xyz{end}" for end in endings),
    ]
    tokenizer = Tokenizer(models.WordPiece({token: row for row, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = template(tokenizer, "[CLS]", "[SEP]")
    encoder = make_encoder(tmp_path, tokenizer, SPECIAL)
    vocabulary = trim_vocabulary(encoder, sentences_of(en=[f"xyz{ending}" for ending in endings]), size=40)
    assert vocabulary.report["rows_kept"] <= 40
    assert vocabulary.encoder.tokenizer.tokenize("xyzhh") == ["xyz", "##h", "##h"]


def test_table_for_people(plain):
    from rich.console import Console

    corpus = sentences_of(en=["abba abba", "abba ab"], ru=["баба"])
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(vocabulary_table(keep_vocabulary(plain, corpus).report))
    assert "kept" not in console.export_text()
    console.print(vocabulary_table(trim_vocabulary(plain, corpus, sentences_of(en=["abba"]), coverage=0.75).report))
    text = console.export_text()
    assert "11 are kept" in text and "100.0%" in text and "1.0 → 1.0" in text


def test_stage_writes_the_trimmed_teacher(encoders, tmp_path, monkeypatch):
    folder = tmp_path / "teacher"
    save_encoder(encoders["byte_bpe"], folder)
    records = [Record(text, "en" if text.isascii() else "xx") for text in TEXT]
    run = RunFolder(tmp_path / "run")
    write_records(run.split("train"), records)
    write_records(run.split("dev"), records[:3])

    def config(streaming=False, **vocabulary):
        return JobConfig.model_construct(
            corpus=CorpusConfig(sources=[PhrasebookSource()], streaming=streaming),
            teacher=TeacherConfig(model=str(folder)),
            vocabulary=VocabularyConfig(**vocabulary),
        )

    vocabulary_stage(config(), run)
    counts = np.load(run.token_counts)
    assert counts.shape == (len(encoders["byte_bpe"].tokenizer),) and counts.dtype == np.int64
    assert counts.sum() == sum(map(len, tokenise(encoders["byte_bpe"], TEXT)))
    assert not run.base_encoder.exists()
    vocabulary_stage(config(kind="trim", coverage=0.9), run)
    report = json.loads(run.vocabulary_counts.read_text())
    trimmed = load_teacher(TeacherConfig(model=str(run.base_encoder)))
    counts = np.load(run.token_counts)
    assert len(trimmed.tokenizer) == report["rows_kept"] == len(counts) < report["rows"]
    assert counts.sum() == sum(map(len, tokenise(trimmed, TEXT)))
    assert report["languages"]["en"]["identical"] is not None and report["languages"]["en"]["tokens_kept"] >= 0.9
    assert "corpus_rows" not in report

    monkeypatch.setattr("distillabse.vocabulary.stage.STREAMED_ROWS", 5)
    vocabulary_stage(config(streaming=True), run)
    report = json.loads(run.vocabulary_counts.read_text())
    assert (report["corpus_rows"], report["corpus_rows_counted"]) == (len(TEXT), 5)
    assert np.load(run.token_counts).sum() == sum(map(len, tokenise(encoders["byte_bpe"], TEXT[:5])))


# Refused


def test_a_language_that_the_teacher_does_not_know(plain):
    with pytest.raises(InputError, match=r"no token of the language 'el'.*Remove 'el' from corpus\.sources"):
        trim_vocabulary(plain, sentences_of(en=["abba"], el=["ποτάμι σπίτι"]))
    assert keep_vocabulary(plain, sentences_of(el=["ποτάμι"])).report["languages"]["el"]["unknown_rate"] == 1.0


def test_refused_coverage_and_empty_corpus(plain):
    with pytest.raises(ConfigurationError, match=r"vocabulary\.coverage: 0\.0 keeps nothing"):
        trim_vocabulary(plain, sentences_of(en=["abba"]), coverage=0.0)
    with pytest.raises(InputError, match="no sentences"):
        trim_vocabulary(plain, [])


def test_tokenizers_that_cannot_be_trimmed(tmp_path, plain, monkeypatch):
    vocabulary = {token: row for row, token in enumerate([*SPECIAL.values(), "hello"])}
    word_level = make_encoder(tmp_path, Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]")), SPECIAL)
    with pytest.raises(ConfigurationError, match=r"a WordLevel tokenizer cannot be trimmed.*vocabulary\.kind: keep"):
        trim_vocabulary(word_level, sentences_of(en=["hello"]))
    monkeypatch.setattr(type(plain.tokenizer), "is_fast", False)
    with pytest.raises(ConfigurationError, match=r"is not a fast tokenizer.*vocabulary\.kind: keep"):
        TokenizerDocument.of(plain)


def test_tokens_without_a_row_in_the_table(tmp_path):
    tokenizer = Tokenizer(models.WordPiece({token: row for row, token in enumerate(PLAIN)}, unk_token="[UNK]"))
    encoder = make_encoder(tmp_path, tokenizer, SPECIAL)
    encoder.tokenizer.add_tokens(["extra"])
    with pytest.raises(InputError, match=r"up to row 14, but the embedding table has only 14.*resize_token_embeddings"):
        trim_encoder(encoder, [4])


def test_padded_table_loses_the_rows_without_a_token(tmp_path, plain):
    encoder = make_encoder(tmp_path, plain.tokenizer.backend_tokenizer, SPECIAL)
    transformer_of(encoder).resize_token_embeddings(64)
    report = trim_vocabulary(encoder, sentences_of(en=["abba"]), coverage=1.0)
    assert report.report["rows"] == 64 and report.report["rows_kept"] == 4 + 3 + 1
