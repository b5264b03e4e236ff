"""Our hook points beside TransformerLens' own on the same module, and autoencoders inside its models."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
import transformer_lens
import transformer_lens.hook_points
from torch import Tensor, nn
from transformer_lens import HookedTransformer, HookedTransformerConfig

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.sparse_autoencoder import SparseAutoencoder, hook_points

OURS = (hook_points.HookedRootModule, hook_points.HookPoint)
THEIRS = (transformer_lens.HookedRootModule, transformer_lens.hook_points.HookPoint)
HOOKS = ["hook_sae_in", "hook_hidden_pre", "hook_hidden_post", "hook_sae_out"]


def two_layers(root: type, point: type) -> Any:
    """The same little module on either's classes."""

    class TwoLayers(root):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(3, 4), point())
            self.hook_out = point()
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) / 7)
            self.setup()

        def forward(self, x: Tensor) -> Tensor:
            return self.hook_out(self.inner(x).pow(2)).sum()

    return TwoLayers()


X = torch.tensor([[[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]]])


def seen(use: Any) -> Any:
    """What `use(module)` returns for ours and for theirs, which must agree."""
    one, other = (use(two_layers(*classes)) for classes in (OURS, THEIRS))
    assert str(one) == str(other)  # tensors, dicts and names alike
    return one


def scale(tensor: Tensor, hook: Any) -> Tensor:
    return tensor * (2 if hook.name == "hook_out" else 3)


# ------------------------------------------------------------------------------------------------------ side by side


@pytest.mark.parametrize(
    ("ours", "theirs", "names"),
    [
        (OURS[1], THEIRS[1], ["add_hook", "add_perma_hook", "remove_hooks", "clear_context", "forward"]),
        (OURS[0], THEIRS[0], ["setup", "hook_points", "add_hook", "add_perma_hook", "reset_hooks", "hooks"]),
        (OURS[0], THEIRS[0], ["run_with_hooks", "run_with_cache", "add_caching_hooks"]),
    ],
)
def test_parameters_have_the_same_names_order_and_defaults(ours: type, theirs: type, names: list[str]) -> None:
    # alias_names and pos_slice are for models only; level is ours, after the shared ones.
    for name in names:
        mine, other = (
            {key: list(p.default) if isinstance(p.default, tuple) else p.default for key, p in signature.items()}
            for signature in (inspect.signature(getattr(cls, name)).parameters for cls in (ours, theirs))
        )
        shared = {key: default for key, default in other.items() if key not in ("alias_names", "pos_slice")}
        found = {key: default for key, default in mine.items() if name != "add_caching_hooks" or key != "level"}
        assert list(found.items()) == list(shared.items()), name


def test_names_are_collected_alike() -> None:
    assert seen(lambda module: list(module.mod_dict)) == ["inner", "inner.0", "inner.1", "hook_out"]
    assert seen(lambda module: list(module.hook_dict)) == ["inner.1", "hook_out"]
    assert seen(lambda module: [point.name for point in module.hook_points()]) == ["inner.1", "hook_out"]


@pytest.mark.parametrize("names", ["hook_out", lambda name: True, lambda name: name.startswith("inner")])
def test_forward_hooks_change_the_output_for_one_run(names: Any) -> None:
    def use(module: Any) -> list[Tensor]:
        return [module(X), module.run_with_hooks(X, fwd_hooks=[(names, scale)]), module(X)]

    plain, hooked, after = seen(use)
    assert hooked != plain and after == plain


def test_backward_hooks_change_the_gradient() -> None:
    def use(module: Any) -> list[Tensor]:
        module.run_with_hooks(X, bwd_hooks=[("inner.1", scale)], reset_hooks_end=False).backward()
        hooked = module.inner[0].weight.grad.clone()
        module.reset_hooks()
        module.zero_grad()
        module(X).backward()
        return [hooked, module.inner[0].weight.grad]

    hooked, plain = seen(use)
    torch.testing.assert_close(hooked, 3 * plain)


def test_hooks_run_in_order_prepended_ones_first() -> None:
    def use(module: Any) -> list[str]:
        calls: list[str] = []
        for name, prepend in (("first", False), ("second", False), ("before", True)):
            module.add_hook("hook_out", lambda tensor, hook, name=name: calls.append(name), prepend=prepend)
        module(X)
        return calls

    assert seen(use) == ["before", "first", "second"]


def test_permanent_hooks_stay_until_they_are_meant() -> None:
    def use(module: Any) -> list[list[int]]:
        point, counts = module.hook_dict["inner.1"], []
        module.add_perma_hook("inner.1", scale)
        module.add_hook("inner.1", scale)
        point.add_hook(scale, dir="bwd")
        for reset in (point.remove_hooks, module.reset_hooks, lambda: module.reset_hooks(including_permanent=True)):
            counts.append([len(point.fwd_hooks), len(point.bwd_hooks)])
            reset()
        return [*counts, [len(point.fwd_hooks), len(point.bwd_hooks)]]

    assert seen(use) == [[2, 1], [1, 1], [1, 0], [0, 0]]


