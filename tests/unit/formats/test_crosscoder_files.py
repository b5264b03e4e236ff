"""Files of crosscoders and cross-layer transcoders: what their programs compute, places by name, what is refused."""

from __future__ import annotations

import json
import resource
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from safetensors.torch import load_file, save_file

from sae_training.formats.inspection import in_json, in_words, inspect
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.sparse_autoencoder.crosscoder import Crosscoder

ROOT = reference.ROOT.parent / "reference_crosscoders"
IN_PARTS = [folder for folder in reference.CROSSCODERS if folder.name.startswith(("gemma", "circuit_tracer"))]


def path_of(name: str) -> Path:
    folder = ROOT / name
    return folder / reference.facts_of(folder)["path"]


def copy_of(name: str, tmp_path: Path) -> Path:
    path = path_of(name)
    if path.is_file():
        return Path(shutil.copy(path, tmp_path))
    return Path(shutil.copytree(path, tmp_path / path.name))


def load(path: Path, **given: Any) -> Crosscoder:
    with warnings.catch_warnings(action="ignore"):
        return Crosscoder.load_from_pretrained(path, **given)


@pytest.mark.parametrize("folder", reference.CROSSCODERS, ids=lambda path: path.name)
@pytest.mark.filterwarnings("ignore:.*")
def test_encode_and_decode_are_those_of_the_program_that_wrote_the_files(folder: Path) -> None:
    acts, out = reference.difference(folder)
    expected = load_file(folder / "expected.safetensors")
    assert acts <= 1e-5 * max(1.0, expected["acts"].abs().max().item())
    assert out <= 1e-5 * max(1.0, expected["out"].abs().max().item())


def test_reference_files_are_small_and_have_rows_on_the_page() -> None:
    page = (reference.ROOT.parents[1] / "docs" / "formats.md").read_text()
    assert len(reference.CROSSCODERS) > 20
    for folder in reference.CROSSCODERS:
        assert sum(path.stat().st_size for path in folder.rglob("*")) < 60_000
        assert f"({folder.name})" in page, "write the table anew: scripts/reference_files/table.py"


@pytest.mark.parametrize("folder", reference.CROSSCODERS, ids=lambda path: path.name)
def test_inspect_agrees_with_loading(folder: Path) -> None:
    told = inspect(folder / reference.facts_of(folder)["path"], full=True)
    json.loads(in_json(told), parse_constant=pytest.fail)
    (one,) = told["autoencoders"].values()
    cfg = load(folder / reference.facts_of(folder)["path"]).cfg
    assert one["problem"] is None
    assert (one["config"]["reads"], one["config"]["writes"]) == (list(cfg.reads), list(cfg.writes))
    assert [tuple(map(tuple, part.values())) for part in one["latents"]] == list(cfg.latents)
    assert (one["format"], one["config"]["d_sae"]) == (cfg.file_format, cfg.d_sae)
    assert [part for parts in one["figures"].values() for part in parts.values() if part.get("decoder_norms")]
    assert "Crosscoder.load_from_pretrained" in in_words(told)


@pytest.mark.parametrize("folder", reference.CROSSCODERS, ids=lambda path: path.name)
def test_the_loader_of_autoencoders_names_the_one_of_crosscoders(folder: Path) -> None:
    path = folder / reference.facts_of(folder)["path"]
    with pytest.raises(ValueError, match=r"read or write several places.*Crosscoder\.load_from_pretrained"):
        SparseAutoencoder.load_from_pretrained(path)
    (many,) = [SparseAutoencoder.load_many(path)]
    with pytest.raises(ValueError, match=r"Crosscoder\.load_from_pretrained"):
        many[next(iter(many))]


def test_an_autoencoder_is_no_crosscoder() -> None:
    with pytest.raises(ValueError, match=r"no crosscoder.*SparseAutoencoder\.load_from_pretrained"):
        load(reference.ROOT / "saelens-standard")


