"""All that one pass over a corpus gathers of an autoencoder's latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sae_analysis.codes import code_of
from sae_analysis.corpus import Contexts
from sae_analysis.events import firings, priorities
from sae_analysis.examples import BestOf, Silences
from sae_analysis.latent_statistics import LatentStatistics, Moments
from sae_analysis.neighbours import RowSample
from sae_analysis.sharing import is_own_lane
from sae_analysis.token_mass import TokenMass
from sae_training.activations_store.position_rule import PositionRule
from sae_training.language_model.sites import Sites
from sae_training.parallel.ranks import is_first
from sae_training.sparse_autoencoder import SparseAutoencoder

N_SILENCES = 512  # contexts, of which each latent's few are taken


@dataclass(frozen=True)
class Sizes:
    """How many examples of a latent are kept: of the strongest, of a band of quantiles, and so on."""

    top: int = 20
    quantile: int = 4
    random: int = 5
    silent: int = 5

    @property
    def sampled(self) -> int:
        """How many random firings are drawn: three times what the five bands need, because each takes its part."""
        return self.random + 3 * 5 * self.quantile


class Accumulator(Protocol):
    """A part of what is gathered. Its arrays are all of its state."""

    def arrays(self) -> dict[str, np.ndarray]: ...

    def load(self, arrays: dict[str, np.ndarray]) -> None: ...

    def merge(self, arrays: dict[str, np.ndarray]) -> None: ...


class Gathered:
    """What a corpus tells of the latents of `sae`, which reads at `sites`."""

    def __init__(
        self, sae: SparseAutoencoder, sites: Sites, context_size: int, d_vocab: int, sizes: Sizes, seed: int
    ) -> None:
        self.sae, self.sites, self.seed = sae, sites, seed
        self.statistics = LatentStatistics(sae.d_sae, context_size)
        self.moments = Moments(sae.d_sae)
        self.strongest = BestOf(sae.d_sae, sizes.top, np.float32)
        self.sampled = BestOf(sae.d_sae, sizes.sampled, np.uint64)
        self.silences = Silences(sae.d_sae, N_SILENCES, seed)
        self.mass = TokenMass(sae.d_sae, d_vocab)
        self.rows = RowSample(sae.d_sae, seed)

    def add(self, contexts: Contexts, rule: PositionRule) -> None:
        x = contexts.activations[self.sites.input]
        keep = rule(contexts.tokens, x)
        code = code_of(self.sae, x[keep].to(self.sae.dtype))
        found = firings(code, contexts.tokens, keep, contexts.first)
        prompts, positions = (part.cpu().numpy() for part in keep.nonzero(as_tuple=True))
        self.statistics.add(found, len(prompts))
        self.moments.add(found, contexts.lane)
        self.strongest.add(found, -found.values)
        self.sampled.add(found, priorities(self.seed, found.latents, found.contexts, found.positions))
        self.silences.add(found, keep.cpu().numpy())
        self.mass.add(found)
        self.rows.add(code, prompts + contexts.first, positions)

    @property
    def parts(self) -> dict[str, Accumulator]:
        names = ("statistics", "moments", "strongest", "sampled", "silences", "mass", "rows")
        return {name: getattr(self, name) for name in names}

    def state(self) -> dict[str, Tensor]:
        """Return all that has been gathered, to be saved."""
        return {
            f"{part}.{name}": torch.from_numpy(np.asarray(array, order="C"))
            for part, accumulator in self.parts.items()
            for name, array in accumulator.arrays().items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        for part, accumulator in self.parts.items():
            accumulator.load(arrays_in(state, part))

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Take up what another process has gathered of other contexts, or some parts of it."""
        for part, accumulator in self.parts.items():
            if arrays := arrays_in(state, part):
                accumulator.merge(arrays)


def is_own(name: str) -> bool:
    """Return whether this process goes on with the part of a saved state that has this name.

    Each goes on with its own lanes, the first with all else, because it matters to nothing else who has gathered what.
    """
    part, _, of_part = name.partition(".")
    return is_own_lane(int(of_part)) if part == "moments" else is_first()


def arrays_in(state: Mapping[str, Tensor], part: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(f"{part}."): state[name].numpy() for name in state if name.startswith(f"{part}.")}
