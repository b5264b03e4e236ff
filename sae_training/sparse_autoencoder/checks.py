"""What configs, weights and activations must be for an autoencoder, and what is said of others."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.config.types import HOOKS_WITH_HEADS
from sae_training.sparse_autoencoder.normalization import BY_ROW


def check_config(cfg: LanguageModelSAERunnerConfig) -> None:
    """ValueError for a config that no autoencoder can be built from."""
    is_transcoder = cfg.target_hook_point is not None
    if not isinstance(cfg.d_in, int):
        raise ValueError(f"d_in: found {cfg.d_in!r}, expected the width of the activations as an int.")
    if is_transcoder and cfg.d_out is None:
        raise ValueError("d_out: found None, expected the width of the activations at target_hook_point as an int.")
    if cfg.skip_connection and not is_transcoder:
        raise ValueError("skip_connection: found True without target_hook_point, expected a transcoder.")
    if cfg.normalize_activations in BY_ROW and is_transcoder and cfg.file_format is None:
        raise ValueError(f"normalize_activations: found {cfg.normalize_activations}, which a transcoder cannot undo.")
    if cfg.architecture == "groupmax" and isinstance(cfg.d_sae, int) and cfg.d_sae % cfg.k:
        raise ValueError(
            f"k: found {cfg.k} with {cfg.d_sae} latents, expected a divisor: groupmax has groups of a size."
        )


def without_heads(x: Tensor, hook_point: str, d_in: int) -> Tensor:
    """Activations (..., d_in) of a hook with heads, such as hook_z, from (..., heads, d_head); others as is."""
    has_heads = hook_point.endswith(HOOKS_WITH_HEADS) and isinstance(x, Tensor) and x.ndim > 1
    return x.flatten(-2) if has_heads and x.shape[-1] != d_in == x.shape[-1] * x.shape[-2] else x


def check_width(x: Tensor, name: str, width: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(
            f"activations: found {type(x).__name__}, expected a tensor (..., {width}); give torch.as_tensor(x)."
        )
    if x.shape[-1:] != (width,):
        raise ValueError(f"activations: found shape {tuple(x.shape)}, expected (..., {name}) with {name} = {width}.")


def check_weights(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """ValueError, with all problems at once, unless the tensors of a file are those of the autoencoder `expected`."""
    lines = [f"{name}: missing" for name in expected if name not in found]
    lines += [f"{name}: not a tensor of this architecture" for name in found if name not in expected]
    for name in found.keys() & expected.keys():
        shape = tuple(expected[name].shape)
        if tuple(found[name].shape) != shape:
            lines.append(f"{name}: found shape {tuple(found[name].shape)}, expected {shape}")
    if lines:
        raise ValueError("weights do not fit the config:\n" + "\n".join(sorted(lines)))


def matrices_of(weights: Mapping[str, Tensor], d_in: int, d_sae: int, d_out: int) -> tuple[Tensor, Tensor]:
    """W_enc and W_dec of the weights of a file; ValueError if they are missing or have other shapes."""
    for name, shape in (("W_enc", (d_in, d_sae)), ("W_dec", (d_sae, d_out))):
        found = tuple(weights[name].shape) if name in weights else "none"
        if found != shape:
            raise ValueError(f"{name}: found {found}, expected {shape} by the config; the files do not fit together.")
    return weights["W_enc"], weights["W_dec"]
