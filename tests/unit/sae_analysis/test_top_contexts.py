from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_analysis.top_contexts import TopContexts, contexts_of, find_top_contexts, specific_latents
from sae_training.activations_store import ActivationsStore
from sae_training.sparse_autoencoder import SparseAutoencoder

N_PROMPTS = 6  # of 16 tokens; the store takes 4 at a time, so the last pass is a short one


@pytest.fixture(params=[False, True], ids=["all tokens", "without BOS"])
def store(request: pytest.FixtureRequest, small_config: Callable, demo_model: Any) -> ActivationsStore:
    return ActivationsStore(small_config(exclude_special_tokens=request.param), demo_model)


@pytest.fixture
def sae(store: ActivationsStore) -> SparseAutoencoder:
    sae = SparseAutoencoder(store.cfg)
    with torch.no_grad():
        sae.b_enc[0] = -1e6  # never fires
    return sae


@pytest.fixture(scope="module")
def tokens(demo_model: Any) -> Tensor:
    ids = torch.randint(1, demo_model.cfg.d_vocab, (N_PROMPTS, 16), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = demo_model.tokenizer.bos_token_id
    return ids


def activations(sae: SparseAutoencoder, store: ActivationsStore, tokens: Tensor) -> Tensor:
    """(prompts, positions, latents), one prompt at a time; -1 where the position does not count."""
    with torch.no_grad():
        acts = torch.cat([sae.encode(store.get_activations(prompt.unsqueeze(0))) for prompt in tokens])
    if store.rule.excluded_ids is not None:
        acts[tokens == store.model.tokenizer.bos_token_id] = -1
    return acts


def test_top_tokens_are_the_strongest_of_each_prompt(
    sae: SparseAutoencoder, store: ActivationsStore, tokens: Tensor
) -> None:
    found = find_top_contexts(sae, store, tokens, n=3)
    acts = activations(sae, store, tokens)
    for latent in range(1, sae.d_sae, 37):
        strongest = sorted((acts[prompt, :, latent].max().item() for prompt in range(N_PROMPTS)), reverse=True)
        expected = [max(value, 0.0) for value in strongest[:3]]
        assert found.activations[:, latent].tolist() == pytest.approx(expected, abs=1e-3)


def test_places_hold_the_activations_and_are_of_different_prompts(
    sae: SparseAutoencoder, store: ActivationsStore, tokens: Tensor
) -> None:
    found = find_top_contexts(sae, store, tokens, n=3)
    acts = activations(sae, store, tokens)
    there = acts[found.prompts, found.positions, torch.arange(sae.d_sae)]
    fires = found.activations > 0
    torch.testing.assert_close(found.activations[fires], there[fires], atol=1e-3, rtol=1e-3)
    assert all(len(set(prompts)) == 3 for prompts in found.prompts[:, fires.all(dim=0)].T.tolist())


def test_density_is_the_share_of_tokens_that_count(
    sae: SparseAutoencoder, store: ActivationsStore, tokens: Tensor
) -> None:
    found = find_top_contexts(sae, store, tokens)
    n_tokens = N_PROMPTS * (16 if store.rule.excluded_ids is None else 15)
    expected = (activations(sae, store, tokens) > 0).sum(dim=(0, 1)) / n_tokens
    torch.testing.assert_close(found.density, expected, atol=1.5 / n_tokens, rtol=0)  # a latent at 0 may flip
    assert found.density[0] == 0


def test_latent_that_never_fires_has_no_contexts(
    sae: SparseAutoencoder, store: ActivationsStore, tokens: Tensor
) -> None:
    found = find_top_contexts(sae, store, tokens)
    assert not (found.activations[:, 0] > 0).any()
    assert contexts_of(0, found, store, tokens) == []


def test_fewer_prompts_than_asked_for_give_so_many_contexts(
    sae: SparseAutoencoder, store: ActivationsStore, tokens: Tensor
) -> None:
    found = find_top_contexts(sae, store, tokens[:2], n=5)
    latent = int(found.activations[1].argmax())  # fires in both prompts
    assert found.activations[1, latent] > 0
    assert len(contexts_of(latent, found, store, tokens[:2])) == 2


# ----------------------------------------------------------------------------------------------------------------- text


def at(prompt: int, position: int, activation: float = 1.0) -> TopContexts:
    """One latent with one top context."""
    return TopContexts(
        torch.tensor([0.5]), torch.tensor([[activation]]), torch.tensor([[prompt]]), torch.tensor([[position]])
    )


@pytest.mark.parametrize(
    ("position", "before", "after"),
    [(0, [], [1, 2]), (1, [], [2, 3]), (9, [5, 6, 7, 8], [10, 11]), (15, [11, 12, 13, 14], [])],
)
def test_text_around_a_token(
    store: ActivationsStore, tokens: Tensor, position: int, before: list[int], after: list[int]
) -> None:
    # 4 tokens before, never the BOS, and 2 after, within the prompt.
    decode = store.model.tokenizer.decode
    (context,) = contexts_of(0, at(2, position), store, tokens, width=4)
    assert context.before == decode(tokens[2, before])
    assert context.token == decode(tokens[2, [position]])
    assert context.after == decode(tokens[2, after])


# ------------------------------------------------------------------------------------------------- latents worth a look


def six_latents() -> tuple[TopContexts, Tensor]:
    """Strengths 1 to 6, each latent at one position of three prompts.

    The strongest tokens are 10, 11, 12, 12, 14 and 15. Latent 0 is too rare, 4 too common, 5 always on the token 15.
    """
    tokens = torch.tensor([[0, 10, 11, 12, 14, 15], [0, 20, 21, 22, 24, 15], [0, 30, 31, 32, 34, 15]])
    density = torch.tensor([1e-5, 1e-3, 1e-3, 1e-3, 0.5, 1e-3])
    strength = torch.arange(1.0, 7.0).expand(3, 6).clone()
    prompts = torch.arange(3).unsqueeze(1).expand(3, 6)
    positions = torch.tensor([1, 2, 3, 3, 4, 5]).expand(3, 6)
    return TopContexts(density, strength, prompts, positions), tokens


def test_specific_latents_are_neither_rare_nor_common_and_differ_in_their_token() -> None:
    found, tokens = six_latents()
    assert specific_latents(found, tokens, n=5) == [3, 1]  # 2 fires on the token of 3, and more weakly


def test_specific_latents_are_no_more_than_asked_for() -> None:
    found, tokens = six_latents()
    assert specific_latents(found, tokens, n=1) == [3]


def test_specific_latents_fire_in_all_their_top_contexts() -> None:
    found, tokens = six_latents()
    found.activations[2, 3] = 0
    assert specific_latents(found, tokens, n=5) == [2, 1]


def test_no_latent_in_range_gives_none() -> None:
    found, tokens = six_latents()
    assert specific_latents(found, tokens, n=5, rarest=0.9, commonest=1.0) == []


def test_with_a_tokenizer_pieces_of_words_are_left_out_and_case_does_not_tell_words_apart(demo_model: Any) -> None:
    tokenizer = demo_model.tokenizer
    start = tokenizer.bos_token_id

    def ids(word: str) -> list[int]:
        return tokenizer(word, add_special_tokens=False)["input_ids"][:1]

    # Rows of three tokens: BOS, what the latent fires on, what follows. Latent i fires in its rows only.
    piece = tokenizer(" Xylophonistically", add_special_tokens=False)["input_ids"][:2]
    words = {0: [" the", " was", " and"], 1: [" The", " that", " not"], 2: [" that", " That", " that"]}
    words[4] = [" by", " of", " in"]
    rows, prompts = [], torch.zeros(3, 5, dtype=torch.long)
    for latent in range(5):
        for n in range(3):
            prompts[n, latent] = len(rows)
            rows.append([start, *piece] if latent == 3 else [start, *ids(words[latent][n]), *ids(" was")])
    tokens = torch.tensor(rows)
    strength = torch.arange(1.0, 6.0).expand(3, 5)
    found = TopContexts(torch.full((5,), 1e-3), strength, prompts, torch.ones_like(prompts))
    # 4: of two letters; 3: a piece; 2: one word; 0: the word of 1, and more weakly
    assert specific_latents(found, tokens, n=5, tokenizer=tokenizer) == [1]
