"""The shuffling store between the language model and the autoencoder.

    tokens (prompts, context) --harvest--> rows --> buffer[n_rows, d_in] --random batches--> (train_batch_size, d_in)

The buffer is allocated once. Batches are drawn from it in a random order; when half of its rows have been served,
exactly those rows are overwritten in place by new ones, and a new order is drawn. A row waits in the buffer for two
refills on average, so each batch mixes tokens of many prompts. Rows keep the language model's own precision, hence
lose nothing.

There is a buffer for each site (hook) that any autoencoder of the run reads or predicts, all filled from the same pass
over the language model and served in the same order: row i is the same token at every site. The order depends on
nothing but their size, so an autoencoder gets the same batches whichever others are trained beside it.

With `normalize_activations` the batches are scaled to a mean norm of sqrt(width), by factors that `measure_scales`
takes from the buffer once; `get_activations` gives the model's own units in any case.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from sae_training.activations import harvest
from sae_training.cache import CachedReader, open_cache
from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.config_io import option
from sae_training.documents import Documents
from sae_training.language_model import (
    HookSite,
    LanguageModel,
    check_order,
    find_hook_site,
    find_target_site,
    fingerprint,
)
from sae_training.text_data import open_documents, open_mixture
from sae_training.tokens import TokenStream


class Batch(NamedTuple):
    """What an autoencoder reads, (rows, d_in), and what it is to make of it, (rows, d_out): `x`, or another hook's."""

    x: Tensor
    target: Tensor


Sites = tuple[HookSite, ...]
"""Where an autoencoder's input is read and, for a transcoder, where its output belongs."""

SHUFFLE_SEED = 42  # the same in all runs, so that seeds of one run can share their batches


