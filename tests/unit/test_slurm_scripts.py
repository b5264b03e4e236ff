"""The job files for SLURM: bash reads them, their flags are ours or torchrun's, and they end as they say."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from sae_training.cli import VERBS, parse
from sae_training.config.checks import field_types

FOLDER = Path(__file__).parents[2] / "scripts" / "slurm"
FILES = sorted(FOLDER.iterdir())
OF_TORCHRUN = {option for action in get_args_parser()._actions for option in action.option_strings}
OF_SLURM = {
    "job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "time", "output", "requeue",
    "signal", "open-mode", "parsable", "wrap", "kill-on-invalid-dep", "dependency", "kill-on-bad-exit",
}  # fmt: skip


def commands(path: Path) -> list[list[str]]:
    """Return the words of each command line of a script, comments and continuations aside."""
    text = re.sub(r"\\\n", " ", path.read_text(encoding="utf-8"))
    return [shlex.split(line, comments=True) for line in re.split(r"\n", text) if not line.startswith("#SBATCH")]


def flags(words: list[str]) -> list[str]:
    return [word.partition("=")[0].rstrip(")") for word in words if word.startswith("--")]


def verb_of(words: list[str]) -> tuple[str, list[str]] | None:
    """Return the verb of this program that a command runs, and the words after it."""
    for program in ("sae_training", "$(quoted sae-training", "sae-training"):
        for i, word in enumerate(words[:-1]):
            if word.endswith(program) or word == program.split()[-1]:
                return words[i + 1], [w.rstrip(")") for w in words[i + 2 :] if w != "&"]
    return None


def test_there_is_a_file_for_each_kind_of_job() -> None:
    assert [path.name for path in FILES] == [
        "cache_then_train.sh", "many_nodes.sbatch", "one_node.sbatch", "requeued.sbatch",
    ]  # fmt: skip
    page = (FOLDER.parents[1] / "docs" / "how-to" / "cluster.md").read_text(encoding="utf-8")
    assert all(f"| `{path.name}` |" in page for path in FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_bash_reads_it(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.access(path, os.X_OK)
    assert "set -euo pipefail" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_flag_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    asked = [flag.partition("=")[0].removeprefix("--") for flag in re.findall(r"^#SBATCH (--\S+)", text, re.M)]
    assert not {*asked} - OF_SLURM
    found = 0
    for words in commands(path):
        ours = verb_of(words)
        if ours is None:
            assert not {flag.removeprefix("--") for flag in flags(words)} - OF_SLURM
            continue
        verb, after = ours
        found += 1
        own = {f"--{name}" for name in field_types(VERBS[verb])}
        assert not {*flags(after)} - own
        before = words[: len(words) - len(after)]
        of_slurm = {f"--{name}" for name in OF_SLURM}
        assert not {*flags(before)} - OF_TORCHRUN - of_slurm
        parse([verb, *(word.replace("$tokens", "1000") for word in after)])  # which reads the values too
    assert found == text.count("total_training_tokens")


def stub(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def environment(folder: Path) -> dict[str, str]:
    own = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    return os.environ | own | {"SLURM_CPUS_PER_TASK": "8", "SLURM_GPUS_ON_NODE": "2", "SLURM_NNODES": "2"}


def test_a_job_that_is_warned_lets_its_processes_save_and_goes_back_into_the_queue(tmp_path: Path) -> None:
    program = "import signal, sys; signal.signal(15, lambda *_: sys.exit(143)); print('up', flush=True); signal.pause()"
    child = f'{sys.executable} -c "{program}"'
    stub(tmp_path, "torchrun", f"{child} & wait $!; code=$?; echo saved $code >> '{tmp_path}/said'; exit 1")
    stub(tmp_path, "scontrol", f"echo \"$@\" >> '{tmp_path}/said'")
    job = subprocess.Popen(
        ["bash", str(FOLDER / "requeued.sbatch")], env=environment(tmp_path), stdout=subprocess.PIPE, text=True
    )
    assert job.stdout is not None and job.stdout.readline() == "up\n"
    job.send_signal(10)
    assert job.wait(timeout=60) == 0
    assert (tmp_path / "said").read_text() == "saved 143\nrequeue 7\n"


@pytest.mark.parametrize("code", [0, 3])
def test_a_job_that_ends_by_itself_is_not_requeued(code: int, tmp_path: Path) -> None:
    stub(tmp_path, "torchrun", f"exit {code}")
    stub(tmp_path, "scontrol", f"touch '{tmp_path}/said'")
    done = subprocess.run(["bash", str(FOLDER / "requeued.sbatch")], env=environment(tmp_path), timeout=60)
    assert done.returncode == code
    assert not (tmp_path / "said").exists()


def test_training_waits_for_the_cache(tmp_path: Path) -> None:
    stub(tmp_path, "sbatch", f"printf '%s\\n' \"$@\" >> '{tmp_path}/said'; echo '12;cluster'")
    named = {"DATASET": "/data/my text", "CACHE": str(tmp_path / "cache")}
    subprocess.run(["bash", str(FOLDER / "cache_then_train.sh")], env=environment(tmp_path) | named, check=True)
    said = (tmp_path / "said").read_text().splitlines()
    assert "--dependency=afterok:12" in said
    wrapped = [shlex.split(said[i + 1]) for i, word in enumerate(said) if word == "--wrap"]
    ours = [words[words.index("sae_training") + 1 :] for words in wrapped]
    assert [words[0] for words in ours] == ["cache", "train"]
    assert all(words[words.index("--nproc_per_node") + 1] == "8" for words in wrapped)
    for words in ours:
        verb = parse(words)
        assert (verb.dataset, verb.cached_activations_path) == (named["DATASET"], named["CACHE"])  # pyright: ignore


def test_nodes_meet_on_the_first(tmp_path: Path) -> None:
    stub(tmp_path, "scontrol", "echo n1; sleep 0.2; echo n2")  # slowly, as of many nodes
    stub(tmp_path, "srun", f"printf '%s\\n' \"$@\" > '{tmp_path}/said'")
    subprocess.run(["bash", str(FOLDER / "many_nodes.sbatch")], env=environment(tmp_path), check=True)
    said = (tmp_path / "said").read_text().splitlines()
    assert said[said.index("--rdzv_endpoint") + 1] == "n1:20007"
    assert said[said.index("--nnodes") + 1] == said[said.index("--nproc_per_node") + 1] == "2"
