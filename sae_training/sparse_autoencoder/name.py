"""The name of an autoencoder, as mats made it from the model, the place and the size."""

from __future__ import annotations

from pathlib import Path

from sae_training.config import LanguageModelSAERunnerConfig


def name_of(cfg: LanguageModelSAERunnerConfig, d_sae: int) -> str:
    """sparse_autoencoder_{model}_{hook}_{d_sae}, with _head{h} after the hook for a single head; for a transcoder
    transcoder_{model}_{hook}_{target hook}_{d_sae}. A local model is named by its folder alone.
    """
    model = Path(cfg.model_name).name if Path(cfg.model_name).is_absolute() else cfg.model_name
    place = f"{model}_{cfg.resolved_hook_point}"
    if cfg.target_hook_point is not None:
        return f"transcoder_{place}_{cfg.resolved_target_hook_point}_{d_sae}"
    head = "" if cfg.hook_point_head_index is None else f"_head{cfg.hook_point_head_index}"
    return f"sparse_autoencoder_{place}{head}_{d_sae}"