class ActivationsStore:
    """Serves shuffled activations of `model` on the text that `cfg` names (or on `dataset`, if given).

    `sites` are those of all autoencoders that are trained together; None stands for those of `cfg`.
    """

    def __init__(
        self,
        cfg: Any,
        model: LanguageModel,
        dataset: Any = None,
        notify: Callable[[str], None] = tqdm.write,
        sites: Iterable[HookSite] | None = None,
    ) -> None:
        self.cfg = cfg
        self.model = model
        self.device = torch.device(cfg.device)
        self.dtype: torch.dtype = option(cfg, "dtype")
        self.context_size: int = cfg.context_size
        self.store_batch_size: int = cfg.store_batch_size
        self.train_batch_size: int = cfg.train_batch_size
        self.n_rows = cfg.n_batches_in_buffer * cfg.store_batch_size * cfg.context_size
        self.sites = tuple(dict.fromkeys(find_sites(cfg, model) if sites is None else sites))
        self.scales = {site: 1.0 for site in self.sites}
        """What rows of each site are multiplied by before they are served."""
        check_context_size(cfg.context_size, model)

        self.documents = self.open(cfg.dataset_path if dataset is None else dataset)
        self.notify = notify
        self.n_held_out = 0
        if option(cfg, "eval_dataset_path") is None:
            self.n_held_out = option(cfg, "n_eval_batches") * cfg.store_batch_size
        self.tokens = self.token_stream(self.documents, self.n_held_out)
        self.excluded_ids = special_token_ids(model) if option(cfg, "exclude_special_tokens") else None
        self.seqpos_slice: tuple[int, ...] = tuple(option(cfg, "seqpos_slice"))

        self.generator = torch.Generator().manual_seed(SHUFFLE_SEED)
        self.buffers: list[Tensor] = []
        """One (n_rows, width) for each site, once they are filled."""
        self.order = torch.empty(0, dtype=torch.long)
        self.served = 0
        self.places = torch.empty(0, dtype=torch.long)
        """Where the latest batch is in the buffers."""
        self.spill = [torch.empty(0, site.d_in, dtype=model.cfg.dtype, device=self.device) for site in self.sites]
        self.latest: tuple[Sites, Batch] | None = None
        self.cached: CachedReader | None = None
        """What activations come from instead of the language model, if the config says so: rows that are served as
        they come, or contexts that take the place of the language model's passes."""
        if option(cfg, "use_cached_activations") is not False:
            shards = open_cache(
                Path(cfg.cached_activations_path), origin(cfg, self), {s.name: s.d_in for s in self.sites}
            )
            self.documents.check_position(shards.manifest.progress["tokens"]["source"])
            self.cached = CachedReader(shards, notify)
        self.cached_batch: dict[str, Tensor] = {}

    # ----------------------------------------------------------------------------------------------------- tokens

    def open(self, dataset: Any) -> Documents:
        how = {
            "split": option(self.cfg, "dataset_split"),
            "text_column": option(self.cfg, "dataset_text_column"),
            "streaming": option(self.cfg, "streaming"),
        }
        if isinstance(dataset, list):
            return open_mixture(dataset, option(self.cfg, "dataset_weights"), **how)
        return open_documents(dataset, **how)

    @property
    def n_tokenizer_processes(self) -> int:
        given: int | None = option(self.cfg, "tokenizer_processes")
        if given is None:  # a GPU takes tokens faster than one process makes them
            return 1 if self.device.type == "cpu" else 4
        return given

    def token_stream(self, documents: Documents, n_held_out: int) -> TokenStream:
        return TokenStream(
            documents,
            self.model.tokenizer,
            self.context_size,
            prepend_bos=option(self.cfg, "prepend_bos"),
            n_held_out=n_held_out,
            vocab_size=self.model.cfg.d_vocab,
            notify=self.notify,
            separator=option(self.cfg, "sequence_separator_token"),
            n_processes=self.n_tokenizer_processes,
        )

    def get_batch_tokens(self) -> Tensor:
        """The next contexts of the training text, (store_batch_size, context_size), on the config's device."""
        return self.tokens.next_contexts(self.store_batch_size).to(self.device)

    def held_out_tokens(self) -> Tensor:
        """Contexts (n, context_size) that training never sees: of `eval_dataset_path`, or 1 in 20 of the training
        text.
        """
        eval_dataset = option(self.cfg, "eval_dataset_path")
        if eval_dataset is None:
            return self.tokens.held_out_contexts()
        n_contexts = option(self.cfg, "n_eval_batches") * self.store_batch_size
        try:
            return self.token_stream(self.open(eval_dataset), 0).first_contexts(n_contexts)
        except (OSError, ValueError) as error:
            raise type(error)(str(error).replace("dataset_path", "eval_dataset_path", 1)) from error

    # ------------------------------------------------------------------------------------------------ activations

    def get_activations(self, tokens: Tensor) -> Tensor:
        """Activations of token ids (prompts, context), as (prompts, context, d_in) in the config's dtype."""
        (activations,) = harvest(self.model, tokens, [self.sites[0]])
        return activations.to(self.dtype).clone()

    def keeps(self, tokens: Tensor) -> Tensor:
        """Bool mask, of the shape of `tokens`: the positions the autoencoder is trained on."""
        keep = torch.ones_like(tokens, dtype=torch.bool)
        if self.seqpos_slice:
            keep.zero_()
            keep[:, torch.arange(tokens.shape[1])[slice(*self.seqpos_slice)]] = True
        return keep if self.excluded_ids is None else keep & ~torch.isin(tokens, self.excluded_ids.to(tokens.device))

    def next_rows(self) -> list[Tensor]:
        """Rows (n, width) of the next `store_batch_size` prompts at each site, in the model's precision."""
        if self.cached is not None and not self.goes_live(self.store_batch_size):
            read = self.cached.take(self.store_batch_size)
            tokens, found = read["tokens"], [read[site.name].to(self.model.cfg.dtype) for site in self.sites]
            found = [activations.to(self.device) for activations in found]
        else:
            tokens = self.get_batch_tokens()
            found = harvest(self.model, tokens, self.sites)
        found = [activations.flatten(end_dim=1) for activations in found]
        if self.excluded_ids is None and not self.seqpos_slice:
            return found
        keep = self.keeps(tokens).flatten()
        return [rows[keep] for rows in found]

    def next_batch(self) -> Tensor:
        """The next random batch, (train_batch_size, d_in), in the config's dtype."""
        return self.next_pair().x

    def next_pair(self) -> Batch:
        """The next random batch with its targets, (train_batch_size, d_in) and (train_batch_size, d_out)."""
        self.advance()
        return self.batch(self.sites)

    def advance(self, n_rows: int | None = None) -> None:
        """Go on to the next `n_rows` (None: train_batch_size) random rows, which `batch` then gives for any sites."""
        n_rows = n_rows or self.train_batch_size
        self.latest = None
        if self.serves_cached_rows and not self.goes_live(n_rows):
            assert self.cached is not None
            self.cached_batch = self.cached.take(n_rows)
            return
        self.fill(n_rows)
        self.places = self.order[self.served : self.served + n_rows]
        self.served += n_rows

    @property
    def serves_cached_rows(self) -> bool:
        """Whether batches are rows of a cache, as they come: these are shuffled already."""
        return self.cached is not None and self.cached.shards.form == "rows"

    def goes_live(self, n: int) -> bool:
        """Whether fewer than `n` rows or contexts of the cache are left, and the language model takes over there."""
        assert self.cached is not None
        if option(self.cfg, "use_cached_activations") != "then_live" or self.cached.remaining() >= n:
            return False
        shards, self.cached = self.cached.shards, None
        self.notify(f"end of {shards.folder} after {shards.n:,} {shards.form}: from here on, activations are live")
        tokens = shards.manifest.progress["tokens"]
        self.tokens.load_state_dict(tokens | {"pending": torch.tensor(tokens["pending"], dtype=torch.int64)})
        return True

    def batch(self, sites: Sites) -> Batch:
        """The batch that `advance` went on to. Asked again for the same sites, the same tensors."""
        if self.latest is None or self.latest[0] != sites:
            if self.serves_cached_rows:
                found = [self.as_served(self.cached_batch[site.name].to(self.device), site) for site in sites]
                self.latest = sites, Batch(found[0], found[-1])
            else:
                self.latest = sites, self.rows_at(self.places, sites)
        return self.latest[1]

    def measure_scales(self, n_rows: int, sites: Sites) -> None:
        """From now on, scale what is served of the sites to a mean norm of sqrt(width) over up to `n_rows` rows."""
        for site in sites:
            self.scales[site] = 1.0
            norm = self.sample(n_rows, (site,), torch.float32).x.norm(dim=1).mean().item()
            if not 0 < norm < math.inf:
                raise ValueError(
                    f"normalize_activations: the mean norm of {site.name} is {norm}, expected a number above 0; choose "
                    "another hook, or a wider dtype."
                )
            self.scales[site] = site.d_in**0.5 / norm

    def sample(self, n_rows: int, sites: Sites | None = None, dtype: torch.dtype | None = None) -> Batch:
        """Up to `n_rows` random rows of the buffer, or the next ones of a cache, without serving them."""
        sites = sites or self.sites
        if self.serves_cached_rows:
            assert self.cached is not None
            read = self.cached.peek(n_rows)
            found = [self.as_served(read[site.name].to(self.device), site, dtype) for site in sites]
            return Batch(found[0], found[-1])
        self.fill()
        return self.rows_at(self.order[:n_rows], sites, dtype)

    def rows_at(self, places: Tensor, sites: Sites, dtype: torch.dtype | None = None) -> Batch:
        """The buffers' rows at `places` (n,), scaled, in `dtype` (None: the config's)."""
        places = places.to(self.device)
        raw = [self.buffers[self.sites.index(site)].index_select(0, places) for site in sites]
        found = [self.as_served(rows, site, dtype) for rows, site in zip(raw, sites, strict=True)]
        return Batch(found[0], found[-1])

    def as_served(self, rows: Tensor, site: HookSite, dtype: torch.dtype | None = None) -> Tensor:
        """Raw activations of a site, scaled, in `dtype` (None: the config's)."""
        dtype, scale = dtype or self.dtype, self.scales[site]
        wide = torch.promote_types(dtype, torch.float32)  # raw activations can be too large for float16
        return (rows if scale == 1 else rows.to(wide) * scale).to(dtype)

    # ----------------------------------------------------------------------------------------------------- buffer

    def fill(self, n_rows: int = 0) -> None:
        """Allocate and fill the buffers at first, and refill their served half when the next `n_rows` would pass it."""
        if not self.buffers:
            self.check_buffer_size()
            dtype = self.model.cfg.dtype
            self.buffers = [torch.empty(self.n_rows, site.d_in, dtype=dtype, device=self.device) for site in self.sites]
            self.overwrite(torch.arange(self.n_rows))
        elif self.served + n_rows > self.n_rows // 2:
            self.overwrite(self.order[: self.served])

    def overwrite(self, slots: Tensor) -> None:
        """Put new rows into the buffers' places `slots` (n,), and draw a new order."""
        slots = slots.to(self.device)
        first_fill = len(slots) == self.n_rows
        with tqdm(total=len(slots), desc="filling the buffer", unit="row", leave=False, disable=not first_fill) as bar:
            while len(slots):
                rows = self.spill if len(self.spill[0]) else self.next_rows()
                n = min(len(rows[0]), len(slots))
                for buffer, new in zip(self.buffers, rows, strict=True):
                    buffer.index_copy_(0, slots[:n], new[:n])
                self.spill, slots = [new[n:] for new in rows], slots[n:]
                bar.update(n)
        self.order = torch.randperm(self.n_rows, generator=self.generator)
        self.served = 0

    @property
    def needs_buffer(self) -> bool:
        """Whether rows will go through the buffer: not those of a cache that is never left."""
        return not self.serves_cached_rows or option(self.cfg, "use_cached_activations") == "then_live"

    def check_buffer_size(self) -> None:
        if self.needs_buffer and self.train_batch_size > self.n_rows // 2:
            raise ValueError(
                f"train_batch_size: {self.train_batch_size} rows, but half the buffer holds {self.n_rows // 2} "
                "(n_batches_in_buffer * store_batch_size * context_size / 2); raise n_batches_in_buffer."
            )

    # ------------------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """All that the next batches depend on: buffer, order, position, generator, and the position in the text."""
        names = [site.name for site in self.sites]
        state: dict[str, Any] = {
            "served": self.served,
            "order": self.order,
            "spill": dict(zip(names, self.spill, strict=True)),
            "scales": dict(zip(names, self.scales.values(), strict=True)),
            "generator": self.generator.get_state(),
            "tokens": self.tokens.state_dict(),
            "cached": None if self.cached is None else self.cached.state_dict(),
        }
        return state | {"buffers": dict(zip(names, self.buffers, strict=True))} if self.buffers else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.served = state["served"]
        self.order = state["order"].clone()
        self.spill = [state["spill"][site.name].to(self.device) for site in self.sites]
        self.scales = {site: state["scales"][site.name] for site in self.sites}
        self.generator.set_state(state["generator"])
        try:
            self.tokens.load_state_dict(state["tokens"])
        except ValueError as error:
            raise ValueError(f"dataset_path: the data is not what the run was started on. {error}") from error
        if state.get("cached") is None:
            self.cached = None  # it had come to its end
        elif self.cached is not None:
            self.cached.load_state_dict(state["cached"])
        if "buffers" in state:
            self.buffers = [state["buffers"][site.name].to(self.device) for site in self.sites]


