"""Jobs as their folders show them. Their records are written by the code that jobs write them with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sae_training import cli
from sae_training.jobs.found import find_job, folder_named, job_at, jobs_in
from sae_training.jobs.table import duration, middle_out, table
from sae_training.machine.holder import holder_of, write_holder
from sae_training.run.record import Kind, Record

ROOT = Path(__file__).parents[3]


def write_status(folder: Path, state: str, **values: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "status.json").write_text(json.dumps({"state": state, **values}))
    return folder


def write_dead_holder(folder: Path, since: str) -> None:
    with subprocess.Popen(["sleep", "600"]) as process:
        write_holder(folder, holder_of(process.pid, since))
        process.kill()


def state_of(folder: Path) -> str:
    return job_at(folder, "a").state


def test_the_states_of_a_job_of_this_process(tmp_path: Path) -> None:
    with Record(tmp_path, "cache") as record:
        record.progress(3, 10, 64)
        job = job_at(tmp_path, "a")
        assert (job.kind, job.state, job.status["step"], job.status["total_steps"]) == ("cache", "training", 3, 10)
        assert job.holder is not None
        assert job.holder.pid == os.getpid()
    job = job_at(tmp_path, "a")
    assert (job.state, job.holder, job.status["step"]) == ("finished", None, 3)
    for error, state in ((KeyboardInterrupt, "interrupted"), (ValueError, "failed")):
        with pytest.raises(error), Record(tmp_path, "build"):
            assert state_of(tmp_path) == "training"
            raise error
        assert state_of(tmp_path) == state


def test_a_job_that_ended_without_a_word_is_lost_unless_its_result_is_there(tmp_path: Path) -> None:
    since = "2026-01-31T12:00:00Z"
    folder = write_status(tmp_path / "run", "training", started=since, step=7)
    assert state_of(folder) == "lost"  # nobody holds it
    write_dead_holder(folder, since)
    os.utime(folder / ".holder.json", (0, 0))
    job = job_at(folder, "a")
    assert (job.state, job.since, job.status["step"]) == ("lost", "1970-01-01T00:00:00Z", 7)
    (folder / "final").mkdir()
    assert state_of(folder) == "finished"


def test_one_that_goes_on_is_training_before_it_has_written_anything(tmp_path: Path) -> None:
    folder = write_status(tmp_path / "run", "interrupted", started="2026-01-31T12:00:00Z")
    record = Record(folder, "train")
    record.begin()
    assert state_of(folder) == "training"
    record.write("interrupted")  # at its end, while the process still lives
    assert state_of(folder) == "interrupted"
    record.end()
    write_dead_holder(folder, "2026-02-01T12:00:00Z")  # killed before it wrote
    assert state_of(folder) == "interrupted"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"state": 3}'])
def test_a_damaged_status_is_no_obstacle(content: str, tmp_path: Path) -> None:
    folder = write_status(tmp_path / "run", "training")
    (folder / "status.json").write_text(content)
    assert state_of(folder) == "lost"
    assert len(jobs_in(tmp_path)) in (0, 1)


KINDS: dict[str, Kind] = {
    "toy": "toy",
    "run": "train",
    "run/analysis": "build",
    "run/analysis-of/step_1/analysis": "build",
    "final": "train",
    "rows": "cache",
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A folder of finished jobs, one of them elsewhere."""
    for name, kind in KINDS.items():
        with Record(tmp_path / "runs" / name, kind):
            pass
    write_status(tmp_path / "runs" / "run" / "checkpoints" / "step_1", "training")  # is none
    with Record(tmp_path / "else" / "cache", "cache"):
        pass
    ticket = tmp_path / "runs" / ".detached" / "far"
    ticket.mkdir(parents=True)
    (ticket / "place.json").write_text(json.dumps({"folder": str(tmp_path / "else" / "cache"), "log_begins": 0}))
    (tmp_path / "runs" / ".detached" / "left behind").mkdir()
    return tmp_path / "runs"


def test_jobs_are_found_below_and_elsewhere(run_dir: Path) -> None:
    assert {job.name: job.kind for job in jobs_in(run_dir)} == {**KINDS, "far": "cache"}
    assert jobs_in(run_dir / "none") == []


def test_a_job_is_named_by_its_name_or_its_path(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run_dir.parent)
    (run_dir / "run" / "member").mkdir()
    for word, name in {
        "run": "run",
        "runs/run/": "run",
        str(run_dir / "run"): "run",
        "run/member": "run",
        "run/analysis": "run/analysis",
        "far": "far",
        "else/cache": "far",
    }.items():
        assert find_job(word, Path("runs")).name == name, word
        resume = cli.parse(["resume", word, "--run_dir", "runs"])
        assert isinstance(resume, cli.Resume)
        if word != "run/member":  # which is not resumed alone
            assert folder_named(resume.run, resume.run_dir) == find_job(word, Path("runs")).folder
    for word in ("nothing", "run/nothing", "runs"):
        with pytest.raises(FileNotFoundError, match="sae-training runs"):
            find_job(word, Path("runs"))
    assert folder_named(Path("runs"), Path("runs")) == Path("runs")  # of which who reads it says what is wrong
    with pytest.raises(FileNotFoundError, match="sae-training runs"):
        folder_named(Path("run/member"), Path("runs"))


