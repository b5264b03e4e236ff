"""The sparse autoencoder: the readable definition of what is trained, and its saved form.

sae_in       = x - b_dec
hidden_pre   = sae_in @ W_enc + b_enc
feature_acts = ReLU(hidden_pre)                the k largest of each row only, for architecture "topk"
sae_out      = feature_acts @ W_dec + b_dec
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sae_training.config_io import option
from sae_training.geometric_median import geometric_median
from sae_training.language_model import HookedRootModule, HookPoint
from sae_training.losses import auxk_loss, ghost_grad_loss, l1_norm, normalised_squared_error
from sae_training.weights import load_weights, save_weights


class ForwardOutput(NamedTuple):
    """What `SparseAutoencoder.forward` returns; unpacks in this order."""

    sae_out: Tensor
    """Reconstruction, of the shape of the input."""
    feature_acts: Tensor
    """Latent activations, (..., d_sae)."""
    loss: Tensor
    """mse_loss + l1_loss + ghost_grad_loss, a scalar."""
    mse_loss: Tensor
    """Mean over elements of the squared error over the row's centred norm."""
    l1_loss: Tensor
    """l1_coefficient times the mean over rows of the L1 norm; 0 for topk."""
    ghost_grad_loss: Tensor
    """The loss of the remedy for dead latents: ghost gradients, or AuxK times its coefficient; else 0."""


