"""What an analysis needs of the language model beside its passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sae_analysis.pieces import pieces_of
from sae_training.language_model.sites import HookSite
from sae_training.language_model.tokenizer import tokenizer_of
from sae_training.language_model.unembedding import neurons, tensors_of, to_logits


@dataclass(frozen=True)
class OfModel:
    """None: the model has none, or not at this place."""

    pieces: list[bytes]
    """The bytes of each token id."""
    unembedding: Tensor | None
    """(d_out, d_vocab): from the place that the autoencoder writes to, to the logits."""
    neurons: Tensor | None
    """(n, d_out): what each neuron of the layer writes there."""


def of_model(model: Any, site: HookSite) -> OfModel:
    """Return it for an autoencoder that writes to `site`, of a language model or its parts."""
    pieces = pieces_of(tokenizer_of(model), model.cfg.d_vocab)
    tensors = tensors_of(model, [site])
    return OfModel(pieces, to_logits(tensors, site), neurons(tensors, site))
