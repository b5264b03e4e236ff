"""Put sparse autoencoders into a language model, and change the activations of their latents, while a context lasts.

    with splice(model, sae):              the reconstruction takes the place of the activations
    with ablate(model, sae, [5, 17]):     the activations lose what these latents contribute
    with steer(model, sae, {5: 3.0}):     latent 5 is more active by 3.0

Whoever runs the model in there gets the changed activations: plain calls, `run_with_cache`, `generate`. Contexts nest;
of two at one hook, the second reads what the first has made. Afterwards the model is as it was before, whatever
happened inside. At the hook that is written, the model has the hook points of SAELens' HookedSAETransformer, each a
tensor (prompts, positions, width):

    {hook}.hook_sae_input       x: what the autoencoder reads
    {hook}.hook_sae_acts_pre    pre-activations
    {hook}.hook_sae_acts_post   activations of the latents, after ablating or steering
    {hook}.hook_sae_recons      recons: their reconstruction, in the units of the activations
    {hook}.hook_sae_error       error: activations - clean, where clean is the reconstruction of x without any change
    {hook}.hook_sae_output      recons; with the error term, activations + (recons - clean) + (change of the error)

With the error term the output is recons + error except for rounding, and no bit of the activations moves where nothing
is changed. A transcoder reads at its hook_point and writes at its target_hook_point. Of a hook with heads, an
autoencoder takes its one head, or all side by side. Gradients are those of the output as it stands above; with a hook
that returns `error.detach()`, those of SAELens.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from sae_analysis.positions import Positions, Where, mask_of, where_of
from sae_training.activations_store.position_rule import PositionRule
from sae_training.language_model.harvest import at_site, put_back
from sae_training.language_model.load import LanguageModel
from sae_training.language_model.sites import Sites, find_sites
from sae_training.language_model.standing import lent_points, shown_tokens, standing_hook, without_hooks
from sae_training.language_model.switches import switches_restored
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.sparse_autoencoder.hook_points import HookPoint

POINTS = INPUT, PRE, POST, RECONS, ERROR, OUTPUT = (
    *("hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post"),
    *("hook_sae_recons", "hook_sae_error", "hook_sae_output"),
)

Edit = Callable[[Tensor], Tensor]
"""A change of the latents' activations (prompts, positions, d_sae)."""


@contextmanager
def splice(
    model: LanguageModel, sae: SparseAutoencoder, use_error_term: bool = False, positions: Positions = "trained"
) -> Iterator[LanguageModel]:
    """In here the reconstruction of `sae` takes the place of the activations that it reconstructs.

    With `use_error_term` the model computes what it did without, until a hook changes something of the autoencoder.

    `positions` says where activations are replaced; elsewhere they stay. "trained": where the autoencoder is trained
    (`exclude_special_tokens`, `seqpos_slice`); if it has a `max_activation_norm_multiple` too, give the `rule` of its
    store instead. "all": everywhere. A bool tensor (positions,) or (prompts, positions): where it is true.

    Raise ValueError if the autoencoder does not fit the model.
    """
    with intervention(model, sae, lambda acts: acts, use_error_term, positions):
        yield model


@contextmanager
def ablate(
    model: LanguageModel,
    sae: SparseAutoencoder,
    latents: int | Iterable[int] | Tensor,
    use_error_term: bool = True,
    positions: Positions = "trained",
) -> Iterator[LanguageModel]:
    """In here the activations of `latents` are 0, and the model's activations lose what these contribute.

    Without the error term they are the reconstruction by all other latents. `positions` and errors as for `splice`.
    """
    edit = setting(dict.fromkeys(latent_numbers(latents, sae.d_sae), 0.0), sae)
    with intervention(model, sae, edit, use_error_term, positions):
        yield model


@contextmanager
def steer(
    model: LanguageModel,
    sae: SparseAutoencoder,
    strengths: Mapping[int, float],
    clamp: bool = False,
    use_error_term: bool = True,
    positions: Positions = "trained",
) -> Iterator[LanguageModel]:
    """In here each latent in `strengths` is more active by its strength, in the units of the latent's activation.

    So at every position the model's activations move by strength * W_dec[latent], times the size of the row if the
    autoencoder normalises rows (`normalize_activations` "layer_norm", "unit_norm"). With `clamp` the strength is the
    activation that the latent gets, whatever it had. `positions` and errors as for `splice`.
    """
    if not isinstance(strengths, Mapping):
        raise ValueError(f"strengths: found {strengths!r}, expected a dict of strengths by latent, such as {{5: 3.0}}.")
    numbers = latent_numbers(strengths.keys(), sae.d_sae)
    checked = dict(zip(numbers, map(finite, strengths.values()), strict=True))
    with intervention(model, sae, (setting if clamp else adding)(checked, sae), use_error_term, positions):
        yield model


# ------------------------------------------------------------------------------------------------- latents and edits


