"""The runs in a folder, read again and again while they are written: what a page of all runs shows of each."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sae_training.config.io import WATCHING_FIELDS
from sae_training.machine.holder import read_holder, state_of
from sae_training.machine.run_files import METRICS_FILE, REPORT_FILE, RUN_CONFIG_FILE, STATUS_FILE
from sae_training.report.curves import is_number
from sae_training.report.metrics_file import TOKENS_KEY
from sae_training.report.page import shown

DEEPEST = 3  # folders below the one that is asked for, in which runs are looked for
MOST_POINTS = 400  # of a line, because a page of 100 runs has 800 lines
LAST_BYTES = 64  # of what was read, which tell whether the file still begins with it


class Figure(NamedTuple):
    """A plot of the page, with a line for each run. `table`: its column in the table of runs, "" for none."""

    key: str
    title: str
    y_title: str
    table: str = ""
    log_scale: bool = False
    from_zero: bool = False


FIGURES = (
    Figure("metrics/explained_variance", "Explained variance", "fraction", "EV", from_zero=True),
    Figure("metrics/eval_explained_variance", "Explained variance, held out", "fraction", from_zero=True),
    Figure("metrics/l0", "L0", "active latents per token", "L0", log_scale=True),
    Figure("sparsity/dead_features", "Dead latents", "latents", "dead"),
    Figure("losses/overall_loss", "Loss", "loss", "loss", log_scale=True),
    Figure("metrics/CE_loss_score", "CE score", "fraction recovered", "CE score", from_zero=True),
    Figure("losses/mse_loss", "MSE loss", "loss", log_scale=True),
    Figure("details/current_learning_rate", "Learning rate", "learning rate"),
)

HELD_OUT = {"EV": "metrics/eval_explained_variance", "L0": "metrics/eval_l0"}
"""The figures on held-out text that the table shows once there are any."""

FIRST_FIELDS = (
    "architecture", "hook_point", "hook_point_layer", "k", "l1_coefficient", "target_l0", "expansion_factor", "lr",
    "train_batch_size", "total_training_tokens", "seed", "model_name", "dataset_path",
)  # fmt: skip
"""The fields of a config that people compare runs by, first in the table."""


class Line:
    """A figure of a run by step; NaN is a gap."""

    def __init__(self) -> None:
        self.steps, self.values = array("d"), array("d")

    def add(self, step: float, value: float | None) -> None:
        self.steps.append(step)
        self.values.append(math.nan if value is None else value)


class RunRead:
    """One run as far as it was read; `look` reads what has been written since."""

    def __init__(self, path: Path, name: str, parent: Path | None = None) -> None:
        self.path, self.name = path, name
        self.parent = parent
        """The folder of the run of several that it is a member of, which has the status of all."""
        self.begin()

    def begin(self) -> None:
        self.read_to, self.end = 0, b""
        self.n_lines, self.problem = 0, ""
        self.lines: dict[str, Line] = {}
        self.drawn: dict[str, list[list[float | None]]] = {}
        """The lines as the page has them, until more is read."""

    def look(self) -> dict[str, Any]:
        """Return what the page shows, with what is damaged or cannot be read in words."""
        problems = []
        config = read_object(self.path / RUN_CONFIG_FILE, problems)
        folder = self.parent or self.path
        holder = read_holder(folder)  # before the status, as `state_of` says
        status = read_object(folder / STATUS_FILE, problems)
        state, _ = state_of(folder, status, holder)
        if state == "lost" and holder is None and "state" not in status:
            state = "unknown"
        try:
            self.read_on()
        except OSError as error:
            problems.append(f"{METRICS_FILE}: cannot be read ({error.strerror})")
        given_up = status.get("failed")
        given_up = given_up.get(self.path.name) if self.parent and isinstance(given_up, dict) else None
        alerts = status.get("alerts")
        own = self.path.name if self.parent else ""
        return {
            "name": self.name,
            "report": f"{self.name}/{REPORT_FILE}" if (self.path / REPORT_FILE).is_file() else "",
            "state": "given up" if given_up else state,
            "step": status.get("step", self.last_step()),
            "total": status.get("total_steps"),
            "updated": status.get("updated"),
            "tokens_per_step": self.tokens_per_step(),
            "figures": self.figures(),
            "problems": [*problems, *filter(None, [self.problem]), *filter(None, [given_up])],
            "alerts": [a for a in alerts if of_member(a, own)] if isinstance(alerts, list) else [],
            "config": fields_of(config),
            "lines": self.drawn,
        }

    def read_on(self) -> None:
        """Read the whole lines that were added; from the start, if the file is not the one that was read."""
        path = self.path / METRICS_FILE
        if not path.exists():
            return self.begin()
        with path.open("rb") as file:
            file.seek(max(0, self.read_to - LAST_BYTES))
            if file.read(min(self.read_to, LAST_BYTES)) != self.end:  # a run that went on has cut it back
                self.begin()
                file.seek(0)
            added = file.read()
        added = added[: added.rfind(b"\n") + 1]  # without a line that is being written
        if not added:
            return None
        self.read_to += len(added)
        self.end = (self.end + added)[-LAST_BYTES:]
        for line in added.splitlines():
            self.n_lines += 1
            if line.strip():
                self.add(line)
        self.drawn = {key: drawn(self.lines[key]) for key, *_ in FIGURES if key in self.lines}
        return None

    def add(self, line: bytes) -> None:
        try:
            row = json.loads(line)
            items = row.items()
        except (ValueError, RecursionError, AttributeError):
            self.problem = self.problem or (
                f"{METRICS_FILE}, line {self.n_lines}: found text that is not a row of JSON; remove the line"
            )
            return
        if not is_number(step := row.get("step")):
            return
        for key, value in items:
            if key != "step" and (value is None or is_number(value)):
                self.lines.setdefault(key, Line()).add(step, value)

    def figures(self) -> dict[str, float | None]:
        """Return the last value of each figure of the table, on held-out text where there is one."""
        keys = {figure.table: figure.key for figure in FIGURES if figure.table}
        found = {}
        for name, key in keys.items():
            key = HELD_OUT[name] if HELD_OUT.get(name) in self.lines else key
            found[name] = short(self.lines[key].values[-1]) if key in self.lines else None
        return found

    def last_step(self) -> int | None:
        return int(max((line.steps[-1] for line in self.lines.values()), default=0)) or None

    def tokens_per_step(self) -> float | None:
        tokens = self.lines.get(TOKENS_KEY)
        return tokens.values[-1] / tokens.steps[-1] if tokens and tokens.steps[-1] else None


def of_member(alert: Any, folder: str | None) -> bool:
    """Return whether an alert of status.json is of the whole run, or of the autoencoder in a folder; None: of any."""
    if not isinstance(alert, dict) or "message" not in alert:
        return False
    return folder is None or str(alert.get("name", "")).replace("/", "_") in ("", folder)


def alerts(run_folder: Path) -> list[str]:
    """Return what was said to be wrong in training: of a run and all its autoencoders, or of one in its folder."""
    folder, name = run_folder.resolve(), None
    if not (folder / STATUS_FILE).exists():
        folder, name = folder.parent, folder.name
    found = read_object(folder / STATUS_FILE, []).get("alerts")
    of_it = [alert for alert in found if of_member(alert, name)] if isinstance(found, list) else []
    names = [f"{alert['name']}, " if alert.get("name") else "" for alert in of_it]
    return [
        f"Alert: {name}after step {shown(alert.get('step', '?'))}, {alert['message']}."
        for name, alert in zip(names, of_it, strict=True)
    ]


def read_object(path: Path, problems: list[str]) -> dict[str, Any]:
    """Return the values of a JSON file, none if it is missing; what else is wrong with it goes to `problems`."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict):
            return values
        problems.append(f"{path.name}: found {type(values).__name__}, expected an object of JSON")
    except FileNotFoundError:
        pass
    except OSError as error:
        problems.append(f"{path.name}: cannot be read ({error.strerror})")
    except (ValueError, RecursionError):
        problems.append(f"{path.name}: found text that is not JSON, expected what a run writes")
    return {}


