"""What the options of jumprelu mean together: where thresholds start, and what is refused."""

from __future__ import annotations

from typing import Any

from sae_training.config.fields import Autoencoder


def starts_from_data(cfg: Any) -> bool:
    """Return whether the first thresholds come from the first rows, and not from jumprelu_init_threshold.

    "auto" gives way to a threshold that is named. The default names none.
    """
    if cfg.jumprelu_init_l0 != "auto":
        return cfg.jumprelu_init_l0 is not None
    return cfg.jumprelu_init_threshold == Autoencoder.jumprelu_init_threshold


def target_l0_in_parts(target_l0: float | None, micro_batch_size: int | None, grad_acc_steps: int = 1) -> str | None:
    """Refuse target_l0 where the penalty would be the sum over parts of a batch."""
    if target_l0 is None or micro_batch_size is None and grad_acc_steps == 1:
        return None
    return (
        f"target_l0: found {target_l0} with micro_batch_size {micro_batch_size}, grad_acc_steps "
        f"{grad_acc_steps}, expected neither, because it penalises the L0 of a whole batch; leave one out"
    )


def target_l0_of_tanh(target_l0: float | None, architecture: str, jumprelu_sparsity_loss_mode: str) -> str | None:
    """Refuse target_l0 with a penalty that is not L0."""
    if target_l0 is None or architecture != "jumprelu" or jumprelu_sparsity_loss_mode == "step":
        return None
    return f"target_l0: found {target_l0} with jumprelu_sparsity_loss_mode tanh, expected step; set one of them"


def l0_out_of_reach(
    target_l0: float | None, jumprelu_init_l0: float | str | None, architecture: str, d_sae: int | None
) -> str | None:
    """Refuse an L0 that no thresholds above 0 give: half of the pre-activations are below 0 when a run begins."""
    if architecture != "jumprelu" or d_sae is None:
        return None
    for name, l0 in (("target_l0", target_l0), ("jumprelu_init_l0", jumprelu_init_l0)):
        if isinstance(l0, int | float) and l0 > d_sae / 2:
            return (
                f"{name}: found {l0:g}, expected at most {d_sae / 2:g}, half of d_sae: thresholds are above 0, and so "
                "is about half of all pre-activations; lower it, or raise expansion_factor"
            )
    return None


def norms_in_a_count(
    scale_sparsity_penalty_by_decoder_norm: bool, architecture: str, jumprelu_sparsity_loss_mode: str
) -> str | None:
    """Refuse decoder norms in a penalty that counts latents."""
    counts = architecture == "jumprelu" and jumprelu_sparsity_loss_mode == "step"
    if not scale_sparsity_penalty_by_decoder_norm or not counts:
        return None
    return (
        "scale_sparsity_penalty_by_decoder_norm: found True with jumprelu_sparsity_loss_mode step, which counts "
        "latents and not their sizes; set it to tanh"
    )


RULES = (target_l0_in_parts, target_l0_of_tanh, l0_out_of_reach, norms_in_a_count)
