"""The store between the language model and the autoencoders: it opens the text, and serves shuffled activations.

    text --TokenStream--> Passes --rows--> ShuffleBuffer --batches--> (train_batch_size, d_in)

Any number of sites (hooks) are served at once, from the same passes and in the same order. Rows of a cache, which are
shuffled already, go past the buffer; contexts of one take the place of the language model's passes.

With `normalize_activations="expected_average_only_in"` the batches are scaled to a mean norm of sqrt(width), by factors
that `measure_scales` takes from the buffer once; `get_activations` gives the model's own units in any case.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sae_training.activations_store.cache import origin
from sae_training.activations_store.cache_reader import CachedReader, open_cache
from sae_training.activations_store.passes import Passes, PositionRule, to_device
from sae_training.activations_store.shuffle_buffer import ShuffleBuffer
from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.config.io import option
from sae_training.language_model.harvest import harvest
from sae_training.language_model.load import LanguageModel
from sae_training.language_model.sites import HookSite, Sites, check_context_size, find_sites
from sae_training.text.documents import Documents
from sae_training.text.open import open_documents, open_mixture
from sae_training.text.pretokenized import check_tokenizer
from sae_training.text.stream import TokenStream


@dataclass(frozen=True)
class Batch:
    """The rows of an autoencoder's `Sites`: one (rows, width) for each input and for each target.

    Where a target is an input too, it is the same tensor.
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


NORM_TOKENS = 8_192  # whose median norm tells what an outlier is


