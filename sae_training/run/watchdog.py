"""What goes wrong with a run while it trains: what was seen, what is normal in this run, and what to do.

What is normal is told by the run itself: its own medians, its own best, its own first minutes. Each symptom is said
once. Figures and readings are looked at, never changed, so that weights and batches are the same with and without it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.config.types import FIXED_K, WITH_PENALTY
from sae_training.machine.files import megabytes
from sae_training.machine.memory import gigabytes
from sae_training.run.remarks import against_silence

LOOKED_AT = (
    "losses/mse_loss", "losses/overall_loss", "metrics/explained_variance", "metrics/l0", "sparsity/dead_features"
)  # fmt: skip
"""The figures of a logged step that tell how an autoencoder does."""

FIRST_LOOKS = 10  # after warm-up, which only tell what is normal
MEMORY_OF_LOOKS = 30
SPIKE = 2.0  # times the median: a loss that is no spike stays far below
SPIKE_SPREADS = 8.0  # spreads above the median, where a run is noisier
EV_FALL = 0.05
EV_FALL_SHARE = 0.3  # of the variance that was not explained at best
DEAD_RISE, DEAD_SHARE = 0.15, 0.25  # of all latents
L0_OFF = 0.25  # of k; of target_l0, which is steered to from far away, as much again

SLOW = 2.5  # times the run's own seconds for a token
SLOW_FOR_S = 60.0
STRETCH_S = 2.0  # over which a rate is told, at least
STRETCHES = 5  # at least, of the last minute and of the time before
OWN_RATES = 200  # stretches of a process, which tell its own rate
TREND_S = 600.0  # over which a disk or the memory must move before its course is drawn out to the end
FALLEN = 0.5  # of the disk that was free: less of it is other people's traffic
GROWN, GROWN_BYTES = 1.25, 256 * 2**20
LEAST_MEMORY = 0.03  # of what the process has and can get
ALIKE = 0.5  # of the rows of a batch; those at BOS are alike in any text
ROWS_KEPT = 5_000


def median(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def spread(values: Sequence[float], middle: float) -> float:
    """Return the standard deviation of values, told by the median of their distances, which a spike does not move."""
    return 1.4826 * median([abs(value - middle) for value in values])


# ---------------------------------------------------------------------------------------------- of one autoencoder


class Health:
    """The figures of an autoencoder's logged steps, and what is normal among them. `look` takes them in order."""

    def __init__(self, cfg: LanguageModelSAERunnerConfig, tokens_per_step: int) -> None:
        self.cfg, self.total = cfg, cfg.total_training_steps
        of_tokens = cfg.dead_feature_window_tokens
        self.dead_from = cfg.dead_feature_window if of_tokens is None else of_tokens // tokens_per_step + 1
        self.settled_from = max(cfg.resolved_lr_warm_up_steps, cfg.l1_warm_up_steps, cfg.k_anneal_steps)
        self.resamples_every = None if cfg.feature_sampling_method is None else cfg.feature_sampling_window
        self.losses: deque[tuple[float, float]] = deque(maxlen=MEMORY_OF_LOOKS)
        self.largest_loss = 0.0
        self.explained: deque[float] = deque(maxlen=20)
        self.best: dict[int, float] = {}
        """The best explained variance at each L0, which is counted in steps of a tenth."""
        self.fewest_dead = math.inf
        self.l0s: deque[float] = deque(maxlen=FIRST_LOOKS)
        self.in_a_row: dict[str, int] = {}
        self.step = 0

    def look(self, step: int, figures: Mapping[str, float]) -> dict[str, str]:
        """Return a message for each symptom that the figures show after `step` steps, by its kind."""
        if not all(math.isfinite(figures[name]) for name in LOOKED_AT):
            return {}
        if self.resamples_every and step // self.resamples_every > self.step // self.resamples_every:
            self.losses.clear()  # new latents make the loss jump
            self.best.clear()
        self.step = step
        mse, overall, explained, l0, dead = (figures[name] for name in LOOKED_AT)
        found = {"dead latents": self.dead(dead), "L0": self.l0(l0)}
        if step > self.settled_from:
            found |= {"loss": self.loss(mse, overall), "explained variance": self.variance(explained, l0)}
        return {kind: message for kind, message in found.items() if message}

    def holds(self, kind: str, is_so: bool, looks: int) -> bool:
        """Return whether something has been so at each of the last `looks`."""
        self.in_a_row[kind] = self.in_a_row.get(kind, 0) + 1 if is_so else 0
        return self.in_a_row[kind] >= looks

    def loss(self, mse: float, overall: float) -> str | None:
        """A jump of both the error and the loss: one of them alone may rise because a penalty bites, or AuxK begins."""
        pairs = list(self.losses)
        is_high = len(pairs) >= FIRST_LOOKS and mse > 0.01 * self.largest_loss
        for place, value in enumerate((mse, overall)):
            values = [pair[place] for pair in pairs]
            is_high = is_high and value > SPIKE * min(values)  # nearly always false, and no median is needed
            if is_high:
                middle = median(values)
                is_high = value > max(SPIKE * middle, middle + SPIKE_SPREADS * spread(values, middle))
        if not is_high:
            self.losses.append((mse, overall))
            self.largest_loss = max(self.largest_loss, mse)
        if not self.holds("loss", is_high, 2):
            return None
        before = [pair[0] for pair in pairs]
        return (
            f"the loss has jumped: MSE loss is {mse:.3g}, and was {median(before):.3g} ({min(before):.3g} to "
            f"{max(before):.3g}) at the {len(before)} looks before; if it does not fall again, begin anew with a lower "
            f"lr (now {self.cfg.resolved_lr:.3g}), more lr_warm_up_steps (now {self.cfg.resolved_lr_warm_up_steps}) or "
            "clip_grad_norm 1"
        )

    def variance(self, explained: float, l0: float) -> str | None:
        """A fall below what the run has explained with as many active latents, or fewer: sparser codes explain less."""
        self.explained.append(explained)
        if len(self.explained) < FIRST_LOOKS:
            return None
        place = math.floor(math.log(max(l0, 1e-3)) / math.log(1.1))
        best = max((value for at, value in self.best.items() if at <= place + 1), default=-math.inf)
        recent = list(self.explained)
        now = median(recent[-5:])
        steps = [abs(b - a) for a, b in pairwise(recent)]
        limit = max(EV_FALL, EV_FALL_SHARE * (1 - best), 4 * median(steps))
        if not self.holds("explained variance", not now >= best - limit, 3):
            self.best[place] = max(now, self.best.get(place, -math.inf))
            return None
        return (
            f"explained variance has fallen to {now:.3f}, from {best:.3f} at an L0 that was no higher (now {l0:.3g}); "
            f"lower lr (now {self.cfg.resolved_lr:.3g}), or see whether the text has changed there (another language, "
            "code, tables)"
        )

    def dead(self, n: float) -> str | None:
        """A rise above the fewest since latents can be dead at all."""
        if self.step <= self.dead_from:
            return None
        share = n / self.d_sae
        self.fewest_dead = min(self.fewest_dead, share)
        is_high = share >= max(DEAD_SHARE, self.fewest_dead + DEAD_RISE)
        if not self.holds("dead latents", is_high, 3):
            return None
        auxk = "set auxk_coefficient to auto, or " if not self.cfg.resolved_auxk_coefficient else ""
        auxk = auxk if self.cfg.architecture in FIXED_K else "set feature_sampling_method to anthropic, "
        return (
            f"{n:,.0f} of {self.d_sae:,} latents are dead ({share:.0%}), {self.fewest_dead:.0%} were at the fewest; "
            f"{auxk}{against_silence(self.cfg)}"
        )

    @property
    def d_sae(self) -> int:
        return self.cfg.d_sae or 1

    def l0(self, l0: float) -> str | None:
        """L0 far from the k or target_l0 of the config or, without one, a code that is empty or not sparse."""
        self.l0s.append(l0)
        if len(self.l0s) < FIRST_LOOKS or self.step <= self.settled_from:
            return None
        now, cfg = median(self.l0s), self.cfg
        is_half = self.step >= self.total / 2
        if cfg.architecture in FIXED_K or cfg.target_l0 is not None:
            name = "k" if cfg.architecture in FIXED_K else "target_l0"
            aim, off = getattr(cfg, name), L0_OFF if name == "k" else 2 * L0_OFF
            if not self.holds("L0", is_half and abs(now - aim) > off * aim, 2):
                return None
            what = "raise l1_coefficient" if now > aim else "lower l1_coefficient"
            what = against_silence(cfg) if name == "k" else f"{what} (now {cfg.l1_coefficient:.3g})"
            return f"L0 is {now:.3g}, where {name} is {aim:g}; {what}"
        if cfg.architecture not in WITH_PENALTY:
            return None
        if self.holds("L0", self.step >= self.total / 4 and now < 1, 2):
            return f"L0 is {now:.2g}: most rows have no active latent; {against_silence(cfg)}"
        if self.holds("dense", is_half and now > (cfg.d_in or math.inf), 2):
            return (
                f"L0 is {now:,.0f}, more than the {cfg.d_in:,} dimensions of a row, so the code is not sparse; raise "
                f"l1_coefficient (now {cfg.l1_coefficient:.3g})"
            )
        return None


