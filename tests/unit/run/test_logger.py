"""The run logger with real files and real wandb runs, read back from the file that wandb writes."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from wandb_file import artifacts, history, the_run, wandb_files

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.run import wandb_mirror
from sae_training.run.logger import RunLogger
from sae_training.run.wandb_run import Artifact, WandbOptions
from scripts.benchmarks.wandb_server import WandbServer

FAKE_KEY = "a" * 40


pytestmark = pytest.mark.usefixtures("clean_wandb")


class Said(list[str]):
    """What the logger told its user."""

    def __call__(self, message: str) -> None:
        self.append(message)


def open_logger(folder: Path, notify: Said, resume_at: int = 0, **changes: Any) -> RunLogger:
    """A logger with a wandb run, offline where `changes` of its options say no other mode."""
    options = WandbOptions(
        **{"mode": "offline", "project": "a_project", "entity": "an_entity", "name": "a name", **changes}
    )
    config = {"model_name": "demo", "lr": 0.5, "hooks": ["a", "b"]}
    return RunLogger(folder, config=config, wandb=options, resume_at=resume_at, notify=notify)


def open_file(folder: Path, notify: Said | None = None, resume_at: int = 0) -> RunLogger:
    """A logger without wandb."""
    return RunLogger(folder, config={}, resume_at=resume_at, notify=Said() if notify is None else notify)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# metrics.jsonl


def test_log_writes_one_line_at_once(tmp_path: Path) -> None:
    with open_file(tmp_path) as logger:
        logger.log({"losses/mse_loss": 0.25, "sparsity/dead_features": 3}, step=10, tokens=40)
        assert (tmp_path / "metrics.jsonl").read_text() == (
            '{"step": 10, "details/n_training_tokens": 40, "losses/mse_loss": 0.25, "sparsity/dead_features": 3}\n'
        )


def test_log_takes_scalar_tensors(tmp_path: Path) -> None:
    with open_file(tmp_path) as logger:
        logger.log({"metrics/l0": torch.tensor(1.5)}, step=1, tokens=1)  # pyright: ignore
    assert lines(tmp_path)[0]["metrics/l0"] == 1.5


def test_log_writes_null_for_what_is_not_finite(tmp_path: Path) -> None:
    with open_file(tmp_path) as logger:
        logger.log({"a": float("nan"), "b": float("inf"), "c": 1.0}, step=1, tokens=1)
    row = lines(tmp_path)[0]
    assert (row["a"], row["b"], row["c"]) == (None, None, 1.0)


def test_log_histogram_has_64_bins_over_the_finite_values(tmp_path: Path) -> None:
    values = torch.tensor([0.0, 64.0, 32.5, 32.6, float("nan"), float("-inf")])
    with open_file(tmp_path) as logger:
        logger.log_histogram("plots/density", values, step=5)
    (row,) = lines(tmp_path)
    counts, edges = row["plots/density"]["counts"], row["plots/density"]["edges"]
    assert row["step"] == 5
    assert edges == [float(edge) for edge in range(65)]
    assert {bin_: count for bin_, count in enumerate(counts) if count} == {0: 1, 32: 2, 63: 1}


def test_log_beside_stays_out_of_the_file(tmp_path: Path) -> None:
    with open_file(tmp_path) as logger:
        logger.log_beside({"time/tokens_per_second": 1234.5}, step=1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_resume_leaves_the_file_of_an_uninterrupted_run(tmp_path: Path) -> None:
    def train(logger: RunLogger, steps: range) -> None:
        for step in steps:
            logger.log({"loss": 1 / (step + 1)}, step=step, tokens=step * 8)
            logger.log_histogram("density", torch.arange(step + 2.0), step=step)

    with open_file(tmp_path / "whole") as logger:
        train(logger, range(6))

    killed = tmp_path / "killed"
    with open_file(killed) as logger:
        train(logger, range(3))
        position = logger.position()
        train(logger, range(3, 5))
    with (killed / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "lo')  # the kill came in the middle of a row
    said = Said()
    with open_file(killed, said, resume_at=position) as logger:
        train(logger, range(3, 6))

    whole = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert (killed / "metrics.jsonl").read_bytes() == whole
    assert said == []


def test_position_counts_the_bytes_of_the_file(tmp_path: Path) -> None:
    with open_file(tmp_path) as logger:
        assert logger.position() == 0
        logger.log({"loss": 1.0}, step=1, tokens=8)
        assert logger.position() == (tmp_path / "metrics.jsonl").stat().st_size > 0


def test_new_run_starts_the_file_anew(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with open_file(tmp_path) as logger:
        logger.log({}, step=7, tokens=56)
    assert [row["step"] for row in lines(tmp_path)] == [7]


def test_resume_says_when_rows_are_missing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    said = Said()
    open_file(tmp_path, said, resume_at=500).close()
    assert len(said) == 1
    assert "found 12 bytes" in said[0]
    assert "expected the 500" in said[0]
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


# wandb, offline


def test_wandb_holds_the_rows_under_their_names_and_steps(tmp_path: Path) -> None:
    said = Said()
    with open_logger(tmp_path, said) as logger:
        logger.log({"losses/mse_loss": 0.5, "metrics/l0": 4.0}, step=10, tokens=80)
        logger.log({"metrics/CE_loss_score": 0.75}, step=10, tokens=80)
        logger.log_beside({"time/tokens_per_second": 99.0}, step=10)
        logger.log({"losses/mse_loss": float("nan")}, step=20, tokens=160)
    (file,) = wandb_files(tmp_path)
    first, second = history(file)
    assert (
        first
        | {
            "_step": 10,
            "details/n_training_tokens": 80,
            "losses/mse_loss": 0.5,
            "metrics/l0": 4.0,
            "metrics/CE_loss_score": 0.75,
            "time/tokens_per_second": 99.0,
        }
        == first
    )
    assert second["_step"] == 20
    assert second["losses/mse_loss"] != second["losses/mse_loss"]
    assert said == []


def test_wandb_holds_words_in_place_of_a_figure(tmp_path: Path) -> None:
    with open_logger(tmp_path, Said()) as logger:
        logger.log({"metrics/CE_loss_score": float("nan"), "base/rows": 64}, step=10, tokens=80)
        logger.log_beside({"metrics/CE_loss_score": "no score: nothing changes"}, step=10)
    (file,) = wandb_files(tmp_path)
    (row,) = history(file)
    assert row["metrics/CE_loss_score"] == "no score: nothing changes"
    assert "base/rows" not in row
    assert lines(tmp_path) == [{"step": 10, "details/n_training_tokens": 80, "metrics/CE_loss_score": None}]


def test_wandb_holds_the_histogram_of_the_file(tmp_path: Path) -> None:
    with open_logger(tmp_path, Said()) as logger:
        logger.log_histogram("plots/feature_density_line_chart", torch.linspace(-10, 0, 33), step=3)
    (file,) = wandb_files(tmp_path)
    mirrored = history(file)[0]["plots/feature_density_line_chart"]
    kept = lines(tmp_path)[0]["plots/feature_density_line_chart"]
    assert mirrored["_type"] == "histogram"
    assert mirrored["values"] == kept["counts"]
    assert mirrored["bins"] == kept["edges"]
    assert sum(kept["counts"]) == 33


def test_wandb_run_has_config_project_entity_and_name(tmp_path: Path) -> None:
    open_logger(tmp_path, Said()).close()
    (file,) = wandb_files(tmp_path)
    run = the_run(file)
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (run.project, run.entity, run.display_name) == ("a_project", "an_entity", "a name")
    assert (config["model_name"], config["lr"], config["hooks"]) == ("demo", 0.5, ["a", "b"])


def test_wandb_artifacts_have_type_alias_metadata_and_files(tmp_path: Path) -> None:
    weights, sparsity = tmp_path / "sae.safetensors", tmp_path / "log_feature_sparsity.safetensors"
    weights.write_bytes(b"weights")
    sparsity.write_bytes(b"sparsity")
    said = Said()
    with open_logger(tmp_path, said) as logger:
        name = "sparse_autoencoder_org/model_blocks.0.hook_mlp_out_64"
        logger.log_artifact(Artifact(name, "model", [weights], metadata={"d_in": 16}, aliases=["final_model"]))
        sparse = Artifact(f"{name}_log_feature_sparsity", "log_feature_sparsity", [sparsity], aliases=["final_model"])
        logger.log_artifact(sparse)
    (file,) = wandb_files(tmp_path)
    found = artifacts(file)
    safe = "sparse_autoencoder_org_model_blocks.0.hook_mlp_out_64"
    assert set(found) == {safe, f"{safe}_log_feature_sparsity"}
    model, frequencies = found[safe], found[f"{safe}_log_feature_sparsity"]
    assert (model.type, set(model.aliases)) == ("model", {"final_model", "latest"})
    assert json.loads(model.metadata) == {"d_in": 16}
    assert [entry.local_path for entry in model.manifest.contents] == [str(weights)]
    assert frequencies.type == "log_feature_sparsity"
    assert set(frequencies.aliases) == {"final_model", "latest"}
    assert said == []


def test_artifact_that_cannot_be_logged_is_said_and_metrics_go_on(tmp_path: Path) -> None:
    said = Said()
    with open_logger(tmp_path, said) as logger:
        logger.log_artifact(Artifact("gone", "model", [tmp_path / "gone.safetensors"]))
        logger.log({"loss": 1.0}, step=1, tokens=8)
    (file,) = wandb_files(tmp_path)
    assert len(said) == 1
    assert "artifact gone was not logged" in said[0]
    assert history(file)[0]["loss"] == 1.0


def test_artifact_metadata_of_more_than_100_keys_is_kept(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"w")
    metadata = {f"field_{number}": number for number in range(101)}
    with open_logger(tmp_path, Said()) as logger:
        logger.log_artifact(Artifact("n" * 200, "model", [tmp_path / "w"], metadata=metadata))
    (file,) = wandb_files(tmp_path)
    ((name, artifact),) = artifacts(file).items()
    assert len(name) == 128
    assert json.loads(artifact.metadata) == {"cfg": metadata}


def test_resumed_run_keeps_its_wandb_id(tmp_path: Path) -> None:
    open_logger(tmp_path, Said()).close()
    run_id = (tmp_path / "wandb_run_id.txt").read_text().strip()
    open_logger(tmp_path, Said()).close()
    assert [the_run(file).run_id for file in wandb_files(tmp_path)] == [run_id, run_id]


def test_sweep_agent_decides_the_run_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep123")
    monkeypatch.setenv("WANDB_RUN_ID", "agent456")
    monkeypatch.setenv("WANDB_PROJECT", "sweeps_project")
    said = Said()
    open_logger(tmp_path, said).close()
    (file,) = wandb_files(tmp_path)
    run = the_run(file)
    assert (run.run_id, run.sweep_id, run.project) == ("agent456", "sweep123", "sweeps_project")
    run_id, place = (tmp_path / "wandb_run_id.txt").read_text().splitlines()
    assert run_id == "agent456" and place.endswith("/sweeps_project")
    assert said == []


def test_open_run_of_the_caller_is_used_and_left_open(tmp_path: Path) -> None:
    with wandb.init(mode="offline", project="theirs", dir=tmp_path, settings=wandb.Settings(silent=True)) as run:
        with open_logger(tmp_path / "run", Said()) as logger:
            logger.log({"loss": 2.0}, step=1, tokens=8)
        assert wandb.run is run
        run.log({"later": 1.0}, step=2)
        assert run.config["model_name"] == "demo"
    (file,) = wandb_files(tmp_path)
    assert [row.get("loss", row.get("later")) for row in history(file)] == [2.0, 1.0]
    open_logger(tmp_path / "run", Said()).close()  # without the caller, as `sync` does, it goes on in the same run
    (own,) = wandb_files(tmp_path / "run")
    assert (the_run(own).run_id, the_run(own).project) == (run.id, "theirs")


def test_loggers_of_a_group_share_the_callers_run_without_a_step_lost(tmp_path: Path) -> None:
    """One has rows already when the other is opened, as after a resume; each has a histogram in a row of its own."""
    said, names, steps = Said(), ("k8", "k32"), range(1, 51)
    folders = {name: tmp_path / "run" / name for name in names}
    earlier = open_file(folders["k8"])
    for step in range(1, 21):
        earlier.log({"loss": 8 / step}, step=step, tokens=step)
    position = earlier.position()
    earlier.close()
    with wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(silent=True)):
        first = open_logger(folders["k8"], said, resume_at=position, group="run")
        time.sleep(2 * wandb_mirror.POLL_S)  # in which its thread reads what is there
        second = open_logger(folders["k32"], said, group="run")
        for step in steps:
            if step > 20:
                first.log({"loss": 8 / step}, step=step, tokens=step)
            second.log({"loss": 32 / step}, step=step, tokens=step)
            second.log_histogram("density", torch.arange(step + 1.0), step=step)
            time.sleep(wandb_mirror.POLL_S / 10)  # so that their threads read some at a time
        first.close()
        second.close()
    (file,) = wandb_files(tmp_path)
    rows = history(file)
    assert [row["_step"] for row in rows] == [*steps]
    assert [(row["k8/loss"], row["k32/loss"]) for row in rows] == [(8 / step, 32 / step) for step in steps]
    assert [sum(row["k32/density"]["values"]) for row in rows] == [step + 1 for step in steps]
    assert said == []


def test_rows_in_the_callers_run_do_not_wait_for_a_logger_that_has_stopped(tmp_path: Path) -> None:
    with wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(silent=True)) as run:
        loggers = [open_logger(tmp_path / "run" / name, Said(), group="run") for name in ("k8", "k32")]
        for step in range(1, 201):
            for logger in loggers if step <= 3 else loggers[1:]:
                logger.log({"loss": 1.0}, step=step, tokens=step)
        until(lambda: run.step >= 199)
        for logger in loggers:
            logger.close()
    (file,) = wandb_files(tmp_path)
    rows = history(file)
    assert [row["_step"] for row in rows if "k8/loss" in row] == [1, 2, 3]
    assert [row["_step"] for row in rows if "k32/loss" in row] == [*range(1, 201)]


def test_open_run_of_the_caller_goes_on_after_a_mirror_that_did_not_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_mirror, "GRACE_S", 0.1)
    said = Said()
    with wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(silent=True)) as run:
        with wandb_mirror.session.lock:  # as another mirror holds it that wandb does not answer
            open_logger(tmp_path / "run", said, finish_timeout_s=0.0).close()
        assert wandb.run is run
        run.log({"later": 1.0}, step=2)
    (file,) = wandb_files(tmp_path)
    assert [row["later"] for row in history(file)] == [1.0]
    assert len(said) == 1
    assert "did not end within 0 s" in said[0]


def test_wandb_leaves_random_generators_and_signal_handlers_alone(tmp_path: Path) -> None:
    def outside() -> tuple[Any, ...]:
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        return (
            random.getstate(),
            torch.get_rng_state().tolist(),
            *handlers,
            sys.stdout,
            sys.stderr,
        )

    before = outside()
    with open_logger(tmp_path, Said()) as logger:
        logger.log({"loss": 1.0}, step=1, tokens=8)
        assert outside() == before
    assert outside() == before


# wandb off, or failing


@pytest.mark.parametrize("how", ["log_to_wandb", "wandb_mode", "WANDB_MODE"])
def test_disabled_wandb_leaves_no_trace(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, dict[str, Any]] = {
        "log_to_wandb": {"log_to_wandb": False},
        "wandb_mode": {"wandb_mode": "disabled"},
        "WANDB_MODE": {},
    }
    monkeypatch.setenv("WANDB_MODE", "disabled" if how == "WANDB_MODE" else "offline")
    cfg = LanguageModelSAERunnerConfig(**{"log_to_wandb": True, **changes[how]})
    said = Said()
    options = WandbOptions.of_member(cfg, tmp_path, tmp_path) if cfg.log_to_wandb else None
    with RunLogger(tmp_path, config={}, wandb=options, notify=said) as logger:
        logger.log({"loss": 1.0}, step=1, tokens=8)
        logger.log_artifact(Artifact("name", "model", [tmp_path / "missing"]))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert said == []


def test_options_are_those_of_the_config() -> None:
    cfg = LanguageModelSAERunnerConfig(
        log_to_wandb=True, wandb_mode="offline", wandb_project="a_project", wandb_entity="an_entity"
    )
    expected = WandbOptions(mode="offline", project="a_project", entity="an_entity", name="a_run")
    assert WandbOptions.of_member(cfg, Path("runs/a_run"), Path("runs/a_run")) == expected
    expected = dataclasses.replace(expected, name="a_run/k8", group="a_run")
    assert WandbOptions.of_member(cfg, Path("runs/a_run"), Path("runs/a_run/k8")) == expected


def test_wandb_is_imported_only_when_wanted(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from sae_training.run.logger import RunLogger\n"
        f"RunLogger(Path({str(tmp_path)!r}), config={{}}).close()\n"
        "assert 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("mode", [None, "online"])
def test_no_key_means_offline_and_is_said_once(mode: str | None, tmp_path: Path) -> None:
    said = Said()
    with open_logger(tmp_path, said, mode=mode) as logger:
        logger.log({"loss": 1.0}, step=1, tokens=8)
    (file,) = wandb_files(tmp_path)
    assert file.parent.name.startswith("offline-run-")
    assert history(file)[0]["loss"] == 1.0
    assert len(said) == 1
    assert "no API key" in said[0]


@pytest.mark.parametrize("where", ["environment", "netrc"])
def test_unreachable_server_means_offline_and_is_said_once(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    if where == "environment":
        monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
    else:
        netrc_file = Path(os.environ["NETRC"])
        netrc_file.write_text(f"machine 127.0.0.1:1\n  login user\n  password {FAKE_KEY}\n")
        netrc_file.chmod(0o600)
    said = Said()
    mode = "online" if where == "environment" else None
    with open_logger(tmp_path, said, mode=mode, init_timeout_s=1.0) as logger:
        logger.log({"loss": 1.0}, step=1, tokens=8)
    assert len(said) == 1
    assert "no connection" in said[0]
    assert lines(tmp_path)[0]["loss"] == 1.0
    (file,) = (file for file in wandb_files(tmp_path) if file.parent.name.startswith("offline"))
    assert history(file)[0]["loss"] == 1.0
    assert the_run(file).run_id == (tmp_path / "wandb_run_id.txt").read_text().strip()


def test_malformed_key_does_not_stop_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "short")
    said = Said()
    with open_logger(tmp_path, said, mode=None) as logger:
        logger.log({"loss": 1.0}, step=1, tokens=8)
    assert len(said) == 1
    assert "offline" in said[0]
    assert lines(tmp_path)[0]["loss"] == 1.0


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
        yield server
        wandb.teardown()


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_key_and_server_mean_online(tmp_path: Path, server: WandbServer) -> None:
    said = Said()
    with open_logger(tmp_path, said, mode=None) as logger:
        logger.log({"loss": 1.0}, step=1, tokens=8)
        logger.log({"loss": 0.5}, step=2, tokens=16)
    (lines_there,) = server.history.values()
    assert [(row["_step"], row["loss"]) for _, row in sorted(lines_there.items())] == [(1, 1.0), (2, 0.5)]
    assert said == []


def test_server_that_dies_is_said_once_and_waited_for_a_bounded_time(tmp_path: Path, server: WandbServer) -> None:
    said = Said()
    logger = open_logger(tmp_path, said, mode="online", finish_timeout_s=1.0)
    logger.log({"loss": 1.0}, step=1, tokens=8)
    until(lambda: "UpsertBucket" in server.asked)
    server.mood = "never"
    logger.log({"loss": 0.5}, step=2, tokens=16)
    start = time.monotonic()
    logger.close()
    assert time.monotonic() - start < 20
    assert len(said) == 1
    assert "not everything was uploaded" in said[0]
    assert [row["loss"] for row in lines(tmp_path)] == [1.0, 0.5]
    (file,) = wandb_files(tmp_path)  # what `wandb sync` would upload
    assert [row["loss"] for row in history(file)] == [1.0, 0.5]


DISTURBED_SERVICE = """
import os, signal, sys, time
from pathlib import Path
from sae_training.run.logger import RunLogger
from sae_training.run.wandb_run import WandbOptions