class ActivationsStore:
    """Serves shuffled activations of `model` on the text that `cfg` names (or on `dataset`, if given).

    `sites`: those of all autoencoders that are trained together (`merged`); None stands for those of `cfg`.
    """

    def __init__(
        self,
        cfg: Any,
        model: LanguageModel,
        dataset: Any = None,
        notify: Callable[[str], None] = tqdm.write,
        sites: Sites | None = None,
    ) -> None:
        self.cfg = cfg
        self.model = model
        self.device = torch.device(cfg.device)
        self.dtype: torch.dtype = option(cfg, "dtype")
        self.context_size: int = cfg.context_size
        self.store_batch_size: int = cfg.store_batch_size
        self.train_batch_size: int = cfg.train_batch_size
        self.n_rows = cfg.n_batches_in_buffer * cfg.store_batch_size * cfg.context_size
        self.sites = find_sites(cfg, model) if sites is None else sites
        self.hooks = self.sites.all
        self.scales = {site: 1.0 for site in self.hooks}
        """What rows of each site are multiplied by before they are served."""
        check_context_size(cfg.context_size, model)

        self.documents = self.open(cfg.dataset_path if dataset is None else dataset)
        self.notify = notify
        self.n_held_out = 0
        if option(cfg, "eval_dataset_path") is None:
            self.n_held_out = option(cfg, "n_eval_batches") * cfg.store_batch_size
        self.rule = PositionRule(
            special_token_ids(model) if option(cfg, "exclude_special_tokens") else None,
            tuple(option(cfg, "seqpos_slice")),
            self.max_norm(option(cfg, "max_activation_norm_multiple")),
        )
        then_live = option(cfg, "use_cached_activations") == "then_live"
        cached = self.open_cache()
        self.cached_rows = cached if cached and cached.shards.form == "rows" else None
        """Batches as they come, shuffled already, in place of the buffer's."""
        self.tokens = self.token_stream(self.documents, self.n_held_out)
        contexts = None if self.cached_rows else cached
        self.passes = Passes(
            model, self.hooks, self.tokens, self.store_batch_size, self.rule, self.device, contexts, then_live
        )
        self.buffer = ShuffleBuffer(self.passes, self.n_rows)
        self.needs_buffer = self.cached_rows is None or then_live
        self.cached_batch: dict[str, Tensor] = {}
        self.latest: tuple[Sites, Batch] | None = None

    # ----------------------------------------------------------------------------------------------------- tokens

    def open(self, dataset: Any, field: str = "dataset_path") -> Documents:
        how = {
            "field": field,
            "split": option(self.cfg, "dataset_split"),
            "text_column": option(self.cfg, "dataset_text_column"),
            "streaming": option(self.cfg, "streaming"),
        }
        paths = dataset if isinstance(dataset, list) else [dataset]
        for path in paths:
            check_tokenizer(path, self.model.tokenizer, field)
        if isinstance(dataset, list) and dataset is self.cfg.dataset_path:
            return open_mixture(dataset, option(self.cfg, "dataset_weights"), **how)
        return open_documents(dataset, **how)

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
        return self.token_stream(self.open(eval_dataset, "eval_dataset_path"), 0).first_contexts(n_contexts)

    def open_cache(self) -> CachedReader | None:
        """What activations come from instead of the language model, if the config says so."""
        if option(self.cfg, "use_cached_activations") is False:
            return None
        widths = {site.name: site.d_in for site in self.hooks}
        shards = open_cache(
            Path(self.cfg.cached_activations_path), origin(self.cfg, self.model, self.n_held_out), widths
        )
        try:
            self.documents.check_position(shards.manifest.progress["tokens"]["source"])
        except ValueError as error:
            raise ValueError(
                f"cached_activations_path: {self.cfg.cached_activations_path} was written from another text: {error}, "
                "or write another cache."
            ) from error
        return CachedReader(shards, self.notify)

    # ------------------------------------------------------------------------------------------------ activations

    def get_activations(self, tokens: Tensor) -> Tensor:
        """Activations of token ids (prompts, context), as (prompts, context, d_in) in the config's dtype."""
        (activations,) = harvest(self.model, tokens, self.sites.inputs[:1])
        return activations.to(self.dtype).clone()

    def keeps(self, tokens: Tensor, activations: Tensor | None = None) -> Tensor:
        """Bool mask, of the shape of `tokens`: the positions the autoencoder is trained on.

        A rule about norms (`max_activation_norm_multiple`) asks for the `activations` (prompts, context, d_in) at them.
        """
        return self.rule(tokens, activations)

    def max_norm(self, multiple: float | None) -> float | None:
        """`multiple` times the median norm of the first NORM_TOKENS tokens of the text at the first site.

        It follows from the text and the model, so that a run, its continuation and every later look at it agree.
        """
        if multiple is None:
            return None
        contexts = self.token_stream(self.documents, 0).first_contexts(-(-NORM_TOKENS // self.context_size))
        passes = contexts.to(self.device).split(self.store_batch_size)
        norms = [harvest(self.model, prompts, self.sites.inputs[:1])[0].float().norm(dim=-1) for prompts in passes]
        return multiple * torch.cat(norms).median().item()

    def next_batch(self) -> Tensor:
        """The next random batch, (train_batch_size, d_in), in the config's dtype."""
        return self.next_pair().x

    def next_pair(self) -> Batch:
        """The next random batch with its targets, (train_batch_size, d_in) and (train_batch_size, d_out)."""
        self.advance()
        return self.batch(self.sites)

    def advance(self, n_rows: int | None = None, n_left: int | None = None) -> None:
        """Go on to the next `n_rows` (None: train_batch_size) random rows, which `batch` then gives for any sites.

        `n_left` is how many rows a run will still ask for, these included; then none are made that it will not see.
        """
        n_rows = n_rows or self.train_batch_size
        self.latest = None
        if self.cached_rows is not None and self.needs_buffer and self.cached_rows.remaining() < n_rows:
            self.passes.go_live(self.cached_rows)
            self.cached_rows = None
        if self.cached_rows is None:
            self.buffer.advance(n_rows, n_left)
        else:
            self.cached_batch = self.cached_rows.take(n_rows)

    def batch(self, sites: Sites) -> Batch:
        """The batch that `advance` went on to. Asked again for the same sites, the same tensors."""
        if self.latest is None or self.latest[0] != sites:
            self.latest = sites, self.as_served(self.raw_batch, sites)
        return self.latest[1]

    def raw_batch(self, site: HookSite) -> Tensor:
        if self.cached_rows is None:
            return self.buffer.rows(self.hooks.index(site))
        return to_device(self.cached_batch[site.name], self.device)

    def measure_scales(self, n_rows: int, sites: Sites) -> None:
        """From now on, scale what is served of the sites to a mean norm of sqrt(width) over up to `n_rows` rows."""
        for site in sites.all:
            self.scales[site] = 1.0
            norm = self.sample(n_rows, Sites((site,), (site,)), torch.float32).x.norm(dim=1).mean().item()
            if not 0 < norm < math.inf:
                raise ValueError(
                    f"normalize_activations: the mean norm of {site.name} is {norm}, expected a number above 0; choose "
                    "another hook, or a wider dtype."
                )
            self.scales[site] = site.d_in**0.5 / norm

    def sample(self, n_rows: int, sites: Sites | None = None, dtype: torch.dtype | None = None) -> Batch:
        """Up to `n_rows` random rows of the buffer, or the next ones of a cache, without serving them."""
        sites = sites or self.sites
        if self.cached_rows is not None:
            read = self.cached_rows.peek(n_rows)
            return self.as_served(lambda site: to_device(read[site.name], self.device), sites, dtype)
        self.buffer.fill()
        places = self.buffer.order[:n_rows]
        return self.as_served(lambda site: self.buffer.rows_at(places, self.hooks.index(site)), sites, dtype)

    def as_served(self, raw: Callable[[HookSite], Tensor], sites: Sites, dtype: torch.dtype | None = None) -> Batch:
        """The raw activations of an autoencoder's sites, scaled, in `dtype` (None: the config's)."""
        dtype = dtype or self.dtype
        wide = torch.promote_types(dtype, torch.float32)  # raw activations can be too large for float16
        rows: dict[HookSite, Tensor] = {}
        for site in sites.all:
            scaled = raw(site) if self.scales[site] == 1 else raw(site).to(wide) * self.scales[site]
            rows[site] = scaled.to(dtype)
        return Batch(tuple(rows[site] for site in sites.inputs), tuple(rows[site] for site in sites.targets))

    def check_buffer_size(self) -> None:
        """ValueError unless half of the buffer, if the store needs one, holds the batches of a step, and a cache that
        is read again and again what is taken from it at once.
        """
        per_step = getattr(self.cfg, "tokens_per_step", self.train_batch_size)
        if self.needs_buffer:
            self.buffer.check_size(per_step)
        elif self.cached_rows is not None:
            self.cached_rows.check_size(per_step)
        if self.passes.cached is not None and not self.passes.then_live:
            self.passes.cached.check_size(self.store_batch_size)

    # ------------------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """All that the next batches depend on."""
        state = self.buffer.state_dict() | {"scales": {site.name: scale for site, scale in self.scales.items()}}
        return state if self.cached_rows is None else state | {"cached": self.cached_rows.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scales = {site: state["scales"][site.name] for site in self.hooks}
        if self.cached_rows is not None and state["cached"] is not None:
            self.cached_rows.load_state_dict(state["cached"])
        else:
            self.cached_rows = None  # it had come to its end, if there was one
        self.buffer.load_state_dict(state)


def without_cache(cfg: Any) -> Any:
    """`cfg` for live activations: those of a finished run, whose cache may be gone."""
    if not isinstance(cfg, LanguageModelSAERunnerConfig) or cfg.use_cached_activations is False:
        return cfg
    return dataclasses.replace(cfg, use_cached_activations=False)


def special_token_ids(model: LanguageModel) -> Tensor:
    """The ids that the tokenizer calls special (BOS, EOS, padding, ...)."""
    return torch.tensor(sorted(set(model.tokenizer.all_special_ids)), dtype=torch.long)
