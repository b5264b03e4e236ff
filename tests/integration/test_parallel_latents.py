"""Processes that hold the latents of one dictionary together under torchrun: the run of one, whatever stops them."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import all_end_well, check_same_run, files_of, ranks, run_by_torchrun, stopped_after_a_checkpoint, train
from safetensors.torch import load_file
from test_parallel_data import RUN

from sae_training import cli
from sae_training.formats.safetensors_files import header
from sae_training.sparse_autoencoder import SparseAutoencoder

NOT_OF_JUMPRELU = ("k", "auxk_coefficient", "normalize_activations", "micro_batch_size")
JUMPRELU: dict[str, Any] = {
    **{name: value for name, value in RUN.items() if name not in NOT_OF_JUMPRELU},
    "architecture": "jumprelu",
    "expansion_factor": [2, 3],
    "target_l0": 10,
    "ema_decay": 0.9,
    "clip_grad_norm": 0.1,
    "n_checkpoints": 2,
}


def latents_of(folder: Path, run: dict[str, Any] = RUN, **changes: Any) -> list[str]:
    return train({**run, "parallel": "latents", "n_checkpoints": 2, **changes}, folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    assert cli.main(latents_of(folder)) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two, by torchrun."""
    folder = tmp_path_factory.mktemp("sharded")
    return run_by_torchrun(2, folder, *latents_of(folder))


def check_same_tensors(found: Path, expected: Path) -> None:
    """The same names and values in the files of two runs, up to the order of sums."""
    for path in sorted(expected.rglob("*.safetensors")):
        same = found / path.relative_to(expected)
        if path.name == "store.safetensors":
            check_same_rows(same.parent, path)
            continue
        tensors, theirs = load_file(path), load_file(same)
        assert header(path).starts == header(same).starts
        for name, tensor in tensors.items():
            torch.testing.assert_close(theirs[name], tensor, rtol=1e-8, atol=1e-8, msg=f"{path} {name}")


def check_same_rows(found: Path, expected: Path) -> None:
    """The rows of one process's buffer, each in the part of the process that keeps it."""
    of_one, parts = load_file(expected), [load_file(path) for path in sorted(found.glob("store*.safetensors"))]
    places = torch.cat([part.get("places", torch.arange(len(of_one["order"]))) for part in parts])
    assert torch.equal(places.sort().values, torch.arange(len(of_one["order"])))
    for name in (name for name in of_one if name.startswith("buffers")):
        assert torch.equal(torch.cat([part[name] for part in parts])[places.argsort()], of_one[name])
    assert torch.equal(parts[0]["order"], of_one["order"])


@pytest.mark.slow
def test_two_processes_make_the_run_of_one(alone: Path, sharded: Path) -> None:
    check_same_run(sharded, alone)
    assert {*files_of(sharded)} == {*files_of(alone)}
    check_same_tensors(sharded, alone)
    ours, theirs = (SparseAutoencoder.load_from_pretrained(run) for run in (sharded, alone))
    assert ours.d_sae == theirs.d_sae


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "n_after"), [(signal.SIGKILL, 2), (signal.SIGTERM, 2), (signal.SIGTERM, 1), (signal.SIGTERM, 3)]
)
def test_a_stopped_job_goes_on(
    number: signal.Signals, n_after: int, alone: Path, sharded: Path, tmp_path: Path
) -> None:
    run, _ = stopped_after_a_checkpoint(number, tmp_path, *latents_of(tmp_path))
    all_end_well(ranks(n_after, tmp_path, "resume", str(run)))
    if n_after == 2:
        assert files_of(run) == files_of(sharded)
    check_same_run(run, alone)
    check_same_tensors(run, alone)


@pytest.mark.slow
def test_a_mesh_makes_the_run_of_one_and_one_goes_on_with_it(alone: Path, tmp_path: Path) -> None:
    all_end_well(ranks(4, tmp_path, *latents_of(tmp_path, parallel="data,latents", mesh=[2, 2])))
    run = tmp_path / "run"
    check_same_run(run, alone)
    check_same_tensors(run, alone)
    assert {*files_of(run)} == {*files_of(alone)}
    for name in ("final", "checkpoints/step_12"):  # as if the processes had been killed before them
        shutil.rmtree(run / name)
    assert cli.main(["resume", str(run)]) == 0
    check_same_run(run, alone)
    check_same_tensors(run, alone)


@pytest.mark.slow
def test_three_processes_train_two_autoencoders_of_different_widths(tmp_path: Path) -> None:
    assert cli.main(latents_of(tmp_path / "alone", JUMPRELU)) == 0
    all_end_well(ranks(3, tmp_path, *latents_of(tmp_path / "sharded", JUMPRELU)))
    alone, sharded = (tmp_path / name / "run" for name in ("alone", "sharded"))
    check_same_tensors(sharded, alone)
    for final in alone.glob("*/final"):
        check_same_run(sharded / final.parent.name, final.parent)
    assert len([*sharded.glob("*/snapshots/*/sae.safetensors")]) == 4


def test_an_optimizer_whose_moments_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    for process in ranks(2, tmp_path, *latents_of(tmp_path, optimizer="adam8bit")):
        _, err = process.communicate()
        assert process.returncode == 1
        assert "optimizer: " in err
