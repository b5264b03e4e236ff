"""The package on a system that is not Linux, as far as Linux can show it: without /proc and what only Linux has.

The process says that it is "darwin" once the libraries are loaded, whose parts for Linux must go on working.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from small import SMALL_RUN

ROOT = Path(__file__).parents[3]
AS_ON_A_MAC = """
import importlib, os, pkgutil, signal, sys
import datasets, pandas, plotly, psutil, torch, transformer_lens, transformers, wandb  # before the change

refused = []

def refuse(event, arguments):
    path = str(arguments[0]) if event in ("open", "os.listdir", "os.scandir") and arguments else ""
    if not path.startswith(("/proc", "/sys/", "/dev/shm")):
        return
    frame = sys._getframe(1)
    while frame is not None and "/lib/python" in frame.f_code.co_filename and "site-" not in frame.f_code.co_filename:
        frame = frame.f_back  # the standard library's own frames
    if frame is not None and frame.f_code.co_filename.startswith(ROOT + "/sae_"):
        refused.append(path)
        raise FileNotFoundError(2, "No such file or directory", path)

sys.addaudithook(refuse)
sys.platform = "darwin"
for module, names in (
    (os, "sched_getaffinity sched_setaffinity posix_fadvise posix_fallocate memfd_create pidfd_open O_DIRECT"),
    (signal, "SIGPWR SIGSTKFLT SIGRTMIN SIGRTMAX SIGPOLL"),
):
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)

import sae_analysis, sae_training
for package in (sae_training, sae_analysis):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.kernels import cpu
from sae_training.lm_runner import language_model_sae_runner
assert cpu.available() and cpu.library()._name.startswith(CACHE)
language_model_sae_runner(LanguageModelSAERunnerConfig(**CONFIG))
assert any("cgroup" in path for path in refused)  # so the hook works
print("trained on", sys.platform)
"""
APPLES_COMPILER = """#!/bin/sh
case "$*" in *-fopenmp*|*x86-64*) echo "clang: error: unsupported option" >&2; exit 1;; esac
exec g++ "$@"
"""


def test_a_run_needs_nothing_that_only_linux_has(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(APPLES_COMPILER)
    compiler.chmod(0o755)
    config = {**SMALL_RUN, "run_dir": str(tmp_path / "runs"), "architecture": "topk", "k": 4}
    values = f"ROOT, CACHE, CONFIG = {str(ROOT)!r}, {str(tmp_path / 'cache')!r}, {config!r}\n"
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path), "CXX": str(compiler), "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", values + AS_ON_A_MAC], env=environment, capture_output=True, text=True, timeout=300
    )
    assert "trained on darwin" in done.stdout, done.stderr
    assert "Traceback" not in done.stderr and "could not be compiled" not in done.stderr