def test_the_crosscoders_below_a_folder_are_loaded_by_name(tmp_path: Path) -> None:
    for number in (10, 9):
        shutil.copytree(path_of("gemma_scope_2-clt"), tmp_path / f"clt/width_{number}")
    shutil.copytree(reference.ROOT / "saelens-standard", tmp_path / "sae")
    many = Crosscoder.load_many(tmp_path)
    assert list(many) == ["clt/width_9", "clt/width_10"]
    assert many["clt/width_10"].cfg.architecture == "cross_layer_transcoder"
    with pytest.raises(FileNotFoundError, match="below it there are sae, clt/width_9"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "reads", "writes", "model"),
    [
        ("gemma_scope_2-crosscoder", "blocks.13.hook_resid_post", "blocks.13.hook_resid_post", "google/gemma-3-1b-pt"),
        ("gemma_scope_2-clt", "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out", "google/gemma-3-270m-it"),
        ("circuit_tracer-clt-relu", "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out", "google/gemma-2-2b"),
        ("llamascopium-clt-relu", "blocks.3.hook_resid_mid", "blocks.3.hook_mlp_out", "unknown"),
        ("llamascopium-crosscoder-relu", "blocks.3.hook_resid_post", "blocks.3.hook_resid_post", "unknown"),
        ("kissane-crosscoder", "1:blocks.14.hook_resid_pre", "1:blocks.14.hook_resid_pre", "unknown"),
        ("dictionary_learning_fork-crosscoder", "1", "1", "unknown"),
    ],
)
def test_places_and_models_have_our_names(name: str, reads: str, writes: str, model: str) -> None:
    cfg = load(path_of(name)).cfg
    assert (cfg.reads[1], cfg.writes[1], cfg.model_name) == (reads, writes, model)
    assert load(path_of(name), model_name="given").cfg.model_name == "given"


# ------------------------------------------------------------------------------------------------- what is doubtful


@pytest.mark.parametrize("folder", IN_PARTS, ids=lambda path: path.name)
def test_one_file_of_several_and_a_missing_one_are_named(folder: Path, tmp_path: Path) -> None:
    path = copy_of(folder.name, tmp_path)
    files = sorted(path.glob("*_1.safetensors"))
    with pytest.raises(ValueError, match="give the folder to Crosscoder"):
        load(files[0])
    files[0].unlink()
    with pytest.raises(ValueError, match="of which number 1 is missing"):
        load(path)


