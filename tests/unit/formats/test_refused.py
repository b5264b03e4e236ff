"""Files that are recognised and not read name what they are, and why."""

from __future__ import annotations

import json
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sae_training.formats.inspection import in_words, inspect
from sae_training.sparse_autoencoder import SparseAutoencoder


def test_files_without_a_stated_rule(tmp_path: Path) -> None:
    names = ["encoder_linear.weight", "decoder.weight", "decoder_bias"]
    torch.save({name: torch.zeros(2, 2) for name in names}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="Goodfire's top-k for gpt-oss"):
        SparseAutoencoder.load_from_pretrained(tmp_path / "weights.pt")
    told = inspect(tmp_path / "weights.pt")
    assert [one["family"] for one in told["autoencoders"].values()] == ["goodfire top-k"]
    assert "format       goodfire top-k (not read)" in in_words(told)


class SparseAutoencoderState:
    """Pickled under another program's name, as its own class is, with a set among its parts."""

    def __init__(self) -> None:
        self.config, self.fields = {"n_components": 2}, {"config", "state_dict"}
        self.state_dict = {"tied_bias": torch.zeros(2, 4)}


def saved_by_torch(state: Any, path: Path) -> None:
    torch.save(state, path)


def saved_by_old_torch(state: Any, path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def pickled(state: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(state))


@pytest.mark.parametrize(
    ("save", "name"), [(saved_by_torch, "sae.pt"), (saved_by_old_torch, "sae.pt"), (pickled, "sae.pkl")]
)
def test_states_of_ai_safety_foundation(
    save: Callable[[Any, Path], None], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "sparse_autoencoder.autoencoder.model"
    for part in ("sparse_autoencoder", "sparse_autoencoder.autoencoder", module):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setattr(SparseAutoencoderState, "__module__", module)
    monkeypatch.setattr(sys.modules[module], "SparseAutoencoderState", SparseAutoencoderState, raising=False)
    save(SparseAutoencoderState(), tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: a state of ai-safety-foundation's sparse_autoencoder") as error:
        SparseAutoencoder.load_from_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match=r"axis of components .* same function in dictionary_learning's names"):
        inspect(tmp_path / name)
    assert "use another copy" not in str(error.value)


def test_what_that_message_advises_is_read(tmp_path: Path) -> None:
    state = {"encoder.weight": torch.randn(8, 4), "encoder.bias": torch.randn(8), "decoder.weight": torch.randn(4, 8)}
    tied_bias, x = torch.randn(4), torch.randn(5, 4)
    torch.save(state | {"bias": tied_bias}, tmp_path / "ae.pt")
    sae = SparseAutoencoder.load_from_pretrained(tmp_path / "ae.pt")
    acts = ((x - tied_bias) @ state["encoder.weight"].T + state["encoder.bias"]).relu()
    torch.testing.assert_close(sae.encode(x), acts)
    torch.testing.assert_close(sae.decode(acts), acts @ state["decoder.weight"].T + tied_bias)


@pytest.mark.parametrize("kind", ["lorsa", "molt"])
def test_other_kinds_of_llamascopium(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"sae_type": kind}))
    save_file({"W_E": torch.zeros(1)}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(ValueError, match=f"a {kind} of llamascopium"):
        SparseAutoencoder.load_from_pretrained(tmp_path)
    (one,) = inspect(tmp_path)["autoencoders"].values()
    assert (one["family"], one["format"]) == (f"llamascopium {kind}", f"llamascopium {kind}")


def test_folders_of_models_of_sequences(tmp_path: Path) -> None:
    (tmp_path / "conf.yaml").write_text("{}")
    save_file({"encoder.weight": torch.zeros(2, 2, 2)}, tmp_path / "latest_ckpt.safetensors")
    with pytest.raises(ValueError, match="a temporal autoencoder"):
        SparseAutoencoder.load_from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "listed", ["hf://owner/repo/layer_0.safetensors", "{id: a, layer: 0, filepath: owner/repo/layer_0.safetensors}"]
)
def test_lists_of_transcoders_that_lie_elsewhere(listed: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"model_name: gpt2\nmodel_kind: transcoder_set\ntranscoders:\n  - {listed}\n")
    with pytest.raises(ValueError, match=r"config.yaml is a list of circuit-tracer's .* lie elsewhere .*1 in all"):
        SparseAutoencoder.load_from_pretrained(tmp_path)
    (tmp_path / "layers.3").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        SparseAutoencoder.load_from_pretrained(tmp_path)


def test_another_config_yaml_is_no_such_list(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("!!python/name:os.system a")
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        SparseAutoencoder.load_from_pretrained(tmp_path)