class SparseAutoencoder(HookedRootModule):
    """A sparse autoencoder over vectors of width `cfg.d_in`, with `cfg.d_sae` latents.

    `cfg` is a LanguageModelSAERunnerConfig, or any object with its attributes; attributes it lacks take that class's
    defaults. Parameters: W_enc (d_in, d_sae), b_enc (d_sae,), W_dec (d_sae, d_in) with rows of unit norm, b_dec
    (d_in,).
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        if not isinstance(cfg.d_in, int):
            raise ValueError(f"d_in: found {cfg.d_in!r}, expected the width of the activations as an int.")
        self.cfg = cfg
        self.d_in: int = cfg.d_in
        self.d_sae: int = cfg.d_sae
        self.dtype: torch.dtype = option(cfg, "dtype")
        self.device = torch.device(cfg.device)
        self.architecture: str = option(cfg, "architecture")
        self.k: int = option(cfg, "k")
        self.l1_coefficient: float = option(cfg, "l1_coefficient")
        self.use_ghost_grads: bool = option(cfg, "use_ghost_grads")
        self.auxk_coefficient: float = getattr(cfg, "resolved_auxk_coefficient", 0.0)
        self.auxk_k: int = getattr(cfg, "resolved_auxk_k", 0)

        W_enc, W_dec = self.initial_weights(seed=option(cfg, "seed"))
        placed = {"dtype": self.dtype, "device": self.device}
        self.W_enc = nn.Parameter(W_enc.to(**placed))
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae, **placed))
        self.W_dec = nn.Parameter(W_dec.to(**placed))
        self.b_dec = nn.Parameter(torch.zeros(self.d_in, **placed))

        self.hook_sae_in = HookPoint()
        self.hook_hidden_pre = HookPoint()
        self.hook_hidden_post = HookPoint()
        self.hook_sae_out = HookPoint()
        self.setup()

    def initial_weights(self, seed: int) -> tuple[Tensor, Tensor]:
        """Kaiming-uniform W_enc and W_dec, decoder rows of unit norm, the same for a seed on every device.

        For topk the encoder starts as the decoder's transpose (Gao et al. 2024), which leaves far fewer latents dead;
        for standard the two are independent, as in mats.
        """
        generator = torch.Generator().manual_seed(seed)
        W_enc = nn.init.kaiming_uniform_(torch.empty(self.d_in, self.d_sae), generator=generator)
        W_dec = nn.init.kaiming_uniform_(torch.empty(self.d_sae, self.d_in), generator=generator)
        W_dec = W_dec / W_dec.norm(dim=1, keepdim=True)
        if self.architecture == "topk":
            W_enc = W_dec.T.contiguous()
        return W_enc, W_dec

    # ------------------------------------------------------------------------------------------------- the function

    def encode(self, x: Tensor) -> Tensor:
        """Latent activations (..., d_sae) of activations (..., d_in)."""
        return self.activate(self.pre_activations(x))

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Reconstruction (..., d_in) of latent activations (..., d_sae)."""
        return self.hook_sae_out(feature_acts @ self.W_dec + self.b_dec)

    def pre_activations(self, x: Tensor) -> Tensor:
        self.check_width(x)
        sae_in = self.hook_sae_in(x.to(self.dtype) - self.b_dec)
        return self.hook_hidden_pre(sae_in @ self.W_enc + self.b_enc)

    def activate(self, hidden_pre: Tensor) -> Tensor:
        match self.architecture:
            case "standard":
                acts = hidden_pre.relu()
            case "topk":
                values, indices = hidden_pre.topk(self.k, dim=-1, sorted=False)
                acts = torch.zeros_like(hidden_pre).scatter(-1, indices, values.relu())
            case other:
                raise ValueError(f"architecture: found {other!r}, expected 'standard' or 'topk'.")
        return self.hook_hidden_post(acts)

    def forward(self, x: Tensor, dead_neuron_mask: Tensor | None = None) -> ForwardOutput:
        """Reconstruct activations `x` (..., d_in), with all losses; leading dimensions are rows alike.

        `dead_neuron_mask` (d_sae,) bool marks the latents that the remedy for dead latents (ghost gradients or AuxK, in
        training mode only) works on; None means none.
        """
        return self.losses(x, dead_neuron_mask, self.l1_coefficient)

    def losses(self, x: Tensor, dead: Tensor | None, l1_coefficient: float) -> ForwardOutput:
        x = x.to(self.dtype)
        hidden_pre = self.pre_activations(x)
        feature_acts = self.activate(hidden_pre)
        sae_out = self.decode(feature_acts)

        rows, rows_out = x.reshape(-1, self.d_in), sae_out.reshape(-1, self.d_in)
        mse = normalised_squared_error(rows_out, rows)
        mse_loss = mse.mean()
        if self.architecture == "standard":
            l1_loss = l1_coefficient * l1_norm(feature_acts)
        else:
            l1_loss = torch.zeros_like(mse_loss)
        remedy_loss = self.remedy_loss(rows, rows_out, hidden_pre.reshape(-1, self.d_sae), mse, dead)
        loss = mse_loss + l1_loss + remedy_loss
        return ForwardOutput(sae_out, feature_acts, loss, mse_loss, l1_loss, remedy_loss)

    def remedy_loss(self, x: Tensor, sae_out: Tensor, hidden_pre: Tensor, mse: Tensor, dead: Tensor | None) -> Tensor:
        has_remedy = self.use_ghost_grads or self.auxk_coefficient > 0
        if dead is None or not has_remedy or not self.training or not dead.any():
            return torch.zeros((), dtype=x.dtype, device=x.device)
        if self.use_ghost_grads:
            return ghost_grad_loss(x, sae_out, hidden_pre, self.W_dec, dead, mse)
        return self.auxk_coefficient * auxk_loss(x, sae_out, hidden_pre, self.W_dec, dead, self.auxk_k)

    def check_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.d_in:
            raise ValueError(
                f"activations: the last dimension of {tuple(x.shape)} is {x.shape[-1]}, expected d_in = {self.d_in}."
            )

    # --------------------------------------------------------------------------------------------------- the decoder

    @torch.no_grad()
    def initialize_b_dec(self, activations: Tensor, method: str) -> None:
        """Set b_dec from a sample of activations (rows, d_in): "geometric_median", "mean" or "zeros"."""
        match method:
            case "geometric_median":
                self.b_dec.copy_(geometric_median(activations))
            case "mean":
                self.b_dec.copy_(activations.float().mean(dim=0))
            case "zeros":
                self.b_dec.zero_()
            case other:
                raise ValueError(f"b_dec_init_method: found {other!r}, expected 'geometric_median', 'mean' or 'zeros'.")

    @torch.no_grad()
    def set_decoder_norm_to_unit_norm(self, unless: Tensor | bool = False) -> None:
        """Divide each row of W_dec by its L2 norm; a row of zeros stays zero, and all rows do where `unless` is true.

        Dividing rows of unit norm once more moves them by a rounding error, hence `unless`, read on the device.
        """
        norms = self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-30)
        self.W_dec.div_(torch.where(torch.as_tensor(unless, device=norms.device), 1.0, norms))

    @torch.no_grad()
    def remove_gradient_parallel_to_decoder_directions(self) -> None:
        """Take from W_dec's gradient what would only stretch or shrink its (unit) rows."""
        if self.W_dec.grad is None:
            raise ValueError("W_dec has no gradient: call backward() first.")
        along = (self.W_dec.grad * self.W_dec).sum(dim=1, keepdim=True)
        self.W_dec.grad.addcmul_(along, self.W_dec, value=-1)

    # ------------------------------------------------------------------------------------------------ name and files

    def get_name(self) -> str:
        """sparse_autoencoder_{model}_{hook}_{d_sae}, with _head{h} after the hook for a single head.

        A local model is named by its folder alone.
        """
        model = Path(self.cfg.model_name).name if Path(self.cfg.model_name).is_absolute() else self.cfg.model_name
        hook = getattr(self.cfg, "resolved_hook_point", self.cfg.hook_point)
        head = option(self.cfg, "hook_point_head_index")
        return f"sparse_autoencoder_{model}_{hook}{'' if head is None else f'_head{head}'}_{self.d_sae}"

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, parameter.detach()) for name, parameter in self.named_parameters())

    def save_model(self, path: str | Path) -> None:
        """Save to a folder (cfg.json + sae.safetensors), or to one file if `path` ends in .safetensors."""
        save_weights(Path(path), dict(self.weights()), self.cfg)

    @classmethod
    def load_from_pretrained(cls, path: str | Path, device: str | None = None) -> SparseAutoencoder:
        """Load a run folder, a folder or file written by `save_model`, or an old .pt / .pkl / .pkl.gz.

        `device` overrides the saved one; without it, a saved device that this machine lacks falls back to the CPU. Old
        files are read by an unpickler that builds tensors and plain config data and nothing else.
        """
        cfg, tensors = load_weights(Path(path), device)
        sae = cls(cfg)
        sae.load_state_dict(tensors)
        return sae
