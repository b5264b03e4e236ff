"""Figures that say that a run is broken, and what the remark tells to change."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from small import D_SAE

from sae_training.run.remarks import what_is_wrong

NAN = float("nan")
SOUND = {
    "metrics/eval_explained_variance": 0.8,
    "metrics/eval_l0": 20.0,
    "metrics/ce_loss_without_sae": 4.0,
    "metrics/ce_loss_with_sae": 4.5,
    "base/rows": 64,
    "base/predicted_tokens": 60,
    "base/mean_row_share": 0.1,
    "base/row_std": 1.0,
    "base/largest_mean_element": 0.5,
}
LONG = {"total_training_tokens": 64 * 1000, "lr": 1e-3}
WORSE = {"metrics/eval_explained_variance": -240_000.0}


@pytest.mark.parametrize(
    ("changes", "figures", "expected"),
    [
        ({}, {}, {}),
        ({"b_dec_init_method": "zeros"}, {"base/mean_row_share": 0.99}, {}),
        (
            {"b_dec_init_method": "zeros"},
            WORSE | {"base/mean_row_share": 0.9999, "base/largest_mean_element": 680.0},
            {
                "explained variance": r"-2.4e\+05 on held-out rows, worse than predicting their mean.*over 99.9%.*"
                "b_dec began at zeros and has moved by .* towards elements of up to 680; set b_dec_init_method to geo"
            },
        ),
        ({"lr": 1.0}, WORSE, {"explained variance": "lr 1 is [0-9]+ times what lr auto would take; lower it to"}),
        ({"lr": 1e-6}, WORSE, {"explained variance": "lr 1e-06 is 0.0% of what lr auto would take; raise it to"}),
        ({"total_training_tokens": 768}, WORSE, {"explained variance": "the run has 12 steps; raise total_training"}),
        (
            {"lr_warm_up_steps": 2000},
            WORSE,
            {"explained variance": "all 1000 steps are warm-up; lower lr_warm_up_steps"},
        ),
        ({}, WORSE | {"base/row_std": 300.0}, {"explained variance": "set normalize_activations to expected_average"}),
        ({}, WORSE | {"metrics/eval_l0": 0.01}, {"explained variance": "L0 is 0.01; lower l1_coefficient"}),
        ({}, WORSE, {"explained variance": "lower lr .now 0.001., or raise total_training_tokens .now 1,000 steps"}),
        ({}, {"metrics/eval_l0": 0.0}, {"L0": "L0 is 0: no latent fires .* lower l1_coefficient"}),
        ({"architecture": "topk", "k": 8}, {"metrics/eval_l0": 0.0}, {"L0": "lower lr .now 0.001., or raise lr_warm"}),
        (
            {},
            {"sparsity/dead_features": D_SAE},
            {"dead latents": f"all {D_SAE} latents are dead: lower l1_coefficient"},
        ),
        ({}, {"metrics/eval_explained_variance": NAN}, {"explained variance": "not a number: reconstructions are not"}),
        (
            {},
            {"metrics/eval_explained_variance": NAN, "base/row_std": 0.0},
            {"explained variance": "all held-out rows are the same"},
        ),
        ({}, {"base/rows": 0}, {"rows": "no held-out row counts"}),
        ({}, {"metrics/ce_loss_without_sae": NAN}, {"CE loss": "own loss .* overflow in float32; set lm_dtype"}),
        ({}, {"metrics/ce_loss_with_sae": NAN}, {"CE loss": "loss on reconstructions .* overflow in float32"}),
        ({}, {"metrics/ce_loss_without_sae": NAN, "base/predicted_tokens": 0}, {}),
    ],
)
def test_what_is_wrong_and_what_to_change(
    small_config: Callable, changes: dict[str, Any], figures: dict[str, float], expected: dict[str, str]
) -> None:
    found = what_is_wrong(small_config(**{**LONG, **changes}), 10, SOUND | figures)
    assert found.keys() == expected.keys(), found
    for name, pattern in expected.items():
        assert re.search(pattern, found[name]), found[name]


def test_without_an_evaluation_only_the_latents_are_asked(small_config: Callable) -> None:
    cfg = small_config(**LONG)
    assert what_is_wrong(cfg, 10, {}) == {}
    assert list(what_is_wrong(cfg, 10, {"sparsity/dead_features": D_SAE})) == ["dead latents"]
