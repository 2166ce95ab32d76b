"""Which words mean the same: on text whose true links are known, and as tokens of two encoders."""

import importlib.util

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from tiny import VOCABULARY, tiny_encoder

from distillabse.alignment import align_pairs, aligned_links, ibm1, require_aligner
from distillabse.alignment.links import token_spans
from distillabse.alignment.words import Vocabulary, Words, words_of
from distillabse.errors import ConfigurationError
from distillabse.models.tokens import token_offsets, tokenise

needs_eflomal = pytest.mark.skipif(importlib.util.find_spec("eflomal") is None, reason="eflomal is not installed")


def invented_language(pairs, seed=0):
    """Sentences, their translations into a language of other words and word order, and the true links.

    Word k is a<k> here and b<k> there. A tenth of the words have no translation, one word in six of a translation
    stands for nothing, and its words have moved by up to two places. Words are as unevenly frequent as in real text.
    """
    random = np.random.default_rng(seed)
    frequency = 1 / np.arange(1, 401)
    texts, links = [], set()
    for number in range(pairs):
        source = random.choice(400, size=random.integers(3, 12), p=frequency / frequency.sum())
        kept = [place for place in range(len(source)) if random.random() > 0.1]
        kept.sort(key=lambda place: place + random.uniform(0, 2))
        translation = []
        for place in kept:
            if random.random() < 1 / 6:
                translation.append(f"c{random.integers(5)}")
            links.add((number, place, len(translation)))
            translation.append(f"b{source[place]}")
        texts.append((" ".join(f"a{word}" for word in source), " ".join(translation)))
    return texts, links


def numbered(found, texts):
    """Links of characters as numbers of words."""
    return {
        (pair, texts[pair][0][:start].count(" "), texts[pair][1][:other].count(" "))
        for pair, start, _, other, _ in found.tolist()
    }


def agreement(found, true):
    """Precision and recall."""
    return len(found & true) / len(found), len(found & true) / len(true)


def test_words_are_unicode_segments_with_their_places():
    text = "Don't PAY 3.50 €, l'été «jetzt»!"
    assert [word.text for word in words_of(text)] == ["don't", "pay", "3.50", "l'été", "jetzt"]
    assert all(text[word.start : word.end].casefold() == word.text for word in words_of(text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("我喜欢 LaBSE。", ["我", "喜", "欢", "labse"]),
        ("猫がカタカナ", ["猫", "が", "カタカナ"]),
        ("한국어를 좋아해", ["한국어를", "좋아해"]),
        ("مرحبا بالعالم", ["مرحبا", "بالعالم"]),
        ("जिन्दगी अच्छी", ["जिन्दगी", "अच्छी"]),
        ("ฉันชอบ LaBSE", ["labse"]),
        ("…!? \u200b", []),
    ],
)
def test_words_need_no_language(text, words):
    assert [word.text for word in words_of(text)] == words


def test_ibm1_finds_the_true_links():
    texts, true = invented_language(2000)
    found = numbered(align_pairs(texts, "ibm1", ["a-b"] * len(texts)), texts)
    precision, recall = agreement(found, true)
    assert precision > 0.97
    assert recall > 0.9
    # Words at the same place, which is what is left of an aligner that learned nothing.
    same_place = {(pair, place, place) for pair, place, _ in true}
    assert agreement(same_place, true)[0] < 0.5


@needs_eflomal
def test_eflomal_finds_the_true_links():
    texts, true = invented_language(2000)
    texts[5:5] = [("", "b1"), ("a1", "!")]
    true = {(pair + 2 * (pair >= 5), *places) for pair, *places in true}
    found = numbered(align_pairs(texts, "eflomal", ["a-b"] * len(texts)), texts)
    precision, recall = agreement(found, true)
    assert precision > 0.97
    assert recall > 0.9


