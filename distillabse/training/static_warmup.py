"""A start for the embedding table: it learns alone, as a static model, before the layers above it do."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn

from distillabse.config import StaticWarmupConfig
from distillabse.models.taps import encoder_layers
from distillabse.models.teacher import transformer_of
from distillabse.training.pairs import TranslationPairs

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from sentence_transformers import SentenceTransformer

    from distillabse.training.cache import TeacherCache
    from distillabse.training.data import TokenisedSentences

logger = logging.getLogger(__name__)
_BLOCK = 20_000


class StaticModel(nn.Module):
    """Mean of the rows of a text's tokens, led to the teacher's dimension where the rows are narrower, length 1."""

    def __init__(self, rows: int, width: int, dimension: int) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(rows, width, mode="mean")
        nn.init.normal_(self.table.weight, std=0.1)
        self.widen = nn.Identity() if width == dimension else nn.Linear(width, dimension, bias=False)

    def forward(self, ids: Tensor, starts: Tensor) -> Tensor:
        """Unit vectors [texts, dimension] of texts whose token ids follow one another; `starts` is int64 [texts]."""
        return nn.functional.normalize(self.widen(self.table(ids, starts)), dim=-1)


def warm_up_table(
    student: SentenceTransformer,
    sentences: TokenisedSentences | TranslationPairs,
    cache: TeacherCache,
    config: StaticWarmupConfig,
    seed: int,
    device: torch.device,
) -> list[float]:
    """Train the student's embedding table alone to give the teacher's vectors, and let its layers start with it.

    The table keeps its own, larger spread: a layer normalisation follows, and the same learning rate then changes it
    less. The layers begin as hardly more than a residual connection: a tenth of what they would add.

    Args:
        student: changed in place.
        sentences, cache, config, seed, device: as for `train_static_model`.

    Returns:
        The mean loss of each epoch.
    """
    model = transformer_of(student)
    weight = model.get_input_embeddings().weight
    static, losses = train_static_model(weight.shape[0], weight.shape[1], sentences, cache, config, seed, device)
    with torch.no_grad():
        weight.copy_(static.table.weight)
        for layer in encoder_layers(model):
            for output in (layer.attention.output.dense, layer.output.dense):
                output.weight.mul_(0.1)
    return losses


def train_static_model(
    rows: int,
    width: int,
    sentences: TokenisedSentences | TranslationPairs,
    cache: TeacherCache,
    config: StaticWarmupConfig,
    seed: int,
    device: torch.device,
) -> tuple[StaticModel, list[float]]:
    """Train a table of this size as a static model; the loss is the squared distance of unit vectors.

    Args:
        rows, width: of the table.
        sentences: what to learn from; a translation learns the vector of its source.
        cache: the teacher's vectors of them.
        config: how long.
        seed: of the start, the order, and the choice of sentences; every process gets the same.
        device: where to train.

    Returns:
        The model, and the mean loss of each epoch.
    """
    random = np.random.default_rng(seed)
    texts, targets = _examples(sentences, config.max_sentences, random)
    vectors = torch.from_numpy(np.array(cache.sentence[: int(targets.max()) + 1]))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        static = StaticModel(rows, width, vectors.shape[1]).to(device)
    optimizer = torch.optim.Adam(static.parameters(), lr=config.learning_rate, fused=True)
    batches = max(1, len(targets) // config.batch_size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, config.epochs * batches)
    losses = []
    for epoch in range(config.epochs):
        total = torch.zeros((), device=device)
        parts = np.array_split(random.permutation(len(targets)), batches)
        for chosen in track(parts, description=f"Static start, epoch {epoch + 1}", transient=True):
            ids, starts = texts.gather(chosen)
            target = nn.functional.normalize(vectors[torch.from_numpy(targets[chosen])].to(device).float(), dim=-1)
            loss = (static(ids.to(device), starts.to(device)) - target).square().sum(dim=-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        losses.append(float(total) / batches)
        logger.info("Static start, epoch %d of %d: loss %.4f", epoch + 1, config.epochs, losses[-1])
    return static, losses


class _Texts:
    """Token ids of some texts, all in memory."""

    def __init__(self, ids: NDArray[np.int32], starts: NDArray[np.int64]) -> None:
        self.ids = ids
        self.starts = starts

    def gather(self, texts: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Token ids of these texts in line, and where each begins: int64."""
        first, lengths = self.starts[texts], np.diff(self.starts)[texts]
        begins = np.cumsum(lengths) - lengths
        places = np.arange(lengths.sum()) + np.repeat(first - begins, lengths)
        return torch.from_numpy(self.ids[places].astype(np.int64)), torch.from_numpy(begins)


def _examples(
    sentences: TokenisedSentences | TranslationPairs, most: int, random: np.random.Generator
) -> tuple[_Texts, NDArray[np.int64]]:
    """At most so many texts, each once, and for each the row of the cache that holds its target."""
    if isinstance(sentences, TranslationPairs):
        chosen = _sample(len(sentences), most // 2, random)
        pairs = np.concatenate([sentences.pair_rows(block) for block in _blocks(chosen)])
        rows, first = np.unique(pairs.T.reshape(-1), return_index=True)
        tokens, targets = sentences.student, np.tile(pairs[:, 0], 2)[first]
    else:
        rows = _sample(len(sentences), most, random)
        tokens, targets = sentences, rows
    lengths = np.concatenate([tokens.lengths(block) for block in _blocks(rows)])
    ids = [item["input_ids"] for block in _blocks(rows) for item in tokens.__getitems__(block.tolist())]
    return _Texts(np.concatenate(ids), np.concatenate([[0], np.cumsum(lengths)])), targets


def _sample(available: int, most: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Numbers below `available`, ascending: all, or so many at random."""
    most = max(most, 1)
    return np.arange(available) if available <= most else np.sort(random.choice(available, most, replace=False))


def _blocks(rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    yield from (rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK))