folder, number = Path(sys.argv[1]), signal.Signals[sys.argv[2]]

def wandb_service():
    for entry in Path("/proc").iterdir():
        try:
            parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[1]
            if parent == str(os.getpid()) and b"wandb-core" in (entry / "cmdline").read_bytes():
                return int(entry.name)
        except (OSError, IndexError):
            pass

def log(steps):
    for step in steps:
        logger.log({f"figure_{number}": step / 7 for number in range(20)}, step=step, tokens=8 * step)

with RunLogger(folder, config={}, wandb=WandbOptions(mode="offline", finish_timeout_s=1.0)) as logger:
    log(range(1, 301))
    while not any(file.stat().st_size > 40_000 for file in folder.glob("wandb/*run-*/*.wandb")):
        time.sleep(0.1)  # until wandb has written some of them
    os.kill(wandb_service(), number)
    log(range(301, 601))
"""


def disturbed(folder: Path, number: str) -> str:
    """Log 600 steps, with a signal to wandb's service after 300, and return what was said."""
    script = [sys.executable, "-c", DISTURBED_SERVICE, str(folder), number]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert [row["step"] for row in lines(folder)] == list(range(1, 601))
    return done.stdout


def steps_in_files(folder: Path) -> list[int]:
    return sorted(row["_step"] for file in wandb_files(folder) for row in history(file))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the service through /proc")
