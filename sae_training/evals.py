"""Evaluation on held-out tokens: what the language model loses when it runs on reconstructions.

Every batch takes three passes of the whole language model: clean, with the reconstruction in place of the activations,
and with zeros in their place. Sums are taken over all tokens before any ratio, so no figure is a mean of ratios.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sae_training.activations import at_site, put_back
from sae_training.activations_store import ActivationsStore
from sae_training.language_model import HookSite, LanguageModel
from sae_training.sparse_autoencoder import SparseAutoencoder

MAX_LOGITS = 2**26  # logits held at once, 256 MB in float32: bounds the prompts of one pass

Sums = defaultdict[str, float]


@torch.no_grad()
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

    Positions the autoencoder is not trained on (`exclude_special_tokens`) keep their clean activations in both changed
    runs and do not count in the figures about rows. A transcoder's reconstruction takes the place of its target.
    """
    was_training = sae.training
    sae.eval()
    sums: Sums = defaultdict(float)
    row_moments = RowMoments(sae.d_out, sae.d_sae)
    for prompts in batches_of_prompts(tokens, store.model):
        add_batch(sums, row_moments, sae, store, prompts.to(store.device))
    sae.train(was_training)
    return figures(sums, row_moments)


def batches_of_prompts(tokens: Tensor, model: LanguageModel) -> Iterator[Tensor]:
    n_prompts = max(1, MAX_LOGITS // (tokens.shape[1] * model.cfg.d_vocab))
    return iter(tokens.split(n_prompts))


def add_batch(
    sums: Sums, moments: RowMoments, sae: SparseAutoencoder, store: ActivationsStore, prompts: Tensor
) -> None:
    model, target_site = store.model, store.target_site
    keep = store.keeps(prompts)
    seen: list[Tensor] = []

    def look_at(site: HookSite) -> Callable[[Tensor, Any], None]:
        return lambda activations, hook: seen.append(at_site(activations, site))

    clean_logits, clean_pattern = run(model, prompts, store.site, [(site.name, look_at(site)) for site in store.sites])
    x, target = seen[0], seen[-1]  # in the order in which the pass comes to them
    feature_acts = sae.encode(x)
    sae_out = sae.decode(feature_acts, x)
    moments.add(feature_acts[keep], sae_out[keep], target.to(sae.dtype)[keep])
    sums["tokens"] += prompts[:, 1:].numel()
    for name, new in (("sae", sae_out), ("ablation", torch.zeros_like(sae_out))):
        logits, pattern = run(model, prompts, store.site, [(target_site.name, replacing(target_site, new, keep))])
        ce_clean, ce, kl = compare_predictions(clean_logits, logits, prompts)
        sums["ce_clean"] += ce_clean / 2  # the same number in each of two runs
        sums[f"ce_{name}"] += ce
        sums[f"kl_{name}"] += kl
        if clean_pattern is not None and pattern is not None:
            sums[f"pattern_kl_{name}"] += pattern_kl_sum(clean_pattern, pattern)
            sums["queries"] += clean_pattern.shape[0] * clean_pattern.shape[1] / 2  # counted once in each of two runs


def replacing(site: HookSite, new: Tensor, keep: Tensor) -> Callable[[Tensor, Any], Tensor]:
    """A hook that puts `new` (prompts, positions, width) at the site, at the positions `keep` (prompts, positions)."""

    def replace(activations: Tensor, hook: Any) -> Tensor:
        clean = at_site(activations, site)
        return put_back(activations, torch.where(keep.unsqueeze(-1), new.to(clean.dtype), clean), site)

    return replace


def run(
    model: LanguageModel, prompts: Tensor, site: HookSite, hooks: list[tuple[str, Callable[[Tensor, Any], Any]]]
) -> tuple[Tensor, Tensor | None]:
    """Logits (prompts, positions, vocab) with `hooks` and, where the site is one head, its attention pattern."""
    pattern: list[Tensor] = []

    def keep_pattern(activations: Tensor, hook: Any) -> None:
        pattern.append(activations[:, site.head_index])

    if site.head_index is not None:
        hooks = [*hooks, (f"blocks.{site.layer}.attn.hook_pattern", keep_pattern)]
    logits = model.run_with_hooks(prompts, fwd_hooks=hooks, return_type="logits")
    return logits, pattern[0] if pattern else None


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
