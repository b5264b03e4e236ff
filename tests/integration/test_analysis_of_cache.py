"""An analysis of activations on a disk: the same as from passes, and without the language model's weights."""

from __future__ import annotations

import json
import shutil
import sqlite3
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from small import D_HEAD, D_IN, SMALL_RUN

from sae_analysis import build_analysis
from sae_analysis.analysis import Analysis
from sae_training.cache_activations_runner import cache_activations_runner
from sae_training.config import CacheActivationsRunnerConfig, LanguageModelSAERunnerConfig
from sae_training.config.fields import Source
from sae_training.demo_data import DEMO_MODEL
from sae_training.utils import LMSparseAutoencoderSessionloader

N_TOKENS = 600
WEIGHTS = "model.safetensors"
PLACES: dict[str, dict[str, Any]] = {
    "stream, long rows left out": {"hook_point": "blocks.1.hook_resid_post", "max_activation_norm_multiple": 1.5},
    "transcoder": {
        "hook_point": "blocks.1.hook_resid_pre", "target_hook_point": "blocks.1.hook_mlp_out", "d_out": D_IN,
        "exclude_special_tokens": True,
    },
    "one head": {"hook_point": "blocks.2.attn.hook_z", "hook_point_head_index": 1, "d_in": D_HEAD},
    "neurons": {"hook_point": "blocks.0.mlp.hook_post", "d_in": None, "expansion_factor": 1},
}  # fmt: skip


def own_model(folder: Path) -> Path:
    """Return a copy of the bundled language model, whose files a test may delete."""
    return Path(shutil.copytree(DEMO_MODEL, folder / "model"))


def sae_and_cache(folder: Path, model: Path, changes: dict[str, Any]) -> tuple[Path, CacheActivationsRunnerConfig]:
    """Return an autoencoder, and the config of a cache of its activations that has been written."""
    cfg = LanguageModelSAERunnerConfig(
        **{**SMALL_RUN, "architecture": "topk", "k": 8, "model_name": str(model), **changes}
    )
    loaded, sae, _ = LMSparseAutoencoderSessionloader(cfg).load_session()
    sae.save_model(folder / "sae")
    hooks = [cfg.hook_point] if cfg.target_hook_point is None else [cfg.hook_point, cfg.target_hook_point]
    source = {field.name: getattr(cfg, field.name) for field in fields(Source)}
    cache = CacheActivationsRunnerConfig(
        **source | {"hook_point": hooks}, form="contexts", total_training_tokens=N_TOKENS + 200,
        cached_activations_path=str(folder / "cache"),
    )  # fmt: skip
    cache_activations_runner(cache, loaded)
    return folder / "sae", cache


def content(analysis: Analysis | dict[str, Analysis]) -> dict[str, Any]:
    """All rows of all tables, without what says where they come from."""
    assert isinstance(analysis, Analysis)
    connection = sqlite3.connect(analysis.reader.url.removeprefix("sqlite:///"))
    names = [name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")]
    found: dict[str, Any] = {name: sorted(connection.execute(f"select * from {name}")) for name in names}
    connection.close()
    ((*start, about),) = found["analyses"]
    return found | {
        "analyses": [*start, {k: v for k, v in json.loads(about).items() if k not in ("settings", "source")}]
    }


@pytest.mark.parametrize("place", PLACES)
def test_a_cache_gives_the_same_without_the_weights_of_the_model(place: str, tmp_path: Path) -> None:
    model = own_model(tmp_path)
    sae, cache = sae_and_cache(tmp_path, model, PLACES[place])
    live = content(build_analysis(sae, N_TOKENS, output=tmp_path / "live"))
    (model / WEIGHTS).unlink()
    found = build_analysis(sae, N_TOKENS, cached=cache.cached_activations_path, output=tmp_path / "out")
    assert content(found) == live
    assert len(live["contexts"]) > 10
    with pytest.raises(FileNotFoundError, match="model_name"):  # because effects need passes
        build_analysis(sae, N_TOKENS, cached=cache.cached_activations_path, output=tmp_path / "out", effects=1)


def test_a_cache_of_an_earlier_version_needs_the_model_and_goes_on_with_the_same_build(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = own_model(tmp_path)
    sae, cache = sae_and_cache(tmp_path, model, {})
    folder = Path(str(cache.cached_activations_path))
    build = {"n_tokens": N_TOKENS, "cached": folder, "output": tmp_path / "out"}
    first = content(build_analysis(sae, **build))
    manifest = json.loads((folder / "manifest.json").read_text())
    part = manifest.pop("unembedding")
    (folder / part["file"]).unlink()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    capfd.readouterr()
    assert content(build_analysis(sae, **build)) == first
    assert "there already" in "".join(capfd.readouterr())  # the settings are the same ones
    assert content(build_analysis(sae, **build, anew=True)) == first
    cache_activations_runner(cache)
    assert json.loads((folder / "manifest.json").read_text())["unembedding"] == part
    (model / WEIGHTS).unlink()
    assert content(build_analysis(sae, **build, anew=True)) == first


def test_a_damaged_unembedding_is_refused_and_written_again(tmp_path: Path) -> None:
    sae, cache = sae_and_cache(tmp_path, own_model(tmp_path), {})
    path = Path(str(cache.cached_activations_path)) / "unembedding.safetensors"
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"unembedding.safetensors: found content of SHA-256 .*delete this file alone"):
        build_analysis(sae, N_TOKENS, cached=path.parent, output=tmp_path / "out")
    with pytest.raises(ValueError, match="unembedding.safetensors: found content"):
        cache_activations_runner(cache)
    path.unlink()
    cache_activations_runner(cache)
    assert path.read_bytes() == sound


def test_a_cache_of_another_model_or_precision_is_refused(tmp_path: Path) -> None:
    sae, cache = sae_and_cache(tmp_path, own_model(tmp_path), {"lm_dtype": "bfloat16"})
    folder = Path(str(cache.cached_activations_path))
    config = sae / "cfg.json"
    values = json.loads(config.read_text())
    for field, value in (("lm_dtype", "float32"), ("model_name", "demo")):
        config.write_text(json.dumps(values | {field: value}))
        with pytest.raises(ValueError, match=f"{field}: this run has"):
            build_analysis(sae, N_TOKENS, cached=folder, output=tmp_path / "out")
