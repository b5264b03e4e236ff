"""Evaluation on held-out text: what the language model loses when it runs on reconstructions.

Every batch takes three passes of the language model: clean, with the reconstruction in place of the activations, and
with zeros in their place. The last two begin above the blocks that the replacement cannot change. Several autoencoders
share the clean pass, those of one hook also the pass with zeros.
Sums are taken over all tokens before any ratio, so that no figure is a mean of ratios.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from sae_training.activations_store import ActivationsStore
from sae_training.activations_store.finiteness import check_finite, explain_live
from sae_training.activations_store.store import without_cache
from sae_training.config.io import check_known
from sae_training.formats import Facts
from sae_training.language_model.blocks_below import BlocksBelow, n_blocks_below
from sae_training.language_model.harvest import at_site, put_back
from sae_training.language_model.hooks import NamedLook, hooked, inputs_of
from sae_training.language_model.load import LanguageModel, model_of
from sae_training.language_model.sites import HookSite, Sites
from sae_training.machine.interrupt import stop_point
from sae_training.machine.phases import Bar, phase, progress_bar
from sae_training.parallel.ranks import Rounds
from sae_training.parallel.share import ALONE, Share
from sae_training.run.eval_sums import Evaluated, Outputs, compare
from sae_training.sparse_autoencoder import SparseAutoencoder

MAX_LOGITS = 2**26  # in a pass, or values of a dense code: 256 MB of float32; bounds the prompts of the pass


def evaluate(sae: SparseAutoencoder, store: ActivationsStore, tokens: Tensor) -> dict[str, float]:
    """Evaluate on held-out contexts `tokens` (n, context_size), without changing the store or the weights.

    | key                           | what                                                                             |
    |-------------------------------|----------------------------------------------------------------------------------|
    | metrics/ce_loss_without_sae   | next-token cross-entropy of the clean model, nats per token                      |
    | metrics/ce_loss_with_sae      | the same with the reconstruction in place of the activations                     |
    | metrics/ce_loss_with_ablation | the same with zeros in their place                                               |
    | metrics/CE_loss_score         | (ablation - with sae) / (ablation - without): 1 is perfect, 0 as bad as zeros    |
    | metrics/kl_with_sae, ..._with_ablation | KL(clean || changed) of the next-token distribution, nats per token     |
    | metrics/eval_explained_variance | 1 - sum of squared errors / sum of squares around the mean, over all rows      |
    | metrics/eval_l0               | mean number of active latents a token                                            |
    | metrics/l2_norm, metrics/l2_ratio | mean L2 norm of the reconstruction; mean ratio to the norm of its target     |
    | metrics/eval_dead_fraction    | share of latents that fire on none of these tokens                               |
    | metrics/kldiv_reconstructed, metrics/kldiv_ablation | one head only: KL of its attention pattern, bits a query   |
    | base/rows, base/positions     | how many rows the figures about rows are over, of how many positions             |
    | base/predicted_tokens, base/contexts | how many tokens the losses are over; in how many contexts                 |
    | base/ce_loss_by_chance        | log of the vocabulary's size: the cross-entropy of a model that knows nothing    |
    | base/mean_row_share           | share of the mean row in the rows' squared norm                                  |
    | base/row_std, base/largest_mean_element | root mean square of centred elements; the mean row's largest element   |

    The score is NaN where it would mean nothing (`why_no_score`): zeros change next to nothing, or improve the model.

    Positions the autoencoder is not trained on (`exclude_special_tokens` and the like) keep their clean activations in
    both changed runs and do not count in the figures about rows. A transcoder's reconstruction takes the place of its
    target.
    """
    return evaluate_together([(sae, store.sites)], store, tokens)[0]


@torch.no_grad()
def evaluate_together(
    saes: Sequence[tuple[SparseAutoencoder, Sites]],
    store: ActivationsStore,
    tokens: Tensor,
    share: Share = ALONE,
    is_everyones: bool = False,
) -> list[dict[str, float]]:
    """Evaluate several autoencoders, each with its sites, which are among those of the store.

    With a `share`, this process evaluates its share of the batches, and returns the figures of all. `is_everyones`: all
    processes of the job evaluate now, each its own, or its share, and agree on a stop between two passes. Of these,
    one may have given all of its own up.
    """
    evaluated = [Evaluated(sae, sites) for sae, sites in saes]
    were_training = [sae.training for sae, _ in saes]
    for each in evaluated:
        each.sae.eval()
    n_prompts = prompts_of_a_pass(tokens.shape[1], store.model, max((sae.shard.d_sae for sae, _ in saes), default=0))
    batches = tokens.split(n_prompts)[share.rank :: share.n] if saes else ()
    n_passes = len(batches) * (1 + len({sites.target for _, sites in saes}) + len(saes))
    rounds = Rounds(n_passes) if is_everyones else None
    with progress_bar("evaluating", n_passes, "passes") as bar:
        for prompts in batches:
            add_batch(evaluated, store, prompts.to(store.device), bar, rounds)
        if rounds is not None:
            rounds.finish()
    for each, was_training in zip(evaluated, were_training, strict=True):
        each.sae.train(was_training)
        if not share.is_all:
            each.add_up(share.everyones((each.sums, each.moments)))
        if not each.sae.shard.is_all:  # what was counted is of the latents here
            l0, fired = zip(*each.sae.shard.everyones((each.moments.l0, each.moments.fired)), strict=True)
            each.moments.l0, each.moments.fired = sum(l0), torch.cat(fired)
    return [each.figures(store.model.cfg.d_vocab) for each in evaluated]


def prompts_of_a_pass(context_size: int, model: LanguageModel, d_sae: int = 0) -> int:
    """Return how many prompts can be evaluated at once, for MAX_LOGITS logits or values of the widest code."""
    return prompts_of_width(context_size, max(model.cfg.d_vocab, d_sae))


def prompts_of_width(context_size: int, width: int) -> int:
    """Return how many prompts have MAX_LOGITS values at most, where each position has `width` of them."""
    return max(1, MAX_LOGITS // (context_size * width))


# ------------------------------------------------------------------------------------------------------- one batch


def add_batch(
    evaluated: Sequence[Evaluated], store: ActivationsStore, prompts: Tensor, bar: Bar, rounds: Rounds | None = None
) -> None:
    """Add to the sums of each autoencoder what the batch `prompts` (n, context_size) tells of it."""
    before_a_pass = stop_point if rounds is None else rounds.next
    seen: dict[HookSite, Tensor] = {}

    def look_at(site: HookSite) -> NamedLook:
        return site.name, lambda activations: seen.update({site: at_site(activations, site).to(store.device)})

    sites = dict.fromkeys(site for each in evaluated for site in each.sites.all)
    below = BlocksBelow(store.model, (n_blocks_below(names_hooked(each.sites)) for each in evaluated))
    before_a_pass()
    clean = forward_pass(store, prompts, below.recorded(), sites, reads=map(look_at, sites))
    bar.update(1)
    keep = store.keeps(prompts, seen[evaluated[0].sites.input])  # a rule about norms is for runs with one input site
    check_finite({site.name: seen[site][keep] for site in sites}, explain_live(store.model))
    for target_site in dict.fromkeys(each.sites.target for each in evaluated):
        of_site = [each for each in evaluated if each.sites.target == target_site]
        zeros = replacing(target_site, torch.zeros_like(seen[target_site]), keep)
        heads = dict.fromkeys(each.sites.input for each in of_site)
        n_below = min(n_blocks_below(names_hooked(each.sites)) for each in of_site)
        before_a_pass()
        zeroed = forward_pass(store, prompts, below.skipped(n_below), heads, replacements=[zeros])
        ablated = compare(clean, zeroed, prompts)
        bar.update(1)
        for each in of_site:
            x = seen[each.sites.input]
            feature_acts = each.sae.encode(x)
            sae_out = each.sae.decode(feature_acts, x)
            each.moments.add(feature_acts[keep], sae_out[keep], seen[target_site].to(each.sae.dtype)[keep])
            del feature_acts  # the largest tensor of all, which the next pass does not need
            new = replacing(target_site, sae_out, keep)
            skipped = below.skipped(n_blocks_below(names_hooked(each.sites)))
            before_a_pass()
            changed = forward_pass(store, prompts, skipped, each.sites.inputs, replacements=[new])
            each.sums.add(prompts, each.sites.input, compare(clean, changed, prompts), ablated)
            bar.update(1)


def names_hooked(sites: Sites) -> list[str]:
    """Return the hooks of a changed pass: where it differs from the clean one, and where its patterns are read."""
    return [sites.target.name, *(pattern_name(site) for site in sites.inputs if site.head_index is not None)]


def pattern_name(site: HookSite) -> str:
    return f"blocks.{site.layer}.attn.hook_pattern"


def replacing(site: HookSite, new: Tensor, keep: Tensor) -> NamedLook:
    """Return a hook that sets `new` (prompts, positions, width) at the site where `keep` (prompts, positions) is."""

    def replace(activations: Tensor) -> Tensor:
        clean = at_site(activations, site)
        here = keep.to(clean.device).unsqueeze(-1)
        return put_back(activations, torch.where(here, new.to(clean), clean), site)

    return site.name, replace


def forward_pass(
    store: ActivationsStore,
    prompts: Tensor,
    blocks: AbstractContextManager[None],
    sites: Iterable[HookSite],
    reads: Iterable[NamedLook] = (),
    replacements: Iterable[NamedLook] = (),
) -> Outputs:
    """Run the store's model on `prompts`, its `blocks` recorded or skipped, with hooks that read and that replace."""
    patterns: dict[HookSite, Tensor] = {}

    def keep_pattern(site: HookSite) -> NamedLook:
        return pattern_name(site), lambda activations: patterns.update({site: activations[:, site.head_index]})

    looks = [keep_pattern(site) for site in sites if site.head_index is not None]
    # In this order, because the hooks choose what runs in a block, and the recorder goes around that.
    with hooked(store.model, [*reads, *looks], replacements), blocks:
        return Outputs(store.model(**inputs_of(store.model, prompts, store.padded), return_type="logits"), patterns)