def test_a_part_of_the_pairs_teaches_the_links_of_all():
    texts, true = invented_language(4000)
    sides = []
    for number in (0, 1):
        words = [words_of(pair[number]) for pair in texts]
        sides.append(Words(Vocabulary().numbers(words), np.cumsum([0, *map(len, words)])))
    cells = int((sides[0].lengths * sides[1].lengths).sum())
    links = ibm1.align(*sides, training_cells=cells // 4)
    pair = sides[0].sentence_of(links[:, 0])
    inside = links - np.stack([side.starts[pair] for side in sides], axis=1)
    found = set(zip(pair.tolist(), *inside.T.tolist(), strict=True))
    precision, recall = agreement(found, true)
    assert precision > 0.95
    assert recall > 0.85
    assert links.tolist() == sorted(links.tolist())


def test_languages_do_not_mix():
    # The same words, and each means something else in the other language.
    texts, _ = invented_language(300)
    others, _ = invented_language(300, seed=1)
    others = [(source, translation.replace("b1", "b2")) for source, translation in others]
    both = [pair for pairs in zip(texts, others, strict=True) for pair in pairs]
    alone = [align_pairs(pairs, "ibm1", ["x"] * 300) for pairs in (texts, others)]
    for number, links in enumerate(alone):
        links[:, 0] = 2 * links[:, 0] + number
    expected = np.concatenate(alone)
    expected = expected[np.lexsort((expected[:, 1], expected[:, 0]))]
    assert np.array_equal(align_pairs(both, "ibm1", ["x", "y"] * 300), expected)
    assert not np.array_equal(align_pairs(both, "ibm1", ["x"] * 600), expected)


def test_a_word_that_stands_twice_is_linked_to_the_nearer_one():
    filler, _ = invented_language(300)
    texts = [*filler, ("a1 a2 a3 a1", "b1 b3 b2 b1")]
    found = {link for link in numbered(align_pairs(texts, "ibm1", ["x"] * 301), texts) if link[0] == 300}
    assert found == {(300, 0, 0), (300, 1, 2), (300, 2, 1), (300, 3, 3)}


@pytest.mark.parametrize("texts", [[], [("", "")], [("hello", "!")], [("only once", "nur einmal")]])
def test_nothing_to_link(texts):
    assert align_pairs(texts, "ibm1", ["x"] * len(texts)).shape == (0, 5)


def test_as_many_languages_as_pairs():
    with pytest.raises(ValueError):
        align_pairs([("a", "b"), ("c", "d")], "ibm1", ["x"])


def test_an_aligner_that_is_not_installed_is_refused_with_a_remedy(monkeypatch):
    from importlib import metadata

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", missing)
    require_aligner("ibm1")
    with pytest.raises(ConfigurationError, match=r"eflomal is not installed.*distillabse\[align\].*aligner: ibm1"):
        require_aligner("eflomal")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """A teacher that reads whole words, and a student that knows characters alone and truncates after 20 tokens."""
    folder = tmp_path_factory.mktemp("encoders")
    characters = [token for token in VOCABULARY if len(token.removeprefix("##")) == 1 or token.startswith("[")]
    teacher = SentenceTransformer(str(tiny_encoder(folder / "teacher")), device="cpu")
    student = SentenceTransformer(str(tiny_encoder(folder / "student", vocabulary=characters)), device="cpu")
    student.max_seq_length = 20
    return student, teacher


def test_offsets_are_those_of_the_token_ids(encoders):
    for encoder in encoders:
        texts = ["the cat and the house", "x", "", "A blue bird, please!"]
        for text, ids, offsets in zip(texts, tokenise(encoder, texts), token_offsets(encoder, texts), strict=True):
            tokens = encoder.tokenizer.convert_ids_to_tokens(ids)
            assert len(tokens) == len(offsets)
            for token, (start, end) in zip(tokens[1:-1], offsets[1:-1], strict=True):
                assert text[start:end] == token.removeprefix("##")
            assert not offsets[[0, -1]].any()


def test_spans_of_words_in_tokens_with_a_prompt(encoders):
    student, teacher = encoders
    text = "good old cat"
    words = [words_of(text)]
    assert token_spans(teacher, [text], words).tolist() == [[1, 2], [2, 3], [3, 4]]
    assert token_spans(student, [text], words).tolist() == [[1, 5], [5, 8], [8, 11]]
    teacher.prompts, teacher.default_prompt_name = {"query": "how are you: "}, "query"
    try:
        assert token_spans(teacher, [text], words).tolist() == [[5, 6], [6, 7], [7, 8]]
        assert teacher.tokenizer.decode(tokenise(teacher, [text])[0][5:8]) == text
    finally:
        teacher.prompts, teacher.default_prompt_name = {}, None


def test_links_as_tokens_of_a_student_and_a_teacher_with_tokenizers_of_their_own(encoders):
    student, teacher = encoders
    words = "man woman dog cat house city street car train night".split()
    others = [word[::-1] for word in words]
    random = np.random.default_rng(0)
    texts = []
    for _ in range(200):
        chosen = random.choice(10, size=4, replace=False)
        texts.append((" ".join(words[i] for i in chosen), " ".join(others[i] for i in chosen[::-1])))
    texts[100] = ("", "")
    links = aligned_links(texts, student, teacher, "ibm1", ["x"] * 200)
    assert links.starts.dtype == np.int64 and links.spans.dtype == np.int32
    assert links.starts[0] == 0 and links.starts[-1] == len(links.spans) and links.starts[100] == links.starts[101]
    sides = [tokenise(student, [s for s, _ in texts]), tokenise(student, [t for _, t in texts])]
    sides.append(tokenise(teacher, [s for s, _ in texts]))
    encoders_of_sides = (student, student, teacher)
    fitting = 0
    for number, (source, translation) in enumerate(texts):
        found = set()
        for span in links.spans[links.starts[number] : links.starts[number + 1]].reshape(-1, 3, 2):
            said = []
            for ids, encoder, (first, end) in zip(sides, encoders_of_sides, span, strict=True):
                assert 0 < first < end < len(ids[number])  # no special token
                tokens = encoder.tokenizer.convert_ids_to_tokens(ids[number][first:end])
                said.append("".join(token.removeprefix("##") for token in tokens))
            found.add(tuple(said))
        # 18 tokens remain beside the two special ones; the word at the edge may be cut.
        whole = {
            (word, word[::-1], word)
            for word in source.split()
            if (source.index(word) + len(word) - source[: source.index(word)].count(" ")) <= 18
            and (translation.index(word[::-1]) + len(word) - translation[: translation.index(word[::-1])].count(" "))
            <= 18
        }
        assert whole <= found
        assert len(found) <= len(source.split())
        assert all(own.startswith(source_part) for source_part, _, own in found)
        fitting += len(whole) < len(source.split())
    assert fitting > 5  # truncation did cut words off
