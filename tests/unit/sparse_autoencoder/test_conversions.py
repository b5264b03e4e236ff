from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.sparse_autoencoder.conversions import fold_decoder_norms, fold_input_scale, to_jumprelu


def make(architecture: str, **changes: Any) -> SparseAutoencoder:
    """In float64, away from its start, with decoder norms that differ."""
    cfg = LanguageModelSAERunnerConfig(
        d_in=5,
        expansion_factor=4,
        k=3,
        architecture=architecture,
        dtype="float64",
        **changes,  # pyright: ignore
    )
    sae = SparseAutoencoder(cfg)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return sae.eval()


def rows(n: int = 200) -> torch.Tensor:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
def test_folding_decoder_norms_keeps_outputs_and_scales_activations(architecture: str) -> None:
    sae = make(architecture)
    folded, norms = fold_decoder_norms(sae), sae.W_dec.norm(dim=1)
    before, after = sae(rows()), folded(rows())
    torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(20, dtype=torch.float64))
    torch.testing.assert_close(after.sae_out, before.sae_out)
    torch.testing.assert_close(after.feature_acts, before.feature_acts * norms)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka"])
def test_folding_that_would_change_the_choice_is_refused(architecture: str) -> None:
    with pytest.raises(ValueError, match="convert it with to_jumprelu first"):
        fold_decoder_norms(make(architecture))


@pytest.mark.parametrize("architecture", ["standard", "topk", "batchtopk", "jumprelu", "gated"])
def test_folding_the_input_scale_gives_codes_and_outputs_in_raw_units(architecture: str) -> None:
    sae, scale = make(architecture), 0.3
    if architecture == "batchtopk":
        sae.inference_threshold.fill_(0.2)
    folded = fold_input_scale(sae, scale)
    on_scaled, on_raw = sae(scale * rows()), folded(rows())
    assert (on_raw.feature_acts == 0).any()
    torch.testing.assert_close(on_raw.feature_acts, on_scaled.feature_acts / scale)
    torch.testing.assert_close(on_raw.sae_out, on_scaled.sae_out / scale)
    assert torch.equal(folded.W_dec, sae.W_dec)
    for (name, weight), (_, again) in zip(sae.weights(), fold_input_scale(folded, 1 / scale).weights(), strict=True):
        torch.testing.assert_close(again, weight, msg=name)


def test_folding_both_scales_of_a_transcoder_gives_raw_units() -> None:
    sae = make("topk", target_hook_point="blocks.0.hook_mlp_out", d_out=3, skip_connection=True)
    folded = fold_input_scale(sae, 0.3, target_scale=5.0)
    torch.testing.assert_close(folded.encode(rows()), sae.encode(0.3 * rows()) / 5)
    torch.testing.assert_close(folded.reconstruct(rows()), sae.reconstruct(0.3 * rows()) / 5)
    with pytest.raises(ValueError, match="found 5.0, expected scale = 0.3: this is not a transcoder"):
        fold_input_scale(make("topk"), 0.3, 5.0)


def test_scale_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="found 0, expected a number above 0"):
        fold_input_scale(make("standard"), 0)


@pytest.mark.parametrize("changes", [{}, {"matryoshka_widths": (4, 8)}], ids=["batchtopk", "matryoshka"])
def test_batchtopk_as_jumprelu_is_the_same_function(changes: dict[str, Any]) -> None:
    sae = make("matryoshka" if changes else "batchtopk", **changes)
    sae.inference_threshold.fill_(0.4)
    converted = to_jumprelu(sae)
    assert converted.architecture == "jumprelu"
    before, after = sae(rows()), converted(rows())
    assert (before.feature_acts > 0).any()
    torch.testing.assert_close(after.feature_acts, before.feature_acts)
    torch.testing.assert_close(after.sae_out, before.sae_out)


def test_topk_as_jumprelu_has_k_active_on_average() -> None:
    converted = to_jumprelu(make("topk"), rows())
    assert (converted.encode(rows()) > 0).sum() == 3 * 200


def test_topk_without_rows_and_other_architectures_are_refused() -> None:
    with pytest.raises(ValueError, match="needs `rows`"):
        to_jumprelu(make("topk"))
    with pytest.raises(ValueError, match="found architecture standard, expected one of topk"):
        to_jumprelu(make("standard"))


def test_converted_autoencoder_comes_back_from_its_file(tmp_path: Path) -> None:
    sae = make("batchtopk", k_anneal_steps=10)  # an option that jumprelu refuses
    sae.inference_threshold.fill_(0.4)
    to_jumprelu(sae).save_model(tmp_path)
    loaded = SparseAutoencoder.load_from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.encode(rows()), sae.encode(rows()))
