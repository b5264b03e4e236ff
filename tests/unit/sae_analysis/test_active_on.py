"""Which latents are active on a text: against plain passes and `encode`, and where model and weights come from."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_analysis import make_analysis
from small import D_SAE, SMALL_RUN

from sae_analysis import build_analysis, open_analysis
from sae_analysis.active_on import Active, active_on
from sae_analysis.analysis import Analysis
from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.language_model.sites import find_sites, with_widths
from sae_training.lm_runner import run_config
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.utils import LMSparseAutoencoderSessionloader

TEXT = "The whale swam away, and the sailors looked after it."
TOPK = {"architecture": "topk", "k": 8, "exclude_special_tokens": True}
HOSTILE = [
    "<script>alert(1)</script> &amp;",
    "\x00\x07\x1b\x7f\u2028\n\r\t",
    "\u202egnp.exe שלום",
    "😀é漢字\ufffd\ufeff",
    "x" * 5000,
    "<|endoftext|>The end.<|endoftext|><|endoftext|>",
    "   ",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, demo_model: Any) -> Path:
    cfg = LanguageModelSAERunnerConfig(**{**SMALL_RUN, **TOPK, "run_dir": str(tmp_path_factory.mktemp("run"))})
    return run_config(cfg, demo_model).folder.path


@pytest.fixture(scope="module")
def analysis(run: Path, demo_model: Any) -> Analysis:
    found = build_analysis(run, 500)
    assert isinstance(found, Analysis)
    found.model = demo_model
    return found


def autoencoder(model: Any, **changes: Any) -> SparseAutoencoder:
    """A random autoencoder for `model`."""
    cfg = LanguageModelSAERunnerConfig(**{**SMALL_RUN, "exclude_special_tokens": True, "d_in": None, **changes})
    torch.manual_seed(0)
    sae = SparseAutoencoder(with_widths(cfg, find_sites(cfg, model))).eval()
    with torch.no_grad():
        sae.b_enc.normal_(std=0.1)
    return sae


def dense(found: Active, d_sae: int) -> list[np.ndarray]:
    """The codes (positions, d_sae) of each context."""
    codes = [np.zeros((len(ids), d_sae), dtype=np.float32) for ids in found.ids]
    for context, position, latent, activation in zip(*found[1:], strict=True):
        codes[context][position, latent] = activation
    return codes


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "standard"},
        TOPK,
        {"architecture": "batchtopk", "k": 8},
        {"architecture": "jumprelu"},
        {"architecture": "gated"},
        {"hook_point": "blocks.1.ln2.hook_normalized", "target_hook_point": "blocks.1.hook_mlp_out"},
        {"hook_point": "blocks.1.attn.hook_z", "hook_point_head_index": 1},
        {"normalize_activations": "layer_norm"},
    ],
    ids=str,
)
def test_codes_are_those_of_encode(demo_model: Any, changes: dict[str, Any]) -> None:
    sae = autoencoder(demo_model, **{"context_size": 64, **changes})
    tokens = demo_model.to_tokens(TEXT)
    with torch.no_grad():
        _, cache = demo_model.run_with_cache(tokens)
        x = cache[sae.cfg.hook_point]
        x = x[:, :, 1] if sae.cfg.hook_point_head_index == 1 else x
        expected = sae.encode(x)[0].numpy()
    for positions, first in (("all", 0), ("trained", 1)):
        found = active_on(TEXT, demo_model, sae.train(), positions)
        assert found.ids == tokens.tolist()
        (code,) = dense(found, sae.d_sae)
        assert (code[:first] == 0).all() and (code[first:] > 0).any()
        np.testing.assert_array_equal(code[first:] > 0, expected[first:] > 0)
        np.testing.assert_allclose(code[first:], expected[first:], rtol=1e-5, atol=1e-6)


def test_the_table_goes_along_the_text(analysis: Analysis, demo_model: Any) -> None:
    table = analysis.active_on(TEXT[:30])
    tokens = [demo_model.tokenizer.decode(i) for i in demo_model.to_tokens(TEXT[:30])[0, 1:]]
    assert table.drop_duplicates("position")["token"].tolist() == tokens
    assert 1 <= table.groupby("position").size().max() <= 8
    assert table["position"].min() == 1  # BOS does not count in this run
    assert all(part["activation"].is_monotonic_decreasing for _, part in table.groupby("position"))
    row = table.iloc[0]
    latent = analysis.latent(row["latent"])
    assert (row["density"], row["max"]) == (latent.density, latent.max)
    assert row["of_max"] == pytest.approx(row["activation"] / latent.max)
    assert row["top_tokens"].split(" ")[0] == latent.top_tokens[0][0].strip()
    everywhere = analysis.active_on(TEXT[:30], positions="all")
    assert everywhere["position"].min() == 0 and len(table) < len(everywhere) <= len(table) + 8


def test_a_text_longer_than_a_context_goes_on_in_the_next(analysis: Analysis, demo_model: Any) -> None:
    size, bos = SMALL_RUN["context_size"], demo_model.tokenizer.bos_token_id
    found = active_on(TEXT * 9, demo_model, analysis.sae)
    assert len(found.ids) > 4 and {len(ids) for ids in found.ids[:-1]} == {size}
    assert all(ids[0] == bos for ids in found.ids)
    codes = dense(found, D_SAE)
    for ids, code in zip(found.ids, codes, strict=True):
        _, cache = demo_model.run_with_cache(torch.tensor([ids]))
        with torch.no_grad():
            expected = analysis.sae.encode(cache[analysis.sae.cfg.hook_point])[0].numpy()
        np.testing.assert_allclose(code[1:], expected[1:], rtol=1e-4, atol=1e-5)
    table = analysis.active_on(TEXT * 9)
    places = table.drop_duplicates(["context", "position"])
    assert "".join(places["token"]) == TEXT * 9
    assert len(places) == sum(len(ids) - 1 for ids in found.ids)


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:9]))
def test_any_text_is_shown_as_it_is(analysis: Analysis, text: str) -> None:
    table = analysis.active_on(text, positions="all")
    places = table.drop_duplicates(["context", "position"])
    shown = "".join(places[places["position"] > 0]["token"])
    assert shown.replace("<|endoftext|>", "") == text.replace("<|endoftext|>", "")
    assert len(analysis.active_on("")) == 0
    assert list(analysis.active_on("").columns) == list(table.columns)


def test_what_is_no_text_is_refused(analysis: Analysis, demo_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"half a surrogate pair \(character 1\)"):
        analysis.active_on("a\ud800")
    with pytest.raises(ValueError, match="text: found a list, expected a string"):
        analysis.active_on([TEXT])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="positions: found 'some'"):
        analysis.active_on(TEXT, positions="some")
    monkeypatch.setattr(demo_model, "_tokenizer" if hasattr(demo_model, "_tokenizer") else "tokenizer", None)
    with pytest.raises(ValueError, match="without a tokenizer"):
        analysis.active_on(TEXT)


@pytest.mark.parametrize(
    ("rule", "positions"),
    [({"seqpos_slice": (3, -2)}, range(3, 10)), ({"exclude_special_tokens": False}, range(12)), ({}, range(1, 12))],
)
def test_positions_that_count_are_those_of_the_run(demo_model: Any, rule: dict[str, Any], positions: range) -> None:
    found = active_on(" the" * 11, demo_model, autoencoder(demo_model, **TOPK | rule))
    assert sorted(set(found.positions.tolist())) == list(positions)


def test_large_norms_are_left_out_as_in_the_run(analysis: Analysis, demo_model: Any, tmp_path: Path) -> None:
    sae = autoencoder(demo_model, **TOPK | {"max_activation_norm_multiple": 1.0, "exclude_special_tokens": False})
    other = copy.copy(analysis)
    with pytest.warns(UserWarning, match="found other weights than those that this analysis was built with"):
        table = other.active_on(TEXT[:40], demo_model, sae)
    _, _, store = LMSparseAutoencoderSessionloader(sae.cfg).load_session(demo_model)
    tokens = demo_model.to_tokens(TEXT[:40])
    keep = store.keeps(tokens, store.get_activations(tokens))[0]
    assert 0 < keep.sum() < tokens.shape[1]
    assert sorted(set(table["position"])) == keep.nonzero().flatten().tolist()


# ------------------------------------------------------------------------------------------------ where they come from


def test_model_and_autoencoder_are_loaded_once_from_the_run_wherever_it_lies(
    run: Path, analysis: Analysis, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "moved")
    moved = open_analysis(tmp_path / "moved")
    table = moved.active_on(TEXT[:30])
    model, sae = moved.model, moved.sae
    assert table["latent"].tolist() == analysis.active_on(TEXT[:30])["latent"].tolist()
    moved.active_on(TEXT[30:])
    assert (moved.model, moved.sae) == (model, sae)


def test_a_file_a_checkpoint_and_another_output_are_found_again(
    run: Path, demo_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sae_analysis.subjects.model_of", lambda cfg: demo_model)
    SparseAutoencoder.load_from_pretrained(run).save_model("mine.safetensors")
    copied = shutil.copytree(run, tmp_path / "copied", ignore=shutil.ignore_patterns("analysis"))
    shutil.copytree(run / "final", copied / "checkpoints" / "step_1")
    build_analysis("mine.safetensors", 100)
    build_analysis(copied / "checkpoints" / "step_1", 100)
    build_analysis(copied / "checkpoints" / "step_1", 100, output="elsewhere")
    for path in ("runs/mine", copied / "analysis-of" / "step_1", "elsewhere"):
        found = open_analysis(path)
        assert found.sae.d_sae == D_SAE
        assert len(found.active_on(TEXT[:30], demo_model)) > 0
    (tmp_path / "mine.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"found no autoencoder.*mine.safetensors.*active_on\(text, sae=sae\)"):
        open_analysis("runs/mine").active_on(TEXT)


def test_other_weights_are_not_taken_for_those_of_the_analysis(
    run: Path, demo_model: Any, tmp_path: Path, analysis: Analysis
) -> None:
    copied = shutil.copytree(run, tmp_path / "run")
    sae = SparseAutoencoder.load_from_pretrained(run)
    with torch.no_grad():
        sae.W_dec.mul_(2)
    sae.save_model(copied / "final")
    found = open_analysis(copied)
    with pytest.raises(ValueError, match=r"holds other weights than this analysis was built with.*anew, or give"):
        found.active_on(TEXT)
    with pytest.warns(UserWarning, match="found other weights"):
        given = found.active_on(TEXT[:30], demo_model, sae)
    assert given["latent"].tolist() == analysis.active_on(TEXT[:30])["latent"].tolist()
    assert found.sae is sae  # and is kept
    with pytest.raises(ValueError, match="sae: found .* latents, but this analysis is of"):
        found.active_on(TEXT, demo_model, autoencoder(demo_model, expansion_factor=1))


def test_an_analysis_without_its_run_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"give the autoencoder: active_on\(text, sae=sae\)"):
        make_analysis(tmp_path).active_on(TEXT)