# --------------------------------------------------------------------------------------- of the machine and the text


class Readings(NamedTuple):
    """What surrounds a run at a look."""

    seconds: float
    """By a clock that is never set."""
    tokens: int
    """That are trained on."""
    n_buffered: int
    """Rows of the buffer, which is filled again and again."""
    seconds_left: float
    share_left: float
    n_passes: int
    """How often the text has started again."""
    rows: Sequence[float]
    """Sums of some rows of the batch, by which copies are known."""
    disk: tuple[int, int] | None = None
    """Free bytes, and bytes that the next checkpoint takes; None: not read this time."""
    memory: tuple[int, int] | None = None
    """Bytes that the process has, and can still get."""


class Surroundings:
    """The rate of a run, the disk, the memory and the text, and what is normal of them. `look` takes them in order."""

    def __init__(self) -> None:
        self.last: Readings | None = None
        """At the end of the last stretch whose rate is known."""
        self.own: list[float] = []
        self.recent: deque[tuple[float, float]] = deque()
        self.free: deque[tuple[float, int]] = deque()
        self.used: deque[tuple[float, int]] = deque()
        self.first_free, self.first_used = 0, 0
        self.read_at = -math.inf
        """When disk and memory were read last."""
        self.seen: set[float] = set()
        """Sums of the rows of earlier looks, as long as they are in `kept`, the oldest first."""
        self.kept: deque[float] = deque()
        self.n_alike, self.n_short = 0, 0

    def look(self, now: Readings) -> dict[str, str]:
        """Return a message for each symptom, by its kind."""
        found = {"throughput": self.rate(now), "data": self.text(now)}
        if now.disk is not None:
            found["disk"] = self.disk(now, *now.disk)
        if now.memory is not None:
            found["memory"] = self.memory(now, *now.memory)
        return {kind: message for kind, message in found.items() if message}

    def rate(self, now: Readings) -> str | None:
        """A rate that was far below the run's own for a minute.

        A stretch holds whole refills of the buffer, which take most of the time of some runs. Medians of stretches,
        because evaluations and saves are pauses.
        """
        self.last = self.last or now
        took, tokens = now.seconds - self.last.seconds, now.tokens - self.last.tokens
        if took < STRETCH_S or tokens < max(1, now.n_buffered):
            return None
        self.last = now
        # A pause of an hour is no minute of its own.
        self.recent.append((min(took, SLOW_FOR_S / STRETCHES), took / tokens))
        while len(self.recent) > STRETCHES and sum(t for t, _ in self.recent) - self.recent[0][0] > SLOW_FOR_S:
            left = self.recent.popleft()
            if len(self.own) < OWN_RATES:
                self.own.append(left[1])
        if len(self.own) < STRETCHES or sum(t for t, _ in self.recent) < SLOW_FOR_S:
            return None
        own, slow = median(self.own), median(per for _, per in self.recent)
        if slow < SLOW * own:
            return None
        return (
            f"throughput has fallen to {1 / slow:,.0f} tokens/s in the last minute, this run's own was "
            f"{1 / own:,.0f}; see what else runs here (top, nvidia-smi), whether the processor is too hot, and whether "
            "the disk or network of the text is slow"
        )

    def text(self, now: Readings) -> str | None:
        """Text that has come to its end and starts again, or rows that are copies of each other."""
        alike = sum(row in self.seen for row in now.rows) / max(1, len(now.rows))
        self.n_alike = self.n_alike + 1 if alike > ALIKE else 0
        new = set(now.rows) - self.seen
        self.kept.extend(new)
        self.seen |= new
        while len(self.kept) > ROWS_KEPT:
            self.seen.remove(self.kept.popleft())
        if now.n_passes:
            return (
                f"the text has come to its end and starts again, with {now.share_left:.0%} of the run still to come, "
                "so the same rows are trained on again; give more text, or lower total_training_tokens"
            )
        if self.n_alike < 5:
            return None
        return (
            f"{alike:.0%} of the rows of a batch are copies of earlier ones, so the text repeats itself; remove copies "
            "of documents from it, or give another"
        )

    def disk(self, now: Readings, free: int, needed: int) -> str | None:
        """A disk without room for the next checkpoint, or on its way there before the run ends."""
        self.first_free = self.first_free or free
        add_level(self.free, now.seconds, free)
        advice = "delete what is no longer needed there (old runs, checkpoints, caches), or lower keep_checkpoints"
        if free < needed:
            return f"the next checkpoint takes {megabytes(needed)}, but {megabytes(free)} are free; {advice}"
        left = seconds_until(self.free, free - needed)
        if left > now.seconds_left or free > FALLEN * self.first_free:
            return None
        return (
            f"the disk fills: {megabytes(free)} are free, {megabytes(self.first_free)} were, so in "
            f"{left / 3600:.1f} hours there is no room for a checkpoint ({megabytes(needed)}), and the run has "
            f"{now.seconds_left / 3600:.1f} to go; {advice}"
        )

    def memory(self, now: Readings, used: int, left: int) -> str | None:
        """Memory that is nearly used up, or that grows and will be before the run ends."""
        self.first_used = self.first_used or used
        add_level(self.used, now.seconds, -used)
        self.n_short = self.n_short + 1 if left < LEAST_MEMORY * (used + left) else 0
        advice = "lower n_batches_in_buffer, train_batch_size or store_batch_size, or free memory of other programs"
        if self.n_short >= 3:
            return f"the process has {gigabytes(used)} and can get {gigabytes(left)} more; {advice}"
        first, until = self.first_used, seconds_until(self.used, left)
        if until > now.seconds_left or used < GROWN * first + GROWN_BYTES:
            return None
        return (
            f"memory grows: the process has {gigabytes(used)}, and had {gigabytes(first)}; in {until / 3600:.1f} hours "
            f"nothing is left of the {gigabytes(left)} that it can still get, and the run has "
            f"{now.seconds_left / 3600:.1f} to go; {advice}, and stop and resume the run"
        )


