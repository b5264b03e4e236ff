"""Values of plain pickles, packed or not, that are left in the file until they are used."""

from __future__ import annotations

import gzip
import pickle
import shutil
from pathlib import Path

import memory
import pytest
import reference
import torch

from sae_training.formats import pickles, unpickler
from sae_training.formats.inspection import inspect

WITH_PICKLES = [folder for folder in [*reference.FOLDERS, *reference.CROSSCODERS] if list(folder.rglob("*.pt"))]
PROTOCOL = 3  # without frames, in which small values would lie


def write(path: Path, content: object, packed: bool) -> Path:
    data = pickle.dumps(content, protocol=PROTOCOL)
    path.write_bytes(gzip.compress(data) if packed else data)
    return path


def left_in(content: dict) -> set[str]:
    return {name for name, tensor in pickles.tensors_by_name(content).items() if tensor.is_meta}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("folder", WITH_PICKLES, ids=lambda path: path.name)
def test_every_family_reads_values_that_are_left_in_the_file(
    folder: Path, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / folder.name))
    for path in copy.rglob("*.pt"):
        content = torch.load(path)
        largest = max(tensor.untyped_storage().nbytes() for tensor in pickles.tensors_by_name(content).values())
        monkeypatch.setattr(unpickler, "LARGE", largest)
        assert left_in(pickles.read(write(path, content, packed)))
    assert reference.difference(copy) == reference.difference(folder)
    told = [inspect(path / reference.facts_of(folder)["path"], full=True) for path in (copy, folder)]
    ones = [next(iter(one["autoencoders"].values())) for one in told]
    assert ones[0]["figures"] == ones[1]["figures"]


@pytest.mark.parametrize("packed", [True, False])
def test_values_are_read_in_whatever_order_and_part_they_lie(packed: bool, tmp_path: Path) -> None:
    values = torch.arange(2.0**20).view(2**10, 2**10)
    content = {"plain": values, "turned": values.T, "part": values[5:9, 3:7], "one": values[7, 8]}
    content |= {
        "bfloat16": values.bfloat16(),
        "none": values[:0],
        "deep": values.view(2**5, 2**5, 2**5, 2**5),
        "small": torch.arange(3),
    }
    read = pickles.read(write(tmp_path / "a.pkl", content, packed))
    assert left_in(read) == content.keys() - {"small"}
    for name, tensor in content.items():
        assert torch.equal(pickles.copied(read[name]), tensor.to(pickles.copied(read[name]).dtype))
    assert torch.equal(pickles.copied(read["plain"], transposed=True), values.T)


def test_a_file_that_ends_too_soon_is_named_whenever_it_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pkl.gz", {"W": torch.randn(2**9, 2**10)}, packed=True)
    data = path.read_bytes()
    read = pickles.read(path)
    for length in (len(data) // 2, len(data) - 9, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"a\.pkl\.gz"):
            pickles.read(path)
    path.write_bytes(data[: len(data) // 2])  # after it was read
    with pytest.raises(ValueError, match=r"a\.pkl\.gz: damaged"):
        pickles.copied(read["W"])


def test_more_is_not_declared_than_is_left(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pkl.gz", {"W": torch.zeros(2**10, 2**9)}, packed=True)
    data = gzip.decompress(path.read_bytes())
    size = b"M\x00\x04M\x00\x02\x86"  # (1024, 512)
    assert data.count(size) == 1
    path.write_bytes(gzip.compress(data.replace(size, b"M\x00\x08M\x00\x02\x86")))
    with pytest.raises(ValueError, match=r"declares a tensor \(2048, 512\)"):
        pickles.read(path)


def test_loading_holds_the_weights_and_little_more(tmp_path: Path) -> None:
    d_in, d_sae = 512, 2**16  # 256 MB
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_enc": d_sae, "b_dec": d_in}
    content = {"cfg": {}, "state_dict": {name: torch.zeros(shape) for name, shape in shapes.items()}}
    with (tmp_path / "old.pkl").open("wb") as file:
        pickle.dump(content, file)
    assert memory.of_loading(tmp_path / "old.pkl") < 1.25


@pytest.mark.parametrize("name", ["a.pkl", "a.pkl.gz"])
@pytest.mark.parametrize("n_bytes", [2**20, 2**40, 2**60, 2**64 - 1])
def test_bytes_that_are_not_there_end_with_the_file(n_bytes: int, name: str, tmp_path: Path) -> None:
    data = b"\x80\x04\x8e" + n_bytes.to_bytes(8, "little") + b"x" * 2**17
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(ValueError, match=r"not a readable autoencoder file"):
        pickles.read(tmp_path / name)
