"""The store between the language model and the autoencoders: it serves shuffled activations of a text.

    text --TrainingText--> contexts --LiveContexts--> activations --Passes--> rows --ShuffleBuffer--> batches

The contexts of a cache replace the language model's passes. The rows of a cache replace the buffer too, because they
are shuffled already. `open_source` puts the parts together. Any number of hooks are served at once, from the same
passes and in the same order.

With `normalize_activations="expected_average_only_in"` batches are scaled to a mean norm of sqrt(width), by factors
that `measure_scales` measures once. `get_activations` gives the model's own units in any case.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from tqdm import tqdm

from sae_training.activations_store.open_source import open_source
from sae_training.activations_store.passes import to_device
from sae_training.activations_store.position_rule import position_rule
from sae_training.activations_store.source import Taken
from sae_training.activations_store.training_text import TrainingText
from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.config.io import with_defaults
from sae_training.language_model.harvest import harvest
from sae_training.language_model.load import LanguageModel
from sae_training.language_model.sites import HookSite, Sites, check_context_size, find_sites
from sae_training.machine.device import checked
from sae_training.machine.precision import at_least_float32
from sae_training.parallel.deal import Deal
from sae_training.parallel.ranks import rank


@dataclass(frozen=True)
class Batch:
    """The rows of an autoencoder's `Sites`: one (rows, width) for each input and for each target.

    Where a target is an input too, both are the same tensor.
    """

    inputs: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]

    @property
    def x(self) -> Tensor:
        """The rows of the one input, (rows, d_in)."""
        (x,) = self.inputs
        return x

    @property
    def target(self) -> Tensor:
        """The rows of the one target, (rows, d_out)."""
        (target,) = self.targets
        return target


class ActivationsStore:
    """Serves shuffled activations of `model` on a text.

    cfg: a run config, a cache config, or any object with some of their fields; other fields take their defaults.
    dataset: stands in for the text that `cfg` names.
    notify: told what a user should know, such as that the text starts again.
    sites: those of all autoencoders that are trained together (`merged`); None stands for those of `cfg`.
    sites_of_ranks: where several processes train autoencoders of their own, the sites that each of them serves.
    deal: where they train the same ones, which rows of each batch they compute and keep.
    """

    def __init__(
        self,
        cfg: Any,
        model: LanguageModel,
        dataset: Any = None,
        notify: Callable[[str], None] = tqdm.write,
        sites: Sites | None = None,
        sites_of_ranks: Sequence[Sites] = (),
        deal: Deal | None = None,
    ) -> None:
        self.cfg, self.model = cfg, model
        cfg = with_defaults(cfg)
        self.device = checked(cfg.device)
        self.dtype = at_least_float32(cfg.dtype)
        """The dtype of what is served: float32, or float64 if the config's is."""
        self.store_batch_size, self.train_batch_size = cfg.store_batch_size, cfg.train_batch_size
        self.rows_per_step = cfg.tokens_per_step
        self.padded = not cfg.pack_sequences
        """Whether contexts end with padding, ids below 0."""
        everyones = find_sites(cfg, model) if sites is None else sites
        self.sites = sites_of_ranks[rank()] if sites_of_ranks else everyones
        self.scales = dict.fromkeys(self.sites.all, 1.0)
        """What rows of each site are multiplied by before they are served."""
        check_context_size(cfg.context_size, model)
        self.text = TrainingText(cfg, model, dataset, notify)
        self.rule = position_rule(cfg, model, self.text.tokens, everyones.inputs[0])
        hooks_of_ranks = [[site.name for site in of_rank.all] for of_rank in sites_of_ranks]
        self.deal = deal
        self.source = open_source(cfg, model, self.text, everyones.all, self.rule, hooks_of_ranks, deal)
        self.taken: Taken | None = None
        """The rows that `advance` went on to."""
        self.latest: tuple[Sites, Batch] | None = None
        """What was served of them last."""

    # --------------------------------------------------------------------------------------- tokens and activations

    def get_batch_tokens(self) -> Tensor:
        """Return the next contexts of the training text, (store_batch_size, context_size), on the config's device.

        With `pack_sequences=False` the id -1 fills a context after the end of its sequence; `keeps` is false there.
        """
        return self.text.tokens.next_contexts(self.store_batch_size).to(self.device)

    def held_out_tokens(self) -> Tensor:
        """Return contexts (n, context_size) that training never sees (`TrainingText.held_out`)."""
        return self.text.held_out()

    def get_activations(self, tokens: Tensor) -> Tensor:
        """Return the activations of token ids (prompts, context), (prompts, context, d_in), in the store's dtype."""
        (activations,) = harvest(self.model, tokens, self.sites.inputs[:1], self.padded)
        return activations.to(self.dtype).clone()

    def keeps(self, tokens: Tensor, activations: Tensor | None = None) -> Tensor:
        """Return a bool mask like `tokens`: true at the positions that autoencoders are trained on.

        With `max_activation_norm_multiple` it depends on the `activations` (prompts, context, d_in) there, too.
        """
        return self.rule(tokens, activations)

    # -------------------------------------------------------------------------------------------------------- batches

    def next_batch(self) -> Tensor:
        """Return the next random batch, (train_batch_size, d_in), in the store's dtype."""
        self.advance()
        return self.batch(self.sites).x

    def advance(self, n_rows: int | None = None, n_left: int | None = None) -> None:
        """Go on to the next `n_rows` (None: train_batch_size) random rows, which `batch` then serves.

        `n_left`: how many rows the run will still use, including these (None: unknown).
        """
        self.latest = None
        self.taken = self.source.take(n_rows or self.train_batch_size, n_left)

    def batch(self, sites: Sites) -> Batch:
        """Return the rows that `advance` went on to; the same tensors when asked again for the same sites."""
        assert self.taken is not None, "advance comes before batch"
        if self.latest is None or self.latest[0] != sites:
            self.latest = sites, self.serve(self.taken, sites)
        return self.latest[1]

    def sample(self, n_rows: int, sites: Sites | None = None) -> Batch:
        """Return up to `n_rows` random rows of the buffer (the next rows of a cache), which can still be served.

        Of processes that train the same autoencoders, all must ask, and get all of these rows.
        """
        return self.serve(self.source.sample(n_rows), sites or self.sites)

    def serve(self, taken: Taken, sites: Sites) -> Batch:
        """Return what was taken for an autoencoder's sites, scaled."""
        rows: dict[HookSite, Tensor] = {}
        for site in sites.all:
            raw, scale = to_device(taken(site.name), self.device), self.scales[site]
            rows[site] = raw.to(self.dtype) if scale == 1 else raw.to(self.dtype) * scale
        return Batch(tuple(rows[site] for site in sites.inputs), tuple(rows[site] for site in sites.targets))

    def measure_scales(self, n_rows: int, sites: Sites) -> None:
        """Scale what is served of the sites, from now on, to a mean norm of sqrt(width) over up to `n_rows` rows."""
        for site in sites.all:
            self.scales[site] = 1.0
            norm = self.sample(n_rows, Sites((site,), (site,))).x.float().norm(dim=1).mean().item()
            if not 0 < norm < math.inf:
                raise ValueError(
                    f"normalize_activations: found a mean norm of {norm} at {site.name}, expected a number above 0; "
                    "choose another hook."
                )
            self.scales[site] = site.d_in**0.5 / norm

    @property
    def n_buffered(self) -> int:
        """How many rows of each hook this process holds in memory; 0 where it reads shuffled rows from a cache."""
        return self.source.n_buffered

    def check_buffer_size(self) -> None:
        """Raise ValueError if one step needs more rows than half the buffer (live) or the whole cache holds."""
        self.source.check_size(self.rows_per_step)

    # ---------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next batches depend on."""
        return self.source.state_dict() | {"scales": {site.name: scale for site, scale in self.scales.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.load_scales(state)
        self.source.load_state_dict(state)

    def load_part(self, part: dict[str, Any]) -> None:
        """Take rows and scales from what another rank has written of its state, after that of the first one."""
        self.load_scales(part)
        self.source.load_rows(part)

    def load_scales(self, state: dict[str, Any]) -> None:
        self.scales = {site: state["scales"].get(site.name, scale) for site, scale in self.scales.items()}


def without_cache(cfg: Any) -> Any:
    """Return `cfg` for live activations: the cache of a finished run may be gone."""
    if not isinstance(cfg, LanguageModelSAERunnerConfig) or cfg.use_cached_activations is False:
        return cfg
    return dataclasses.replace(cfg, use_cached_activations=False)