def origin(cfg: Any, store: ActivationsStore) -> dict[str, Any]:
    """What the activations of a store come from: the fields of `cache.MUST_AGREE`."""
    return {
        "model_name": cfg.model_name,
        "model_fingerprint": fingerprint(store.model),
        "lm_dtype": str(store.model.cfg.dtype).removeprefix("torch."),
        "dataset_path": cfg.dataset_path,
        "dataset_weights": list(cfg.dataset_weights),
        "dataset_split": cfg.dataset_split,
        "dataset_text_column": cfg.dataset_text_column,
        "hook_point_head_index": cfg.hook_point_head_index,
        "tokenizer": getattr(store.model.tokenizer, "name_or_path", None),
        "context_size": cfg.context_size,
        "prepend_bos": cfg.prepend_bos,
        "sequence_separator_token": cfg.sequence_separator_token,
        "exclude_special_tokens": cfg.exclude_special_tokens,
        "seqpos_slice": list(cfg.seqpos_slice),
        "n_held_out": store.n_held_out,
    }


def find_sites(cfg: Any, model: LanguageModel) -> Sites:
    """The hooks of `cfg` in `model`, checked: where the input is read and, for a transcoder, the target."""
    hook_point = getattr(cfg, "resolved_hook_point", cfg.hook_point)
    site = find_hook_site(model, hook_point, option(cfg, "hook_point_head_index"), cfg.d_in)
    target_hook_point = getattr(cfg, "resolved_target_hook_point", option(cfg, "target_hook_point"))
    if target_hook_point is None:
        return (site,)
    target_site = find_target_site(model, target_hook_point, option(cfg, "d_out"))
    check_order(model, site, target_site)
    return site, target_site


def with_widths(cfg: LanguageModelSAERunnerConfig, sites: Sites) -> LanguageModelSAERunnerConfig:
    """`cfg` with d_in and, for a transcoder, d_out as its `sites` have them."""
    site, *target = sites
    return dataclasses.replace(cfg, d_in=site.d_in, d_out=target[0].d_in if target else None)


def without_cache(cfg: Any) -> Any:
    """`cfg` for live activations: those of a finished run, whose cache may be gone."""
    if not isinstance(cfg, LanguageModelSAERunnerConfig) or cfg.use_cached_activations is False:
        return cfg
    return dataclasses.replace(cfg, use_cached_activations=False)


def special_token_ids(model: LanguageModel) -> Tensor:
    """The ids that the tokenizer calls special (BOS, EOS, padding, ...)."""
    return torch.tensor(sorted(set(model.tokenizer.all_special_ids)), dtype=torch.long)


def check_context_size(context_size: int, model: LanguageModel) -> None:
    if context_size > model.cfg.n_ctx:
        raise ValueError(
            f"context_size: got {context_size}, but the model reads at most {model.cfg.n_ctx} tokens; use "
            f"{model.cfg.n_ctx} or less."
        )
