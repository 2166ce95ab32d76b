"""Token ids in files and in memory, and which of them every process takes in every step."""

import hashlib
import os
import pickle
import tracemalloc
from collections import Counter
from itertools import chain

import numpy as np
import psutil
import pytest
import torch
from accelerate import skip_first_batches
from scipy.stats import chisquare
from tiny import FakeSentences

from distillabse.errors import ConfigurationError, InputError, StorageError
from distillabse.models.teacher import load_encoder
from distillabse.models.tokens import tokenise
from distillabse.training import data
from distillabse.training.batches import WINDOW, Permutation, SentenceBatches, SentenceLoader
from distillabse.training.data import (
    FileArray,
    PaddingCollator,
    TokenisedSentences,
    tokenise_corpus,
    tokenised_sentences,
)

WORDS = "the man woman dog cat house city walk run small big old red blue water tree".split()


@pytest.fixture(scope="module")
def encoder(encoder_folder):
    return load_encoder(str(encoder_folder))


def corpus(n, seed=0):
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, size=random.integers(1, 12))) for _ in range(n)]


class Numbers(FakeSentences):
    """The same as a dataset of their own numbers."""

    def __getitem__(self, row):
        return row


def steps(n, split=(4, 1, 1), epochs=1, by_length=True, seed=7, first=0):
    """The rows of each step, of all processes: a list of lists."""
    batch_size, accumulation, processes = split
    ranks = [
        SentenceBatches(FakeSentences(n), batch_size, accumulation, rank, processes, seed, by_length)
        for rank in range(processes)
    ]
    found = []
    for epoch in range(first, first + epochs):
        for sampler in ranks:
            sampler.set_epoch(epoch)
        batches = [list(sampler) for sampler in ranks]
        assert all(len(own) == len(ranks[0]) for own in batches)
        for start in range(0, len(ranks[0]), accumulation):
            found.append([row for own in batches for batch in own[start : start + accumulation] for row in batch])
    return found


@pytest.mark.parametrize("block", [3, 20_000])
def test_files_hold_what_memory_holds_and_what_the_encoder_sees(encoder, tmp_path, monkeypatch, block):
    texts = ["", *corpus(50), "dog " * 500]
    monkeypatch.setattr(data, "_BLOCK", block)
    stored = tokenise_corpus(encoder, iter(texts), tmp_path / "tokens")
    expected = tokenise(encoder, texts)
    held = tokenised_sentences(encoder, texts)
    for sentences in (stored, held, TokenisedSentences.open(tmp_path / "tokens")):
        assert len(sentences) == 52
        rows = sentences.__getitems__(range(52))
        assert [row["input_ids"].tolist() for row in rows] == expected and [row["row"] for row in rows] == [*range(52)]
        assert sentences[51]["input_ids"].tolist() == expected[51] and len(expected[51]) == 64
        picked = np.array([51, 0, 7, 7])
        assert sentences.lengths(picked).tolist() == [len(expected[row]) for row in picked]
        assert sentences.lengths(picked).dtype == np.int64 and sentences[3]["input_ids"].dtype == np.int32
        with pytest.raises(IndexError):
            sentences[52]
    ids = np.concatenate([np.asarray(row, "<i4") for row in expected])
    starts = np.concatenate([[0], np.cumsum([len(row) for row in expected])]).astype("<i8")
    parts = [hashlib.sha256(array.tobytes()).digest() for array in (ids, starts)]
    assert stored.digest == held.digest == hashlib.sha256(b"".join(parts)).hexdigest()


def test_the_digest_tells_text_sets_and_truncation_apart(encoder_folder, encoder):
    texts = corpus(20)
    digests = {tokenised_sentences(encoder, some).digest for some in (texts, texts[::-1], texts[:-1], [])}
    # The same ids in line, cut at other places.
    digests.add(TokenisedSentences(np.arange(4), np.array([0, 1, 4]), "").digest)
    shorter = load_encoder(str(encoder_folder))
    shorter.max_seq_length = 8
    digests.add(tokenised_sentences(shorter, texts).digest)
    assert len(digests) == 6


def test_no_text_gives_no_sentences(encoder, tmp_path):
    assert len(tokenise_corpus(encoder, [], tmp_path / "tokens")) == len(tokenised_sentences(encoder, [])) == 0


def test_a_file_of_the_wrong_size_is_named_with_the_remedy(encoder, tmp_path):
    folder = tmp_path / "tokens"
    sentences = tokenise_corpus(encoder, corpus(9), folder)
    os.truncate(folder / "ids.bin", 20)
    with pytest.raises(InputError, match=r"ids\.bin has 20 bytes instead of [0-9,]+\. Remove the folder .*tokens"):
        TokenisedSentences.open(folder)
    with pytest.raises(InputError, match=r"ids\.bin ends too early"):
        sentences[8]
    (folder / "starts.bin").unlink()
    (folder / "ids.bin").write_bytes(b"0" * 4 * sentences.starts[np.array([9])][0])
    with pytest.raises(InputError, match=r"starts\.bin is missing"):
        TokenisedSentences.open(folder)
    with pytest.raises(InputError, match=r"tokens\.json does not exist"):
        TokenisedSentences.open(tmp_path)


