"""Files of numpy arrays: what is read, and what is refused before any array is made."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import memory
import numpy as np
import pytest
import reference
import torch

from sae_training.formats import npz_files

FOLDER = reference.ROOT / "gemma_scope_1-transcoder"
SOURCE = FOLDER / reference.facts_of(FOLDER)["path"]


def npy(array: Any, **changes: Any) -> bytes:
    """The bytes of a .npy, with another header if `changes` say so."""
    file = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(file, header | changes)
    return file.getvalue() + array.tobytes()


def npz(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_every_precision_and_order_are_read(dtype: str, order: Any, tmp_path: Path) -> None:
    array = np.asarray(np.arange(6).reshape(2, 3), dtype=dtype, order=order)
    np.savez(tmp_path / "a.npz", W_enc=array, b=np.zeros(0, "f4"))
    assert npz_files.header(tmp_path / "a.npz").shapes == {"W_enc": (2, 3), "b": (0,)}
    read = npz_files.tensors(tmp_path / "a.npz")
    assert torch.equal(read["W_enc"], torch.arange(6).reshape(2, 3).to(read["W_enc"].dtype))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"W_enc.npy": npy(np.zeros(2, "f4"), shape=(2**40, 2**20))}, "has .* bytes, expected"),
        ({"W_enc.npy": npy(np.zeros(2, "f4"), shape=(-1, 2))}, "shape"),
        ({"W_enc.npy": npy(np.zeros(2, "i8"))}, "array of int64"),
        ({"W_enc.npy": npy(np.zeros(2, "f4"), descr="|O")}, "array of object"),
        ({"W_enc.npy": npy(np.zeros(2, "f4"))[:-1]}, "has .* bytes, expected"),
        ({"W_enc.npy": b"no array"}, "damaged"),
        ({"../W_enc.npy": npy(np.zeros(2, "f4"))}, "expected arrays"),
        ({"code.py": b"print()"}, "expected arrays"),
        ({f"{n}.npy": b"" for n in range(100)}, "holds 100 arrays"),
        ({}, "holds 0 arrays"),
    ],
)
def test_what_is_no_file_of_weights_is_refused(members: dict[str, bytes], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        npz_files.header(npz(tmp_path / "a.npz", members))


def test_a_file_that_expands_to_far_more_than_it_is_refused(tmp_path: Path) -> None:
    path = npz(tmp_path / "a.npz", {"W_enc.npy": npy(np.zeros(2**24, "f4"))}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="would expand to"):
        npz_files.tensors(path)


def test_members_that_share_bytes_are_refused(tmp_path: Path) -> None:
    path = npz(tmp_path / "a.npz", {f"{n}.npy": npy(np.zeros(500, "f4")) for n in range(2)})
    data = path.read_bytes()
    start = data.index(b"PK\x01\x02")
    second = data.index(b"PK\x03\x04", 4)
    half = data[:second] + data[start:]  # both entries of the directory, and one member
    path.write_bytes(half[:-6] + second.to_bytes(4, "little") + half[-2:])
    with pytest.raises(ValueError, match=r"a\.npz"):
        npz_files.header(path)


def test_truncated_and_changed_files_are_named(tmp_path: Path) -> None:
    data = SOURCE.read_bytes()
    path = tmp_path / "params.npz"
    for length in range(0, len(data), 97):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"params\.npz"):
            npz_files.tensors(path)


def test_changed_bytes_give_the_same_arrays_or_a_clear_error(tmp_path: Path) -> None:
    data, path = bytearray(SOURCE.read_bytes()), tmp_path / "params.npz"
    generator = np.random.default_rng(0)
    for _ in range(300):
        changed = bytearray(data)
        for place in generator.integers(len(data), size=3):
            changed[place] = generator.integers(256)
        path.write_bytes(changed)
        try:
            read = npz_files.tensors(path)
        except ValueError as error:
            assert os.fspath(path) in str(error)
        else:
            assert sum(tensor.numel() for tensor in read.values()) < len(data)


def test_loading_holds_the_weights_and_little_more(tmp_path: Path) -> None:
    d_in, d_sae = 512, 2**16  # 256 MB in float32
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_enc": d_sae, "b_dec": d_in, "threshold": d_sae}
    np.savez(tmp_path / "params.npz", **{name: np.zeros(shape, dtype="float16") for name, shape in shapes.items()})
    assert memory.of_loading(tmp_path) < 1.25