def test_killed_wandb_is_said_once_and_opened_anew_without_a_step_lost_or_doubled(tmp_path: Path) -> None:
    said = disturbed(tmp_path, "SIGKILL")
    assert said.count("wandb:") == 1
    assert "lost its connection" in said
    assert len(wandb_files(tmp_path)) == 2
    assert steps_in_files(tmp_path) == list(range(1, 601))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the service through /proc")
def test_wandb_that_stands_still_is_waited_for_a_bounded_time(tmp_path: Path) -> None:
    said = disturbed(tmp_path, "SIGSTOP")
    assert said.count("wandb:") == 1
    assert "did not end within 11 s" in said
    assert f"sync {tmp_path}" in said
    found = steps_in_files(tmp_path)
    assert found == list(range(1, len(found) + 1))


def test_resumed_run_goes_on_behind_what_wandb_holds(tmp_path: Path) -> None:
    """Rows after the checkpoint are logged again; the last step of a run that stopped waits for what is added to it."""

    def train(logger: RunLogger, steps: range) -> None:
        for step in steps:
            logger.log({"loss": 1 / (step + 1)}, step=step, tokens=step * 8)
            logger.log_histogram("density", torch.arange(step + 2.0), step=step)

    with pytest.raises(KeyboardInterrupt), open_logger(tmp_path, Said()) as logger:
        train(logger, range(3))
        position = logger.position()
        train(logger, range(3, 5))
        logger.log({"loss": 1 / 6}, step=5, tokens=40)
        raise KeyboardInterrupt
    assert steps_in_files(tmp_path) == [0, 1, 2, 3, 4]
    said = Said()
    with open_logger(tmp_path, said, resume_at=position) as logger:
        train(logger, range(3, 8))
    rows = [row for file in wandb_files(tmp_path) for row in history(file)]
    assert [(row["_step"], row["loss"]) for row in rows] == [(step, 1 / (step + 1)) for step in range(8)]
    assert all(sum(row["density"]["values"]) == row["_step"] + 2 for row in rows)
    assert said == []


def test_missing_wandb_does_not_stop_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # makes the import fail
    said = Said()
    with open_logger(tmp_path, said) as logger:
        logger.log({"loss": 1.0}, step=1, tokens=8)
    assert len(said) == 1
    assert "cannot be imported" in said[0]
    assert lines(tmp_path)[0]["loss"] == 1.0