@torch.no_grad()
def evaluate_run(
    path: str | Path,
    hook_point: str | None = None,
    layer: int | None = None,
    n_eval_batches: int | None = None,
    **given: Unpack[Facts],
) -> dict[str, float]:
    """Evaluate the autoencoder in the run folder `path` on its held-out text, as the run itself did at its end.

    `path` may also be a checkpoint, or what else `SparseAutoencoder.load_from_pretrained` takes, whose arguments are
    the others but `n_eval_batches`: how many batches of store_batch_size contexts, in place of the run's number (10
    for files of other programs). ValueError if the language model, the place or the text is known from neither, and
    for more batches than a run here held out of the text that it trained on.
    """
    with phase("reading the autoencoder"):
        sae = SparseAutoencoder.load_from_pretrained(path, None, hook_point, layer, **given)
    check_known(sae.cfg)
    if n_eval_batches is not None:
        is_other_text = given.get("dataset_path") is not None or sae.cfg.eval_dataset_path is not None
        if n_eval_batches > sae.cfg.n_eval_batches and sae.cfg.file_format is None and not is_other_text:
            raise ValueError(
                f"n_eval_batches: found {n_eval_batches}, expected at most {sae.cfg.n_eval_batches}, which this run "
                "held out; it trained on the text after them. Lower it, or give dataset_path."
            )
        sae.cfg = dataclasses.replace(sae.cfg, n_eval_batches=n_eval_batches)
    with phase("loading the language model"):
        model = model_of(sae.cfg)
    with phase("reading the text"):
        store = ActivationsStore(without_cache(sae.cfg), model)
        tokens = store.held_out_tokens()
    if len(tokens) == 0:
        raise ValueError(
            f"{path}: this run holds no text out (n_eval_batches=0), so there is nothing to evaluate it on."
        )
    with phase("evaluation", has_bar=True):
        return evaluate(sae, store, tokens)
