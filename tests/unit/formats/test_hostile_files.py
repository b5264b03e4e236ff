"""Files that want to run code, to fill the memory, or are damaged: an error that names the file, and nothing else."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from safetensors.torch import load_file, save_file

from sae_training.formats import pickles
from sae_training.formats.inspection import inspect
from sae_training.sparse_autoencoder import SparseAutoencoder

SAELENS_WEIGHTS = "sae_weights.safetensors"
MEMORY = 4 * 2**30  # bytes of address space; torch alone maps 2 GB


def refused(path: Path, words: str = "") -> str:
    """Both ways to look at a file end in an error with its path; the message."""
    with pytest.raises((ValueError, OSError)) as caught:
        SparseAutoencoder.load_from_pretrained(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)
    return str(caught.value)


class Runs:
    """Unpickling it would run a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.mark}",)


def tensors() -> dict[str, torch.Tensor]:
    return {"W_enc": torch.randn(4, 6), "b_enc": torch.zeros(6), "W_dec": torch.randn(6, 4), "b_dec": torch.zeros(4)}


def save_as(content: Any, path: Path) -> None:
    if path.suffix == ".pt":
        torch.save(content, path)
    elif path.suffix == ".gz":
        with gzip.open(path, "wb") as file:
            pickle.dump(content, file)
    else:
        path.write_bytes(pickle.dumps(content))


