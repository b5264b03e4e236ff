"""Splicing, ablating and steering: against plain transformers and explicit formulas, and what they leave behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from sae_analysis.interventions import POINTS, ablate, splice, steer
from sae_training.activations_store import ActivationsStore
from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.demo_data import DEMO_MODEL
from sae_training.language_model.harvest import harvest
from sae_training.language_model.load import hooked_transformer_class, load_language_model
from sae_training.language_model.sites import find_hook_site, find_sites, with_widths
from sae_training.run.evals import evaluate
from sae_training.sparse_autoencoder import SparseAutoencoder

LAYER = 1
HOOK = f"blocks.{LAYER}.hook_resid_post"
LATENTS = [0, 3, 7]
Context = AbstractContextManager[Any]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def hooked_transformer() -> Any:
    HookedTransformer = hooked_transformer_class()
    if HookedTransformer is None:
        pytest.skip("this TransformerLens has no HookedTransformer")
    from transformer_lens import HookedTransformerConfig

    sizes = {"n_layers": 3, "d_model": 16, "n_ctx": 40, "d_head": 8, "n_heads": 2, "d_vocab": 50}
    return HookedTransformer(HookedTransformerConfig(**sizes, act_fn="gelu", seed=0)).eval()  # pyright: ignore


@pytest.fixture(scope="module")
def gpt2_bridge(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A GPT-2, whose fused queries, keys and values have no taps in the twins of its blocks."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(n_layer=3, n_embd=16, n_head=2, n_positions=40, vocab_size=len(tokenizer))
    GPT2LMHeadModel(config).save_pretrained(folder)
    return load_language_model(str(folder), lm_dtype="float32")


@pytest.fixture(params=["demo_model", "hooked_transformer", "gpt2_bridge"])
def model(request: pytest.FixtureRequest) -> Any:
    """A model of each class."""
    return request.getfixturevalue(request.param)


def autoencoder(model: Any, hook: str = HOOK, **changes: Any) -> SparseAutoencoder:
    """A random autoencoder for a hook of `model`, none of whose biases is 0."""
    cfg = LanguageModelSAERunnerConfig(
        **{"model_name": "demo", "hook_point": hook, "d_in": None, "expansion_factor": 2, **changes}
    )
    sae = SparseAutoencoder(with_widths(cfg, find_sites(cfg, model))).eval()
    generator = torch.Generator().manual_seed(1)
    for bias in (sae.b_enc, sae.b_dec):
        bias.add_(0.1 * torch.randn(bias.shape, generator=generator))
    return sae


@pytest.fixture
def ids(model: Any) -> Tensor:
    return tokens_of(model)


def tokens_of(model: Any) -> Tensor:
    return torch.randint(1, min(model.cfg.d_vocab, 2000), (3, 10), generator=torch.Generator().manual_seed(0))


def hook_with(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda activations, hook: change(activations)


def codes(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    return ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()


def without(acts: Tensor, latents: list[int] = LATENTS) -> Tensor:
    acts = acts.clone()
    acts[..., latents] = 0
    return acts


# ------------------------------------------------------------------------------------------------ plain transformers

Formula = Callable[[SparseAutoencoder, Tensor], Tensor]
CASES: dict[str, tuple[Callable[[Any, SparseAutoencoder], Context], Formula]] = {
    "splice": (splice, lambda sae, x: codes(sae, x) @ sae.W_dec + sae.b_dec),
    "ablate": (
        lambda model, sae: ablate(model, sae, LATENTS),
        lambda sae, x: x - codes(sae, x)[..., LATENTS] @ sae.W_dec[LATENTS],
    ),
    "ablate in the reconstruction": (
        lambda model, sae: ablate(model, sae, LATENTS, use_error_term=False),
        lambda sae, x: without(codes(sae, x)) @ sae.W_dec + sae.b_dec,
    ),
    "steer": (
        lambda model, sae: steer(model, sae, {3: 2.5, 7: -1.0}),
        lambda sae, x: x + 2.5 * sae.W_dec[3] - sae.W_dec[7],
    ),
    "steer the reconstruction": (
        lambda model, sae: steer(model, sae, {3: 2.5}, use_error_term=False),
        lambda sae, x: codes(sae, x) @ sae.W_dec + sae.b_dec + 2.5 * sae.W_dec[3],
    ),
    "clamp": (
        lambda model, sae: steer(model, sae, {3: 2.5}, clamp=True),
        lambda sae, x: x + (2.5 - codes(sae, x)[..., 3:4]) * sae.W_dec[3],
    ),
}


@pytest.fixture(scope="module")
def plain_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32, attn_implementation="eager").eval()


def plain_log_probs(model: Any, tokens: Tensor, changes: dict[int, Callable[[Tensor], Tensor]]) -> Tensor:
    """Of the model without any of this package, with changes made to the outputs of some layers."""
    with ExitStack() as stack:
        for layer, change in changes.items():
            hook = model.model.layers[layer].register_forward_hook(
                lambda module, inputs, output, change=change: change(output)
            )
            stack.callback(hook.remove)
        return model(tokens).logits.log_softmax(-1)


@pytest.mark.parametrize("case", CASES)
def test_log_probabilities_are_those_of_plain_transformers(case: str, demo_model: Any, plain_model: Any) -> None:
    sae, tokens = autoencoder(demo_model), tokens_of(demo_model)
    context, formula = CASES[case]
    with context(demo_model, sae):
        found = demo_model(tokens).log_softmax(-1)
    expected = plain_log_probs(plain_model, tokens, {LAYER: lambda x: formula(sae, x)})
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    assert not torch.allclose(found, plain_log_probs(plain_model, tokens, {}), atol=2e-2)


def test_autoencoders_at_several_hooks_are_all_in_the_model(demo_model: Any, plain_model: Any) -> None:
    first, second = (autoencoder(demo_model, f"blocks.{layer}.hook_resid_post", seed=layer) for layer in (0, 2))
    tokens = tokens_of(demo_model)
    expected = plain_log_probs(
        plain_model, tokens, {0: lambda x: CASES["splice"][1](first, x), 2: lambda x: CASES["steer"][1](second, x)}
    )
    for order in (1, -1):
        contexts = [splice(demo_model, first), steer(demo_model, second, {3: 2.5, 7: -1.0})][::order]
        with contexts[0], contexts[1]:
            found = demo_model(tokens).log_softmax(-1)
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


def test_of_two_at_one_hook_the_second_reads_what_the_first_made(demo_model: Any, plain_model: Any) -> None:
    first, second = autoencoder(demo_model), autoencoder(demo_model, seed=5)
    tokens = tokens_of(demo_model)
    expected = plain_log_probs(
        plain_model, tokens, {LAYER: lambda x: CASES["splice"][1](second, CASES["ablate"][1](first, x))}
    )
    with ablate(demo_model, first, LATENTS), splice(demo_model, second):
        found = demo_model(tokens).log_softmax(-1)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


def test_strings_and_generation_go_through_the_autoencoder(demo_model: Any) -> None:
    sae, start = autoencoder(demo_model), tokens_of(demo_model)[:1]
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "verbose": False, "stop_at_eos": False}
    with steer(demo_model, sae, {3: 8.0}):
        cached, whole = (demo_model.generate(start, use_past_kv_cache=use, **options) for use in (True, False))
        expected = start
        for _ in range(5):
            expected = torch.cat([expected, demo_model(expected)[:, -1:].argmax(-1)], dim=1)
        of_text = demo_model("Once upon a time")
    assert torch.equal(cached, expected)
    assert torch.equal(whole, expected)
    assert not torch.equal(demo_model.generate(start, **options), expected)
    assert not torch.allclose(of_text, demo_model("Once upon a time"), atol=1e-2)


# --------------------------------------------------------------------------------------------------- nothing is changed

PLACES = (
    "hook_embed",
    "blocks.1.hook_resid_pre",
    HOOK,
    "blocks.1.hook_mlp_out",
    "blocks.1.hook_attn_out",
    "blocks.1.attn.hook_q",
    "blocks.1.attn.hook_z",
    "blocks.1.mlp.hook_post",
    "ln_final.hook_normalized",
)
CHANGES_NOTHING: dict[str, Callable[[Any, SparseAutoencoder], Context]] = {
    "splice": lambda model, sae: splice(model, sae, use_error_term=True),
    "ablate nothing": lambda model, sae: ablate(model, sae, []),
    "ablate a dead latent": lambda model, sae: ablate(model, sae, LATENTS),
    "steer by 0": lambda model, sae: steer(model, sae, {5: 0.0}),
    "clamp a dead latent to 0": lambda model, sae: steer(model, sae, {3: 0}, clamp=True),
    "nowhere": lambda model, sae: splice(model, sae, positions=torch.zeros(10, dtype=torch.bool)),
}


@pytest.mark.parametrize("hook", PLACES)
def test_no_bit_moves_where_nothing_is_changed(model: Any, ids: Tensor, hook: str) -> None:
    sae = autoencoder(model, hook)
    sae.b_enc[LATENTS] = -1e6
    before, (_, cache_before) = model(ids), model.run_with_cache(ids)
    for name, context in CHANGES_NOTHING.items():
        with context(model, sae):
            assert torch.equal(model(ids), before), name
            _, cache = model.run_with_cache(ids)
            assert all(torch.equal(cache[key], cache_before[key]) for key in cache_before), name
    with splice(model, sae):
        assert not torch.equal(model(ids), before)
    assert torch.equal(model(ids), before)


@pytest.mark.parametrize("hook", [HOOK, "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z"])
def test_no_bit_of_a_16_bit_model_moves(hook: str) -> None:
    model = load_language_model("demo", lm_dtype="bfloat16")
    sae, tokens = autoencoder(model, hook), tokens_of(model)
    before = model(tokens)
    with splice(model, sae, use_error_term=True), ablate(model, sae, []):
        assert torch.equal(model(tokens), before)
    with splice(model, sae.to(torch.bfloat16)):
        assert not torch.equal(model(tokens), before)


def test_an_autoencoder_in_16_bits_leaves_other_positions_alone(demo_model: Any) -> None:
    sae, tokens = autoencoder(demo_model).to(torch.bfloat16), tokens_of(demo_model)
    before = demo_model(tokens)
    with splice(demo_model, sae, positions=torch.arange(10) > 3):
        found = demo_model(tokens)
    assert torch.equal(found[:, :4], before[:, :4])
    with splice(demo_model, sae, use_error_term=True):
        assert torch.equal(demo_model(tokens), before)


# --------------------------------------------------------------------------------------------------- leaves no trace


def trace(model: Any) -> Any:
    """All that an intervention touches of a model."""
    points = {name: (id(point), len(point._forward_hooks), [*vars(point)]) for name, point in model.hook_dict.items()}
    switches = [getattr(model.cfg, name, None) for name in ("use_attn_result", "use_hook_mlp_in", "use_attn_in")]
    parts = [(name, len(part._forward_hooks), len(part._forward_pre_hooks)) for name, part in model.named_modules()]
    return points, switches, parts


@contextmanager
def failing(model: Any) -> Iterator[None]:
    """In here a hook of somebody else raises an error."""

    def fail(activations: Tensor, hook: Any) -> None:
        raise RuntimeError("no")

    with model.hooks(fwd_hooks=[("blocks.2.hook_resid_post", fail)]):
        yield


@pytest.mark.parametrize("hook", [HOOK, "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z", "blocks.1.attn.hook_result"])
def test_the_model_is_as_it_was_also_after_errors(model: Any, ids: Tensor, hook: str) -> None:
    before, was = model(ids), trace(model)
    sae = autoencoder(model, hook, exclude_special_tokens=True)
    model.set_use_attn_result(False)  # which finding the hook's width has turned on
    assert trace(model) == was
    with splice(model, sae), ablate(model, sae, LATENTS):
        model(ids)
    assert trace(model) == was
    with pytest.raises(RuntimeError, match="no"), splice(model, sae), failing(model):
        model(ids)
    assert trace(model) == was
    with pytest.raises(ZeroDivisionError), steer(model, sae, {1: 1.0}), splice(model, sae):
        1 / 0  # noqa: B018
    assert trace(model) == was
    with pytest.raises(ValueError, match="positions"), splice(model, sae, positions="some"):  # pyright: ignore
        pass
    assert trace(model) == was
    assert torch.equal(model(ids), before)


def test_hooks_of_others_stay_and_have_their_effect(model: Any, ids: Tensor) -> None:
    name, half = "blocks.1.hook_mlp_out", hook_with(lambda activations: activations / 2)
    sae = autoencoder(model)
    expected = model.run_with_hooks(
        ids, fwd_hooks=[(name, half), (HOOK, hook_with(lambda x: CASES["ablate"][1](sae, x)))]
    )
    point = model.hook_dict[name]
    point.add_hook(half)
    try:
        alone, n_hooks = model(ids), len(point.fwd_hooks)
        with ablate(model, sae, LATENTS):
            torch.testing.assert_close(model(ids), expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(model(ids), alone)
        with ablate(model, autoencoder(model, name), []):
            assert torch.equal(model(ids), alone)
        assert len(point.fwd_hooks) == n_hooks
    finally:
        point.remove_hooks()


def test_hooks_placed_inside_have_their_effect_and_stay_too(model: Any, ids: Tensor) -> None:
    name, half = "blocks.1.hook_mlp_out", hook_with(lambda activations: activations / 2)
    sae = autoencoder(model, name)
    expected = model.run_with_hooks(ids, fwd_hooks=[(name, hook_with(lambda x: CASES["steer"][1](sae, x) / 2))])
    with steer(model, sae, {3: 2.5, 7: -1.0}):
        alone = model(ids)
        model.add_hook(name, half)
        torch.testing.assert_close(model(ids), expected, atol=1e-4, rtol=1e-4)
    n_hooks = len(model.hook_dict[name].fwd_hooks)
    model.reset_hooks()
    assert n_hooks == 1
    with steer(model, sae, {3: 2.5, 7: -1.0}):
        model.reset_hooks()
        assert torch.equal(model(ids), alone)


def test_a_context_begins_without_troubling_hooks_that_expect_certain_prompts(model: Any, ids: Tensor) -> None:
    calls: list[Tensor] = []

    def patch(activations: Tensor, hook: Any) -> Tensor:
        activations = activations.clone()
        activations[2, 9] = 0  # of a pass over 3 prompts of 10 positions
        calls.append(activations)
        return activations

    sae, mask = autoencoder(model, "blocks.1.hook_mlp_out"), torch.ones(3, 10, dtype=torch.bool)
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", patch)]), steer(model, sae, {1: 1.0}, positions=mask):
        with ablate(model, sae, LATENTS):
            assert not calls
            model(ids)
        assert len(calls) == 1


# -------------------------------------------------------------------------------------------------- names of SAELens


def names_at(hook: str) -> dict[str, str]:
    return {name: f"{hook}.{name}" for name in POINTS}


@pytest.mark.parametrize("hook", [HOOK, "blocks.1.hook_mlp_out"])
@pytest.mark.parametrize("use_error_term", [False, True])
def test_the_cache_holds_the_names_of_saelens(model: Any, ids: Tensor, hook: str, use_error_term: bool) -> None:
    sae, names = autoencoder(model, hook), names_at(hook)
    _, clean = model.run_with_cache(ids)
    assert not any("hook_sae" in name for name in clean)
    with ablate(model, sae, LATENTS, use_error_term=use_error_term):
        _, cache = model.run_with_cache(ids)
        _, only = model.run_with_cache(ids, names_filter=[names["hook_sae_acts_post"]])
    x, acts = clean[hook], codes(sae, clean[hook])
    recons, error = without(acts) @ sae.W_dec + sae.b_dec, x - (acts @ sae.W_dec + sae.b_dec)
    expected = {
        "hook_sae_input": x,
        "hook_sae_acts_pre": (x - sae.b_dec) @ sae.W_enc + sae.b_enc,
        "hook_sae_acts_post": without(acts),
        "hook_sae_recons": recons,
        "hook_sae_error": error,
        "hook_sae_output": recons + error if use_error_term else recons,
    }
    for name, tensor in expected.items():
        torch.testing.assert_close(cache[names[name]], tensor, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(only[names["hook_sae_acts_post"]], without(acts), atol=1e-4, rtol=1e-4)
    assert not any("hook_sae" in name for name in model.hook_dict)
    assert not hasattr(model.hook_dict[hook], "hook_sae_acts_post")


def test_hooks_at_these_names_change_the_model(model: Any, ids: Tensor) -> None:
    sae, names = autoencoder(model), names_at(HOOK)
    zeros = hook_with(torch.zeros_like)
    with splice(model, sae):
        spliced = model(ids)
        bias_alone = model.run_with_hooks(ids, fwd_hooks=[(names["hook_sae_acts_post"], zeros)])
    with splice(model, sae, use_error_term=True):
        no_error = model.run_with_hooks(ids, fwd_hooks=[(names["hook_sae_error"], zeros)])
        with model.hooks(fwd_hooks=[(names["hook_sae_acts_post"], hook_with(without))]):
            ablated = model(ids)
        model.add_hook(names["hook_sae_acts_post"], hook_with(without))
        assert torch.equal(model(ids), ablated)
    bias = hook_with(lambda x: sae.b_dec.expand_as(x))
    expected = {
        "splice": hook_with(lambda x: CASES["splice"][1](sae, x)),
        "bias": bias,
        "ablate": hook_with(lambda x: CASES["ablate"][1](sae, x)),
    }
    logits = {name: model.run_with_hooks(ids, fwd_hooks=[(HOOK, hook)]) for name, hook in expected.items()}
    torch.testing.assert_close(spliced, logits["splice"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(no_error, logits["splice"], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(bias_alone, logits["bias"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ablated, logits["ablate"], atol=1e-4, rtol=1e-4)


def test_of_two_at_one_hook_the_names_are_those_of_the_inner(model: Any, ids: Tensor) -> None:
    first, second = autoencoder(model), autoencoder(model, expansion_factor=3)
    name = f"{HOOK}.hook_sae_acts_post"
    widths = []
    with splice(model, first):
        widths.append(model.run_with_cache(ids)[1][name].shape[-1])
        with splice(model, second):
            widths.append(model.run_with_cache(ids)[1][name].shape[-1])
        widths.append(model.run_with_cache(ids)[1][name].shape[-1])
    assert widths == [first.d_sae, second.d_sae, first.d_sae]


def test_hooks_on_the_autoencoder_itself_count_but_not_for_the_error(model: Any, ids: Tensor) -> None:
    sae = autoencoder(model)
    with ablate(model, sae, LATENTS):
        expected = model(ids)
    sae.add_hook("hook_hidden_post", hook_with(without))
    with splice(model, sae, use_error_term=True):
        assert torch.equal(model(ids), expected)


def test_gradients_reach_the_latents(hooked_transformer: Any) -> None:
    model, sae, names = hooked_transformer, autoencoder(hooked_transformer), names_at(HOOK)
    with torch.enable_grad(), splice(model, sae, use_error_term=True):
        _, cache = model.run_with_cache(tokens_of(model), return_type="loss", incl_bwd=True)
        clean_grad = cache[f"{HOOK}_grad"]  # of the tensor after the intervention
        torch.testing.assert_close(cache[names["hook_sae_acts_post"] + "_grad"], clean_grad @ sae.W_dec.T)
        torch.testing.assert_close(cache[names["hook_sae_error"] + "_grad"], clean_grad)
        before = cache["blocks.0.hook_resid_post_grad"]
        model.zero_grad()
        hooks = [(names["hook_sae_error"], hook_with(Tensor.detach))]
        with model.hooks(fwd_hooks=hooks):
            _, held = model.run_with_cache(tokens_of(model), return_type="loss", incl_bwd=True)
        model.zero_grad()
    with torch.enable_grad():
        _, plain = model.run_with_cache(tokens_of(model), return_type="loss", incl_bwd=True)
    torch.testing.assert_close(before, plain["blocks.0.hook_resid_post_grad"])
    assert not torch.allclose(held["blocks.0.hook_resid_post_grad"], before)
    model.zero_grad()


# ---------------------------------------------------------------------------------- transcoders, heads, normalisation


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_reads_at_one_hook_and_writes_at_another(model: Any, ids: Tensor, skip: bool) -> None:
    read, write = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
    sae = autoencoder(model, read, target_hook_point=write, skip_connection=skip)
    if skip:
        sae.W_skip.add_(0.1 * torch.randn(sae.W_skip.shape, generator=torch.Generator().manual_seed(3)))
    seen: list[Tensor] = []

    def predict(activations: Tensor, hook: Any) -> Tensor:
        x = seen[-1]
        out = (x @ sae.W_enc + sae.b_enc).relu() @ sae.W_dec + sae.b_dec
        return out + x @ sae.W_skip if skip else out

    looks = [(read, lambda activations, hook: seen.append(activations)), (write, predict)]
    expected, before = model.run_with_hooks(ids, fwd_hooks=looks), model(ids)
    with splice(model, sae):
        torch.testing.assert_close(model(ids), expected, atol=1e-4, rtol=1e-4)
        assert set(names_at(write).values()) <= model.run_with_cache(ids)[1].keys()
    with splice(model, sae, use_error_term=True), ablate(model, sae, []):
        assert torch.equal(model(ids), before)
    steered = model.run_with_hooks(ids, fwd_hooks=[(write, hook_with(lambda x: x + 3.0 * sae.W_dec[2]))])
    with steer(model, sae, {2: 3.0}):
        torch.testing.assert_close(model(ids), steered, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("head", [None, 1])
@pytest.mark.parametrize("point", ["hook_z", "hook_q"])
def test_a_head_or_all_side_by_side(model: Any, ids: Tensor, point: str, head: int | None) -> None:
    hook = f"blocks.1.attn.{point}"
    sae = autoencoder(model, hook, hook_point_head_index=head)

    def reconstruct(activations: Tensor) -> Tensor:
        changed = activations.clone()
        if head is None:
            changed[:] = CASES["splice"][1](sae, activations.flatten(-2)).view(activations.shape)
        else:
            changed[:, :, head] = CASES["splice"][1](sae, activations[:, :, head])
        return changed

    expected = model.run_with_hooks(ids, fwd_hooks=[(hook, hook_with(reconstruct))])
    with splice(model, sae):
        torch.testing.assert_close(model(ids), expected, atol=1e-4, rtol=1e-4)
        _, cache = model.run_with_cache(ids)
    assert cache[f"{hook}.hook_sae_output"].shape == (3, 10, sae.d_in)


@pytest.mark.parametrize("mode", ["layer_norm", "unit_norm"])
def test_strengths_are_in_the_units_of_normalised_rows(model: Any, ids: Tensor, mode: str) -> None:
    sae = autoencoder(model, normalize_activations=mode)

    def move(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True) if mode == "layer_norm" else x
        size = centred.pow(2).mean(-1, keepdim=True).sqrt() + 1e-5
        return x + 3.0 * size * sae.W_dec[2]

    expected = model.run_with_hooks(ids, fwd_hooks=[(HOOK, hook_with(move))])
    with steer(model, sae, {2: 3.0}):
        torch.testing.assert_close(model(ids), expected, atol=1e-4, rtol=1e-4)
        _, cache = model.run_with_cache(ids)
    output, recons, error = (cache[f"{HOOK}.hook_sae_{name}"] for name in ("output", "recons", "error"))
    torch.testing.assert_close(output, recons + error, atol=1e-4, rtol=1e-4)


def test_an_autoencoder_that_is_being_trained_is_used_as_at_inference(model: Any, ids: Tensor) -> None:
    sae = autoencoder(model, architecture="batchtopk", k=4)
    sae.inference_threshold.fill_(0.3)
    with splice(model, sae):
        expected = model(ids)
    sae.train()
    with splice(model, sae):
        assert torch.equal(model(ids), expected)
    assert sae.training
    assert sae.hook_sae_in.training


# ------------------------------------------------------------------------------------------------------------ positions


def changed_positions(model: Any, tokens: Tensor, context: Context) -> Tensor:
    """Where the tensor at HOOK is another one inside a context, (prompts, positions)."""
    site = find_hook_site(model, HOOK)
    (before,) = harvest(model, tokens, [site])
    with context:
        (inside,) = harvest(model, tokens, [site])
    return (before != inside).any(-1)


@pytest.fixture(scope="module")
def with_bos(demo_model: Any) -> Tensor:
    tokens = tokens_of(demo_model)
    tokens[:, 0] = tokens[1, 4] = demo_model.tokenizer.bos_token_id
    return tokens


def test_positions_that_an_autoencoder_is_not_trained_on_stay(demo_model: Any, with_bos: Tensor) -> None:
    is_bos, place = with_bos == demo_model.tokenizer.bos_token_id, torch.arange(10).expand(3, -1)
    for changes, expected in [
        ({}, torch.ones_like(is_bos)),
        ({"exclude_special_tokens": True}, ~is_bos),
        ({"seqpos_slice": (2, -1)}, (place >= 2) & (place < 9)),
        ({"exclude_special_tokens": True, "seqpos_slice": (None, 5)}, ~is_bos & (place < 5)),
    ]:
        sae = autoencoder(demo_model, **changes)
        for context in (splice(demo_model, sae), steer(demo_model, sae, {2: 3.0})):
            assert torch.equal(changed_positions(demo_model, with_bos, context), expected), changes
        everywhere = splice(demo_model, sae, positions="all")
        assert changed_positions(demo_model, with_bos, everywhere).all()


@pytest.mark.parametrize("shape", [(10,), (3, 10)])
def test_a_mask_says_which_positions_change(model: Any, ids: Tensor, shape: tuple[int, ...]) -> None:
    sae = autoencoder(model, seqpos_slice=(9, None))
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
    found = changed_positions(model, ids, steer(model, sae, {2: 3.0}, positions=mask))
    assert torch.equal(found, mask.expand(3, 10))


def test_the_rule_of_a_store_leaves_large_norms_alone(
    demo_model: Any, with_bos: Tensor, small_config: Callable[..., Any]
) -> None:
    cfg = small_config(max_activation_norm_multiple=1.1)
    sae, store = SparseAutoencoder(cfg).eval(), ActivationsStore(cfg, demo_model)
    expected = store.keeps(with_bos, store.get_activations(with_bos))
    assert 0 < expected.sum() < expected.numel()
    found = changed_positions(demo_model, with_bos, splice(demo_model, sae, positions=store.rule))
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match=r"positions: .*give positions=store\.rule"), splice(demo_model, sae):
        pass


def test_a_splice_costs_what_the_evaluation_says(
    demo_model: Any, with_bos: Tensor, small_config: Callable[..., Any]
) -> None:
    cfg = small_config(exclude_special_tokens=True)
    sae, store = autoencoder(demo_model, exclude_special_tokens=True), ActivationsStore(cfg, demo_model)
    with splice(demo_model, sae):
        loss = demo_model(with_bos, return_type="loss").item()
    assert loss == pytest.approx(evaluate(sae, store, with_bos)["metrics/ce_loss_with_sae"], rel=1e-5)


def test_another_autoencoder_is_evaluated_in_the_steered_model(
    demo_model: Any, with_bos: Tensor, small_config: Callable[..., Any]
) -> None:
    store = ActivationsStore(small_config(hook_point="blocks.2.hook_resid_post"), demo_model)
    sae, other = autoencoder(demo_model), autoencoder(demo_model, "blocks.2.hook_resid_post")
    with steer(demo_model, sae, {3: 8.0}):
        loss = demo_model(with_bos, return_type="loss").item()
        found = evaluate(other, store, with_bos)
        with splice(demo_model, other):
            loss_with_both = demo_model(with_bos, return_type="loss").item()
    assert found["metrics/ce_loss_without_sae"] == pytest.approx(loss, rel=1e-5)
    assert found["metrics/ce_loss_with_sae"] == pytest.approx(loss_with_both, rel=1e-5)
    assert loss != pytest.approx(demo_model(with_bos, return_type="loss").item(), rel=1e-3)


def test_positions_that_a_pass_cannot_have_are_refused(model: Any, ids: Tensor) -> None:
    sae = autoencoder(model, seqpos_slice=(2, None))
    with pytest.raises(ValueError, match=r"positions: found a pass over one position"), splice(model, sae):
        model(ids[:, :1])
    mask = torch.ones(4, 10, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"positions: found a mask \(4, 10\)"), splice(model, sae, positions=mask):
        model(ids)
    for wrong in ("some", None, mask.float(), mask.unsqueeze(0), [0, 1]):
        with pytest.raises(ValueError, match="positions: found"), splice(model, sae, positions=wrong):  # pyright: ignore
            pass


# -------------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize("wrong", [-1, [0, -3], 10**6, "5", ["a"], "", [1.0], 2.5, None, [[1]], [True], "mask"])
def test_latents_that_are_none_are_refused(model: Any, wrong: Any) -> None:
    sae = autoencoder(model)
    latents = torch.ones(sae.d_sae, dtype=torch.bool) if wrong == "mask" else wrong
    with pytest.raises(ValueError, match="latents: found"), ablate(model, sae, latents):
        pass
    one = wrong[-1] if isinstance(wrong, list) and wrong != [[1]] else "5"
    with pytest.raises(ValueError, match="latents: found"), steer(model, sae, {one: 1.0}):
        pass
    with pytest.raises(ValueError, match=f"expected 0 to {sae.d_sae - 1}"), ablate(model, sae, sae.d_sae):
        pass


@pytest.mark.parametrize("strength", ["3", None, float("nan"), float("inf"), True, [1.0], torch.ones(2)])
def test_strengths_that_are_no_numbers_are_refused(model: Any, strength: Any) -> None:
    with pytest.raises(ValueError, match="strengths: found"), steer(model, autoencoder(model), {1: strength}):
        pass


def test_strengths_without_latents_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="expected a dict"), steer(model, autoencoder(model), [1.0]):  # pyright: ignore
        pass


def test_latents_may_be_given_in_any_usual_form(model: Any, ids: Tensor) -> None:
    sae = autoencoder(model)
    with ablate(model, sae, [2, 3]):
        expected = model(ids)
    for latents in (range(2, 4), {2, 3}, torch.tensor([3, 2]), torch.tensor([2, 3]).numpy(), [2, 3, 3], iter([2, 3])):
        with ablate(model, sae, latents):
            assert torch.equal(model(ids), expected)
    with ablate(model, sae, [2]):
        of_one = model(ids)
    for latent in (2, torch.tensor(2), torch.tensor([2]).numpy()[0]):
        with ablate(model, sae, latent):
            assert torch.equal(model(ids), of_one)
    with steer(model, sae, {torch.tensor([2]).numpy()[0]: torch.tensor(1.5)}):
        found = model(ids)
    with steer(model, sae, {2: 1.5}):
        assert torch.equal(model(ids), found)


def test_a_model_that_does_not_fit_is_refused(demo_model: Any, hooked_transformer: Any) -> None:
    sae = autoencoder(demo_model)
    expected = f"sae: found an autoencoder for {sae.d_in} values a position, but {HOOK} of this model has 16"
    for context in (splice(hooked_transformer, sae), ablate(hooked_transformer, sae, [1])):
        with pytest.raises(ValueError, match=expected), context:
            pass
    high = SparseAutoencoder(LanguageModelSAERunnerConfig(hook_point="blocks.30.hook_resid_post", d_in=16))
    expected = "hook_point: blocks.30.hook_resid_post names block 30"
    with pytest.raises(ValueError, match=expected), splice(hooked_transformer, high):
        pass
    assert not any("hook_sae" in name for name in hooked_transformer.hook_dict)