def test_tokens_are_whole_or_absent(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_BLOCK", 4)

    def broken():
        yield from corpus(10)
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space left"):
        tokenise_corpus(encoder, broken(), tmp_path / "tokens")
    assert list(tmp_path.iterdir()) == []


def test_items_of_a_file_are_those_of_the_array(tmp_path):
    values = np.random.default_rng(0).integers(0, 1 << 40, 5000)
    values.tofile(tmp_path / "values")
    array = FileArray(tmp_path / "values", np.dtype("<i8"))
    assert len(array) == 5000
    for items in (slice(10, 20), slice(None), slice(4990, 6000), slice(7, 7), slice(9, 3)):
        assert array[items].tolist() == values[items].tolist()
    for items in (np.array([4999, 0, 63, 64, 65, 2000, 0]), np.empty(0, np.int64), np.array([[3, 4], [900, 901]])):
        assert array[items].tolist() == values[items].tolist() and array[items].shape == items.shape


def test_reading_all_of_a_file_takes_no_memory(tmp_path):
    """Mapped into memory, these 120 MB would count as the process's own."""
    count, length = 1_000_000, 30
    np.broadcast_to(np.arange(length, dtype="<i4"), (count, length)).tofile(tmp_path / "ids")
    (np.arange(count + 1, dtype="<i8") * length).tofile(tmp_path / "starts")
    sentences = TokenisedSentences(
        FileArray(tmp_path / "ids", np.dtype("<i4")), FileArray(tmp_path / "starts", np.dtype("<i8")), ""
    )
    before, tokens = psutil.Process().memory_info().rss, 0
    for start in range(0, count, 5000):
        tokens += int(sentences.lengths(np.arange(start, start + 5000)).sum())
        assert sentences.ids[start * length : (start + 5000) * length].sum() == 5000 * 435
    assert tokens == count * length
    assert psutil.Process().memory_info().rss - before < 20e6


def test_padding():
    rows = [{"input_ids": np.array([1, 2, 3, 4, 5], np.int32)}, {"input_ids": [6]}, {"input_ids": np.empty(0, int)}]
    batch = PaddingCollator(9, multiple_of=4)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 9, 9, 9], [6, *[9] * 7], [9] * 8]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0, 0, 0], [1, *[0] * 7], [0] * 8]
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 97, 1000, 1023, 1024, 1025, 65537, 100_003])
def test_a_permutation_is_one_and_differs_by_epoch_and_seed(size):
    everything = np.arange(size)
    orders = [Permutation(size, seed, epoch)(everything) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for order in orders:
        assert np.array_equal(np.sort(order), everything)
    if size > 30:
        for index, order in enumerate(orders):
            for other in (everything, *orders[:index]):
                # Two independent permutations agree at one position on average.
                assert np.count_nonzero(order == other) <= 8
            assert abs(np.corrcoef(order, everything)[0, 1]) < 4 / np.sqrt(size)
            assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 4 / np.sqrt(size)
    assert Permutation(size, 0, 0)(everything[-1:]) == orders[0][-1]


@pytest.mark.parametrize("size", [2, 3, 5, 10, 17])
def test_over_seeds_all_orders_are_equally_likely(size):
    starts = np.array([Permutation(size, seed, 3)(np.arange(2)) for seed in range(3000)])
    cells = np.bincount(starts[:, 0] * size + starts[:, 1], minlength=size * size).reshape(size, size)
    assert np.trace(cells) == 0
    assert chisquare(cells[~np.eye(size, dtype=bool)]).pvalue > 0.01
    for position in range(2):
        assert chisquare(np.bincount(starts[:, position], minlength=size)).pvalue > 0.01


@pytest.mark.parametrize("by_length", [True, False])
@pytest.mark.parametrize("n", [12, 13, 97, 1201])
def test_every_sentence_once_in_every_epoch(n, by_length):
    size, found = 12, []
    epoch = 0
    while len(found) < -(-3 * n // size):
        found += steps(n, (2, 2, 3), by_length=by_length, first=epoch)
        epoch += 1
    assert all(len(step) == size for step in found)
    for epochs in (1, 2, 3):
        taken = -(-epochs * n // size)  # ceil
        seen = Counter(chain.from_iterable(found[:taken]))
        assert len(seen) == n and set(seen.values()) <= {epochs, epochs + 1}
        twice = sum(times == epochs + 1 for times in seen.values())
        assert twice == taken * size - epochs * n < size


def test_without_by_length_the_steps_are_the_permutations_in_order():
    n = 97
    order = np.concatenate([Permutation(n, 7, epoch)(np.arange(n)) for epoch in range(3)])
    found = steps(n, (10, 1, 1), epochs=3, by_length=False)
    assert len(found) == 27
    assert [row for step in found for row in step] == order[:270].tolist()


@pytest.mark.parametrize("by_length", [True, False])
def test_what_is_in_a_step_does_not_depend_on_processes_and_accumulation(by_length):
    splits = [(16, 1, 1), (8, 1, 2), (4, 4, 1), (4, 2, 2), (2, 2, 4), (1, 1, 16)]
    first, *others = ([sorted(step) for step in steps(1000, split, 3, by_length)] for split in splits)
    assert len(first) == 3 * 62
    assert all(other == first for other in others)
    assert [sorted(step) for step in steps(1000, splits[0], 3, by_length, seed=8)] != first


def test_processes_share_a_block_of_sorted_lengths_in_turns():
    n, lengths = 6000, FakeSentences(6000).lengths
    ranks = [SentenceBatches(FakeSentences(n), 5, 4, rank, 3) for rank in range(3)]
    assert [len(sampler) for sampler in ranks] == [400, 400, 400]
    batches = np.array([list(sampler) for sampler in ranks])  # [processes, micro-batches, batch size]
    blocks = lengths(batches).transpose(1, 2, 0).reshape(100, 60)
    assert (np.diff(blocks, axis=1) <= 0).all()
    # 60 of 3,000 sentences sorted by 30 lengths: nearly all of one length, and the order of steps says nothing.
    assert np.ptp(blocks, axis=1).max() <= 1
    assert abs(np.corrcoef(np.arange(WINDOW), blocks[:WINDOW, 0])[0, 1]) < 0.4
    unsorted = lengths(np.array(list(SentenceBatches(FakeSentences(n), 60, by_length=False))))
    assert np.ptp(unsorted, axis=1).min() > 20


@pytest.mark.parametrize("n", [1000, 9999])
def test_a_start_in_the_middle_gives_the_same_tail(n):
    whole = SentenceBatches(FakeSentences(n), 8)
    expected = []
    for epoch in range(3):
        whole.set_epoch(epoch)
        expected += list(whole)
    fresh = SentenceBatches(FakeSentences(n), 8)
    fresh.set_epoch(1)
    assert list(fresh) == expected[len(whole) : 2 * len(whole)]
    for step in (0, 1, 49, 50, 51, n // 8 + 1, 2 * (n // 8)):
        assert [rows.tolist() for rows in fresh._steps(step, 3 * (n // 8))] == expected[step:]


@pytest.mark.parametrize("workers", [0, 2])
def test_all_workers_of_all_processes_together_take_every_sentence_once(workers):
    n, found = 960, []
    for rank in range(2):
        batches = SentenceBatches(Numbers(n), 6, 2, rank, 2)
        found.append(
            [batch.tolist() for batch in SentenceLoader(Numbers(n), batch_sampler=batches, num_workers=workers)]
        )
        assert len(found[-1]) == 80 and found[-1] == list(batches)
    assert sorted(chain.from_iterable(chain.from_iterable(found))) == list(range(n))


def test_a_loader_goes_on_in_the_middle_of_an_epoch_as_the_trainer_asks():
    batches = SentenceBatches(Numbers(100), 6)
    loader = SentenceLoader(Numbers(100), batch_sampler=batches)
    loader.set_epoch(1)
    whole = [batch.tolist() for batch in loader]
    loader.set_epoch(0)
    assert [batch.tolist() for batch in loader] != whole
    rest = skip_first_batches(loader, 5)
    rest.batch_sampler.batch_sampler.set_epoch(1)
    assert [batch.tolist() for batch in rest] == whole[5:] and len(rest) == 11


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_token_files(encoder, tmp_path, context):
    texts = corpus(40)
    sentences = tokenise_corpus(encoder, texts, tmp_path / "tokens")
    expected = tokenise(encoder, texts)
    assert sentences[0]["input_ids"].tolist() == expected[0]  # the file is open when workers start
    loader = SentenceLoader(
        sentences,
        batch_sampler=SentenceBatches(sentences, 5),
        collate_fn=PaddingCollator(0),
        num_workers=1 if context == "spawn" else 2,
        multiprocessing_context=context,
    )
    found = [ids[mask == 1].tolist() for batch in loader for ids, mask in zip(*batch.values(), strict=True)]
    assert sorted(found) == sorted(expected)
    copy = pickle.loads(pickle.dumps(sentences))
    assert copy[39]["input_ids"].tolist() == expected[39] and copy.digest == sentences.digest


def test_memory_does_not_grow_with_the_number_of_sentences():
    sentences = FakeSentences(50_000_000)
    tracemalloc.start()
    batches = SentenceBatches(sentences, 64, 2, 1, 2)
    batches.set_epoch(2)
    taken = [batch for _, batch in zip(range(2 * 2 * WINDOW), batches, strict=False)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len({row for batch in taken for row in batch}) == 200 * 64
    assert peak < 5e6


def test_fewer_sentences_than_one_step_takes_are_refused():
    with pytest.raises(ConfigurationError, match=r"There are 95 sentences .*takes 96: 3 processes x 8 .*x 4 .*Lower"):
        SentenceBatches(FakeSentences(95), 8, 4, 0, 3)
    assert len(SentenceBatches(FakeSentences(96), 8, 4, 0, 3)) == 4