@pytest.mark.parametrize(
    ("name", "file", "tensor"),
    [
        ("gemma_scope_2-clt", "params_layer_2.safetensors", "b_enc"),
        ("circuit_tracer-clt-jumprelu", "W_enc_2.safetensors", "threshold_2"),
        ("circuit_tracer-clt-relu", "W_dec_1.safetensors", "W_dec_1"),
        ("llamascopium-clt-relu", "sae_weights.safetensors", "W_D.2"),
        ("llamascopium-crosscoder-jumprelu", "sae_weights.safetensors", "activation_function.log_jumprelu_threshold"),
        ("dictionary_learning_fork-crosscoder", "model.safetensors", "decoder.bias"),
    ],
)
def test_tensors_that_are_missing_unknown_or_of_another_shape_are_named(
    name: str, file: str, tensor: str, tmp_path: Path
) -> None:
    path = copy_of(name, tmp_path)
    state = load_file(path / file)
    kept = {key: value for key, value in state.items() if key != tensor}
    for changed in (kept, kept | {tensor: state[tensor][:1].clone()}, state | {"other": torch.zeros(1)}):
        save_file(changed, path / file)
        with pytest.raises(ValueError, match="other is no tensor" if "other" in changed else "missing|found shape"):
            load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_activation": "batch-wise"}, "norm_activation is batch-wise"),
        ({"norm_activation": "token-wise"}, "norm_activation is token-wise"),
        ({"act_fn": "other"}, "act_fn is other"),
        ({"hook_points_in": []}, "hook_points_in is"),
        ({"hook_points_out": 3}, "hook_points_out is"),
        ({"d_model": -8}, "sizes"),
        ({"expansion_factor": 1e308}, "do not fit|sizes|found shape"),
        ({"hook_points_in": ["x"] * 100_000}, "found 100,000 places"),
    ],
)
def test_configs_of_llamascopium_that_cannot_be_read(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = copy_of("llamascopium-clt-relu", tmp_path)
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load(path)


def test_an_average_norm_that_is_missing_or_no_number_is_named(tmp_path: Path) -> None:
    path = copy_of("llamascopium-clt-relu", tmp_path)
    state = load_file(path / "sae_weights.safetensors")
    name = "dataset_average_activation_norm.blocks.3.hook_mlp_out"
    for chance in (0.0, -3.0, 1e-23, torch.nan, torch.inf):
        save_file(state | {name: torch.tensor(chance)}, path / "sae_weights.safetensors")
        with pytest.raises(ValueError, match=f"{name}: found .*, expected the average norm"):
            load(path)
    save_file({key: value for key, value in state.items() if key != name}, path / "sae_weights.safetensors")
    with pytest.raises(ValueError, match=f"{name} is missing"):
        load(path)


DATASET_WISE = [
    folder.name
    for folder in reference.CROSSCODERS
    if folder.name.startswith("llamascopium")
    and json.loads((folder / "config.json").read_text())["norm_activation"] == "dataset-wise"
]


@pytest.mark.parametrize("name", DATASET_WISE)
def test_norms_that_may_be_folded_after_the_config_was_written_are_warned_of(name: str) -> None:
    path = path_of(name)
    with pytest.warns(UserWarning, match="give norm_factor=1"):
        scaled = Crosscoder.load_from_pretrained(path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*norm_factor")
        plain = Crosscoder.load_from_pretrained(path, norm_factor=1.0)
    x = load_file(path / "expected.safetensors")["x"]
    assert not torch.allclose(scaled(x), plain(x), atol=0.1)
    with pytest.raises(ValueError, match=r"norm_factor: found 2 with norm_activation dataset-wise, expected 1"):
        load(path, norm_factor=2.0)


def test_a_checkpoint_of_llamascopium_has_its_norms_apart(tmp_path: Path) -> None:
    path = Path(shutil.copytree(path_of("llamascopium-clt-relu"), tmp_path / "checkpoints" / "100"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*norm_factor")
        Crosscoder.load_from_pretrained(path)


@pytest.mark.parametrize("name", ["llamascopium-clt-jumprelu-folded", "kissane-crosscoder", "gemma_scope_2-clt"])
def test_a_norm_factor_that_says_nothing_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="norm_factor: found 1"):
        load(path_of(name), norm_factor=1.0)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("llamascopium-crosscoder-jumprelu-folded", "into the biases and not into the matrices"),
        ("llamascopium-clt-jumprelu-folded", "changes the decoder norms"),
        ("llamascopium-clt-layertopk", "changes the decoder norms"),
    ],
)
def test_folded_norms_are_told_to_make_another_function(name: str, words: str) -> None:
    (one,) = inspect(path_of(name))["autoencoders"].values()
    assert any(words in text for text in one["warnings"])


def test_k_that_is_missing_is_asked_for(tmp_path: Path) -> None:
    path = copy_of("llamascopium-clt-topk", tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "top_k"}))
    with pytest.raises(ValueError, match=r"top_k is missing.*give k="):
        load(path)
    assert load(path, k=3).cfg.k == 3


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    path = copy_of("gemma_scope_2-clt", tmp_path)
    state = load_file(path / "params_layer_1.safetensors")
    state["w_dec"][2, 1, 3] = torch.nan
    save_file(state, path / "params_layer_1.safetensors")
    with pytest.raises(ValueError, match=r"W_dec\.1\.1: NaN or infinite"):
        load(path)


def test_a_latent_without_a_decoder_is_never_active_above_a_threshold(tmp_path: Path) -> None:
    path = copy_of("llamascopium-crosscoder-jumprelu", tmp_path)
    state = load_file(path / "sae_weights.safetensors")
    state["W_D"][1, 5] = 0
    save_file(state, path / "sae_weights.safetensors")
    crosscoder = load(path)
    acts = crosscoder.encode(100 * load_file(path / "expected.safetensors")["x"])
    assert not acts[:, 1, 5].any() and acts[:, 0, 5].any()


def test_a_crosscoder_between_models_is_told_to_need_factors_and_takes_them() -> None:
    path = path_of("kissane-crosscoder")
    with pytest.warns(UserWarning, match="factor that the files do not hold"):
        plain = Crosscoder.load_from_pretrained(path)
    factors = [0.5, 2.0, 3.0]
    folded, x = load(path, norm_factors=factors), load_file(path / "expected.safetensors")["x"]
    scale = torch.tensor(factors).view(1, -1, 1)
    torch.testing.assert_close(folded.encode(x), plain.encode(x * scale))
    torch.testing.assert_close(folded(x), plain(x * scale) / scale)
    with pytest.raises(ValueError, match="norm_factors: found 2"):
        load(path, norm_factors=[1.0, 2.0])


def test_an_encoder_may_read_some_places_only(tmp_path: Path) -> None:
    path = copy_of("dictionary_learning_fork-crosscoder", tmp_path)
    state, x = load_file(path / "model.safetensors"), load_file(path / "expected.safetensors")["x"]
    state["encoder.weight"] = state["encoder.weight"][:2].clone()
    save_file(state, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"encoder_layers": [0, 2]}))
    wanted = torch.einsum("bld,ldn->bn", x[:, [0, 2]], state["encoder.weight"]) + state["encoder.bias"]
    torch.testing.assert_close(load(path).encode(x), wanted.relu())
    (path / "config.json").write_text(json.dumps(config | {"encoder_layers": [0, 10**12]}))
    with pytest.raises(ValueError, match="places, expected"):
        load(path)


