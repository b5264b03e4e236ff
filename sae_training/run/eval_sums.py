"""How a changed pass of the language model differs from the clean one, and the sums of it over many batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sae_training.language_model.sites import HookSite, Sites
from sae_training.report.in_words import SCORE, why_no_score
from sae_training.sparse_autoencoder import SparseAutoencoder


@dataclass(frozen=True)
class Outputs:
    """What a pass of the language model leaves."""

    logits: Tensor
    """(prompts, positions, vocab)"""
    patterns: dict[HookSite, Tensor]
    """Attention patterns (prompts, queries, keys) of the sites that are one head."""


# --------------------------------------------------------------------------------------------- clean against changed


@dataclass(frozen=True)
class Comparison:
    """How a changed pass of a batch differs from the clean one: sums over predicted tokens, in nats."""

    ce_clean: float
    ce: float
    """Cross-entropy of the changed model."""
    kl: float
    """KL(clean || changed) of the next-token distributions."""
    pattern_kl: dict[HookSite, float]
    """Sums over queries, in bits, for sites that are one head."""


def compare(clean: Outputs, changed: Outputs, prompts: Tensor) -> Comparison:
    prompts = prompts.to(clean.logits.device)
    is_token = prompts >= 0
    pattern_kl = {
        site: pattern_kl_sum(clean.patterns[site], pattern, is_token) for site, pattern in changed.patterns.items()
    }
    return Comparison(*compare_predictions(clean.logits, changed.logits, prompts), pattern_kl)


def compare_predictions(clean: Tensor, changed: Tensor, prompts: Tensor) -> tuple[float, float, float]:
    """Return sums over predicted tokens: clean and changed cross-entropy, and KL(clean || changed), in nats.

    `clean` and `changed` are logits (prompts, positions, vocab); the last position predicts no token that we hold, and
    padding (ids below 0, at the end) is not predicted. The prompts come one by one, because the float32 tensors of one
    are so small that their memory is used for the next.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for tokens, clean_logits, changed_logits in zip(prompts, clean, changed, strict=True):
        following = tokens[1:][tokens[1:] >= 0].unsqueeze(1)
        before = clean_logits[: len(following)].float().log_softmax(dim=-1)
        after = changed_logits[: len(following)].float().log_softmax(dim=-1)
        kl = torch.linalg.vecdot(before.exp(), before - after)
        sums += torch.stack([-before.gather(1, following).sum(), -after.gather(1, following).sum(), kl.sum()]).cpu()
    clean_sum, changed_sum, kl_sum = sums.tolist()
    return clean_sum, changed_sum, kl_sum


def pattern_kl_sum(clean: Tensor, changed: Tensor, is_token: Tensor) -> float:
    """Return the sum over queries of KL(clean || changed), in bits, for patterns (prompts, queries, keys).

    Only queries where `is_token` (prompts, queries) count.
    """
    clean, changed = clean.float(), changed.float()
    counts = (clean > 0) & is_token.to(clean.device).unsqueeze(-1)
    terms = torch.where(counts, clean * (clean.log2() - changed.clamp_min(1e-30).log2()), 0)
    return terms.sum().item()


# -------------------------------------------------------------------------------------------------------------- sums


@dataclass
class Sums:
    """`Comparison`s of an autoencoder, summed over batches."""

    contexts: int = 0
    positions: int = 0
    """Of the contexts, padding aside."""
    tokens: int = 0
    """Predicted ones."""
    ce_clean: float = 0.0
    ce_sae: float = 0.0
    ce_ablation: float = 0.0
    kl_sae: float = 0.0
    kl_ablation: float = 0.0
    queries: int = 0
    """Of the head that the autoencoder reads; 0 if it reads no single head."""
    pattern_kl_sae: float = 0.0
    pattern_kl_ablation: float = 0.0

    def add(self, prompts: Tensor, site: HookSite, with_sae: Comparison, ablated: Comparison) -> None:
        self.contexts += len(prompts)
        self.positions += int((prompts >= 0).sum())
        self.tokens += int((prompts[:, 1:] >= 0).sum())
        self.ce_clean += with_sae.ce_clean
        self.ce_sae += with_sae.ce
        self.ce_ablation += ablated.ce
        self.kl_sae += with_sae.kl
        self.kl_ablation += ablated.kl
        if site in with_sae.pattern_kl:
            self.queries += int((prompts >= 0).sum())
            self.pattern_kl_sae += with_sae.pattern_kl[site]
            self.pattern_kl_ablation += ablated.pattern_kl[site]


