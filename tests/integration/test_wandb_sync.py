"""`sae-training sync`: what wandb lacks of a run is sent later, once, whatever became of it while the run trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wandb
from small import D_SAE
from wandb_file import artifacts, history, the_run, wandb_files

from sae_training import cli
from sae_training.lm_runner import run_config
from scripts.benchmarks.wandb_server import WandbServer

pytestmark = pytest.mark.usefixtures("clean_wandb")


def steps_of(run: Path) -> list[int]:
    """The steps that metrics.jsonl has, each once, in order."""
    return [*dict.fromkeys(json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines())]


def test_sync_of_a_run_without_wandb_files_writes_what_the_run_itself_had_written(
    small_config: Callable, demo_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_config(small_config(log_to_wandb=True, wandb_mode="offline", n_checkpoints=1), demo_model).folder.path
    (live,) = wandb_files(run)
    its_rows, its_id = history(live), the_run(live).run_id
    its_artifacts = {name: artifact.digest for name, artifact in artifacts(live).items()}
    assert [row["_step"] for row in its_rows] == steps_of(run)

    assert cli.main(["sync", str(run), "--offline"]) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert wandb_files(run) == [live]

    shutil.rmtree(run / "wandb")
    assert cli.main(["sync", str(run), "--offline"]) == 0
    assert f"{len(its_rows)} steps sent, 0 were there; 4 artifacts sent" in capsys.readouterr().out
    (synced,) = wandb_files(run)
    assert the_run(synced).run_id == its_id
    of_the_moment = {"_runtime", "_timestamp", "details/tokens_per_second"}
    rows, expected = (
        [{key: value for key, value in row.items() if key not in of_the_moment} for row in its]
        for its in (history(synced), its_rows)
    )
    assert rows == expected
    name = f"sparse_autoencoder_demo_blocks.1.hook_resid_post_{D_SAE}"
    assert {name: artifact.digest for name, artifact in artifacts(synced).items()} == its_artifacts
    assert set(its_artifacts) == {name, f"{name}_log_feature_sparsity"}
    assert "final_model" in artifacts(synced)[name].aliases

    assert cli.main(["sync", str(run), "--offline"]) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert wandb_files(run) == [synced]


def test_sync_sends_a_server_what_it_lacks_and_says_what_it_refuses(
    small_config: Callable, demo_model: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_config(small_config(k=[4, 8], architecture="topk", lr=0.001), demo_model).folder.path
    members = [run / "k4", run / "k8"]
    assert cli.main(["sync", str(run)]) == 1
    assert "no API key of wandb" in capsys.readouterr().err
    wandb.teardown()  # because wandb reads the environment once
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        for sent, there in ((len(steps_of(members[0])), 0), (0, len(steps_of(members[0])))):
            assert cli.main(["sync", str(run)]) == 0
            assert capsys.readouterr().out.count(f"{sent} steps sent, {there} were there; 2 artifacts sent") == 2
            for member in members:
                assert server.steps((member / "wandb_run_id.txt").read_text().strip()) == steps_of(member)
        assert len(server.artifacts) == 4  # by content, so the second time they are no new ones
        (members[1] / "wandb_run_id.txt").write_text("another")
        server.refuses_rows = True
        assert cli.main(["sync", str(run)]) == 1
        assert f"lacks {len(steps_of(members[1]))}, from step 0 on" in capsys.readouterr().err
        server.refuses_rows = False
        assert cli.main(["sync", str(run)]) == 0
        assert server.steps("another") == steps_of(members[1])
        wandb.teardown()