def test_a_training_folder_of_the_fork_is_told_by_its_config(tmp_path: Path) -> None:
    state = load_file(path_of("dictionary_learning_fork-batchtopk") / "model.safetensors")
    torch.save(state, tmp_path / "ae.pt")
    trainer = {"dict_class": "BatchTopKCrossCoder", "code_normalization": "CROSSCODER", "lm_name": "a/model"}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    crosscoder, other = load(tmp_path), load(path_of("dictionary_learning_fork-batchtopk"))
    assert crosscoder.cfg.model_name == "a/model"
    x = load_file(ROOT / "dictionary_learning_fork-batchtopk" / "expected.safetensors")["x"]
    assert torch.equal(crosscoder.encode(x), other.encode(x))


ODD_VALUES = [None, True, -1, 0, 10**30, 1e308, "x", [], [1], ["x"], {}, {"a": []}]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("llamascopium-clt-topk", "config.json"),
        ("llamascopium-crosscoder-jumprelu", "config.json"),
        ("dictionary_learning_fork-batchtopk", "config.json"),
        ("kissane-crosscoder", "cfg.json"),
    ],
)
def test_values_of_other_types_load_or_are_refused(name: str, file: str, tmp_path: Path) -> None:
    path = copy_of(name, tmp_path)
    config = json.loads((path / file).read_text())
    others = {"encoder_layers": 1, "code_normalization_alpha_cc": 1, "trainer": 1, "lm_name": 1, "model_name": 1}
    for key in config | others:
        for value in ODD_VALUES:
            (path / file).write_text(json.dumps(config | {key: value}))
            for look in (load, inspect):
                try:
                    look(path)
                except (ValueError, OSError) as error:
                    assert str(path) in str(error)


@pytest.mark.parametrize("name", ["gemma_scope_2-clt-affine", "circuit_tracer-clt-relu", "kissane-crosscoder"])
def test_a_truncated_file_is_named(name: str, tmp_path: Path) -> None:
    path = copy_of(name, tmp_path)
    file = next(file for pattern in ("*_1.safetensors", "*.pt") for file in sorted(path.glob(pattern)))
    whole = file.read_bytes()
    for length in range(0, len(whole) - 1, 500):
        file.write_bytes(whole[:length])
        with pytest.raises((ValueError, OSError), match=str(path)):
            load(path)


def test_more_places_than_any_model_has_are_refused(tmp_path: Path) -> None:
    for i in range(1001):
        save_file({"w_dec": torch.zeros(1, 1001, 1)} if i == 0 else {}, tmp_path / f"params_layer_{i}.safetensors")
    with pytest.raises(ValueError, match="found 1,001 places"):
        load(tmp_path)


def sparse_file(path: Path, shapes: dict[str, list[int]]) -> None:
    """A safetensors file of zeros that take no room on the disk."""
    head, start = {}, 0
    for name, shape in shapes.items():
        end = start + 4 * torch.Size(shape).numel()
        head[name], start = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}, end
    text = json.dumps(head).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + start)


def test_many_gigabytes_are_inspected_without_reading_them(tmp_path: Path) -> None:
    n, m, d = 16, 16384, 2304
    for i in range(n):
        sparse_file(tmp_path / f"W_enc_{i}.safetensors", {f"W_enc_{i}": [m, d], f"b_enc_{i}": [m], f"b_dec_{i}": [d]})
        sparse_file(tmp_path / f"W_dec_{i}.safetensors", {f"W_dec_{i}": [m, n - i, d]})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (one,) = inspect(tmp_path)["autoencoders"].values()
    assert (one["config"]["d_sae"], len(one["latents"])) == (m, n)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


def test_load_many_where_no_crosscoder_is_says_what_there_is(tmp_path: Path) -> None:
    shutil.copytree(reference.ROOT / "sparsify-topk" / "layers.3", tmp_path / "run" / "layers.3")
    with pytest.raises(ValueError, match=r"found layers.3, no crosscoder among them.*SparseAutoencoder.load_many"):
        Crosscoder.load_many(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="nothing in it is an autoencoder"):
        Crosscoder.load_many(tmp_path / "empty")
