"""What `inspect` says of files: format, config in our words, tensors, traps; and of their weights if it is asked."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import reference
import torch
from safetensors.torch import load_file, save_file

from sae_training.cli import main
from sae_training.formats.inspection import in_json, in_words, inspect
from sae_training.formats.traps import is_square

MAY_HAVE_NONE = ("saelens", "dictionary_learning", "llama_scope")
SAELENS_WEIGHTS = "sae_weights.safetensors"


def told_of(name: str, full: bool = False) -> dict:
    folder = reference.ROOT / name
    path = folder / reference.facts_of(folder).get("path", "")
    return next(iter(inspect(path, full)["autoencoders"].values()))


@pytest.mark.parametrize("folder", reference.FOLDERS, ids=lambda path: path.name)
def test_every_family_is_inspected_and_agrees_with_loading(folder: Path) -> None:
    path = folder / reference.facts_of(folder).get("path", "")
    told = inspect(path, full=True)
    json.loads(in_json(told), parse_constant=pytest.fail)
    assert in_words(told)
    for one in told["autoencoders"].values():
        if one["problem"]:
            assert "give " in one["problem"]  # k, which the caller must say
            continue
        cfg = reference.loaded(folder).cfg
        assert (one["format"], one["config"]["d_in"]) == (cfg.file_format, cfg.d_in)
        assert (one["config"]["d_sae"], one["config"]["architecture"]) == (cfg.d_sae, cfg.architecture)
        figures = [part for parts in one["figures"].values() for part in parts.values()]
        assert [part for part in figures if part.get("decoder_norms")]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("saelens-skip-transcoder", "without the skip connection"),
        ("saelens-checkpoint-batchtopk", "a checkpoint of training"),
        ("saelens-checkpoint-standard-scaled", "activation_scaler.json"),
        ("saelens-v5-log-threshold", "log_threshold in place of threshold"),
        ("saelens-v5-finetuned", "scaling factors"),
        ("saelens-v3-tanh-relu", "SAELens 6 reads as relu"),
        ("saelens-standard-bfloat16", "computed in float32"),
        ("saelens-standard-square", "do not tell a matrix from its transpose"),
        ("saelens-standard-expected-average-only-in", "give norm_factor="),
        ("saelens-transcoder-layer-norm", "not brought back"),
        ("saelens-abstopk", "may be negative"),
        ("saelens-v3", "weights were processed"),
        ("sparsify-legacy-signed", "signed"),
        ("sparsify-topk-expansion-factor", "stands for d_in * expansion_factor"),
        ("sparsify-topk", "transposes it"),
        ("dictionary_learning-backup-topk", "a backup of training"),
        ("dictionary_learning-batchtopk-never-set", "never set it"),
        ("dictionary_learning-autoencoder-new", "nothing is subtracted"),
        ("dictionary_learning-topk", "a threshold is stored, and not used"),
        ("dictionary_learning-autoencoder-april-update", "may have any norm"),
        ("dictionary_learning-batchtopk", "k was an average"),
        ("e2e_sae-many-places", "stored norms mean nothing"),
        ("qwen_scope-topk", "both the other way"),
        ("gemma_scope_1-res", "strictly above"),
        ("gemma_scope_1-embedding", "without Gemma's factor sqrt(d_in)"),
        ("gemma_scope_1-att-lower-case", "all heads side by side"),
        ("gemma_scope_1-transcoder", "without the norm's gain"),
        ("gemma_scope_2-resid-post", "strictly above"),
        ("gemma_scope_2-transcoder", "with its gain"),
        ("gemma_scope_2-transcoder-affine", "W_skip is transposed"),
        ("goodfire-relu-bfloat16", "some take for top-k"),
        ("attention_saes-hook-z", "all heads side by side"),
        ("openai-v1-relu", "used as it is"),
        ("openai-v5-topk", "deviation of a sample"),
        ("openai-v4-relu-tied", "tied weights"),
        ("circuit_tracer-relu", "a latent a row"),
        ("circuit_tracer-skip", "x @ W_skip.T"),
    ],
)
def test_a_known_trap_is_warned_of(name: str, words: str) -> None:
    assert words in " ".join(told_of(name)["warnings"])


@pytest.mark.parametrize("folder", [*reference.FOLDERS, *reference.CROSSCODERS], ids=lambda path: path.name)
def test_families_whose_files_leave_much_unsaid_are_warned_of(folder: Path) -> None:
    told = inspect(folder / reference.facts_of(folder).get("path", ""))
    for one in told["autoencoders"].values():
        warnings = one.get("warnings", [])
        assert len({*warnings}) == len(warnings)
        assert one["problem"] or warnings or folder.name.startswith(MAY_HAVE_NONE)


@pytest.mark.parametrize(
    ("values", "is_so"),
    [
        ({"d_in": 4, "expansion_factor": 1}, True),
        ({"d_in": 4, "expansion_factor": 4}, False),
        ({"d_in": 4, "n_latents": 4}, True),
        ({"d_in": 4, "n_latents": 6}, False),
        ({"d_in": 4, "d_sae": 4}, True),
        ({}, False),
    ],
)
def test_square_is_as_many_latents_as_inputs(values: dict, is_so: bool) -> None:
    assert is_square(values) == is_so


def test_the_units_of_activations_are_said() -> None:
    assert "times the norms" in told_of("saelens-topk-rescale")["convention"]
    assert "own program reports" in told_of("saelens-topk")["convention"]
    assert "from_pretrained there multiplies" in told_of("dictionary_learning-autoencoder")["convention"]
    for name in ("dictionary_learning-autoencoder-new", "qresearch-relu"):
        assert "that encode gives there; forward(output_features=True)" in told_of(name)["convention"]


def test_what_files_leave_out_is_named() -> None:
    assert told_of("saelens-standard")["missing"] == ["dataset_path"]
    one = told_of("dictionary_learning-topk-without-k")
    assert one["problem"] is None or "k is missing" in one["problem"]


def test_full_finds_dead_rows_and_values_that_are_no_numbers(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(reference.ROOT / "saelens-standard", tmp_path / "sae"))
    tensors = load_file(folder / SAELENS_WEIGHTS)
    tensors["W_dec"][2] = 0
    tensors["W_enc"][0, 1] = torch.nan
    tensors["b_enc"][3] = torch.inf
    save_file(tensors, folder / SAELENS_WEIGHTS)
    (one,) = inspect(folder, full=True)["autoencoders"].values()
    parts = one["figures"][SAELENS_WEIGHTS]
    norms = tensors["W_dec"].norm(dim=1)
    assert parts["W_dec"]["decoder_norms"]["dead"] == 1
    assert parts["W_dec"]["decoder_norms"]["largest"] == pytest.approx(norms.max().item())
    assert (parts["W_enc"]["nan"], parts["b_enc"]["infinite"]) == (1, 1)
    assert len([text for text in one["warnings"] if "NaN" in text or "zero" in text]) == 3


def test_norms_are_those_of_latents_in_either_layout() -> None:
    parts = told_of("dictionary_learning-autoencoder-square", full=True)["figures"]["ae.pt"]
    weight = torch.load(next((reference.ROOT / "dictionary_learning-autoencoder-square").rglob("ae.pt")))
    norms = weight["decoder.weight"].norm(dim=0)  # (d_in, d_sae) in a Linear
    assert parts["decoder.weight"]["decoder_norms"]["least"] == pytest.approx(norms.min().item())


def test_a_folder_of_many_lists_them_all_and_what_cannot_be_read(tmp_path: Path) -> None:
    for layer in (2, 10):
        shutil.copytree(reference.ROOT / "sparsify-topk", tmp_path / f"layers.{layer}")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    told = inspect(tmp_path)
    assert len(told["autoencoders"]) >= 2
    assert "broken.safetensors" in told["not_read"]
    assert "not read: broken.safetensors" in in_words(told)


def test_what_is_refused_is_still_described(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(reference.ROOT / "saelens-standard", tmp_path / "sae"))
    cfg = json.loads((folder / "cfg.json").read_text()) | {"architecture": "temporal"}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    (one,) = inspect(folder)["autoencoders"].values()
    assert "model of sequences" in one["problem"]
    assert one["tensors"][SAELENS_WEIGHTS]["W_dec"]["shape"]


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_bytes(b"x")])
def test_nothing_known_is_an_error_in_a_sentence(make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "thing")
    assert main(["inspect", str(tmp_path / "thing")]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert str(tmp_path / "thing") in err and "Traceback" not in err


def test_the_command_prints_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(reference.ROOT / "saelens-jumprelu"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["autoencoders"]["."]["family"] == "saelens"


def sparse_weights(folder: Path, d_in: int, d_sae: int) -> None:
    """A folder as SAELens writes it, of zeros that take no room on the disk."""
    folder.mkdir()
    cfg = json.loads((reference.ROOT / "saelens-standard" / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(cfg | {"d_in": d_in, "d_sae": d_sae}))
    shapes = {"W_enc": [d_in, d_sae], "W_dec": [d_sae, d_in], "b_enc": [d_sae], "b_dec": [d_in]}
    head, start = {}, 0
    for name, shape in shapes.items():
        end = start + 4 * torch.Size(shape).numel()
        head[name], start = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}, end
    text = json.dumps(head).encode()
    with (folder / SAELENS_WEIGHTS).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + start)


def test_four_gigabytes_are_inspected_without_reading_them(tmp_path: Path) -> None:
    sparse_weights(tmp_path / "large", 4096, 131072)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (one,) = inspect(tmp_path / "large")["autoencoders"].values()
    assert one["config"]["d_sae"] == 131072
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


def test_full_reads_a_large_file_in_little_memory(tmp_path: Path) -> None:
    sparse_weights(tmp_path / "large", 1024, 65536)  # 512 MB
    code = (
        "import resource, sys; from pathlib import Path; from sae_training.formats.inspection import inspect\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "inspect(Path(sys.argv[1]), full=True)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "large")], capture_output=True, text=True)
    assert int(done.stdout) < 200_000, done.stderr  # KB


def test_flags_say_what_files_leave_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(reference.ROOT / "qwen_scope-square" / "layer7.sae.pt", tmp_path)
    path = str(tmp_path / "layer7.sae.pt")
    assert main(["inspect", path]) == 0
    shown = capsys.readouterr().out
    assert (
        "k is missing" in shown.replace("k (L0_<k> in the repository's name)", "k")
        and "format       qwen_scope" in shown
    )
    assert main(["inspect", path, "--k", "4", "--model-name", "Qwen/Qwen3-8B-Base", "--json"]) == 0
    one = json.loads(capsys.readouterr().out)["autoencoders"]["."]
    assert (one["problem"], one["config"]["k"], one["config"]["model_name"]) == (None, 4, "Qwen/Qwen3-8B-Base")


def test_a_place_chooses_of_several_or_completes_the_only_one(tmp_path: Path) -> None:
    for layer in (2, 10):
        shutil.copytree(reference.ROOT / "sparsify-topk" / "layers.3", tmp_path / "run" / f"layers.{layer}")
    assert list(inspect(tmp_path / "run", layer=10)["autoencoders"]) == ["layers.10"]
    assert list(inspect(tmp_path / "run", hook_point="layers.2")["autoencoders"]) == ["layers.2"]
    with pytest.raises(ValueError, match=r"layers.2 \(blocks.2.hook_resid_post\).*expected one at .* layer 9"):
        inspect(tmp_path / "run", layer=9)
    shutil.copytree(reference.ROOT / "sparsify-topk" / "layers.3", tmp_path / "experts")
    (one,) = inspect(tmp_path / "experts", hook_point="blocks.5.hook_resid_post")["autoencoders"].values()
    assert one["config"]["hook_point"] == "blocks.5.hook_resid_post"


def test_a_file_of_several_shows_each_and_its_figures() -> None:
    folder = reference.ROOT / "e2e_sae-many-places"
    told = inspect(folder / reference.facts_of(folder).get("path", ""), full=True)
    shown = in_words(told)
    assert len(told["autoencoders"]) > 1 and "give the path of one" not in shown
    assert shown.count("format       e2e_sae") == len(told["autoencoders"])
    assert all(f"  {name}\n" in shown for name in told["autoencoders"])
    assert "norms of decoder rows" in shown


@pytest.mark.parametrize("name", ["thing.pt", "thing.pth"])
def test_a_pickle_of_no_known_format_is_described(name: str, tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(2)}, tmp_path / name)
    with pytest.raises(ValueError, match="found a dict with 'weights', which no format that is read has"):
        inspect(tmp_path / name)
    (tmp_path / "thing.txt").write_text("words")
    with pytest.raises(ValueError, match=r"unknown kind of file; expected .*\.pth"):
        inspect(tmp_path / "thing.txt")


@pytest.mark.parametrize("name", ["W_enc", "W_dec"])
def test_types_that_are_not_read_are_a_problem(name: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(reference.ROOT / "saelens-standard", tmp_path / "sae"))
    tensors = load_file(folder / SAELENS_WEIGHTS)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, folder / SAELENS_WEIGHTS)
    (one,) = inspect(folder, full=True)["autoencoders"].values()
    assert f"{name} of {SAELENS_WEIGHTS} is F8_E4M3, expected float32" in one["problem"]
    assert name not in one["figures"][SAELENS_WEIGHTS]
