"""Evaluation on held-out tokens: what the language model loses when it runs on reconstructions.

Every batch takes three passes of the whole language model: clean, with the reconstruction in place of the activations,
and with zeros in their place. Several autoencoders share the clean pass, and those of one hook the zeros. Sums are
taken over all tokens before any ratio, so no figure is a mean of ratios.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_training.activations_store import ActivationsStore
from sae_training.activations_store.store import without_cache
from sae_training.language_model.harvest import at_site, put_back
from sae_training.language_model.hooks import NamedLook, hooked
from sae_training.language_model.load import LanguageModel, load_language_model
from sae_training.language_model.sites import HookSite, Sites
from sae_training.run.folder import read_run_config
from sae_training.sparse_autoencoder import SparseAutoencoder

MAX_LOGITS = 2**26  # held at once, or as many values of a dense code, 256 MB in float32: bounds the prompts of one pass

Sums = defaultdict[str, float]


@dataclass
class Evaluated:
    """An autoencoder, its sites in the store, and the sums over what it has been evaluated on so far."""

    sae: SparseAutoencoder
    sites: Sites
    sums: Sums = field(default_factory=lambda: defaultdict(float))

    def __post_init__(self) -> None:
        self.moments = RowMoments(self.sae.d_out, self.sae.d_sae)


def evaluate(sae: SparseAutoencoder, store: ActivationsStore, tokens: Tensor) -> dict[str, float]:
    """Evaluate on held-out contexts `tokens` (n, context_size); neither the store nor the weights change.

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

    Positions the autoencoder is not trained on (`exclude_special_tokens` and the like) keep their clean activations in
    both changed runs and do not count in the figures about rows. A transcoder's reconstruction takes the place of its
    target.
    """
    return evaluate_together([(sae, store.sites)], store, tokens)[0]


@torch.no_grad()
def evaluate_together(
    saes: Sequence[tuple[SparseAutoencoder, Sites]], store: ActivationsStore, tokens: Tensor
) -> list[dict[str, float]]:
    """`evaluate` for several autoencoders, each with its sites, which are among those of the store."""
    evaluated = [Evaluated(sae, sites) for sae, sites in saes]
    were_training = [sae.training for sae, _ in saes]
    for each in evaluated:
        each.sae.eval()
    n_prompts = prompts_of_a_pass(tokens.shape[1], store.model, max((sae.d_sae for sae, _ in saes), default=0))
    for prompts in tokens.split(n_prompts):
        add_batch(evaluated, store, prompts.to(store.device))
    for each, was_training in zip(evaluated, were_training, strict=True):
        each.sae.train(was_training)
    return [figures(each.sums, each.moments) for each in evaluated]


def prompts_of_a_pass(context_size: int, model: LanguageModel, d_sae: int = 0) -> int:
    return max(1, MAX_LOGITS // (context_size * max(model.cfg.d_vocab, d_sae)))


def add_batch(evaluated: Sequence[Evaluated], store: ActivationsStore, prompts: Tensor) -> None:
    seen: dict[HookSite, Tensor] = {}

    def look_at(site: HookSite) -> NamedLook:
        return site.name, lambda activations: seen.update({site: at_site(activations, site)})

    sites = dict.fromkeys(site for each in evaluated for site in each.sites.all)
    clean = run(store.model, prompts, tuple(sites), map(look_at, sites))
    keep = store.keeps(prompts, seen[evaluated[0].sites.input])  # a rule about norms is for runs with one input site
    for target_site in dict.fromkeys(each.sites.target for each in evaluated):
        of_site = [each for each in evaluated if each.sites.target == target_site]
        zeros = torch.zeros_like(seen[target_site])
        heads = tuple(dict.fromkeys(each.sites.input for each in of_site))
        without = compare(clean, run(store.model, prompts, heads, (), [replacing(target_site, zeros, keep)]), prompts)
        for each in of_site:
            x = seen[each.sites.input]
            feature_acts = each.sae.encode(x)
            sae_out = each.sae.decode(feature_acts, x)
            each.moments.add(feature_acts[keep], sae_out[keep], seen[target_site].to(each.sae.dtype)[keep])
            del feature_acts
            changed = run(store.model, prompts, each.sites.inputs, (), [replacing(target_site, sae_out, keep)])
            with_sae = compare(clean, changed, prompts)
            each.sums["tokens"] += prompts[:, 1:].numel()
            each.sums["ce_clean"] += with_sae["ce_clean"]
            for name, found in (("sae", with_sae), ("ablation", without)):
                each.sums[f"ce_{name}"] += found["ce"]
                each.sums[f"kl_{name}"] += found["kl"]
                each.sums[f"pattern_kl_{name}"] += found.get(each.sites.input, 0.0)
            if each.sites.input in clean.patterns:
                each.sums["queries"] += prompts.numel()


def replacing(site: HookSite, new: Tensor, keep: Tensor) -> NamedLook:
    """Puts `new` (prompts, positions, width) at the site, where `keep` (prompts, positions) is true."""

    def replace(activations: Tensor) -> Tensor:
        clean = at_site(activations, site)
        return put_back(activations, torch.where(keep.unsqueeze(-1), new.to(clean.dtype), clean), site)

    return site.name, replace


@dataclass(frozen=True)
class Pass:
    """What a pass of the language model leaves: logits, and the attention patterns of the sites that are one head."""

    logits: Tensor
    patterns: dict[HookSite, Tensor]


def run(
    model: LanguageModel,
    prompts: Tensor,
    sites: Iterable[HookSite],
    reads: Iterable[NamedLook],
    replacements: Iterable[NamedLook] = (),
) -> Pass:
    """A pass over `prompts`; (prompts, positions, vocab) logits, (prompts, queries, keys) patterns."""
    patterns: dict[HookSite, Tensor] = {}

    def keep_pattern(site: HookSite) -> NamedLook:
        return f"blocks.{site.layer}.attn.hook_pattern", lambda activations: patterns.update(
            {site: activations[:, site.head_index]}
        )

    looks = [keep_pattern(site) for site in sites if site.head_index is not None]
    with hooked(model, [*reads, *looks], replacements):
        return Pass(model(prompts, return_type="logits"), patterns)


class RowMoments:
    """Running sums over rows, from which the figures about reconstructions follow."""

    def __init__(self, d_out: int, d_sae: int) -> None:
        self.n_rows = 0
        self.sum = torch.zeros(d_out, dtype=torch.float64)
        self.sum_squares = self.squared_error = self.l0 = self.out_norm = self.norm_ratio = 0.0
        self.fired = torch.zeros(d_sae, dtype=torch.bool)

    def add(self, feature_acts: Tensor, sae_out: Tensor, target: Tensor) -> None:
        """Codes (n, d_sae), their reconstructions and what these should be, (n, d_out)."""
        norms, out_norms = target.norm(dim=-1), sae_out.norm(dim=-1)
        active = feature_acts > 0
        self.n_rows += len(target)
        exact, exact_error = target.cpu().double(), (sae_out - target).cpu().double()  # mps has no float64
        self.sum += exact.sum(dim=0)
        self.sum_squares += exact.pow(2).sum().item()
        self.squared_error += exact_error.pow(2).sum().item()
        self.l0 += active.sum().item()
        self.out_norm += out_norms.sum().item()
        self.norm_ratio += (out_norms / norms.clamp_min(1e-12)).sum().item()
        self.fired |= active.any(dim=0).cpu()

    def variance(self) -> float:
        """Sum of squared distances from the mean row."""
        return self.sum_squares - (self.sum.pow(2).sum() / self.n_rows).item()


def figures(sums: Sums, rows: RowMoments) -> dict[str, float]:
    n = sums["tokens"]
    clean, with_sae, ablated = sums["ce_clean"] / n, sums["ce_sae"] / n, sums["ce_ablation"] / n
    result = {
        "metrics/ce_loss_without_sae": clean,
        "metrics/ce_loss_with_sae": with_sae,
        "metrics/ce_loss_with_ablation": ablated,
        "metrics/CE_loss_score": (ablated - with_sae) / (ablated - clean) if ablated != clean else float("nan"),
        "metrics/kl_with_sae": sums["kl_sae"] / n,
        "metrics/kl_with_ablation": sums["kl_ablation"] / n,
        "metrics/eval_explained_variance": 1 - rows.squared_error / rows.variance(),
        "metrics/eval_l0": rows.l0 / rows.n_rows,
        "metrics/l2_norm": rows.out_norm / rows.n_rows,
        "metrics/l2_ratio": rows.norm_ratio / rows.n_rows,
        "metrics/eval_dead_fraction": 1 - rows.fired.float().mean().item(),
    }
    if sums["queries"]:
        result["metrics/kldiv_reconstructed"] = sums["pattern_kl_sae"] / sums["queries"]
        result["metrics/kldiv_ablation"] = sums["pattern_kl_ablation"] / sums["queries"]
    return result


def compare(clean: Pass, changed: Pass, prompts: Tensor) -> dict[Any, float]:
    """`compare_predictions` by name, and by site the sums over queries of how the patterns differ."""
    ce_clean, ce, kl = compare_predictions(clean.logits, changed.logits, prompts)
    found: dict[Any, float] = {"ce_clean": ce_clean, "ce": ce, "kl": kl}
    return found | {site: pattern_kl_sum(clean.patterns[site], pattern) for site, pattern in changed.patterns.items()}


def compare_predictions(clean: Tensor, changed: Tensor, prompts: Tensor) -> tuple[float, float, float]:
    """Sums over predicted tokens of clean cross-entropy, changed cross-entropy and KL(clean || changed), in nats.

    `clean` and `changed` are logits (prompts, positions, vocab); the last position predicts no token we hold. One
    prompt at a time: what it needs in float32 then stays small enough for its memory to be used again.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for tokens, clean_logits, changed_logits in zip(prompts, clean, changed, strict=True):
        following = tokens[1:].unsqueeze(1)
        before = clean_logits[:-1].float().log_softmax(dim=-1)
        after = changed_logits[:-1].float().log_softmax(dim=-1)
        kl = torch.linalg.vecdot(before.exp(), before - after)
        sums += torch.stack([-before.gather(1, following).sum(), -after.gather(1, following).sum(), kl.sum()]).cpu()
    clean_sum, changed_sum, kl_sum = sums.tolist()
    return clean_sum, changed_sum, kl_sum


def pattern_kl_sum(clean: Tensor, changed: Tensor) -> float:
    """Sum over queries of KL(clean || changed) in bits, for attention patterns (prompts, queries, keys)."""
    clean, changed = clean.float(), changed.float()
    terms = torch.where(clean > 0, clean * (clean.log2() - changed.clamp_min(1e-30).log2()), 0)
    return terms.sum().item()


@torch.no_grad()
def evaluate_run(path: str | Path) -> dict[str, float]:
    """Evaluate the autoencoder of the run in `path` on its held-out tokens, as the run itself did at its end."""
    path = Path(path)
    cfg = read_run_config(path)
    sae = SparseAutoencoder.load_from_pretrained(path)
    model = load_language_model(cfg.model_name, str(sae.device), cfg.lm_dtype)
    store = ActivationsStore(without_cache(sae.cfg), model)
    tokens = store.held_out_tokens()
    if len(tokens) == 0:
        raise ValueError(
            f"{path}: this run holds no text out (n_eval_batches=0), so there is nothing to evaluate it on."
        )
    return evaluate(sae, store, tokens)
