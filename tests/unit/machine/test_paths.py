"""Local models and data by absolute path, so that a run can be resumed and loaded from anywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.machine.paths import with_absolute_paths

Make = Callable[..., LanguageModelSAERunnerConfig]


def test_local_paths_become_absolute(small_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "text.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    cfg = with_absolute_paths(small_config(dataset_path="data/text.txt", model_name="./data"))
    assert cfg.dataset_path == str(tmp_path / "data" / "text.txt")
    assert cfg.model_name == str(tmp_path / "data")


def test_local_file_named_without_a_folder_becomes_absolute(
    small_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The store reads ./text.txt for this name, so a resume from elsewhere must find the same file.
    (tmp_path / "text.txt").write_text("a")
    (tmp_path / "sae.safetensors").write_text("a")
    monkeypatch.chdir(tmp_path)
    cfg = with_absolute_paths(small_config(dataset_path="text.txt", from_pretrained_path="sae.safetensors"))
    assert cfg.dataset_path == str(tmp_path / "text.txt")
    assert cfg.from_pretrained_path == str(tmp_path / "sae.safetensors")


def test_local_paths_of_a_mixture_become_absolute(
    small_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    cfg = with_absolute_paths(small_config(dataset_path=["text.txt", "owner/name", "demo"], dataset_weights=(1, 2, 3)))
    assert cfg.dataset_path == [str(tmp_path / "text.txt"), "owner/name", "demo"]


def test_home_is_filled_in(small_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text("a")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert with_absolute_paths(small_config(dataset_path="~/text.txt")).dataset_path == str(tmp_path / "text.txt")


def test_names_stay_names(small_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A folder called like a bundled text or a known model does not stand in for it.
    for name in ("demo", "gpt2"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    cfg = small_config(dataset_path="demo", model_name="gpt2", eval_dataset_path="owner/not-here")
    assert with_absolute_paths(cfg) == cfg


def test_bare_folder_names_that_hold_data_become_absolute(
    small_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_model").mkdir()
    (tmp_path / "my_model" / "config.json").write_text("{}")
    (tmp_path / "my_text").mkdir()
    (tmp_path / "my_text" / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    cfg = with_absolute_paths(small_config(model_name="my_model", dataset_path="my_text"))
    assert (cfg.model_name, cfg.dataset_path) == (str(tmp_path / "my_model"), str(tmp_path / "my_text"))
