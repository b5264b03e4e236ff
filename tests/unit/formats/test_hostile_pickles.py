"""Pickles and archives whose few bytes ask for much memory or time, or for values that are not there, are refused."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import pytest
import torch

from sae_training.formats import pickles
from sae_training.sparse_autoencoder import SparseAutoencoder


def integer(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little")
    return b"\x8a" + bytes([len(data)]) + data


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def doubled(kind: bytes, times: int) -> bytes:
    """A value of two of a value of two of ...: put in the memo, and taken from it twice."""
    program = b"K\x01"
    for _ in range(times):
        program += {b"l": b"q\x000]h\x00ah\x00a", b"t": b"q\x000h\x00h\x00\x86"}[kind]
    return program


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"


def tensor(n_values: int, offset: bytes, size: bytes, stride: bytes) -> bytes:
    """A program that makes a tensor of the storage 0 of `n_values`."""
    storage = STORAGE + integer(n_values) + b"tQ"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + size + stride + b"\x89)tR."


def one(value: int) -> bytes:
    return integer(value) + b"\x85"


PROGRAMS = {
    "bytearray": b"\x80\x02c__builtin__\nbytearray\n" + one(3 * 2**30) + b"R.",
    "bytearray8": b"\x80\x05\x96" + struct.pack("<Q", 3 * 2**30) + b"x.",
    "range": b"\x80\x02c__builtin__\nlist\nc__builtin__\nrange\n" + one(2**40) + b"R\x85R.",
    "doubled lists": b"\x80\x02}(" + text("cfg") + b"}" + text("device") + doubled(b"l", 40)
    + b"s" + text("state_dict") + b"}u.",
    "doubled tuples": b"\x80\x02" + doubled(b"t", 40) + b".",
    "doubled tuples as a key": b"\x80\x02}" + doubled(b"t", 40) + b"K\x01s.",
    "doubled tuples in a set": b"\x80\x04\x8f(" + doubled(b"t", 40) + b"\x90.",
    "doubled tuples in ordered pairs": b"\x80\x02ccollections\nOrderedDict\n](" + doubled(b"t", 40)
    + b"K\x01\x86e\x85R.",
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "a dict in itself": b"\x80\x02}q\x00K\x01h\x00s.",
    "numbers of one hash": b"\x80\x02}(" + b"".join(integer(i * (2**61 - 1)) + b"N" for i in range(1, 100_000)) + b"u.",
    "attributes again and again": b"\x80\x02}q\x00(" + b"".join(b"K" + bytes([i]) + b"N" for i in range(200)) + b"u0"
    + b"csae_lens.x\nC\nq\x01" + b"h\x01)\x81h\x00b" * 90_000 + b".",
    "a long text again and again": b"\x80\x02" + text("x" * 10**6) + b"q\x000c_codecs\nencode\nq\x01"
    + b"h\x01h\x00\x85R" * 100_000 + b".",
    "sizes again and again": b"\x80\x02](" + b"K\x01" * 1000 + b"eq\x000ctorch\nSize\nq\x01"
    + b"h\x01h\x00\x85R" * 90_000 + b".",
    "marks": b"\x80\x02" + b"(" * 5_000_000 + b".",
    "lists": b"\x80\x02" + b"]" * 5_000_000 + b".",
    "a method of a stand-in": b"\x80\x02csae_lens.x\nC\n)\x81}" + text("append") + b"ctorch\ndevice\nsb" + b"K\x01a.",
    "no tensor": b"\x80\x02ctorch._utils\n_rebuild_parameter\nK\x01\x88)\x87R.",
    "an extension": b"\x80\x02\x84\xff\xff\xff\x7f.",
    "an instance by name": b"(ios\nsystem\n.",
    "an object": b"(cos\nsystem\nS'true'\no.",
    "an object with keywords": b"\x80\x04cos\nsystem\n)}\x92.",
    "a class of stand-ins in torch": b"\x80\x02ctorch.nn.modules.container\nSequential.__init__.__globals__\n.",
    "digits": b"I" + b"9" * 10**6 + b"\n.",
    "a long number": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",
    "a negative length": b"\x80\x02\x8b" + struct.pack("<i", -1) + b"x.",
    "beyond the end": tensor(6, b"K\x04", one(3), one(1)),
    "a stride beyond the end": tensor(6, b"K\x00", one(2), one(6)),
    "a negative offset": tensor(6, b"J\xff\xff\xff\xff", one(3), one(1)),
    "a negative stride": tensor(6, b"K\x05", one(3), b"J\xff\xff\xff\xff\x85"),
    "a negative size": tensor(6, b"K\x00", b"J\xff\xff\xff\xff\x85", one(1)),
    "sizes that overflow": tensor(6, b"K\x00", integer(2**33) + integer(2**31) + b"\x86", b"K\x00K\x00\x86"),
    "sizes of 2**70": tensor(6, b"K\x00", one(2**70), one(1)),
    "values repeated by a stride of 0": tensor(6, b"K\x00", one(10**9), one(0)),
    "a storage larger than its file": tensor(2**33, b"K\x00", one(2**33), one(1)),
    "a shape that is none": tensor(6, b"K\x00", text("abc") + b"\x85", one(1)),
    "axes without end": tensor(6, b"K\x00", b"(" + b"K\x01" * 1000 + b"t", b"(" + b"K\x01" * 1000 + b"t"),
    "another key": b"\x80\x02" + STORAGE.replace(b"\x01\x00\x00\x000", b"\x0a\x00\x00\x00../../../x") + b"K\x06tQ.",
    "an id of a module": b"\x80\x02(X\x06\x00\x00\x00modulecsae_lens.x\nC\nX\x01\x00\x00\x00aX\x01\x00\x00\x00btQ.",
    "an id of numbers": b"\x80\x02K\x01Q.",
    "a storage alone": b"\x80\x02" + STORAGE + b"K\x06tQ.",
}  # fmt: skip


def in_zip(program: bytes, **others: bytes) -> bytes:
    room = io.BytesIO()
    with zipfile.ZipFile(room, "w") as archive:
        for name, content in {"data.pkl": program, "byteorder": b"little", "data/0": bytes(24), **others}.items():
            archive.writestr(f"archive/{name}", content)
    return room.getvalue()


def in_legacy(program: bytes, keys: list[Any] = ["0"], stated: int = 6) -> bytes:  # noqa: B006 - not changed
    parts = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}]
    before = b"".join(pickle.dumps(part, 2) for part in parts)
    return before + program + pickle.dumps(keys, 2) + struct.pack("<q", stated) + bytes(24)


def test_programs_that_ask_for_much_are_refused_in_little_memory(tmp_path: Path) -> None:
    paths = []
    for name, program in PROGRAMS.items():
        forms = {
            "zip.pt": in_zip(program),
            "legacy.pt": in_legacy(program),
            "pkl": program,
            "pkl.gz": gzip.compress(program, 1),
        }
        if len(program) > 10_000:  # long ones take a second each
            forms = {"zip.pt": forms["zip.pt"]}
        for ending, content in forms.items():
            paths.append(tmp_path / f"{name.replace(' ', '_')}.{ending}")
            paths[-1].write_bytes(content)
    hostile.all_refuse(paths, ("load_from_pretrained", "whole"))


def packed(kind: int) -> bytes:
    room = io.BytesIO()
    with zipfile.ZipFile(room, "w", kind) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
    return room.getvalue()


def with_bytes(content: bytes, old: bytes, new: bytes) -> bytes:
    assert old in content
    return content.replace(old, new)


def with_directory_of(n_files: int) -> bytes:
    entry = b"PK\x01\x02" + bytes(24) + struct.pack("<H", 8) + bytes(16) + b"archives"
    entries = entry * n_files
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, len(entries), 4, 0)
    return b"PK\x03\x04" + entries + end


def in_tar() -> bytes:
    room = io.BytesIO()
    with tarfile.open(fileobj=room, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors", "../../evil"):
            archive.addfile(tarfile.TarInfo(name))
    return room.getvalue()


WHOLE = tensor(6, b"K\x00", one(6), one(1))
SINGLE = b"\x80\x02}" + text("cfg") + b"}s" + text("state_dict") + WHOLE[2:-1] + b"s."
UNIX = b"\x14\x03\x14\x00"
FILES = {
    "lzma": lambda: packed(zipfile.ZIP_LZMA),
    "bzip2": lambda: packed(zipfile.ZIP_BZIP2),
    "encrypted": lambda: with_bytes(in_zip(WHOLE), b"PK\x01\x02" + UNIX + b"\x00", b"PK\x01\x02" + UNIX + b"\x01"),
    "torchscript": lambda: in_zip(WHOLE, **{"constants.pkl": b"\x80\x02)."}),
    "big endian": lambda: in_zip(WHOLE, byteorder=b"big"),
    "two programs": lambda: in_zip(WHOLE, **{"x/data.pkl": WHOLE}),
    "a large directory": lambda: with_directory_of(400_000),
    "storage shorter than stated": lambda: in_zip(WHOLE, **{"data/0": bytes(23)}),
    "tar": in_tar,
    "legacy, no keys": lambda: in_legacy(SINGLE, keys=[]),
    "legacy, other keys": lambda: in_legacy(SINGLE, keys=["1"]),
    "legacy, a key twice": lambda: in_legacy(SINGLE, keys=["0", "0"]),
    "legacy, keys that are none": lambda: in_legacy(SINGLE, keys=[[]]),
    "legacy, length of 2**62": lambda: in_legacy(SINGLE, stated=2**62),
    "legacy, negative length": lambda: in_legacy(SINGLE, stated=-1),
    "legacy, too long": lambda: in_legacy(with_bytes(SINGLE, integer(6), integer(7)), stated=7),
}  # fmt: skip


def test_archives_of_other_kinds_are_refused_in_little_memory(tmp_path: Path) -> None:
    for name, content in FILES.items():
        (tmp_path / f"{name}.pt").write_bytes(content())
    hostile.all_refuse(sorted(tmp_path.iterdir()))
    assert not (tmp_path.parent.parent / "evil").exists()


@pytest.mark.parametrize("file", ["zip", "legacy"])
def test_parts_of_archives_may_share_values_and_lie_anywhere(file: str, tmp_path: Path) -> None:
    """Two views of one storage, at whatever address: what torch reads, we read."""
    both = torch.arange(24.0)
    content = {"step": 3, "a": both[:12].view(3, 4).T, "b": both[5:], "n": torch.tensor(7), "h": both.bfloat16()}
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=file == "zip")
    found = pickles.read(tmp_path / "x.pt")
    assert found["step"] == 3
    for name in "abnh":
        assert torch.equal(found[name], content[name])
        assert found[name].dtype == content[name].dtype
        assert found[name].stride() == content[name].stride()
        assert torch.equal(pickles.copied(found[name]), content[name].float())


def single() -> dict[str, Any]:
    shapes = {"W_enc": (4, 8), "b_enc": (8,), "W_dec": (8, 4), "b_dec": (4,)}
    return {"cfg": {"d_in": 4}, "state_dict": {name: torch.randn(shape) for name, shape in shapes.items()}}


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


SAVES: dict[str, Callable[[Any, Path], Any]] = {
    "zip.pt": torch.save,
    "legacy.pt": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    "plain.pkl": lambda content, path: write(path, pickle.dumps(content, 2)),
    "new.pkl": lambda content, path: write(path, pickle.dumps(content, 5)),
    "packed.pkl.gz": lambda content, path: write(path, gzip.compress(pickle.dumps(content))),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAVES)
def test_every_form_is_read_whole_and_refused_when_truncated(name: str, tmp_path: Path) -> None:
    content, path = single(), tmp_path / name
    SAVES[name](content, path)
    sae = SparseAutoencoder.load_from_pretrained(path)
    for key, value in content["state_dict"].items():
        assert torch.equal(getattr(sae, key), value)
    whole = path.read_bytes()
    for length in {*range(0, len(whole), 61), len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=name):
            SparseAutoencoder.load_from_pretrained(path)
