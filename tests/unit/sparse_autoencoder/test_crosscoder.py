"""A crosscoder by its formula: sets of latents that read and write several places."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from small import D_HEAD as D_IN
from torch import Tensor

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.sparse_autoencoder.crosscoder import Crosscoder, CrosscoderConfig, Latents, shapes_of
from sae_training.training.trainer import SAETrainer

D_SAE, N, N_ROWS = 3 * D_IN, 3, 7

ALL, EACH = tuple(range(N)), tuple((place,) for place in range(N))
KINDS = {
    "crosscoder": (Latents(ALL, ALL),),
    "by place": tuple(Latents(ALL, place) for place in EACH),
    "weakly causal": tuple(Latents(place, ALL) for place in EACH),
    "cross-layer": tuple(Latents(place, ALL[place[0] :]) for place in EACH),
}


def crosscoder(kind: str = "crosscoder", **changes: Any) -> Crosscoder:
    cfg = CrosscoderConfig(
        architecture="crosscoder",
        reads=("a", "b", "c"),
        writes=("u", "v", "w"),
        latents=KINDS[kind],
        d_in=D_IN,
        d_out=D_IN,
        d_sae=D_SAE,
        activation="relu",
        shares_encoder=kind == "by place",
    )
    cfg = dataclasses.replace(cfg, **changes)
    generator = torch.Generator().manual_seed(3)
    return Crosscoder(
        cfg, {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes_of(cfg).items()}
    )


def rows(seed: int = 1) -> Tensor:
    return torch.randn(N_ROWS, N, D_IN, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_every_set_reads_and_writes_its_places(kind: str) -> None:
    made, x = crosscoder(kind), rows()
    acts, outs = [], [made.b_dec[place].expand(N_ROWS, -1) for place in ALL]
    for number, (reads, writes) in enumerate(made.cfg.latents):
        e = 0 if made.cfg.shares_encoder else number
        pre = sum(x[:, place] @ made.W_enc[e][j] for j, place in enumerate(reads)) + made.b_enc[e]
        acts.append(pre.relu())
        for j, place in enumerate(writes):
            outs[place] = outs[place] + acts[-1] @ made.W_dec[number][j]
    wanted = acts[0] if len(acts) == 1 else torch.stack(acts, dim=1)
    torch.testing.assert_close(made.encode(x), wanted)
    torch.testing.assert_close(made.decode(wanted), torch.stack(outs, dim=1))
    torch.testing.assert_close(made(x), torch.stack(outs, dim=1))


def test_leading_dimensions_are_rows() -> None:
    made, x = crosscoder("cross-layer"), rows()
    assert made.encode(x[0]).shape == (N, D_SAE)
    folded = x[:6].reshape(2, 3, N, D_IN)
    torch.testing.assert_close(made(folded), made(x[:6]).reshape(2, 3, N, D_IN))


def test_activations_may_be_given_by_name() -> None:
    made, x = crosscoder("weakly causal"), rows()
    by_name = {"other": x[:, 0], "c": x[:, 2], "a": x[:, 0], "b": x[:, 1]}
    torch.testing.assert_close(made.encode(by_name), made.encode(x))
    out = made(by_name)
    assert list(out) == ["u", "v", "w"]
    torch.testing.assert_close(out["v"], made(x)[:, 1])
    with pytest.raises(ValueError, match="x: b missing, expected activations of a, b, c"):
        made.encode({"a": x[:, 0], "c": x[:, 2]})


@pytest.mark.parametrize("shape", [(N_ROWS, D_IN), (N_ROWS, N + 1, D_IN), (N_ROWS, N, D_IN + 1), (D_IN,)])
def test_rows_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="found shape"):
        crosscoder().encode(torch.zeros(shape))
    with pytest.raises(ValueError, match="found shape"):
        crosscoder("cross-layer").decode(torch.zeros(N_ROWS, D_SAE))


def test_above_a_threshold_means_above() -> None:
    made = crosscoder("cross-layer", activation="jumprelu")
    pre = crosscoder("cross-layer").encode(rows())
    pre[pre == 0] = -1
    made.threshold.copy_(pre[0])
    acts = made.activate(pre)
    assert not acts[0].any()
    torch.testing.assert_close(acts, torch.where(pre > pre[0], pre, 0.0))


def largest(scores: Tensor, k: int) -> Tensor:
    """Mask of the k largest of all."""
    return scores >= scores.flatten().sort(descending=True).values[k - 1]


@pytest.mark.parametrize("by_batch", [False, True])
@pytest.mark.parametrize("across_sets", [False, True])
def test_the_k_largest_are_those_of_rows_or_batches_of_sets_or_all(by_batch: bool, across_sets: bool) -> None:
    changes = {"activation": "batchtopk" if by_batch else "topk", "k": 2, "by_batch": by_batch}
    made = crosscoder("cross-layer", across_sets=across_sets, **changes)
    made.weight_of_choice.abs_()
    relu = crosscoder("cross-layer").encode(rows())
    made.load_state_dict(crosscoder("cross-layer").state_dict(), strict=False)
    scores = relu * made.weight_of_choice
    groups: list[tuple[Any, ...]] = [(row, number) for row in range(N_ROWS) for number in range(N)]
    if by_batch:
        groups = [(slice(None), number) for number in range(N)]
    if across_sets:
        groups = [(slice(None),)] if by_batch else [(row,) for row in range(N_ROWS)]
    wanted = torch.zeros_like(relu)
    for group in groups:
        wanted[group] = relu[group] * largest(scores[group], 2 * N_ROWS if by_batch else 2)
    torch.testing.assert_close(made.encode(rows()), wanted)
    assert made.encode(rows()[0]).shape == (N, D_SAE)


def test_more_than_there_are_may_be_asked_for() -> None:
    made = crosscoder(activation="topk", k=10 * D_SAE)
    made.weight_of_choice.fill_(1)
    made.load_state_dict(crosscoder().state_dict(), strict=False)
    torch.testing.assert_close(made.encode(rows()), crosscoder().encode(rows()))


def test_a_skip_connection_needs_the_input() -> None:
    made, x = crosscoder("cross-layer", skip_connection=True), rows()
    acts = made.encode(x)
    with pytest.raises(ValueError, match="skip connection, so decode needs its input"):
        made.decode(acts)
    without = torch.einsum("rpi,pio->rpo", x, made.W_skip)
    wanted = made.decode(acts, torch.zeros_like(x)) + without
    torch.testing.assert_close(made.decode(acts, x), wanted)
    torch.testing.assert_close(made(x), wanted)


def test_rows_that_are_normalised_come_back_in_their_size() -> None:
    made, x = crosscoder(normalize_activations="constant_norm_rescale"), rows()
    scale = D_IN**0.5 / x.norm(dim=-1, keepdim=True)
    plain = crosscoder()
    torch.testing.assert_close(made.encode(x), plain.encode(x * scale))
    torch.testing.assert_close(made(x), plain(x * scale) / scale)


def test_directions_are_the_decoder_rows_of_a_latent() -> None:
    made = crosscoder("cross-layer")
    assert made.directions(4, 1).shape == (N - 1, D_IN)
    assert torch.equal(made.directions(4, 1)[1], made.W_dec[1][1][4])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "other"}, "activation: found other"),
        ({"activation": "topk"}, "k: found None"),
        ({"latents": ()}, "latents: found no set"),
        ({"latents": (Latents((3,), (0,)),)}, "latents: reads"),
        ({"latents": (Latents((0,), ()),)}, "latents: writes"),
        ({"writes": ("u", "v", "w", "z"), "skip_connection": True}, "reads, writes"),
    ],
)
def test_configs_that_mean_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        crosscoder(**changes)


def test_weights_that_do_not_fit_are_all_named() -> None:
    cfg = crosscoder().cfg
    weights = {name: torch.zeros(shape) for name, shape in shapes_of(cfg).items()}
    del weights["b_dec"]
    weights |= {"threshold": torch.zeros(1), "b_enc": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"(?s)b_dec: missing.*b_enc: found shape \(2,\).*threshold: not a tensor"):
        Crosscoder(cfg, weights)


def test_weights_are_taken_over_without_a_copy_and_ask_for_no_gradient() -> None:
    cfg = crosscoder().cfg
    weights = {name: torch.zeros(shape) for name, shape in shapes_of(cfg).items()}
    made = Crosscoder(cfg, weights)
    assert made.W_dec[0][1].data_ptr() == weights["W_dec.0.1"].data_ptr()
    assert not any(parameter.requires_grad for parameter in made.parameters())
    assert (made.double().dtype, made.d_sae, made.n_sets) == (torch.float64, D_SAE, 1)


def test_training_one_is_refused_by_name() -> None:
    cfg = LanguageModelSAERunnerConfig(d_in=D_IN)
    with pytest.raises(TypeError, match="found a Crosscoder, expected a SparseAutoencoder.*not trained"):
        SAETrainer(crosscoder(), cfg)  # type: ignore[arg-type]
