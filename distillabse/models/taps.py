"""Forward hooks that read queries, keys, values, hidden states and routers while attention runs as SDPA.

Nothing is projected twice and no attention matrix is returned by the model: only what an objective asks for is kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from distillabse.errors import ConfigurationError
from distillabse.models.switch import sparse_layers
from distillabse.models.teacher import transformer_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Kind = Literal["query", "key", "value", "hidden", "router"]


@dataclass(frozen=True, order=True)
class Tap:
    """One tensor to read: a projection of a layer's self-attention, the layer's output, or its router's logits.

    Layers count from 0.
    """

    kind: Kind
    layer: int


@dataclass(frozen=True)
class EncoderShape:
    """What an objective needs to know of an encoder."""

    layers: int
    hidden_size: int
    attention_heads: int
    dimension: int
    sparse_layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Signals:
    """What one forward pass gave.

    Attributes:
        sentence: [batch, dimension] L2-normalised sentence vectors.
        taps: each [batch, tokens, hidden size]; a router's logits [real tokens, experts].
    """

    sentence: Tensor
    taps: dict[Tap, Tensor]

    def first(self, rows: int) -> Signals:
        """Those of the first rows of the batch."""
        return Signals(self.sentence[:rows], {tap: tensor[:rows] for tap, tensor in self.taps.items()})


def shape_of(encoder: SentenceTransformer) -> EncoderShape:
    """Layers, hidden size, attention heads and output dimension of a sentence encoder."""
    model = transformer_of(encoder)
    config = model.config
    return EncoderShape(
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        attention_heads=config.num_attention_heads,
        dimension=encoder.get_embedding_dimension(),
        sparse_layers=tuple(sparse_layers(model)),
    )


def encoder_layers(model: Any) -> Any:
    """The stack of layers (nn.ModuleList) of a BERT-like transformers model (BERT, RoBERTa, XLM-R, ELECTRA, ...).

    Raises:
        ConfigurationError: the model has no `encoder.layer[i].attention.self` structure.
    """
    layers = getattr(getattr(model, "encoder", None), "layer", None)
    if not isinstance(layers, nn.ModuleList) or not hasattr(getattr(layers[0], "attention", None), "self"):
        raise ConfigurationError(
            f"{type(model).__name__} is not built like BERT (encoder.layer[i].attention.self), so its layers cannot be "
            "copied or tapped. Choose a BERT, RoBERTa, XLM-R or ELECTRA encoder as teacher."
        )
    return layers


class TappedEncoder:
    """A sentence encoder whose forward pass also gives the tapped tensors."""

    def __init__(self, encoder: SentenceTransformer, taps: Iterable[Tap]) -> None:
        self.encoder = encoder
        self._read: dict[Tap, Tensor] = {}
        layers = encoder_layers(transformer_of(encoder))
        for tap in taps:
            _tapped_module(layers[tap.layer], tap.kind).register_forward_hook(self._reader(tap))

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Signals:
        """Encode a padded batch of token ids, int64 [batch, tokens]."""
        features = self.encoder({"input_ids": input_ids, "attention_mask": attention_mask})
        taps, self._read = self._read, {}
        return Signals(nn.functional.normalize(features["sentence_embedding"].float(), dim=-1), taps)

    def _reader(self, tap: Tap) -> Any:
        def read(module: nn.Module, inputs: Any, output: Any) -> None:
            self._read[tap] = output if isinstance(output, torch.Tensor) else output[0]

        return read


def _tapped_module(layer: Any, kind: Kind) -> nn.Module:
    module: nn.Module
    if kind == "hidden":
        module = layer
    elif kind == "router":
        module = layer.feed_forward.router
    else:
        module = getattr(layer.attention.self, kind)
    return module
