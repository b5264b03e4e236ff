"""The table of `sae-training runs`."""

from __future__ import annotations

import calendar
import time
from collections.abc import Mapping, Sequence
from typing import Any

from sae_training.jobs.found import Job

HEADINGS = ("kind", "name", "state", "step", "tokens/s", "ETA", "EV", "L0", "dead", "since")
LEFT = ("kind", "name", "state", "since")  # the others are numbers
LEFT_OUT = ("since", "tokens/s", "dead", "L0", "ETA", "EV")  # one after the other, where they do not fit
SHORTEST_NAME = 12


def table(jobs: Sequence[Job], width: int | None = None) -> str:
    """Return the jobs, a line each. `width`: of a terminal, for which names are shortened and columns left out."""
    rows = [HEADINGS, *map(row, jobs)]
    widths = {heading: max(len(cells[i]) for cells in rows) for i, heading in enumerate(HEADINGS)}
    if width is not None:
        excess = 0
        for heading in ("", *LEFT_OUT):
            widths.pop(heading, None)
            excess = sum(widths.values()) + 2 * (len(widths) - 1) - width
            if excess <= max(0, widths["name"] - SHORTEST_NAME):
                break
        widths["name"] = max(min(widths["name"], SHORTEST_NAME), widths["name"] - max(0, excess))
    return "".join(line_of(dict(zip(HEADINGS, cells, strict=True)), widths) for cells in rows)


def line_of(cells: Mapping[str, str], widths: Mapping[str, int]) -> str:
    kept = [
        f"{middle_out(cells[name], n):<{n}}" if name in LEFT else f"{cells[name]:>{n}}" for name, n in widths.items()
    ]
    return "  ".join(kept).rstrip() + "\n"


def middle_out(text: str, width: int) -> str:
    """Return the text, without its middle if it is too long."""
    half = (width - 2) // 2
    return text if len(text) <= width else f"{text[: width - 2 - half]}..{text[len(text) - half :]}"


def row(job: Job) -> tuple[str, ...]:
    status = job.status
    step, total, rate = (status.get(name) for name in ("step", "total_steps", "tokens_per_s"))
    return (
        job.kind,
        job.name,
        f"{job.state} (stopped)" if job.detail else job.state,
        "-" if step is None else f"{step:,}" if total is None else f"{step:,}/{total:,}",
        f"{rate:,.0f}" if rate else "-",
        duration(status["eta_s"]) if job.is_live and status.get("eta_s") is not None else "-",
        figure(status.get("explained_variance"), ".3f"),
        figure(status.get("l0"), ".1f"),
        figure(status.get("dead_latents"), ",.0f"),
        local_time(job.since),
    )


def figure(value: Any, form: str) -> str:
    """Return a figure, or the smallest and the largest of several."""
    values = value if isinstance(value, list) else [value]
    return "-".join(dict.fromkeys("-" if one is None else format(one, form) for one in values))


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes >= 10 else f"{minutes}:{seconds:02}"


def local_time(stamp: str) -> str:
    """Return a moment that a record holds in UTC by the clock of this machine."""
    try:
        moment = time.localtime(calendar.timegm(time.strptime(stamp, "%Y-%m-%dT%H:%M:%SZ")))
    except ValueError:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M", moment)
