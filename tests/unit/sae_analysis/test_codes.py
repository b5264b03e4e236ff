"""Codes as entries against `encode`, for every architecture, with a fast precision that rounds much."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from safetensors.torch import load_file

from sae_analysis.codes import code_of
from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.sparse_autoencoder import SparseAutoencoder

D_IN, D_SAE = 48, 640
KINDS: dict[str, dict[str, Any]] = {
    "topk": {"k": 16},
    "batchtopk": {"k": 16},
    "matryoshka": {"k": 16},
    "matryoshka by row": {"architecture": "matryoshka", "k": 16, "matryoshka_selection": "topk"},
    "standard": {},
    "jumprelu": {"jumprelu_init_threshold": 0.7},
    "gated": {},
    "all latents": {"architecture": "topk", "k": D_SAE},
    "layer norm": {"architecture": "topk", "k": 16, "normalize_activations": "layer_norm"},
    "transcoder": {"architecture": "topk", "k": 16, "target_hook_point": "blocks.1.hook_mlp_out", "d_out": 32},
}


@pytest.fixture(params=KINDS)
def sae(request: pytest.FixtureRequest) -> SparseAutoencoder:
    values = {"architecture": request.param, **KINDS[request.param], "encoder_matmul_dtype": "bfloat16"}
    cfg = LanguageModelSAERunnerConfig(
        **values, d_in=D_IN, expansion_factor=D_SAE // D_IN + 1, lr_warm_up_steps=0, seed=1
    )  # fmt: skip
    sae = SparseAutoencoder(cfg).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name.startswith("b_"):
                parameter.normal_(std=0.3, generator=generator)
            if name == "r_mag":
                parameter.normal_(std=0.1, generator=generator)
        sae.b_enc.sub_(0.6)
        if sae.choice == "batchtopk":
            sae.inference_threshold.fill_(0.4)
    return sae


def rows(n: int = 500) -> torch.Tensor:
    """Rows of very different sizes, some with one large coordinate."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, D_IN, generator=generator) * torch.logspace(-1, 1, n).unsqueeze(1)
    x[::50, 7] += 200
    x[1] = 0
    return x


@torch.no_grad()
def test_entries_are_what_encode_gives(sae: SparseAutoencoder) -> None:
    x = rows()
    expected = sae.encode(x)
    code = code_of(sae, x)
    entries = code.at_entries
    assert (code.values > 0).all()
    assert (entries.rows.diff() >= 0).all()
    found = entries.dense(code.values)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # Latents at the edge of being active, whose float32 product depends on its order, may differ; there are few.
    assert ((found > 0) != (expected > 0)).sum() <= 2
    assert len(code.values) == (found > 0).sum()


@pytest.mark.parametrize("folder", reference.FOLDERS, ids=lambda path: path.name)
@torch.no_grad()
def test_entries_of_files_of_other_programs_are_what_encode_gives(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the remarks on doubtful files, which have their own tests
        sae = reference.loaded(folder).eval()
    x = load_file(folder / "expected.safetensors")["x"]
    code = code_of(sae, x.flatten(end_dim=-2)[:, : sae.d_in] if x.shape[-1] == sae.d_in else x.flatten(start_dim=1))
    expected = sae.encode(x).relu().flatten(end_dim=-2)
    torch.testing.assert_close(code.at_entries.dense(code.values), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_fast_precision_that_cannot_tell_is_not_trusted() -> None:
    # Pre-activations that differ by less than bfloat16 can say: every row must take the dense way.
    cfg = LanguageModelSAERunnerConfig(
        architecture="topk", k=4, d_in=D_IN, expansion_factor=8, lr_warm_up_steps=0, encoder_matmul_dtype="bfloat16"
    )
    sae = SparseAutoencoder(cfg).eval()
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(D_IN, 1, generator=generator)
    sae.W_enc.copy_(direction + 1e-3 * torch.randn(D_IN, sae.d_sae, generator=generator))
    x = torch.randn(200, 1, generator=generator).abs() * direction.T + 0.01 * torch.randn(
        200, D_IN, generator=generator
    )
    expected, code = sae.encode(x), code_of(sae, x)
    found = code.at_entries.dense(code.values)
    assert ((found > 0) != (expected > 0)).sum() <= 4  # of 800; ties within float32
    torch.testing.assert_close(found.sum(dim=1), expected.sum(dim=1), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_no_rows_give_no_entries(sae: SparseAutoencoder) -> None:
    code = code_of(sae, rows()[:0])
    assert code.at_entries.n_rows == 0 and len(code.values) == 0