class RowMoments:
    """Running sums over rows, from which the figures about reconstructions follow."""

    def __init__(self, d_out: int, d_sae: int) -> None:
        self.n_rows = 0
        self.sum = torch.zeros(d_out, dtype=torch.float64)
        self.sum_squares = self.squared_error = self.l0 = self.out_norm = self.norm_ratio = 0.0
        self.fired = torch.zeros(d_sae, dtype=torch.bool)

    def add(self, feature_acts: Tensor, sae_out: Tensor, target: Tensor) -> None:
        """Add codes (n, d_sae), their reconstructions (n, d_out), and what these should be."""
        norms, out_norms = target.norm(dim=-1), sae_out.norm(dim=-1)
        active = feature_acts != 0  # not above 0: those of abstopk may be below
        self.n_rows += len(target)
        exact, exact_error = target.cpu().double(), (sae_out - target).cpu().double()  # because mps has no float64
        self.sum += exact.sum(dim=0)
        self.sum_squares += exact.pow(2).sum().item()
        self.squared_error += exact_error.pow(2).sum().item()
        self.l0 += active.sum().item()
        self.out_norm += out_norms.sum().item()
        self.norm_ratio += (out_norms / norms.clamp_min(1e-12)).sum().item()
        self.fired |= active.any(dim=0).cpu()

    def variance(self) -> float:
        """Return the sum of squared distances from the mean row; 0 where what is left is only rounding."""
        variance = self.sum_squares - (self.sum.pow(2).sum() / self.n_rows).item()
        return 0.0 if variance < 1e-12 * self.sum_squares else variance

    def figures(self) -> dict[str, float]:
        """Return the figures about rows and reconstructions; NaN where there are no rows, or none that differ."""
        n, variance = self.n_rows or math.nan, self.variance()
        return {
            "metrics/eval_explained_variance": 1 - self.squared_error / (variance or math.nan),
            "metrics/eval_l0": self.l0 / n,
            "metrics/l2_norm": self.out_norm / n,
            "metrics/l2_ratio": self.norm_ratio / n,
            "metrics/eval_dead_fraction": 1 - self.fired.float().mean().item(),
        }

    def base(self) -> dict[str, float]:
        """Return what the figures are over: facts of the rows themselves."""
        n, variance = self.n_rows or math.nan, max(self.variance(), 0.0)
        return {
            "base/rows": self.n_rows,
            "base/mean_row_share": 1 - variance / (self.sum_squares or math.nan),
            "base/row_std": math.sqrt(variance / (n * len(self.sum))),
            "base/largest_mean_element": self.sum.abs().max().item() / n,
        }


@dataclass
class Evaluated:
    """An autoencoder, its sites, and the sums over what it has been evaluated on so far."""

    sae: SparseAutoencoder
    sites: Sites
    sums: Sums = field(default_factory=Sums)

    def __post_init__(self) -> None:
        self.moments = RowMoments(self.sae.d_out, self.sae.d_sae)

    def add_up(self, of_ranks: Sequence[tuple[Sums, RowMoments]]) -> None:
        """Put the sums of all ranks in the place of this one's."""
        self.sums, self.moments = Sums(), RowMoments(self.sae.d_out, self.sae.d_sae)
        for sums, moments in of_ranks:
            for total, theirs in ((vars(self.sums), vars(sums)), (vars(self.moments), vars(moments))):
                total.update({name: total[name] + value for name, value in theirs.items()})

    def figures(self, d_vocab: int) -> dict[str, float]:
        """Return the table of `evaluate`, for a language model of so many tokens."""
        sums = self.sums
        n_predicted = sums.tokens or math.nan  # sequences of one token predict none
        clean, with_sae, ablated = (total / n_predicted for total in (sums.ce_clean, sums.ce_sae, sums.ce_ablation))
        result = {
            "metrics/ce_loss_without_sae": clean,
            "metrics/ce_loss_with_sae": with_sae,
            "metrics/ce_loss_with_ablation": ablated,
            "metrics/CE_loss_score": (ablated - with_sae) / ((ablated - clean) or math.nan),
            "metrics/kl_with_sae": sums.kl_sae / n_predicted,
            "metrics/kl_with_ablation": sums.kl_ablation / n_predicted,
            **self.moments.figures(),
        }
        if sums.queries:
            result["metrics/kldiv_reconstructed"] = sums.pattern_kl_sae / sums.queries
            result["metrics/kldiv_ablation"] = sums.pattern_kl_ablation / sums.queries
        result |= self.moments.base() | {
            "base/positions": sums.positions,
            "base/contexts": sums.contexts,
            "base/predicted_tokens": sums.tokens,
            "base/ce_loss_by_chance": math.log(d_vocab),
        }
        return result | ({SCORE: math.nan} if why_no_score(result) else {})