def test_a_context_removes_its_own_hooks_only() -> None:
    def use(module: Any) -> list[Any]:
        point, levels = module.hook_dict["hook_out"], []
        module.add_hook("hook_out", scale)
        with module.hooks(fwd_hooks=[("hook_out", scale)]), module.hooks(fwd_hooks=[("hook_out", scale)]) as inner:
            levels = [handle.context_level for handle in point.fwd_hooks]
            out = inner(X)
        return [levels, out, module(X), module.context_level]

    levels, in_context, after, level = seen(use)
    assert levels == [None, 1, 2] and level == 0
    torch.testing.assert_close(in_context, 4 * after)


@pytest.mark.parametrize("names", [None, "hook_out", ["inner.1"], lambda name: "inner" in name, "no such hook"])
def test_caches_hold_the_same_under_the_same_names(names: Any) -> None:
    def use(module: Any) -> list[Any]:
        _, cache = module.run_with_cache(X, names_filter=names, incl_bwd=True)
        _, first_rows = module.run_with_cache(X, names_filter=names, remove_batch_dim=True)
        later = module.add_caching_hooks(names)
        module(X)
        module.reset_hooks()
        return [list(cache), cache, first_rows, later]

    assert len(seen(use)[0]) == {"<class 'NoneType'>": 4}.get(str(type(names)), 0 if names == "no such hook" else 2)


def test_an_unknown_name_or_direction_is_an_error() -> None:
    for classes in (OURS, THEIRS):
        module = two_layers(*classes)
        with pytest.raises(KeyError):
            module.run_with_hooks(X, fwd_hooks=[("no such hook", scale)])
        assert module.context_level == 0
        with pytest.raises(ValueError):
            module.add_hook("hook_out", scale, dir="sideways")


# --------------------------------------------------------------------------------------- inside TransformerLens' models


@pytest.fixture
def model() -> Any:
    sizes = {"n_layers": 1, "d_model": 8, "n_ctx": 6, "d_head": 4, "n_heads": 2, "d_mlp": 16, "d_vocab": 10}
    return HookedTransformer(HookedTransformerConfig(**sizes, act_fn="relu", seed=0))


@pytest.fixture
def sae() -> SparseAutoencoder:
    return SparseAutoencoder(LanguageModelSAERunnerConfig(d_in=8, expansion_factor=2, k=2, architecture="topk"))


TOKENS = torch.arange(6).unsqueeze(0)


def test_an_autoencoder_takes_a_hook_points_place(model: Any, sae: SparseAutoencoder) -> None:
    clean, cache = model.run_with_cache(TOKENS)
    mlp_out = cache["blocks.0.hook_mlp_out"]
    replace = [("blocks.0.hook_mlp_out", lambda tensor, hook: sae(tensor).sae_out)]
    changed = model.run_with_hooks(TOKENS, fwd_hooks=replace)
    expected = model.run_with_hooks(
        TOKENS, fwd_hooks=[("blocks.0.hook_mlp_out", lambda tensor, hook: sae.reconstruct(mlp_out))]
    )
    torch.testing.assert_close(changed, expected)
    assert not torch.equal(changed, clean)
    _, own = sae.run_with_cache(mlp_out)
    assert list(own) == HOOKS
    torch.testing.assert_close(own["hook_hidden_post"], sae.encode(mlp_out)[0])  # forward flattens to rows


@pytest.mark.parametrize("root", ["transformer", "module"])
def test_an_autoencoder_inside_a_model_is_in_its_hooks_and_cache(root: str, model: Any, sae: SparseAutoencoder) -> None:
    if root == "module":  # a root module of theirs that holds both

        class Both(transformer_lens.HookedRootModule):
            def __init__(self) -> None:
                super().__init__()
                self.model = model
                self.setup()

            def forward(self, tokens: Tensor) -> Tensor:
                return self.model(tokens)

        whole: Any = Both()
        prefix = "model."
    else:
        whole, prefix = model, ""
    whole.sae = sae
    whole.setup()
    names = [f"sae.{name}" for name in HOOKS]
    assert [name for name in whole.hook_dict if name.startswith("sae.")] == names
    place = f"{prefix}blocks.0.hook_mlp_out"
    whole.hook_dict[place].add_perma_hook(lambda tensor, hook: sae(tensor).sae_out)

    plain, cache = whole.run_with_cache(TOKENS)
    assert [name for name in cache if name.startswith("sae.")] == names
    torch.testing.assert_close(cache[place][0], cache["sae.hook_sae_out"])
    silenced = whole.run_with_hooks(TOKENS, fwd_hooks=[("sae.hook_hidden_post", lambda acts, hook: acts * 0)])
    assert not torch.equal(silenced, plain)
    whole.reset_hooks()
    torch.testing.assert_close(whole(TOKENS), plain)


def test_hook_points_are_theirs_by_isinstance_and_can_be_copied_and_pickled(sae: SparseAutoencoder) -> None:
    assert isinstance(sae.hook_sae_in, THEIRS[1]) and isinstance(sae.hook_sae_in, OURS[1])
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    for other in (copy.deepcopy(sae), pickle.loads(pickle.dumps(sae))):
        assert type(other.hook_sae_in) is OURS[1]
        _, cache = other.run_with_cache(x)
        assert list(cache) == HOOKS
        torch.testing.assert_close(cache["hook_sae_out"], sae.reconstruct(x))
