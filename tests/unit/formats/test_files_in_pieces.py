"""Files that several processes write together are those of one, and each reads its own part of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_training.formats import pieces
from sae_training.parallel.shard import Shard

D, D_SAE = 6, 17  # latents that no number of processes can share evenly


def whole() -> dict[str, Tensor]:
    torch.manual_seed(0)
    W_enc = torch.randn(D_SAE, D).T  # as it lies in memory
    return {
        "W_enc": W_enc,
        "b_dec": torch.randn(D),
        "average/W_enc": W_enc.clone(),
        "average/b_enc": torch.randn(D_SAE),
        "optimizer/exp_avg.W_enc": torch.randn(D_SAE, D),
        "optimizer/exp_avg.W_skip": torch.randn(D, D),
        "optimizer/step.W_enc": torch.tensor(3.0),
        "tracker/fired": torch.arange(D_SAE),
        "tracker/revived": torch.tensor(5),
        "optimizer/exp_avg.W_dec": torch.randn(D_SAE, D, dtype=torch.float64),
    }


def parts(n: int) -> list[tuple[dict[str, Tensor], Shard]]:
    shards = [Shard(rank, n, D_SAE) for rank in range(n)]
    return [({k: pieces.own_part(k, v, v.shape, shard) for k, v in whole().items()}, shard) for shard in shards]


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("slice_bytes", [1, 100, 2**20])
def test_pieces_make_the_file_of_one_process_byte_by_byte(
    n: int, slice_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "SLICE_BYTES", slice_bytes)
    save_file({name: tensor.contiguous() for name, tensor in whole().items()}, tmp_path / "whole.safetensors")
    path = tmp_path / "pieces.safetensors"
    pieces.begin(path, *parts(n)[-1])
    for tensors, shard in parts(n):
        pieces.fill(path, tensors, shard)
    assert path.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert all(torch.equal(load_file(path)[name], tensor) for name, tensor in whole().items())


@pytest.mark.parametrize("n", [2, 3, 5])
def test_each_process_reads_its_part_of_any_file(n: int, tmp_path: Path) -> None:
    path = tmp_path / "whole.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in whole().items()}, path)
    for expected, shard in parts(n):
        found = pieces.read(path, shard)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