WAYS = {
    "alone": lambda bomb: bomb,
    "in the config": lambda bomb: {"cfg": {"d_in": 4, "x": bomb}, "state_dict": tensors()},
    "deep": lambda bomb: {"cfg": {}, "state_dict": {**tensors(), "x": [(({"y": [bomb]},),)]}},
    "as a key": lambda bomb: {bomb: 1, "cfg": {}, "state_dict": tensors()},
    "in an optimizer": lambda bomb: {
        "step": 1, "ae": tensors(), "norm_factor": 2.0, "config": {}, "optimizer": {"state": {0: {"exp_avg": bomb}}}
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ["sae.pt", "sae.pkl", "sae.pkl.gz"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_no_pickle_runs_code(way: Callable, name: str, tmp_path: Path) -> None:
    save_as(way(Runs(tmp_path / "ran")), tmp_path / name)
    refused(tmp_path / name)
    with pytest.raises(ValueError, match=name):
        inspect(tmp_path / name)
    assert not (tmp_path / "ran").exists()


PROGRAMS = {
    "eval by name": b"cbuiltins\neval\n(S'1'\ntR.",
    "getattr": b"cbuiltins\ngetattr\n(c__builtin__\nobject\nS'__subclasses__'\ntR.",
    "attributes of a shared function": b"ctorch._utils\n_rebuild_tensor_v2\n(dS'__doc__'\nS'x'\nsb.",
    "attributes of a class": b"csae_lens.x\nConfig\nN}S'a'\nI1\ns\x86b.",
    "a memo of 2**31": b"\x80\x02}r\xff\xff\xff\x7f.",
    "bytes of 2**60": b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b"x.",
    "a frame of 2**60": b"\x80\x04\x95" + (2**60).to_bytes(8, "little") + b"x.",
    "an extension": b"\x80\x02\x82\x01.",
    "a persistent id": b"Psomething\n.",
    "nothing on the stack": b"0.",
    "a stand-in that is called": b"csae_lens.x\nConfig\n(I1\ntR.",
    "unhashable key": b"}]]s.",
    "a dotted name": b"\x80\x04\x8c\x05torch\x8c\x0bhub.os.path\x93.",
    "a module of ours": b"csae_training.cli\nmain\n.",
    "lists in lists, a million": b"\x80\x02" + b"]" * 1_000_000 + b"a" * 999_999 + b".",
}


@pytest.mark.parametrize("name", ["sae.pkl", "sae.pkl.gz", "sae.pt"])
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_programs_of_other_kinds_are_refused(program: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(gzip.compress(program) if name.endswith(".gz") else program)
    assert len(refused(tmp_path / name)) < 2000
    assert not hasattr(pickles.StandIn, "a")


def test_a_gzip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "sae.pkl.gz"
    n_bytes = 2**28
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b"\x80\x04\x8e" + n_bytes.to_bytes(8, "little"))
        for _ in range(16):
            file.write(bytes(n_bytes // 16))
        file.write(b".")
    refused(path, "more than its size allows")


def zip_of(path: Path, content: bytes, packed: int = zipfile.ZIP_STORED, name: str = "archive/data.pkl") -> None:
    with zipfile.ZipFile(path, "w", packed) as archive:
        archive.writestr(name, content)
        archive.writestr("archive/version", b"3\n")


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    zip_of(tmp_path / "sae.pt", bytes(70 * 2**20), zipfile.ZIP_DEFLATED)
    refused(tmp_path / "sae.pt", "is packed, which torch never does")


@pytest.mark.parametrize("name", ["../../evil", "/etc/evil", "archive/../../evil", "..\\evil"])
def test_names_that_point_out_of_an_archive_are_refused(name: str, tmp_path: Path) -> None:
    zip_of(tmp_path / "sae.pt", pickle.dumps({}), name=name)
    refused(tmp_path / "sae.pt", "points out of it")
    assert [path.name for path in tmp_path.iterdir()] == ["sae.pt"]


@pytest.mark.parametrize("name", ["sae.pt", "sae.pkl", "sae.pkl.gz"])
def test_a_tensor_larger_than_what_is_stored_for_it_is_refused(name: str, tmp_path: Path) -> None:
    huge = torch.zeros(1).as_strided((1_000_000, 1_000_000), (0, 0))
    save_as({"cfg": {}, "state_dict": tensors() | {"W_enc": huge}}, tmp_path / name)
    refused(tmp_path / name, "bytes are stored")


@pytest.mark.parametrize(
    "odd", [torch.zeros(4, 6).to_sparse(), torch.zeros(4, 6, dtype=torch.complex64), torch.zeros(4, 6, device="meta")]
)
def test_tensors_of_unusual_kinds_are_refused(odd: torch.Tensor, tmp_path: Path) -> None:
    torch.save({"cfg": {}, "state_dict": tensors() | {"W_enc": odd}}, tmp_path / "sae.pt")
    refused(tmp_path / "sae.pt")


# --------------------------------------------------------------------------------------------------------- safetensors


def folder_of(tmp_path: Path, name: str = "saelens-standard") -> Path:
    return Path(shutil.copytree(reference.ROOT / name, tmp_path / "sae"))


def header_bytes(head: bytes, data: bytes = b"") -> bytes:
    return len(head).to_bytes(8, "little") + head + data


HUGE = json.dumps({"W_dec": {"dtype": "F32", "shape": [10**12, 10**6], "data_offsets": [0, 4 * 10**18]}}).encode()
HEADERS = {
    "huge shape": header_bytes(HUGE),
    "a length of 2**63": (2**63).to_bytes(8, "little") + b"{}",
    "a length of 2**64 - 1": b"\xff" * 8,
    "no length": b"\x01",
    "empty": b"",
    "not JSON": header_bytes(b"not json"),
    "a list": header_bytes(b"[]"),
    "nesting": header_bytes(b"[" * 1_000_000),
    "negative": header_bytes(b'{"W_dec":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', b"1234"),
    "overlap": header_bytes(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"1234",
    ),
    "no offsets": header_bytes(b'{"a":{"dtype":"F32","shape":[1]}}', b"1234"),
    "unknown type": header_bytes(b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}', b"1234"),
    "metadata of numbers": header_bytes(b'{"__metadata__":{"cfg":1}}'),
    "no tensors": header_bytes(b"{}"),
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_damaged_headers_are_named(content: bytes, tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (folder / SAELENS_WEIGHTS).write_bytes(content)
    refused(folder)
    try:
        (one,) = inspect(folder)["autoencoders"].values()
    except ValueError as error:
        assert SAELENS_WEIGHTS in str(error)
    else:
        assert SAELENS_WEIGHTS in one["problem"]


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec"])
@pytest.mark.parametrize("shape", [(), (3,), (0, 0), (7, 5), (2, 3, 4)], ids=str)
def test_wrong_shapes_are_named(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    save_file(load_file(folder / SAELENS_WEIGHTS) | {name: torch.ones(shape)}, folder / SAELENS_WEIGHTS)
    refused(folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec"])
def test_weights_that_are_no_numbers_are_refused(name: str, value: float, tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    found = load_file(folder / SAELENS_WEIGHTS)
    found[name].view(-1)[1] = value
    save_file(found, folder / SAELENS_WEIGHTS)
    refused(folder, f"{name}: NaN or infinite values")


def test_an_infinite_threshold_turns_a_latent_off_and_is_read(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "saelens-jumprelu")
    found = load_file(folder / SAELENS_WEIGHTS)
    found["threshold"][2] = torch.inf
    save_file(found, folder / SAELENS_WEIGHTS)
    sae = SparseAutoencoder.load_from_pretrained(folder)
    assert not sae.encode(100 * torch.randn(50, sae.d_in))[:, 2].any()


def test_swapped_axes_of_square_matrices_are_warned_of(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    folder = folder_of(tmp_path, "saelens-standard-square")
    found = load_file(folder / SAELENS_WEIGHTS)
    fitting = found | {"W_enc": found["W_dec"].T.contiguous()}
    save_file(fitting, folder / SAELENS_WEIGHTS)
    SparseAutoencoder.load_from_pretrained(folder)
    assert not [w for w in recwarn if "transposed" in str(w.message)]
    save_file(fitting | {"W_enc": found["W_dec"].clone()}, folder / SAELENS_WEIGHTS)
    with pytest.warns(UserWarning, match="if one of the two is transposed"):
        SparseAutoencoder.load_from_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------- JSON

CONFIGS = {
    "NaN": b'{"d_in": NaN}',
    "infinity": b'{"d_in": -Infinity}',
    "1e999": b'{"d_in": 1e999}',
    "twice": b'{"d_in": 4, "d_in": 8}',
    "twice inside": b'{"a": {"x": 1, "x": 1}}',
    "nesting": b'{"a":' + b"[" * 1_000_000,
    "nested objects": b'{"a":' * 1_000_000,
    "digits": b'{"a": ' + b"9" * 100_000 + b"}",
    "not UTF-8": b'{"a": "\xff\xfe\xfa"}',
    "a list": b"[1]",
    "null": b"null",
    "empty": b"",
    "half": b'{"d_in": 4',
    "zeros": bytes(1000),
    "17 MB": b'{"a": "' + b"x" * (17 * 2**20) + b'"}',
    "tags of YAML": b"!!python/object/apply:os.system ['touch ran']",
}


@pytest.mark.parametrize("content", CONFIGS.values(), ids=CONFIGS)
def test_configs_that_are_no_plain_objects_are_named(content: bytes, tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (folder / "cfg.json").write_bytes(content)
    refused(folder, "cfg.json")


ODD_VALUES = [None, True, -1, 0, 10**30, 1.5, "x", [], [1], {}, {"a": []}]


@pytest.mark.parametrize("name", ["saelens-topk", "saelens-v4", "sparsify-topk", "sparsify-legacy"])
def test_values_of_other_types_load_or_are_refused(name: str, tmp_path: Path) -> None:
    folder = next(path.parent for path in folder_of(tmp_path, name).rglob("cfg.json"))
    cfg = json.loads((folder / "cfg.json").read_text())
    for key in cfg:
        for value in ODD_VALUES:
            (folder / "cfg.json").write_text(json.dumps(cfg | {key: value}))
            try:
                SparseAutoencoder.load_from_pretrained(folder)
            except (ValueError, OSError) as error:
                assert str(folder) in str(error)


# ---------------------------------------------------------------------------------------------------------- other files


@pytest.mark.parametrize("name", ["loop.safetensors", "loop.pt"])
def test_links_to_themselves_and_pipes_and_devices_end(name: str, tmp_path: Path) -> None:
    loop = tmp_path / name
    loop.symlink_to(loop)
    refused(loop)
    os.mkfifo(tmp_path / f"pipe{loop.suffix}")
    refused(tmp_path / f"pipe{loop.suffix}", "neither a file nor a folder")
    (tmp_path / f"device{loop.suffix}").symlink_to("/dev/zero")
    refused(tmp_path / f"device{loop.suffix}", "neither a file nor a folder")


def test_weights_that_are_a_link_to_a_device_are_not_opened(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (folder / SAELENS_WEIGHTS).unlink()
    (folder / SAELENS_WEIGHTS).symlink_to("/dev/zero")
    refused(folder)


def test_folders_that_hold_themselves_end(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    with pytest.raises(FileNotFoundError):
        SparseAutoencoder.load_many(tmp_path)


SOURCES = [
    *reference.ROOT.glob("saelens-v4-jumprelu/*.safetensors"),
    *reference.ROOT.glob("dictionary_learning-gated/*/*/ae.pt"),
    *reference.ROOT.glob("circuit_tracer-jumprelu/layer_3.safetensors"),
    *(reference.ROOT / "gemma_scope_1-res").rglob("params.npz"),
]


@pytest.mark.parametrize("source", [path for path in SOURCES if path.name != "expected.safetensors"], ids=str)
def test_a_truncated_file_is_refused(source: Path, tmp_path: Path) -> None:
    whole = source.read_bytes()
    folder = Path(shutil.copytree(source.parent, tmp_path / "sae"))
    for length in {0, 1, 7, 8, 9, *range(64, len(whole), 1024 if len(whole) > 20_000 else 128), len(whole) - 1}:
        (folder / source.name).write_bytes(whole[:length])
        refused(folder)


@pytest.mark.parametrize("name", ["sae.pt", "sae.pth", "sae.pkl", "sae.pkl.gz", "sae.safetensors", "sae.npz"])
def test_random_bytes_are_refused(name: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for length in (1, 10, 100, 10_000):
        noise = bytes(torch.randint(0, 256, (length,), generator=generator).tolist())
        for start in (b"", b"\x80\x02", b"PK\x03\x04", b"\x1f\x8b\x08\x00"):
            (tmp_path / name).write_bytes(start + noise)
            refused(tmp_path / name)


def test_bombs_stay_in_little_memory(tmp_path: Path) -> None:
    """In a process of its own, whose memory has a limit."""
    inner = io.BytesIO()
    torch.save({"cfg": {}, "state_dict": tensors()}, inner)
    bombs = {"memo.pkl": PROGRAMS["a memo of 2**31"], "bytes.pkl": PROGRAMS["bytes of 2**60"]}
    for name, content in bombs.items():
        (tmp_path / name).write_bytes(content)
    with gzip.open(tmp_path / "zeros.pkl.gz", "wb", compresslevel=1) as file:
        file.write(b"\x80\x04\x8e" + (2**33).to_bytes(8, "little") + bytes(2**28))
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from sae_training.sparse_autoencoder import SparseAutoencoder\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))\n"
        "for path in sorted(Path(sys.argv[1]).iterdir()):\n"
        "    try: SparseAutoencoder.load_from_pretrained(path)\n"
        "    except ValueError as error: assert str(path) in str(error); print(path.name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.split() == ["bytes.pkl", "memo.pkl", "zeros.pkl.gz"], done.stderr
