"""The tokens on which a latent fires most, with the text around them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_training.activations_store import ActivationsStore
from sae_training.sparse_autoencoder import SparseAutoencoder


class Context(NamedTuple):
    """One place where a latent fires: the text before the token, the token, the text after it."""

    activation: float
    before: str
    token: str
    after: str


class TopContexts(NamedTuple):
    """For each latent, the share of tokens on which it fires and its strongest tokens, strongest first.

    density is (d_sae,), the others (n, d_sae): activations, and the prompts and positions in `tokens` where they are.
    """

    density: Tensor
    activations: Tensor
    prompts: Tensor
    positions: Tensor


@torch.no_grad()
def find_top_contexts(sae: SparseAutoencoder, store: ActivationsStore, tokens: Tensor, n: int = 5) -> TopContexts:
    """The `n` strongest tokens of each latent in `tokens` (prompts, context), at most one in each prompt."""
    best = torch.full((n, sae.d_sae), -1.0)
    best_prompt = torch.zeros(n, sae.d_sae, dtype=torch.long)
    best_position = torch.zeros(n, sae.d_sae, dtype=torch.long)
    fired, n_tokens = torch.zeros(sae.d_sae), 0
    for first in range(0, len(tokens), store.store_batch_size):
        batch = tokens[first : first + store.store_batch_size].to(store.device)
        activations = store.get_activations(batch)
        keep = store.keeps(batch, activations)
        acts = sae.encode(activations) * keep.unsqueeze(-1)
        fired += (acts > 0).sum(dim=(0, 1)).cpu()
        n_tokens += int(keep.sum())
        highest, position = acts.max(dim=1)  # (prompts, d_sae): the strongest token of each prompt
        prompts = torch.arange(first, first + len(batch)).unsqueeze(1).expand(-1, sae.d_sae)
        best, chosen = torch.cat([best, highest.float().cpu()]).topk(n, dim=0)
        best_prompt = torch.cat([best_prompt, prompts]).gather(0, chosen)
        best_position = torch.cat([best_position, position.cpu()]).gather(0, chosen)
    return TopContexts(fired / n_tokens, best, best_prompt, best_position)


def contexts_of(
    latent: int, found: TopContexts, store: ActivationsStore, tokens: Tensor, width: int = 10
) -> list[Context]:
    """The top contexts of one latent as text, with `width` tokens before each token and half as many after it."""
    contexts = []
    for activation, prompt, position in zip(
        found.activations[:, latent].tolist(), found.prompts[:, latent], found.positions[:, latent], strict=True
    ):
        if activation <= 0:
            continue
        row, at = tokens[prompt], int(position)
        start = max(1, at - width)  # position 0 holds the BOS token
        text = [
            as_text(part, store.model.tokenizer)
            for part in (row[start:at], row[at : at + 1], row[at + 1 :][: width // 2])
        ]
        contexts.append(Context(activation, *text))
    return contexts


def as_text(ids: Tensor, tokenizer: Any) -> str:
    """The text of ids (n,); the numbers themselves without a tokenizer. Padding, below 0, has none."""
    ids = ids[ids >= 0]
    return " ".join(map(str, ids.tolist())) if tokenizer is None else tokenizer.decode(ids)


def specific_latents(
    found: TopContexts,
    tokens: Tensor,
    n: int,
    rarest: float = 2e-4,
    commonest: float = 1e-2,
    tokenizer: Any = None,
) -> list[int]:
    """`n` latents worth a first look, strongest first, with densities from `rarest` to `commonest`.

    No two have the same strongest token. Left out are latents whose strongest tokens are all the same, because they say
    little more than that token, and those that fire less than half as strongly on the last of them as on the first,
    because `tokens` holds too few places where they do. With a tokenizer, so are those with a piece of a word among
    their strongest tokens, because a reader cannot tell what they stand for; and tokens that differ in case or space
    only are the same.
    """
    top_tokens = tokens[found.prompts, found.positions]  # (contexts, d_sae)
    steady = found.activations[-1] > 0.5 * found.activations[0]
    eligible = (found.density >= rarest) & (found.density <= commonest) & steady
    if tokenizer is None:
        names = top_tokens
    else:
        texts = token_texts(tokens, tokenizer)
        eligible &= whole_words(found, tokens, texts).all(dim=0)
        words = [text.strip().lower() for text in texts]
        first_with: dict[str, int] = {}
        same = torch.tensor([first_with.setdefault(word, id_) for id_, word in enumerate(words)])
        names = same[top_tokens.clamp(min=0)]
    eligible &= (names != names[0]).sum(dim=0) >= 2
    strength = torch.where(eligible, found.activations.mean(dim=0), torch.zeros(()))
    chosen: list[int] = []
    seen: set[int] = set()
    for latent in strength.argsort(descending=True).tolist():
        if len(chosen) == n or strength[latent] <= 0:
            break
        name = int(names[0, latent])
        if name not in seen:
            seen.add(name)
            chosen.append(latent)
    return chosen


def token_texts(tokens: Tensor, tokenizer: Any) -> list[str]:
    """The text of each id from 0 to the highest in `tokens`; "" for those that are not in it."""
    texts = [""] * (int(tokens.max()) + 1)
    for id_ in tokens.unique().tolist():
        if id_ >= 0:
            texts[id_] = tokenizer.decode([id_])
            # SentencePiece writes the space before a word as a bar, and decoding a lone token drops it.
            if str(tokenizer.convert_ids_to_tokens(id_)).startswith("▁"):
                texts[id_] = " " + texts[id_].lstrip()
    return texts


def whole_words(found: TopContexts, tokens: Tensor, texts: list[str]) -> Tensor:
    """Whether each top token is a word of three letters or more, no piece of a longer one; shape (contexts, d_sae)."""
    facts = torch.tensor([[t[:1].isalpha(), t[-1:].isalpha(), sum(map(str.isalpha, t)) > 2] for t in texts])
    starts, ends, long = facts[tokens.clamp(min=0)].unbind(dim=-1)  # (prompts, context) each
    goes_on = torch.zeros_like(starts)  # a letter, then a letter of the next token
    goes_on[:, :-1] = ends[:, :-1] & starts[:, 1:]
    whole = long & ~goes_on & ~goes_on.roll(1, dims=1)
    return whole[found.prompts, found.positions]
