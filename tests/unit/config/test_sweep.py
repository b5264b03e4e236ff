"""Lists in a config, and the single configs that they stand for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sae_training.config import LanguageModelSAERunnerConfig as Config
from sae_training.config.sweep import is_several, variants, with_layers


def names(**changes: Any) -> list[str]:
    return list(variants(Config(**changes)))


def test_single_values_stand_for_one_without_a_name() -> None:
    cfg = Config()
    assert not is_several(cfg)
    assert not is_several(Config(dataset_path=["a", "b"]))
    assert variants(cfg) == {"": cfg}


def test_lists_stand_for_all_combinations() -> None:
    found = variants(Config(lr=[1e-3, "auto"], l1_coefficient=(1e-3, 2e-4), seed=[1]))
    assert [(c.lr, c.l1_coefficient, c.seed) for c in found.values()] == [
        (1e-3, 1e-3, 1),
        ("auto", 1e-3, 1),
        (1e-3, 2e-4, 1),
        ("auto", 2e-4, 1),
    ]
    assert list(found) == [
        "l1-0.001-lr-0.001-seed1",
        "l1-0.001-lr-auto-seed1",
        "l1-0.0002-lr-0.001-seed1",
        "l1-0.0002-lr-auto-seed1",
    ]


def test_what_an_architecture_does_not_use_makes_no_further_ones() -> None:
    found = variants(Config(architecture=["standard", "topk"], k=[16, 32], l1_coefficient=[1e-3, 2e-3, 3e-3]))
    assert list(found) == [
        "standard-l1-0.001",
        "standard-l1-0.002",
        "standard-l1-0.003",
        "topk-k16",
        "topk-k32",
    ]
    assert [c.k for c in found.values()] == [16, 16, 16, 16, 32]


def test_each_is_a_config_of_its_own() -> None:
    cfg = Config(k=[16, 32], architecture="topk", hook_point="blocks.{layer}.hook_mlp_out", hook_point_layer=[0, 3])
    first, *_, last = variants(cfg).values()
    assert not is_several(first)
    assert (first.resolved_hook_point, first.k, first.dtype) == ("blocks.0.hook_mlp_out", 16, cfg.dtype)
    assert (last.resolved_hook_point, last.k) == ("blocks.3.hook_mlp_out", 32)
    assert cfg.k == [16, 32]


def test_options_of_one_architecture_are_nothing_to_the_others() -> None:
    found = variants(Config(architecture=["topk", "jumprelu"], jumprelu_init_threshold=0.5, multi_topk=True))
    assert [(c.jumprelu_init_threshold, c.multi_topk) for c in found.values()] == [(0.1, True), (0.5, False)]


def test_hooks_with_layers_are_named_in_full() -> None:
    hooks = ["blocks.{layer}.hook_mlp_out", "blocks.{layer}.hook_resid_post"]
    assert names(hook_point=hooks, hook_point_layer=[0, 3]) == [
        "blocks.0.hook_mlp_out",
        "blocks.3.hook_mlp_out",
        "blocks.0.hook_resid_post",
        "blocks.3.hook_resid_post",
    ]


def test_all_layers_are_those_of_the_model() -> None:
    cfg = Config(hook_point="blocks.{layer}.hook_resid_pre", hook_point_layer="all")
    assert list(variants(with_layers(cfg, 3))) == ["layer0", "layer1", "layer2"]
    cfg = Config(hook_point="blocks.{layer}.hook_resid_pre", hook_point_layer="all", layer_stride=4)
    assert list(variants(with_layers(cfg, 10))) == ["layer0", "layer4", "layer8"]


def test_the_run_is_named_after_what_differs() -> None:
    assert Config(architecture="topk", k=[16, 32], lr=[1e-3, 2e-3]).resolved_run_name == "sweep-k-lr-Tokens-2.000e+06"
    assert Config(architecture="topk", k=[16, 32], run_name="mine").resolved_run_name == "mine"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"k": []}, "k: found an empty list, expected at least one value"),
        ({"k": [32, 32]}, r"k: found \[32, 32\], expected values that differ"),
        ({"k": [32, 0]}, "k: found 0, expected more than 0"),
        ({"k": [16, 4096], "architecture": "topk"}, "k: found 4096, expected at most d_sae = 2048"),
        ({"lr": [1e-3, "fast"]}, "lr: found 'fast' in a list, expected one of a number, auto"),
        ({"k": [16, 32]}, r"k: found \[16, 32\] with architecture standard, which does not have it"),
        (
            {"l1_coefficient": [1e-4, 2e-4], "architecture": ["topk", "batchtopk"]},
            r"l1_coefficient: found \[0.0001, 0.0002\] with architecture topk, batchtopk, which does not have it",
        ),
        ({"hook_point_layer": [0, 1]}, "hook_point: found 'blocks.0.hook_mlp_out' with layers .* expected {layer}"),
        ({"hook_point_layer": "all"}, "hook_point: found 'blocks.0.hook_mlp_out' with all layers"),
        ({"hook_point_layer": ["all", 1], "hook_point": "blocks.{layer}.hook_mlp_out"}, "all by itself|by itself"),
        (
            {"layer_stride": 2, "hook_point_layer": [0, 1], "hook_point": "blocks.{layer}.hook_mlp_out"},
            "layer_stride: found 2 with hook_point_layer",
        ),
        (
            {"seed": range(100), "k": range(1, 100), "architecture": "topk"},
            "k: the lists stand for 9900 autoencoders",
        ),
        (
            {"architecture": ["standard", "gated"], "multi_topk": True},
            "multi_topk: found True with architecture",
        ),
    ],
)
def test_what_lists_cannot_say_is_an_error(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Config(**changes)


def test_widths_of_matryoshka_are_nothing_to_the_others() -> None:
    cfg = Config(architecture=["topk", "matryoshka"], matryoshka_widths=(64, 256), d_in=512)
    widths = {name: single.matryoshka_widths for name, single in variants(cfg).items()}
    assert widths == {"topk": (), "matryoshka": (64, 256)}


def test_lists_may_be_ranges_and_arrays() -> None:
    cfg = Config(seed=range(3), lr=np.array([1e-3, 2e-3]))
    assert (cfg.seed, cfg.lr) == ([0, 1, 2], [1e-3, 2e-3])
    assert len(variants(cfg)) == 6