def test_rm_asks_and_deletes_nothing_else(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "run" / "member").mkdir()
    flags = ["--run_dir", str(run_dir)]
    assert cli.main(["rm", "run", *flags]) == 1  # there is no terminal
    assert cli.main(["rm", "run/member", "--yes", *flags]) == 1  # is a part of a run
    (run_dir / "link").symlink_to(run_dir / "run")
    assert cli.main(["rm", "link", "--yes", *flags]) == 1
    (run_dir / "link").unlink()
    with Record(run_dir / "run" / "analysis", "build"):  # at work
        assert cli.main(["rm", "run", "--yes", *flags]) == 1
    said = capsys.readouterr().err
    assert all(word in said for word in ("--yes says that it is meant", "is a link to", "is at work; stop it first"))
    assert {job.name for job in jobs_in(run_dir)} == {*KINDS, "far"}
    for name in ("run", "far"):
        assert cli.main(["rm", name, "--yes", *flags]) == 0
    assert {job.name for job in jobs_in(run_dir)} == {"toy", "final", "rows"}
    assert not (run_dir.parent / "else" / "cache").exists()


def test_stop_now_and_a_stopped_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_status(tmp_path / "run", "training", step=1200)
    says = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit()); print(flush=True); time.sleep(600)"
    for words, signals in (([], [signal.SIGSTOP]), (["--now"], [])):
        with subprocess.Popen([sys.executable, "-c", says], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            write_holder(folder, holder_of(process.pid, "2026-01-31T12:00:00Z"))
            write_status(folder, "training", kind="toy" if words else "train", step=1200)
            for number in signals:
                process.send_signal(number)
            assert cli.main(["stop", str(folder), *words]) == 0
            assert process.wait() == (-signal.SIGKILL if words else 0)
    said = capsys.readouterr().out
    assert "stopped at once; what it has saved is there" in said
    assert "toy saves nothing until it is finished" in said


def test_the_table() -> None:
    status = {"step": 1200, "total_steps": 46_875, "tokens_per_s": 2552.4, "eta_s": 3725, "l0": 32.04}
    status |= {"explained_variance": [0.71, 0.8567], "dead_latents": 1234}
    job = job_at(ROOT, "x" * 40)
    shown = table([job, type(job)("b", ROOT, "train", "training", "", "", status, None)]).splitlines()
    assert shown[0].split() == ["kind", "name", "state", "step", "tokens/s", "ETA", "EV", "L0", "dead", "since"]
    found = shown[2].split(maxsplit=5)
    assert found[:5] == ["train", "b", "training", "1,200/46,875", "2,552"]
    assert found[5].split() == ["1", "h", "2", "min", "0.710-0.857", "32.0", "1,234", "-"]
    for width in (200, 100, 90, 50):
        narrow = table([job, type(job)("b", ROOT, "train", "training", "", "", status, None)], width).splitlines()
        assert all(len(line) <= width for line in narrow)
        assert narrow[0].split()[:4] == ["kind", "name", "state", "step"]
        assert ("since" in narrow[0], "EV" in narrow[0]) == (width > 90, width > 50)
    assert middle_out("abcdefghij", 7) == "abc..ij"
    assert [duration(s) for s in (59, 605, 3600, 200_000)] == ["0:59", "10 min", "1 h 0 min", "2 d 7 h"]


def test_runs_answers_without_torch(run_dir: Path) -> None:
    code = (
        "import sys; from sae_training import cli; code = cli.main(sys.argv[1:]); "
        "sys.exit(code or ('torch' in sys.modules and 7))"
    )
    for verb in ("runs", "logs", "stop"):
        words = [verb, *([] if verb == "runs" else ["run"]), "--run_dir", str(run_dir)]
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == (verb == "logs"), done.stderr  # logs: there is none


COMPLETES = """
. "$1"
COMP_LINE=$2 COMP_POINT=${#2}
read -r -a COMP_WORDS <<< "$2"
[[ $2 == *" " ]] && COMP_WORDS+=("")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
$(complete -p sae-training | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
printf '%s\\n' "${COMPREPLY[@]}"
"""


def test_bash_completes_verbs_flags_and_names_of_runs(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_status(run_dir / "a b", "finished")
    write_status(run_dir / "c.d:e", "finished")
    assert cli.main(["completion", "bash"]) == 0
    script = tmp_path / "completion.bash"
    script.write_text(capsys.readouterr().out)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def completed(line: str) -> set[str]:
        words = ["bash", "-c", COMPLETES, "bash", str(script), line]
        return set(subprocess.run(words, cwd=tmp_path, capture_output=True, text=True).stdout.split("\n")) - {""}

    assert completed("sae-training sto") == {"stop"}
    assert completed("sae-training stop ") == {*KINDS, "far", "a\\ b", "c.d:e"}
    assert completed("sae-training resume r") == {name for name in KINDS if name.startswith("r")}
    assert completed("sae-training rm c.d:") == {"e"}  # bash takes : for the end of a word
    assert completed("sae-training logs run --fo") == {"--follow"}
    assert completed(f"sae-training logs --run_dir {tmp_path / 'else'} ") == {"cache"}
