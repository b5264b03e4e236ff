"""Hostile .npz, YAML, JSON and headers, and folders of them: bounded time and memory, and short plain messages."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import zipfile
from pathlib import Path

import hostile
import numpy as np
import pytest
import reference
import torch
from safetensors.torch import load_file, save_file

from sae_training.formats.inspection import in_words, inspect
from sae_training.sparse_autoencoder import SparseAutoencoder


def copied(tmp_path: Path, name: str, to: str = "sae") -> Path:
    return Path(shutil.copytree(reference.ROOT / name, tmp_path / to))


def safetensors(head: dict | bytes, data: bytes = b"") -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return len(text).to_bytes(8, "little") + text + data


def part(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


FOUR = ("W_enc", "b_enc", "W_dec", "b_dec")
REPEATED = b"{" + b",".join(b'"%d":0' % i for i in range(300_000)) + b',"299999":1}'
WEIGHTS = {
    "100,000 tensors": safetensors({str(i): part([1], 4 * i, 4 * i + 4) for i in range(100_000)}, bytes(400_000)),
    "a name of a megabyte": safetensors({"x" * 10**6: part([1], 0, 4)}, bytes(4)),
    "a name of terminal codes": safetensors({"\x1b[2J\x1b]0;x\x07": part([1], 0, 4)}, bytes(4)),
    "holes": safetensors({"W_enc": part([1], 0, 4), "b_enc": part([1], 8, 12)}, bytes(12)),
    "overlapping": safetensors({"W_enc": part([2], 0, 8), "b_enc": part([2], 4, 12)}, bytes(12)),
    "backwards": safetensors({"W_enc": part([1], 4, 0)}, bytes(4)),
    "a dtype of 8 bits": safetensors(
        {name: part([2], 2 * i, 2 * i + 2, "F8_E4M3") for i, name in enumerate(FOUR)}, bytes(8)
    ),
    "no rows, and columns without end": safetensors({name: part([0, 10**15], 0, 0) for name in FOUR}),
    "no columns, and rows without end": safetensors(
        {name: part([10**15, 0] if name == "W_dec" else [0, 10**15], 0, 0) for name in FOUR}
    ),
    "a size above 2**64": safetensors({"W_enc": part([2**40, 2**40], 0, 4)}, bytes(4)),
    "a key repeated among many": safetensors(REPEATED),
    "axes without end": safetensors(
        {name: part([1] * 50_000, 4 * i, 4 * i + 4) for i, name in enumerate(FOUR)}, bytes(16)
    ),
}  # fmt: skip


def test_headers_that_ask_for_much_are_refused_in_little_memory(tmp_path: Path) -> None:
    paths = []
    for name, content in WEIGHTS.items():
        paths.append(copied(tmp_path, "saelens-standard", name))
        (paths[-1] / "sae_weights.safetensors").write_bytes(content)
        paths.append(tmp_path / f"alone {name}")
        paths[-1].mkdir()
        (paths[-1] / "params.safetensors").write_bytes(content)
    hostile.all_refuse(paths)


def test_inspected_names_hold_no_codes_of_terminals(tmp_path: Path) -> None:
    folder = copied(tmp_path, "saelens-standard")
    (folder / "sae_weights.safetensors").write_bytes(WEIGHTS["a name of terminal codes"])
    told = in_words(inspect(folder))
    assert "\\x1b[2J" in told
    assert "\x1b" not in told
    with pytest.raises(ValueError, match="x1b") as caught:
        SparseAutoencoder.load_from_pretrained(folder)
    assert "\x1b" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------------------- npz


def npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    room = io.BytesIO()
    np.lib.format.write_array(room, array, version)
    return room.getvalue()


def npy_of(header: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode("latin1") + data


def npz(members: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
    room = io.BytesIO()
    with zipfile.ZipFile(room, "w", kind) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return room.getvalue()


ARRAY = "{'descr': '<f4', 'fortran_order': False, 'shape': %s, }\n"
OBJECTS = np.array([{"a": 1}], dtype=object)


def broken(kind: int) -> bytes:
    content = bytearray(npz({"W_enc.npy": npy(np.random.default_rng(0).random(1000).astype("f4"))}, kind))
    content[60:200] = bytes(140)
    return bytes(content)


ARRAYS = {
    "objects": npz({"W_enc.npy": npy(OBJECTS)}),
    "version 3": npz({"W_enc.npy": npy(np.zeros(4, "f4"), (3, 0))}),
    "whole numbers": npz({"W_enc.npy": npy(np.zeros(4, "i8"))}),
    "structures": npz({"W_enc.npy": npy(np.zeros(4, [("a", "f4")]))}),
    "huge": npz({"W_enc.npy": npy_of(ARRAY % "(1000000, 1000000)")}),
    "negative": npz({"W_enc.npy": npy_of(ARRAY % "(-1, 4)")}),
    "overflow": npz({"W_enc.npy": npy_of(ARRAY % "(18446744073709551616, 18446744073709551616)")}),
    "no shape": npz({"W_enc.npy": npy_of(ARRAY % "'abc'")}),
    "nested": npz({"W_enc.npy": npy_of("(" * 9000)}),
    "minus": npz({"W_enc.npy": npy_of("-" * 9000 + "1")}),
    "unhashable": npz({"W_enc.npy": npy_of("{[]: 1}")}),
    "a long header": npz({"W_enc.npy": b"\x93NUMPY\x02\x00" + struct.pack("<I", 10**7) + b" " * 10**7}),
    "a header longer than the file": npz({"W_enc.npy": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1)}),
    "lzma": broken(zipfile.ZIP_LZMA),
    "bzip2": broken(zipfile.ZIP_BZIP2),
    "deflate": broken(zipfile.ZIP_DEFLATED),
    "out of it": npz({"../W_enc.npy": npy(np.zeros(4, "f4"))}),
    "many": npz({f"{i}.npy": b"" for i in range(70_000)}),
}


def test_arrays_that_ask_for_much_are_refused_in_little_memory(tmp_path: Path) -> None:
    for name, content in ARRAYS.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
    hostile.all_refuse(sorted(tmp_path.iterdir()))


@pytest.mark.parametrize(
    "change",
    [np.asfortranarray, lambda a: a.astype(">f4"), lambda a: a.astype("<f2")],
    ids=["columns first", "big-endian", "float16"],
)
def test_arrays_in_another_order_are_the_same_numbers(change, tmp_path: Path) -> None:  # noqa: ANN001
    source = next((reference.ROOT / "gemma_scope_1-res").rglob("params.npz"))
    with np.load(source) as arrays:
        np.savez(tmp_path / "params.npz", **{name: change(array) for name, array in arrays.items()})
    sae, same = SparseAutoencoder.load_from_pretrained(tmp_path), SparseAutoencoder.load_from_pretrained(source)
    torch.testing.assert_close(sae.W_enc, same.W_enc, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sae.W_dec, same.W_dec, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------- YAML

CONFIGS = {
    "object": "!!python/object/apply:os.system ['touch ran']",
    "tag of one's own": "model_name: !x y",
    "a tag of YAML": "model_name: !!str y",
    "anchor": "model_name: &a y",
    "alias": "a: &a [1]\nb: [*a, *a]",
    "laughs": "a: &a [x, x]\n" + "\n".join(f"a{i}: &a{i} [*a{i - 1 or ''}, *a{i - 1 or ''}]" for i in range(1, 30)),
    "merge": "<<: &a {<<: *a}",
    "twice": "model_name: a\nmodel_name: b",
    "twice inside": "a: {b: 1, b: 2}",
    "nested": "[" * 200_000,
    "nested objects": "{a: " * 50_000,
    "nested by dashes": "- " * 100_000,
    "keys that are lists": "? [a]\n: b",
    "a list": "- 1",
    "open": "a: [",
    "large": "a: " + "x" * 2**19,
    "two documents": "a: 1\n---\nb: 2",
    "zeros": "\0" * 100,
}


def test_configs_that_are_not_plain_are_refused_in_little_memory(tmp_path: Path) -> None:
    folders = []
    for name, text in CONFIGS.items():
        folders.append(copied(tmp_path, "circuit_tracer-relu", name))
        (folders[-1] / "config.yaml").write_text(text)
    hostile.all_refuse(folders, (*hostile.WAYS, "session"))
    assert not Path("ran").exists()


@pytest.mark.parametrize("value", ["1" + ":59" * 60_000, "0x" + "f" * 200_000, "9" * 200_000, ".nan", "2026-99-99"])
def test_numbers_in_a_config_are_texts_of_no_cost(value: str, tmp_path: Path) -> None:
    folder = copied(tmp_path, "circuit_tracer-relu")
    with (folder / "config.yaml").open("a") as file:
        file.write(f"\nscan2: {value}\n")
    assert SparseAutoencoder.load_from_pretrained(folder).cfg.model_name != "unknown"


# ------------------------------------------------------------------------------------------------------- JSON, folders


def test_a_repeated_key_among_many_is_found_at_once(tmp_path: Path) -> None:
    folder = copied(tmp_path, "saelens-standard")
    (folder / "cfg.json").write_bytes(REPEATED)
    hostile.all_refuse([folder])


@pytest.mark.parametrize("key", ["architecture", "dtype", "normalize_activations", "device", "k"])
@pytest.mark.parametrize(
    "value", ["x" * 10**6, "\x1b[2J", "\ud800", ["x"] * 10**5], ids=["long", "codes", "half", "list"]
)
def test_messages_are_short_and_plain_whatever_a_config_holds(key: str, value: object, tmp_path: Path) -> None:
    folder = copied(tmp_path, "saelens-topk")
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(cfg | {key: value}))
    try:
        SparseAutoencoder.load_from_pretrained(folder)
    except (ValueError, OSError) as error:
        assert len(str(error)) < 5000
        assert str(error).replace("\n", "").isprintable()


def test_one_damaged_folder_among_many_does_not_hide_the_others(tmp_path: Path) -> None:
    copied(tmp_path, "saelens-standard", "good")
    for name, content in (("bad", b"\x01"), ("worse", WEIGHTS["no columns, and rows without end"])):
        copied(tmp_path, "saelens-standard", name)
        (tmp_path / name / "sae_weights.safetensors").write_bytes(content)
    copied(tmp_path, "saelens-standard", "config")
    (tmp_path / "config" / "cfg.json").write_text("{")
    many = SparseAutoencoder.load_many(tmp_path)
    assert {*many} == {"good", "bad", "worse", "config"}
    assert many["good"].d_in == 8
    for name in ("bad", "worse", "config"):
        with pytest.raises(ValueError, match=name):
            many[name]
    told = inspect(tmp_path, full=True)
    assert "good" in told["autoencoders"]
    assert {"bad", "worse", "config"} <= {*told["autoencoders"], *told["not_read"]}


def loop(path: Path) -> None:
    path.symlink_to(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def test_names_of_files_that_are_folders_pipes_and_links_end(tmp_path: Path) -> None:
    folders = []
    for name in ("cfg.json", "sae_weights.safetensors"):
        for make in (
            Path.mkdir,
            os.mkfifo,
            lambda path: path.symlink_to(path),
            lambda path: path.symlink_to("/dev/zero"),
        ):
            folders.append(copied(tmp_path, "saelens-standard", f"{len(folders)} {name}"))
            (folders[-1] / name).unlink()
            make(folders[-1] / name)
    hostile.all_refuse(folders)


def test_files_that_nobody_may_read_are_named(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    folder = copied(tmp_path, "saelens-standard")
    (folder / "sae_weights.safetensors").chmod(0)
    with pytest.raises(OSError, match="sae_weights"):
        SparseAutoencoder.load_from_pretrained(folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["circuit_tracer-jumprelu", "gemma_scope_2-resid-post", "sparsify-topk"])
def test_weights_that_are_no_numbers_are_refused_in_other_families(name: str, value: float, tmp_path: Path) -> None:
    folder = copied(tmp_path, name)
    (path,) = (file for file in folder.rglob("*.safetensors") if file.name != "expected.safetensors")
    tensors = load_file(path)
    tensors[next(key for key in tensors if key.lower() in ("w_enc", "encoder.weight"))][1, 1] = value
    save_file(tensors, path)
    with pytest.raises(ValueError, match="NaN or infinite"):
        SparseAutoencoder.load_from_pretrained(path.parent)
