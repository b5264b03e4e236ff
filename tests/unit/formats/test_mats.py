"""Old files of mats_sae_training, read without running anything in them."""

from __future__ import annotations

import gzip
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sae_training.config import LanguageModelSAERunnerConfig as Config
from sae_training.sparse_autoencoder import SparseAutoencoder


def small(**changes) -> SparseAutoencoder:
    return SparseAutoencoder(Config(**{"d_in": 4, "expansion_factor": 3, "k": 2, "train_batch_size": 64, **changes}))


MATS_CONFIG = {
    "model_name": "gpt2-small",
    "hook_point": "blocks.8.hook_resid_pre",
    "hook_point_layer": 8,
    "d_in": 4,
    "expansion_factor": 3,
    "d_sae": 12,
    "store_batch_size": (32,),
    "device": torch.device("cpu"),
    "dtype": torch.float32,
    "use_ghost_grads": True,
    "tokens_per_buffer": 10,
    "checkpoint_path": "checkpoints/abc",
    "lr_scheduler_name": None,
    "train_batch_size": 10**9,
}


def mats_content(cfg: object) -> dict:
    return {"cfg": cfg, "state_dict": {name: p.detach() for name, p in small().named_parameters()}}


class RunnerConfig:
    """Pickled under a name that no longer exists, like configs of mats files today."""


RunnerConfig.__module__, RunnerConfig.__qualname__ = "sae_training.old_config", "RunnerConfig"


@pytest.fixture
def old_config(monkeypatch: pytest.MonkeyPatch) -> RunnerConfig:
    import sys

    monkeypatch.setitem(sys.modules, "sae_training.old_config", SimpleNamespace(RunnerConfig=RunnerConfig))
    cfg = RunnerConfig()
    vars(cfg).update(MATS_CONFIG)
    return cfg


def save_pt(content: object, path: Path) -> None:
    torch.save(content, path)


def save_pkl_gz(content: object, path: Path) -> None:
    with gzip.open(path, "wb") as file:
        pickle.dump(content, file)


OLD_FORMATS = pytest.mark.parametrize(("save", "name"), [(save_pt, "old.pt"), (save_pkl_gz, "old.pkl.gz")])


@OLD_FORMATS
def test_old_file_loads_without_its_config_class(
    save: Callable, name: str, tmp_path: Path, old_config: RunnerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    save(mats_content(old_config), tmp_path / name)
    monkeypatch.delitem(sys.modules, "sae_training.old_config")
    sae = SparseAutoencoder.load_from_pretrained(tmp_path / name)
    assert torch.equal(sae.W_enc, small().W_enc)
    assert (sae.cfg.model_name, sae.cfg.hook_point, sae.cfg.d_sae) == ("gpt2-small", "blocks.8.hook_resid_pre", 12)


class Bomb:
    """Unpickling it would create the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@OLD_FORMATS
def test_old_file_cannot_run_code(save: Callable, name: str, tmp_path: Path) -> None:
    save(mats_content(SimpleNamespace(bomb=Bomb(tmp_path / "exploded"))), tmp_path / name)
    with pytest.raises(ValueError, match=name):
        SparseAutoencoder.load_from_pretrained(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_of_something_else_is_described(tmp_path: Path) -> None:
    torch.save({"weights": 1, "other": 2}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="found a dict with 'weights', 'other', which no format"):
        SparseAutoencoder.load_from_pretrained(tmp_path / "x.pt")
