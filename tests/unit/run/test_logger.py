"""The run logger with real files and real wandb runs, read back from the file that wandb writes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from wandb_file import artifacts, history, the_run, wandb_files

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.run.logger import RunLogger
from sae_training.run.wandb_mirror import WandbOptions

FAKE_KEY = "a" * 40


@pytest.fixture(autouse=True)
def clean_wandb(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No settings, key or files of the user's own; a fresh wandb session for each test."""
    home = tmp_path_factory.mktemp("wandb_home")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    wandb.teardown()
    yield
    wandb.teardown()


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


def test_log_timing_stays_out_of_the_file(tmp_path: Path) -> None:
    with open_file(tmp_path) as logger:
        logger.log_timing({"time/tokens_per_second": 1234.5}, step=1)
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
        logger.log_timing({"time/tokens_per_second": 99.0}, step=10)
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
        logger.log_words({"metrics/CE_loss_score": "no score: nothing changes"}, step=10)
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
        logger.log_artifact(name, "model", [weights], metadata={"d_in": 16}, aliases=["final_model"])
        logger.log_artifact(
            f"{name}_log_feature_sparsity",
            "log_feature_sparsity",
            [sparsity],
            aliases=["final_model"],
        )
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
        logger.log_artifact("gone", "model", [tmp_path / "gone.safetensors"])
        logger.log({"loss": 1.0}, step=1, tokens=8)
    (file,) = wandb_files(tmp_path)
    assert len(said) == 1
    assert "artifact gone was not logged" in said[0]
    assert history(file)[0]["loss"] == 1.0


def test_artifact_metadata_of_more_than_100_keys_is_kept(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"w")
    metadata = {f"field_{number}": number for number in range(101)}
    with open_logger(tmp_path, Said()) as logger:
        logger.log_artifact("n" * 200, "model", [tmp_path / "w"], metadata=metadata)
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
    assert (tmp_path / "wandb_run_id.txt").read_text().strip() == "agent456"
    assert said == []


def test_open_run_of_the_caller_is_used_and_left_open(tmp_path: Path) -> None:
    with wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(silent=True)) as run:
        with open_logger(tmp_path / "run", Said()) as logger:
            logger.log({"loss": 2.0}, step=1, tokens=8)
        assert wandb.run is run
        run.log({"later": 1.0}, step=2)
        assert run.config["model_name"] == "demo"
    (file,) = wandb_files(tmp_path)
    assert [row.get("loss", row.get("later")) for row in history(file)] == [2.0, 1.0]


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
    with RunLogger(tmp_path, config={}, wandb=WandbOptions.of(cfg, "a name"), notify=said) as logger:
        logger.log({"loss": 1.0}, step=1, tokens=8)
        logger.log_artifact("name", "model", [tmp_path / "missing"])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert said == []


def test_options_are_those_of_the_config() -> None:
    cfg = LanguageModelSAERunnerConfig(
        log_to_wandb=True, wandb_mode="offline", wandb_project="a_project", wandb_entity="an_entity"
    )
    assert WandbOptions.of(cfg, "a name", group="a_group") == WandbOptions(
        mode="offline", project="a_project", entity="an_entity", name="a name", group="a_group"
    )


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
        assert logger.wandb_url is None
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


class WandbServer(ThreadingHTTPServer):
    """Answers as little of wandb's protocol as a run needs, until it is told to fail."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), WandbRequest)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.failing = False
        self.history: list[dict[str, Any]] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # the other side hangs up as it likes


class WandbRequest(BaseHTTPRequestHandler):
    server: WandbServer  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.failing:
            self.close_connection = True
            return
        data = {}
        if self.path == "/graphql":
            data = self.answer(json.loads(body))
        elif self.path.endswith("/file_stream"):
            streamed = json.loads(body).get("files", {}).get("wandb-history.jsonl", {})
            self.server.history += map(json.loads, streamed.get("content", []))
        answer = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_PUT = do_POST

    def answer(self, query: dict[str, Any]) -> dict[str, Any]:
        variables = query.get("variables", {})
        if query.get("operationName") == "UpsertBucket":
            project = {"id": "P", "name": "a_project", "entity": {"id": "E", "name": "an_entity"}}
            bucket = {"id": "B", "name": variables["name"], "displayName": "", "project": project}
            return {"upsertBucket": {"bucket": bucket | {"historyLineCount": 0}, "inserted": True}}
        if query.get("operationName") == "CreateRunFiles":
            files = [{"name": n, "uploadUrl": f"{self.server.url}/{n}"} for n in variables["files"]]
            return {"createRunFiles": {"runID": "B", "uploadHeaders": [], "files": files}}
        return {}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        wandb.teardown()
        server.shutdown()
        thread.join()


def test_key_and_server_mean_online(tmp_path: Path, server: WandbServer) -> None:
    said = Said()
    with open_logger(tmp_path, said, mode=None) as logger:
        assert logger.wandb_url is not None
        assert logger.wandb_url.startswith(f"{server.url}/an_entity/a_project/runs/")
        logger.log({"loss": 1.0}, step=1, tokens=8)
        logger.log({"loss": 0.5}, step=2, tokens=16)
    assert [(row["_step"], row["loss"]) for row in server.history] == [(1, 1.0), (2, 0.5)]
    assert said == []


def test_server_that_dies_is_said_once_and_waited_for_a_bounded_time(tmp_path: Path, server: WandbServer) -> None:
    said = Said()
    logger = open_logger(tmp_path, said, mode="online", finish_timeout_s=1.0)
    logger.log({"loss": 1.0}, step=1, tokens=8)
    server.failing = True
    logger.log({"loss": 0.5}, step=2, tokens=16)
    start = time.monotonic()
    logger.close()
    assert time.monotonic() - start < 20
    assert len(said) == 1
    assert "not everything was uploaded" in said[0]
    assert [row["loss"] for row in lines(tmp_path)] == [1.0, 0.5]
    (file,) = wandb_files(tmp_path)  # what `wandb sync` would upload
    assert [row["loss"] for row in history(file)] == [1.0, 0.5]


DYING_SERVICE = """
import os, signal, sys, time
from pathlib import Path
from sae_training.run.logger import RunLogger
from sae_training.run.wandb_mirror import WandbOptions

def wandb_service():
    for entry in Path("/proc").iterdir():
        try:
            parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[1]
            if parent == str(os.getpid()) and b"wandb-core" in (entry / "cmdline").read_bytes():
                return int(entry.name)
        except (OSError, IndexError):
            pass

with RunLogger(Path(sys.argv[1]), config={}, wandb=WandbOptions(mode="offline")) as logger:
    logger.log({"loss": 1.0}, step=1, tokens=8)
    os.kill(wandb_service(), signal.SIGKILL)
    time.sleep(0.5)
    for step in range(2, 6):
        logger.log({"loss": 1.0}, step=step, tokens=8 * step)
        logger.log_timing({"time": 1.0}, step=step)
        time.sleep(0.1)
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the service through /proc")
def test_dying_wandb_is_said_once_and_training_goes_on(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DYING_SERVICE, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3, 4, 5]
    assert done.stdout.count("wandb:") == 1
    assert "lost its connection" in done.stdout
    assert "Traceback" not in done.stderr


def test_missing_wandb_does_not_stop_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # makes the import fail
    said = Said()
    with open_logger(tmp_path, said) as logger:
        logger.log({"loss": 1.0}, step=1, tokens=8)
    assert len(said) == 1
    assert "cannot be imported" in said[0]
    assert lines(tmp_path)[0]["loss"] == 1.0
