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
from sae_training.formats.inspection import inspect
from sae_training.formats.mats import by_place, members
from sae_training.formats.pickles import StandIn
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


# -------------------------------------------------------------------------------------------------------------- groups


class SAEGroup:
    """Pickled whole, as mats did from February to May 2024."""


class OldModule:
    """Of the mats era: a module whose parameters are in its state."""


SAEGroup.__module__, SAEGroup.__qualname__ = "sae_training.sae_group", "SAEGroup"
OldModule.__module__, OldModule.__qualname__ = "sae_training.old_module", "OldModule"


def group_of(places: list[tuple[str, int]], config: RunnerConfig, as_dict: bool) -> SAEGroup:
    ones = []
    for hook_point, layer in places:
        one, cfg = OldModule(), RunnerConfig()
        vars(cfg).update(vars(config), hook_point=hook_point, hook_point_layer=layer)
        hooks = {"hook_sae_in": torch.nn.Identity()}
        parameters = dict(small(seed=len(ones)).named_parameters())
        vars(one).update(cfg=cfg, _parameters=parameters, _modules=hooks, training=True, mod_dict=hooks)
        ones.append(one)
    group = SAEGroup()
    vars(group).update(cfg=config, autoencoders={f"sae_{at}": one for at, one in enumerate(ones)} if as_dict else ones)
    return group


@OLD_FORMATS
@pytest.mark.parametrize("as_dict", [False, True])
def test_a_group_is_read_by_place(
    save: Callable, name: str, as_dict: bool, tmp_path: Path, old_config: RunnerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    for kind in (SAEGroup, OldModule):
        monkeypatch.setitem(sys.modules, kind.__module__, SimpleNamespace(**{kind.__qualname__: kind}))
    places = [("blocks.{layer}.hook_resid_pre", 8), ("blocks.{layer}.hook_resid_pre", 9), ("blocks.2.hook_mlp_out", 2)]
    save(group_of(places, old_config, as_dict), tmp_path / name)
    for module in ("sae_training.sae_group", "sae_training.old_module", "sae_training.old_config"):
        monkeypatch.delitem(sys.modules, module)
    many = SparseAutoencoder.load_many(tmp_path / name)
    names = ["blocks.8.hook_resid_pre", "blocks.9.hook_resid_pre", "blocks.2.hook_mlp_out"]
    assert list(many) == (["sae_0", "sae_1", "sae_2"] if as_dict else names)
    for at, one in enumerate(many.values()):
        assert one.cfg.hook_point == names[at]
        assert torch.equal(one.W_enc, small(seed=at).W_enc)
    chosen = SparseAutoencoder.load_from_pretrained(tmp_path / name, hook_point="blocks.9.hook_resid_pre")
    assert torch.equal(chosen.W_enc, small(seed=1).W_enc)
    assert torch.equal(SparseAutoencoder.load_from_pretrained(tmp_path / name, layer=2).W_enc, small(seed=2).W_enc)
    with pytest.raises(ValueError, match=r"blocks\.8\.hook_resid_pre.*change hook_point or layer"):
        SparseAutoencoder.load_from_pretrained(tmp_path / name)
    (tensors,) = next(iter(inspect(tmp_path / name)["autoencoders"].values()))["tensors"].values()
    assert sum(part.endswith("W_enc") for part in tensors) == 3


def test_several_of_one_place_have_numbers(tmp_path: Path) -> None:
    cfg = StandIn()
    vars(cfg).update(hook_point="blocks.8.hook_resid_pre", hook_point_layer=8)
    ones = [StandIn(), StandIn()]
    for one in ones:
        vars(one).update(cfg=cfg, _parameters={})
    group = StandIn()
    group.autoencoders = ones  # type: ignore[attr-defined] # pyright: ignore
    assert list(by_place(members(group))) == ["blocks.8.hook_resid_pre_0", "blocks.8.hook_resid_pre_1"]


def test_one_file_that_lacks_its_k_does_not_keep_the_others_from_loading(tmp_path: Path) -> None:
    state = {"W_enc": torch.zeros(6, 4), "W_dec": torch.zeros(4, 6), "b_enc": torch.zeros(6), "b_dec": torch.zeros(4)}
    torch.save(state, tmp_path / "layer3.sae.pt")
    torch.save(mats_content(dict(MATS_CONFIG)), tmp_path / "old.pt")
    many = SparseAutoencoder.load_many(tmp_path)
    assert {*many} == {"layer3.sae", "old"}
    assert many["old"].d_sae == 12
    with pytest.raises(ValueError, match="give k="):
        many["layer3.sae"]
    assert SparseAutoencoder.load_many(tmp_path, k=2)["layer3.sae"].k == 2


def test_a_factor_of_activations_is_folded_into_the_decoder_and_other_tensors_are_refused(tmp_path: Path) -> None:
    cfg = {"model_name": "gpt2-small", "hook_point": "blocks.8.hook_resid_pre", "hook_point_layer": 8}
    content, sae = mats_content(cfg), small()
    factors = torch.arange(1.0, sae.d_sae + 1)
    for scaling_factor in (torch.ones(sae.d_sae), factors):
        content["state_dict"]["scaling_factor"] = scaling_factor
        save_pt(content, tmp_path / "old.pt")
        loaded = SparseAutoencoder.load_from_pretrained(tmp_path / "old.pt")
        torch.testing.assert_close(loaded.W_dec, sae.W_dec * scaling_factor.unsqueeze(1))
    content["state_dict"] |= {"scaling_factor": factors[1:]}
    save_pt(content, tmp_path / "old.pt")
    with pytest.raises(ValueError, match="scaling_factor: found shape"):
        SparseAutoencoder.load_from_pretrained(tmp_path / "old.pt")
    content["state_dict"] |= {"scaling_factor": factors, "threshold": factors}
    save_pt(content, tmp_path / "old.pt")
    with pytest.raises(ValueError, match="threshold: not a tensor of mats' that is read"):
        SparseAutoencoder.load_from_pretrained(tmp_path / "old.pt")


def test_what_a_config_does_not_name_is_unknown(tmp_path: Path) -> None:
    torch.save(mats_content({}), tmp_path / "old.pt")
    cfg = SparseAutoencoder.load_from_pretrained(tmp_path / "old.pt").cfg
    assert (cfg.model_name, cfg.hook_point, cfg.dataset_path) == ("unknown", "unknown", "unknown")
    cfg = SparseAutoencoder.load_from_pretrained(tmp_path / "old.pt", hook_point="layers.3").cfg
    assert (cfg.hook_point, cfg.hook_point_layer) == ("blocks.3.hook_resid_post", 3)


def test_a_factor_of_activations_is_told_by_the_config_and_given(tmp_path: Path) -> None:
    for scaled in (False, True):
        torch.save(mats_content(MATS_CONFIG | {"normalize_activations": scaled}), tmp_path / f"{scaled}.pt")
    plain = SparseAutoencoder.load_from_pretrained(tmp_path / "False.pt")
    assert plain.cfg.normalize_activations == "none"
    with pytest.raises(ValueError, match="give norm_factor="):
        SparseAutoencoder.load_from_pretrained(tmp_path / "True.pt")
    sae = SparseAutoencoder.load_from_pretrained(tmp_path / "True.pt", norm_factor=2.5)
    x = torch.randn(5, 4)
    torch.testing.assert_close(sae.encode(x), plain.encode(2.5 * x))
    torch.testing.assert_close(sae.reconstruct(x), plain.reconstruct(2.5 * x) / 2.5)