def latent_numbers(latents: Any, d_sae: int) -> list[int]:
    """The latents that a user names; ValueError for what is not the number of one."""
    given = latents.tolist() if hasattr(latents, "tolist") else latents
    is_one = isinstance(given, str | bytes) or not isinstance(given, Iterable)
    several: list[Any] = [given] if is_one else list(given)
    for latent in several:
        if isinstance(latent, bool) or not hasattr(latent, "__index__"):
            hint = "; of a mask, give mask.nonzero().flatten()" if isinstance(latent, bool) else ""
            raise ValueError(f"latents: found {latent!r}, expected whole numbers{hint}.")
        if not 0 <= latent < d_sae:
            raise ValueError(
                f"latents: found {latent}, expected 0 to {d_sae - 1}, as this autoencoder has {d_sae} latents."
            )
    return [operator.index(latent) for latent in several]


def finite(strength: Any) -> float:
    number = strength.item() if isinstance(strength, Tensor) and strength.ndim == 0 else strength
    if isinstance(number, bool) or not isinstance(number, Real) or not math.isfinite(number):
        raise ValueError(f"strengths: found {strength!r}, expected a finite number for each latent.")
    return float(number)


def adding(strengths: Mapping[int, float], sae: SparseAutoencoder) -> Edit:
    added = torch.zeros_like(sae.b_enc, requires_grad=False)
    added[list(strengths)] = added.new_tensor(list(strengths.values()))
    return lambda acts: acts + added


def setting(activations: Mapping[int, float], sae: SparseAutoencoder) -> Edit:
    is_set = torch.zeros_like(sae.b_enc, dtype=torch.bool)
    is_set[list(activations)] = True
    add = adding(activations, sae)
    return lambda acts: add(acts.masked_fill(is_set, 0.0))


# ------------------------------------------------------------------------------------------------------- inside a pass


@contextmanager
def intervention(
    model: LanguageModel, sae: SparseAutoencoder, edit: Edit, use_error_term: bool, positions: Positions
) -> Iterator[None]:
    """In here every pass of `model` goes through `sae`, with `edit` made to the activations of the latents."""
    with ExitStack() as stack:
        stack.enter_context(switches_restored(model))
        sites = sites_in(model, sae)
        points = stack.enter_context(lent_points(model, sites.target.name, POINTS))
        inside = Inside(sae, sites, edit, use_error_term, where_of(positions, model, sae), points)
        if isinstance(inside.where, PositionRule):
            stack.enter_context(shown_tokens(model, inside.keep_tokens))
        stack.enter_context(standing_hook(model, sites.input.name, inside.keep_input))
        stack.enter_context(standing_hook(model, sites.target.name, inside.replace))
        yield


def sites_in(model: LanguageModel, sae: SparseAutoencoder) -> Sites:
    """Where `sae` reads and writes in `model`; ValueError if it has no such hooks, or of another width."""
    cfg = copy.copy(sae.full_cfg)
    vars(cfg).update(d_in=None, d_out=None)  # any width, so that the error names the autoencoder and not its config
    with without_hooks(model):
        sites = find_sites(cfg, model)
    for site, width in ((sites.input, sae.d_in), (sites.target, sae.d_out)):
        if site.d_in != width:
            raise ValueError(
                f"sae: found an autoencoder for {width} values a position, but {site.name} of this model has "
                f"{site.d_in}; expected the model that it was trained on ({cfg.model_name!r})."
            )
    return sites


@dataclass
class Inside:
    """An autoencoder inside a language model: what it reads in a pass, and what it puts in the activations' place."""

    sae: SparseAutoencoder
    sites: Sites
    edit: Edit
    use_error_term: bool
    where: Where
    points: dict[str, Any]
    tokens: Tensor | None = None
    x: Tensor | None = None

    def __post_init__(self) -> None:
        """Take the autoencoder in inference mode, and once more without anybody's hooks; both share its weights."""
        self.sae = copy.copy(self.sae)
        self.sae.training = False
        self.clean = copy.copy(self.sae)
        self.clean._modules = {name: HookPoint() for name in self.sae._modules}

    def keep_tokens(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def keep_input(self, activations: Tensor) -> None:
        self.x = at_site(activations, self.sites.input)

    def replace(self, activations: Tensor) -> Tensor:
        """The hook's tensor with the autoencoder's output in it, where it is to be."""
        target = at_site(activations, self.sites.target)
        if self.x is None or self.x.shape[:-1] != target.shape[:-1]:
            raise ValueError(f"sae: this pass came to {self.sites.target.name} without {self.sites.input.name}.")
        out = self.output(self.x.to(self.sae.device), target.to(self.sae.device)).to(target.device)
        mask = mask_of(self.where, self.tokens, self.x)
        out = out if mask is None else torch.where(mask.unsqueeze(-1), out, target)
        return put_back(activations, self.points[OUTPUT](out), self.sites.target)

    def output(self, x: Tensor, target: Tensor) -> Tensor:
        """What takes the place of `target` (prompts, positions, d_out) where the autoencoder reads `x`."""
        sae, points = self.sae, self.points
        changed = points[INPUT](x)
        pre = points[PRE](sae.pre_activations(sae.sae_input(sae.normalize(changed))))
        acts = points[POST](self.edit(sae.activate(pre, sae.k)))
        recons = points[RECONS](sae.decode(acts, changed))
        if not self.use_error_term and not points[ERROR].fwd_hooks:
            return recons
        clean = self.clean.reconstruct(x)
        error = target - clean
        shown = points[ERROR](error)  # to those who look, without the error term too
        return target + (recons - clean) + (shown - error) if self.use_error_term else recons
