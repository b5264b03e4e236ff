"""Counters of which latents fire, for the remedies, the metrics and the saved firing frequencies."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_training.kernels.sparse_code import Code, CodeFigures
from sae_training.parallel.shard import WHOLE, Shard


class FiringTracker:
    """Counts, for each latent, the steps and tokens since it last fired and how often it fires.

    A latent fires on a row when its activation is above zero. It is dead when it has not fired for more than
    `dead_window` steps (or, if given, for more than `dead_window_tokens` tokens). `revived` counts how often a dead
    latent fired again. Frequencies are counted in windows that the caller ends. The last full window is kept beside the
    current one, so that frequencies never come from a few tokens only. Of a `shard` it counts those of its latents; all
    ranks ask for figures of all latents together.
    """

    def __init__(
        self,
        d_sae: int,
        dead_window: int,
        dead_window_tokens: int | None,
        device: torch.device | str = "cpu",
        shard: Shard = WHOLE,
    ) -> None:
        self.shard = shard
        self.dead_window = dead_window
        self.dead_window_tokens = dead_window_tokens
        counters = torch.zeros(4, d_sae, dtype=torch.int64, device=device)
        self.steps_since_fired, self.tokens_since_fired, self.fired, self.fired_last_window = counters
        self.revived = torch.zeros((), dtype=torch.int64, device=device)
        self.window_tokens = 0
        self.last_window_tokens = 0

    def update(self, code: Code | CodeFigures) -> None:
        """Count one batch of latent activations."""
        n_rows = code.n_rows
        fired = code.counts()
        silent = fired == 0
        self.revived += (self.dead() & ~silent).sum()
        # Multiplying by the mask instead of indexing with it keeps the device from waiting for the host.
        self.steps_since_fired.add_(1).mul_(silent)
        self.tokens_since_fired.add_(n_rows).mul_(silent)
        self.fired.add_(fired)
        self.window_tokens += n_rows

    def dead(self) -> Tensor:
        """Bool mask (d_sae,) of dead latents."""
        if self.dead_window_tokens is not None:
            return self.tokens_since_fired > self.dead_window_tokens
        return self.steps_since_fired > self.dead_window

    def n_dead(self) -> Tensor:
        """How many of all latents are dead, a scalar."""
        return self.shard.summed(self.dead().sum())

    def n_revived(self) -> Tensor:
        """How often a dead latent fired again, of all latents, a scalar."""
        return self.shard.summed(self.revived)

    def mean_steps_since_fired(self) -> Tensor:
        """The mean over all latents, a scalar."""
        if self.shard.is_all:
            return self.steps_since_fired.float().mean()
        return self.shard.summed(self.steps_since_fired.sum()) / self.shard.d_sae

    def restart(self, latents: Tensor) -> None:
        """Treat the latents with these numbers as if they had just fired (they were resampled), but not as revived."""
        self.steps_since_fired[latents] = 0
        self.tokens_since_fired[latents] = 0

    def start_new_window(self) -> None:
        self.fired_last_window.copy_(self.fired)
        self.last_window_tokens = self.window_tokens
        self.fired.zero_()
        self.window_tokens = 0

    def log_frequency(self) -> Tensor:
        """log10 of the share of tokens on which each of all latents fired, float32 on the CPU; -10 if it never did.

        Counts the last full window and the current one.
        """
        fired = self.shard.gathered(self.fired + self.fired_last_window).cpu().double()
        tokens = self.window_tokens + self.last_window_tokens
        return torch.log10(fired / max(tokens, 1) + 1e-10).float()

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "steps_since_fired": self.steps_since_fired,
            "tokens_since_fired": self.tokens_since_fired,
            "fired": self.fired,
            "fired_last_window": self.fired_last_window,
            "revived": self.n_revived(),
            "window_tokens": torch.tensor([self.window_tokens, self.last_window_tokens]),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name in ("steps_since_fired", "tokens_since_fired", "fired", "fired_last_window", "revived"):
            getattr(self, name).copy_(state[name])
        if self.shard.rank > 0:  # because the first counts what all have revived so far
            self.revived.zero_()
        self.window_tokens, self.last_window_tokens = state["window_tokens"].tolist()