def fields_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a config that change what is trained, without those that nobody has set."""
    cfg = config.get("config", config)
    if not isinstance(cfg, dict):
        return {}
    return {name: value for name, value in cfg.items() if name not in WATCHING_FIELDS and value is not None}


def drawn(line: Line) -> list[list[float | None]]:
    """Return the steps and the values of a line, thinned."""
    steps, values = thinned(np.array(line.steps), np.array(line.values))
    return [[int(step) for step in steps], [short(value) for value in values]]


def thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return at most MOST_POINTS points of a line: the lowest and the highest of each stretch, so that spikes stay."""
    if len(steps) <= MOST_POINTS:
        return steps, values
    kept = {0, len(steps) - 1}
    for stretch in np.array_split(np.arange(1, len(steps) - 1), MOST_POINTS // 2 - 1):
        finite = stretch[np.isfinite(values[stretch])]
        kept |= (
            {int(finite[values[finite].argmin()]), int(finite[values[finite].argmax()])}
            if len(finite)
            else {int(stretch[0])}
        )
    places = sorted(kept)
    return steps[places], values[places]


def short(value: float) -> float | int | None:
    """Return a number with few digits, because a page shows no more and JSON writes them all."""
    if not math.isfinite(value):
        return None
    return int(value) if float(value).is_integer() and abs(value) < 1e15 else float(f"{value:.5g}")


# --------------------------------------------------------------------------------------------------------- of a folder


class RunsRead:
    """All runs below a folder, those of runs of several included; new ones are found at each look."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs: dict[Path, RunRead] = {}

    def look(self) -> dict[str, Any]:
        """Return what the page shows of all runs: what they have in common once, and where they differ with each."""
        found = {path: (name, parent) for path, name, parent in self.find()}
        for path, (name, parent) in found.items():
            self.runs.setdefault(path, RunRead(path, name, parent))
        self.runs = {path: run for path, run in self.runs.items() if path in found}
        runs = sorted((run.look() for run in self.runs.values()), key=lambda run: run["name"])
        texts: dict[str, set[str]] = {}
        for run in runs:
            run["config"] = {name: shown(value) for name, value in run["config"].items()}
            for name, text in run["config"].items():
                texts.setdefault(name, set()).add(text)
        order = {name: place for place, name in enumerate(FIRST_FIELDS)}
        differ = sorted((n for n in texts if len(texts[n]) > 1), key=lambda name: order.get(name, len(order)))
        for run in runs:
            run["config"] = {name: run["config"][name] for name in differ if name in run["config"]}
        common = {name: next(iter(found)) for name, found in texts.items() if len(found) == 1}
        return {"fields": differ, "common": common, "plots": [f._asdict() for f in FIGURES], "runs": runs}

    def find(self) -> Iterator[tuple[Path, str, Path | None]]:
        """Return the folder of each run, its name from here, and the folder of the run of several that it is in."""
        seen: set[Path] = set()

        def within(folder: Path, depth: int) -> Iterator[tuple[Path, str, Path | None]]:
            if folder.resolve() in seen:  # a link to a folder that it is in
                return
            seen.add(folder.resolve())
            if is_run(folder):
                members = [file.parent for file in folder.glob(f"*/{METRICS_FILE}")]
                for path in members or [folder]:
                    name = path.relative_to(self.folder).as_posix()
                    yield path, name if path != self.folder else path.resolve().name, folder if members else None
            elif depth <= DEEPEST:
                for child in children(folder):
                    yield from within(child, depth + 1)

        yield from within(self.folder, 0)


def children(folder: Path) -> list[Path]:
    try:
        return sorted(child for child in folder.iterdir() if not child.name.startswith(".") and child.is_dir())
    except OSError:  # a folder of somebody else beside the runs
        return []


def is_run(folder: Path) -> bool:
    """Return whether a folder is that of a run, of any version or damaged; models have a config.json, too.

    Caches and builds have a status.json, and are none.
    """
    if read_object(folder / STATUS_FILE, []).get("kind", "train") not in ("train", "toy"):
        return False
    try:
        if (folder / METRICS_FILE).exists() or (folder / STATUS_FILE).exists():
            return True
        return '"versions"' in (folder / RUN_CONFIG_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
