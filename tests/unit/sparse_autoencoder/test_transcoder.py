"""Transcoders: another hook's activations predicted, from the objective to a whole run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_evals import plain_cross_entropy
from torch import Tensor
from transformers import AutoModelForCausalLM

from sae_training.activations_store import ActivationsStore
from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.demo_data import DEMO_MODEL
from sae_training.lm_runner import run_config
from sae_training.run.evals import evaluate
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.sparse_autoencoder.losses import Coefficients
from sae_training.training.objective import objective
from sae_training.training.resampling import resample
from sae_training.training.trainer import SAETrainer
from sae_training.utils import LMSparseAutoencoderSessionloader

D_IN, D_OUT, D_SAE, ROWS, K = 6, 5, 24, 40, 3
DEAD = torch.arange(D_SAE) % 5 == 0
HOOKS = {"hook_point": "blocks.1.hook_resid_mid", "target_hook_point": "blocks.1.hook_mlp_out"}


def config(**changes: Any) -> LanguageModelSAERunnerConfig:
    sizes: dict[str, Any] = {"d_in": D_IN, "d_out": D_OUT, "expansion_factor": D_SAE // D_IN, "k": K}
    return LanguageModelSAERunnerConfig(
        **{**HOOKS, **sizes, "dtype": "float64", "architecture": "topk", "train_batch_size": ROWS, **changes}
    )


def make(**changes: Any) -> SparseAutoencoder:
    sae = SparseAutoencoder(config(**changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        sae.b_enc.sub_(5.0)  # few positive pre-activations, so that the sparse way is not refused
    return sae


def pair(n: int = ROWS) -> tuple[Tensor, Tensor]:
    """Rows and targets, neither around zero."""
    generator = torch.Generator().manual_seed(2)
    x = 2 * torch.randn(n, D_IN, generator=generator, dtype=torch.float64) + 0.3
    return x, torch.randn(n, D_OUT, generator=generator, dtype=torch.float64) - 0.7


def gradients(sae: SparseAutoencoder, loss: Tensor) -> dict[str, Tensor]:
    sae.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}


# ----------------------------------------------------------------------------------------------------------- the step


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_loss_and_gradients_are_those_of_the_formula(skip: bool, sparse: bool) -> None:
    sae = make(skip_connection=skip)
    x, target = pair()
    losses = objective(sae, x, target, Coefficients(0.0, K), None, sparse)
    found = gradients(sae, losses.loss)

    pre = x @ sae.W_enc + sae.b_enc
    acts = pre.relu() * (pre >= pre.sort(descending=True).values[:, K - 1 : K])
    out = acts @ sae.W_dec + sae.b_dec
    if skip:
        out = out + x @ sae.W_skip
    loss = ((out - target).pow(2) / (target - target.mean(0)).norm(dim=1, keepdim=True)).mean()
    expected = gradients(sae, loss)

    assert (losses.code.entries is not None) == sparse
    torch.testing.assert_close(losses.loss, loss)
    assert found.keys() == expected.keys() == dict(sae.named_parameters()).keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("remedy", [{}, {"auxk_coefficient": 0.5, "auxk_k": 2}, {"use_ghost_grads": True}])
@pytest.mark.parametrize(
    "options",
    [{"multi_topk": True}, {"architecture": "batchtopk"}, {"architecture": "matryoshka"}]
    + [{"architecture": name} for name in ("standard", "jumprelu", "gated")],
    ids=str,
)
def test_the_sparse_way_equals_the_dense_way(options: dict, remedy: dict) -> None:
    sae = make(skip_connection=True, **options, **remedy)
    x, target = pair()
    made = [objective(sae, x, target, Coefficients(0.03, K), DEAD, sparse) for sparse in (False, True)]
    assert made[1].code.entries is not None
    dense, sparse = ([losses.loss, *gradients(sae, losses.loss).values()] for losses in made)
    for one, other in zip(dense, sparse, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_the_start_centres_inputs_and_outputs_and_matches_their_sizes() -> None:
    sae = SparseAutoencoder(config(skip_connection=True))
    x, target = pair(500)
    sae.initialize_transcoder(x, target, "mean")
    torch.testing.assert_close(sae.b_dec.detach(), target.mean(0))
    pre = sae.pre_activations(sae.sae_input(x)).detach()
    torch.testing.assert_close(pre.mean(0), torch.zeros(D_SAE, dtype=torch.float64))
    sizes = [(rows - rows.mean(0)).norm(dim=1).mean() for rows in (x, target)]
    columns = sae.W_enc.detach().norm(dim=0)
    torch.testing.assert_close(columns, torch.full((D_SAE,), float(sizes[1] / sizes[0]), dtype=torch.float64))
    assert not sae.W_skip.any()


def test_a_linear_target_is_learned_through_the_skip_connection_alone() -> None:
    matrix = torch.randn(D_IN, D_OUT, generator=torch.Generator().manual_seed(5))
    cfg = config(skip_connection=True, dtype="float32", lr=0.05, total_training_tokens=300 * ROWS, lr_warm_up_steps=0)
    sae = SparseAutoencoder(cfg)
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)  # no latent ever fires
    trainer = SAETrainer(sae, cfg)
    generator = torch.Generator().manual_seed(6)
    for step in range(300):
        x = torch.randn(ROWS, D_IN, generator=generator)
        trainer.step(x, step, x @ matrix + 1)
    torch.testing.assert_close(sae.W_skip.detach(), matrix, atol=0.05, rtol=0)
    torch.testing.assert_close(sae.b_dec.detach(), torch.ones(D_OUT), atol=0.05, rtol=0)


@pytest.mark.parametrize("skip", [False, True])
def test_resampled_latents_read_inputs_and_write_targets(skip: bool) -> None:
    cfg = config(architecture="standard", feature_sampling_method="l2", skip_connection=skip, lr=0.05)
    trainer = SAETrainer(SparseAutoencoder(cfg), cfg)
    x, target = pair()
    trainer.step(x, 0, target)
    sae = trainer.sae
    resample(sae, trainer.by_latent(), DEAD, x, target, "l2", torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize
    left_for_latents = target - sae.b_dec.detach() - (x @ sae.W_skip.detach() if skip else 0)
    along = unit(left_for_latents, dim=1) @ sae.W_dec[DEAD].detach().T
    best = along.max(dim=0)
    torch.testing.assert_close(best.values, torch.ones(int(DEAD.sum()), dtype=torch.float64))
    read = unit(sae.W_enc[:, DEAD].detach().T, dim=1)
    torch.testing.assert_close(read, unit(x - x.mean(0), dim=1)[best.indices])
    pre = sae.pre_activations(sae.sae_input(x))[:, DEAD].detach()
    torch.testing.assert_close(pre.mean(0), torch.zeros_like(pre[0]))


# ---------------------------------------------------------------------------------------------------- the whole thing


def test_rows_of_both_hooks_belong_together(small_config: Callable, demo_model: Any) -> None:
    """resid_post = resid_mid + mlp_out, for each row of a shuffled batch."""
    hooks = {"hook_point": "blocks.1.hook_mlp_out", "target_hook_point": "blocks.1.hook_resid_post"}
    store = ActivationsStore(small_config(**hooks), demo_model)
    mid = ActivationsStore(small_config(hook_point="blocks.1.hook_resid_mid"), demo_model)
    for _ in range(4):
        batch = store.next_pair()
        torch.testing.assert_close(batch.x + mid.next_batch(), batch.target, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_evaluation_puts_the_output_in_the_place_of_the_target(small_config: Callable, demo_model: Any) -> None:
    store = ActivationsStore(small_config(**HOOKS, d_out=256, skip_connection=True), demo_model)
    sae = SparseAutoencoder(store.cfg).eval()
    sae.W_skip.normal_(std=0.05, generator=torch.Generator().manual_seed(3))
    tokens = store.held_out_tokens()[:4]
    found = evaluate(sae, store, tokens)

    plain = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32, attn_implementation="eager").eval()
    block, seen = plain.model.layers[1], {}
    block.post_attention_layernorm.register_forward_pre_hook(lambda module, inputs: seen.update(x=inputs[0]))
    clean = plain(tokens).logits.double()
    handle = block.mlp.register_forward_hook(lambda module, inputs, output: seen.update(y=output))
    plain(tokens)
    handle.remove()
    block.mlp.register_forward_hook(lambda module, inputs, output: sae.reconstruct(seen["x"]))
    changed = plain(tokens).logits.double()
    assert found["metrics/ce_loss_without_sae"] == pytest.approx(plain_cross_entropy(clean, tokens), rel=1e-4)
    assert found["metrics/ce_loss_with_sae"] == pytest.approx(plain_cross_entropy(changed, tokens), rel=1e-4)
    y = seen["y"].flatten(end_dim=1)
    error = sae.reconstruct(seen["x"]).flatten(end_dim=1) - y
    explained = 1 - error.pow(2).sum() / (y - y.mean(0)).pow(2).sum()
    assert found["metrics/eval_explained_variance"] == pytest.approx(explained.item(), abs=1e-4)


@pytest.mark.parametrize("changes", [{}, HOOKS | {"skip_connection": True}], ids=["autoencoder", "transcoder"])
def test_normalised_training_leaves_weights_for_raw_activations(
    changes: dict, small_config: Callable, demo_model: Any
) -> None:
    cfg = small_config(**changes, normalize_activations="expected_average_only_in", architecture="topk", k=8, lr=1e-3)
    run = run_config(cfg, demo_model)
    (member,) = run.members
    scales = member.scales
    assert all(scale != 1 for scale in scales)
    served = run.store.sample(256)
    for rows, site in ((served.x, member.sites.input), (served.target, member.sites.target)):
        assert rows.norm(dim=1).mean().item() == pytest.approx(site.d_in**0.5, rel=0.2)
    expected = member.trainer.sae.reconstruct(served.x) / scales[-1]
    loaded = SparseAutoencoder.load_from_pretrained(run.folder.path)
    torch.testing.assert_close(loaded.reconstruct(served.x / scales[0]), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loaded.W_dec.norm(dim=1), torch.ones(512))
    tuned = run_config(replace(cfg, run_name="tuned", from_pretrained_path=str(run.folder.path), lr=1e-12), demo_model)
    for (name, weight), (_, first) in zip(tuned.sae.weights(), loaded.weights(), strict=True):
        torch.testing.assert_close(weight, first, rtol=1e-3, atol=1e-3, msg=name)


def test_checkpoint_of_a_normalised_run_takes_raw_activations(small_config: Callable, demo_model: Any) -> None:
    cfg = small_config(normalize_activations="expected_average_only_in", checkpoint_every_steps=12)
    run = run_config(cfg, demo_model)
    loaded = SparseAutoencoder.load_from_pretrained(run.folder.path / "checkpoints" / "step_12")
    assert loaded.cfg.normalize_activations == "none"
    for (name, weight), (_, expected) in zip(loaded.weights(), run.sae.weights(), strict=True):
        assert torch.equal(weight, expected), name
    assert not torch.equal(loaded.b_dec, run.members[0].trainer.sae.b_dec)


def test_fine_tuning_an_autoencoder_as_a_transcoder_is_refused(small_config: Callable, demo_model: Any) -> None:
    first = run_config(small_config(), demo_model).folder.path
    with pytest.raises(ValueError, match="it holds an autoencoder, expected a transcoder"):
        run_config(small_config(**HOOKS, run_name="tuned", from_pretrained_path=str(first)), demo_model)


def test_low_precision_chooses_the_latents_of_an_uncentred_input() -> None:
    """Rows whose mean is 30 times their deviation, through a transcoder that starts centred."""
    sizes = {"d_in": 64, "d_out": 64, "expansion_factor": 8, "k": 8, "dtype": "float32"}
    sae = SparseAutoencoder(config(**sizes, encoder_matmul_dtype="bfloat16"))
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(256, 64, generator=generator) + 30 * torch.randn(64, generator=generator)
    sae.initialize_transcoder(x, torch.randn(256, 64, generator=generator), "mean")
    chosen = objective(sae, x, x, Coefficients(0.0, 8), sparse=True).feature_acts > 0
    exact = sae.encode(x) > 0
    assert (chosen & exact).sum() / exact.sum() > 0.95


def test_a_run_trains_resumes_and_comes_back(small_config: Callable, demo_model: Any) -> None:
    cfg = small_config(
        **HOOKS, d_in=None, skip_connection=True, architecture="topk", k=16, lr=2e-3, total_training_tokens=12_800
    )
    run = run_config(cfg, demo_model)
    evaluation = evaluate(run.sae, run.store, run.held_out)
    assert evaluation["metrics/eval_explained_variance"] > 0.2
    assert evaluation["metrics/ce_loss_with_sae"] < evaluation["metrics/ce_loss_with_ablation"]
    assert run.sae.get_name() == "transcoder_demo_blocks.1.hook_resid_mid_blocks.1.hook_mlp_out_512"
    _, sae, store = LMSparseAutoencoderSessionloader.load_session_from_pretrained(run.folder.path, model=demo_model)
    batch = store.next_pair()
    assert sae.is_transcoder and torch.equal(sae.reconstruct(batch.x), run.sae.reconstruct(batch.x))
    assert sae(batch.x, target=batch.target).mse_loss < batch.target.var()


# ---------------------------------------------------------------------------------------------------------- bad input


def test_what_a_user_gets_wrong_is_said(small_config: Callable, demo_model: Any) -> None:
    with pytest.raises(ValueError, match="skip_connection: found True without target_hook_point"):
        LanguageModelSAERunnerConfig(skip_connection=True)
    swapped = {"hook_point": HOOKS["target_hook_point"], "target_hook_point": HOOKS["hook_point"]}
    with pytest.raises(ValueError, match="target_hook_point: the model computes .*resid_mid before .*mlp_out"):
        ActivationsStore(small_config(**swapped), demo_model)
    with pytest.raises(ValueError, match="target_hook_point: this model has no hook 'blocks.1.hook_mlp_uot'"):
        run_config(small_config(**HOOKS | {"target_hook_point": "blocks.1.hook_mlp_uot"}), demo_model)
    with pytest.raises(ValueError, match="d_out: got 300, but .* 256 wide; use d_out=256, or d_out=None"):
        run_config(small_config(**HOOKS, d_out=300), demo_model)
    sae = make(skip_connection=True)
    x, _ = pair()
    with pytest.raises(ValueError, match="target: a transcoder's losses need"):
        sae(x)
    with pytest.raises(ValueError, match="decode needs its input"):
        sae.decode(sae.encode(x))
    with pytest.raises(ValueError, match="target: a transcoder's step needs"):
        SAETrainer(sae, config(skip_connection=True)).step(x, 0)
    with pytest.raises(ValueError, match="d_out: found None"):
        SparseAutoencoder(config(d_out=None))
