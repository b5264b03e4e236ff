"""What ablating a latent does to the predictions of the language model, at the places where it fires most.

At the example's position alone the latent's activation becomes 0, and the model's activations lose what it contributed;
the autoencoder's error stays. The change is that of the next token's log-probability, in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sae_analysis.analysis import Example
from sae_analysis.interventions import ablate
from sae_training.language_model.hooks import inputs_of
from sae_training.language_model.load import LanguageModel
from sae_training.run.evals import prompts_of_a_pass
from sae_training.sparse_autoencoder import SparseAutoencoder

N_TOKENS = 5
Pairs = list[tuple[int, float]]


@torch.no_grad()
def effects_of(
    model: LanguageModel, sae: SparseAutoencoder, examples: Sequence[Example], padded: bool = False
) -> list[dict[str, Any]]:
    """Return the effect of ablating the latent at each of `examples`, which are all of one latent and one length.

    loss: change of the loss of the token that follows; None at the end of a context. raised, lowered: the token ids
    whose log-probability grows and falls most without the latent, and by how much.
    """
    found: list[dict[str, Any]] = []
    n = prompts_of_a_pass(len(examples[0].ids), model) if examples else 1
    for start in range(0, len(examples), n):
        some = examples[start : start + n]
        device = model.cfg.device
        ids = torch.tensor([example.ids for example in some], device=device)
        at = torch.tensor([example.position for example in some], device=device)
        rows = torch.arange(len(some), device=device)
        here = torch.zeros_like(ids, dtype=torch.bool)
        here[rows, at] = True
        inputs = inputs_of(model, ids, padded)
        before = model(**inputs, return_type="logits").to(device)[rows, at].float().log_softmax(dim=-1)
        with ablate(model, sae, some[0].latent, positions=here):
            after = model(**inputs, return_type="logits").to(device)[rows, at].float().log_softmax(dim=-1)
        change = after - before
        for row, example in enumerate(some):
            following = example.ids[example.position + 1 : example.position + 2]
            loss = -change[row, following[0]].item() if following and following[0] >= 0 else None
            raised, lowered = (largest(sign * change[row], sign) for sign in (1, -1))
            found.append({"loss": loss, "raised": raised, "lowered": lowered})
    return found


def largest(change: torch.Tensor, sign: int) -> Pairs:
    """Return the tokens with the largest changes above 0, with the sign that they had."""
    top = change.topk(min(N_TOKENS, len(change)))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [(token, sign * value) for token, value in pairs if value > 0]
