"""How pair_tricks.py composes batches, what it holds out, and that the documents hold its results."""

import gzip
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from tiny import FakeSentences

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import pair_arms  # noqa: E402
import pair_tricks  # noqa: E402
import scaling_tables  # noqa: E402
from pair_batches import NeighbourBatches, ShortPairsFirst, neighbourhoods  # noqa: E402


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def topics(random, count, size):
    """Vectors in clusters: members of one have cosines of some 0.7, of two about 0."""
    centres = unit(random.normal(size=(count, 64)))
    topic = random.permutation(np.repeat(np.arange(count), size))
    return topic, unit(centres[topic] + 0.65 * unit(random.normal(size=(len(topic), 64))))


def test_groups_are_neighbourhoods():
    topic, vectors = topics(np.random.default_rng(0), 100, 8)
    groups = neighbourhoods(vectors, 8, limit=0.9)
    assert sorted(groups.reshape(-1).tolist()) == list(range(800))
    # Each topic fills one group; at random two rows of a group would share a topic once in a hundred times.
    assert np.mean([len(set(topic[group])) == 1 for group in groups]) > 0.95


def test_a_group_holds_nothing_that_means_the_same():
    random = np.random.default_rng(1)
    vectors = unit(random.normal(size=(320, 16)))[np.tile(np.arange(320), 2)]
    groups = neighbourhoods(vectors, 4, limit=0.9)
    assert sorted(groups.reshape(-1).tolist()) == list(range(640))
    # The very last groups take what is left.
    repeated = [len(set((group % 320).tolist())) < 4 for group in groups]
    assert sum(repeated) <= 2 and not any(repeated[:150])
    # Without the limit the copy of a row is its nearest neighbour.
    alike = neighbourhoods(vectors, 4, limit=1.1)
    assert all(len(set((group % 320).tolist())) < 4 for group in alike[:100])


def test_an_epoch_of_neighbours_has_every_pair_once_and_hard_negatives():
    _, vectors = topics(np.random.default_rng(2), 60, 16)
    batches = NeighbourBatches(FakeSentences(960), 32, vectors, group=8, seed=3)
    epoch = list(batches)
    assert len(epoch) == len(batches) == 30 and sorted(chain(*epoch)) == list(range(960))
    hardest = [(vectors[b] @ vectors[b].T - 2 * np.eye(32)).max(axis=1).mean() for b in epoch]
    shuffled = np.random.default_rng(0).permutation(960).reshape(30, 32)
    assert (
        np.mean(hardest)
        > 0.6
        > np.mean([(vectors[b] @ vectors[b].T - 2 * np.eye(32)).max(axis=1).mean() for b in shuffled])
    )
    assert list(NeighbourBatches(FakeSentences(960), 32, vectors, group=8, seed=3)) == epoch
    with pytest.raises(ValueError, match="batches of 32 cannot hold whole groups of 7"):
        NeighbourBatches(FakeSentences(960), 32, vectors, group=7)


def test_short_pairs_come_first_and_then_all():
    pairs = FakeSentences(3000)
    batches = [np.array(batch) for batch in ShortPairsFirst(pairs, 20, steps=120, start=0.1, seed=5)]
    assert len(batches) == 120 and all(len(set(batch.tolist())) == 20 for batch in batches)
    longest = [pairs.lengths(batch).max() for batch in batches]
    # Lengths are even from 3 to 32: the shortest tenth has 3 to 5 tokens, the shortest 55 % at half way up to 19.
    assert max(longest[:1]) <= 5 and max(longest[:20]) <= 19 < max(longest[30:40])
    # The other 80 steps are those of training without a curriculum: no pair twice.
    rest = np.concatenate(batches[40:])
    assert len(set(rest.tolist())) == 1600 and abs(pairs.lengths(rest).mean() - 17.5) < 1


def test_what_is_held_out_is_in_training_on_neither_side(tmp_path):
    folder = tmp_path / "parallel_train"
    folder.mkdir()
    for language in pair_arms.LANGUAGES:
        rows = [f"Sentence {n}{'!' * (language == 'fr')}\t{language} {n % 1500}\t{language}" for n in range(2000)]
        with gzip.open(folder / f"{language}.tsv.gz", "wt", encoding="utf-8") as file:
            file.write("\n".join(["en\txx\tlang", *rows]))
    train, dev = pair_arms.split(tmp_path)
    assert len(dev) == 1000 == len({record.text.rstrip("!") for record in dev})
    known = {record.text.rstrip("!") for record in train}
    assert known.isdisjoint(record.text.rstrip("!") for record in dev)
    assert {record.translation for record in train}.isdisjoint(record.translation for record in dev)
    assert len(train) > 2000


def test_the_documents_hold_the_results():
    text = (ROOT / "docs" / "pair-objectives.md").read_text(encoding="utf-8")
    result = scaling_tables.result("pair_tricks")
    assert pair_tricks.table(result) in text
    assert pair_tricks.costs(result) in " ".join(text.split())