def add_level(levels: deque[tuple[float, int]], at: float, level: int) -> None:
    """Add what is left at a time, and drop what is too old to tell a trend."""
    levels.append((at, level))
    while len(levels) > 2 and at - levels[1][0] >= TREND_S:
        levels.popleft()


def seconds_until(levels: Sequence[tuple[float, int]], room: int) -> float:
    """Return when a level that falls will have fallen by `room` more, at the rate of its last TREND_S seconds.

    The rate is the lowest of its four quarters: a few large files, and copies that are made once, are no trend.
    """
    if len(levels) < FIRST_LOOKS or levels[-1][0] - levels[0][0] < TREND_S:
        return math.inf
    ends = [levels[number * (len(levels) - 1) // 4] for number in range(5)]
    rate = min((a - b) / max(at_b - at_a, 1e-9) for (at_a, a), (at_b, b) in pairwise(ends))
    return max(0, room) / rate if rate > 0 else math.inf


# ---------------------------------------------------------------------------------------------------------- of a run


@dataclass
class Watchdog:
    """What was said of a run, and what looks at its autoencoders and at what surrounds them."""

    health: dict[str, Health] = field(default_factory=dict)
    surroundings: Surroundings = field(default_factory=Surroundings)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    """As status.json has them: step, kind, message and, of one of several autoencoders, its name."""

    def news(
        self, step: int, found: Mapping[str, str], name: str = "", known: Iterable[str] = ()
    ) -> list[dict[str, Any]]:
        """Return the alerts for what was found and not said before; `known`: kinds that something else has said."""
        said = {(alert["kind"], alert.get("name", "")) for alert in self.alerts}
        new = [
            {"step": step, "kind": kind, "message": message} | ({"name": name} if name else {})
            for kind, message in found.items()
            if (kind, name) not in said and kind not in known
        ]
        self.alerts += new
        return new
