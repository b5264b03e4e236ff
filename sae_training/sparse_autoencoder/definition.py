"""The sparse autoencoder: the readable definition of what is trained, and its saved form.

sae_in       = x - b_dec
hidden_pre   = sae_in @ W_enc + b_enc
feature_acts = activation(hidden_pre)          which latents are active, and how: architectures.py
sae_out      = feature_acts @ W_dec + b_dec

A transcoder (`cfg.target_hook_point`) predicts other activations than those it reads: the output of an MLP from its
input, say. Nothing is subtracted from its input (sae_in = x), and it may have a skip connection, sae_out + x @ W_skip.
With `normalize_activations` "layer_norm" or "unit_norm", x is normalised first and sae_out brought back, row by row;
hook points, and losses, see what lies between.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sae_training.config.io import option
from sae_training.formats.native import load_weights, save_weights
from sae_training.kernels.sparse_code import Code, CodeFigures
from sae_training.language_model.hook_points import HookedRootModule, HookPoint
from sae_training.machine.precision import bfloat16_is_fast
from sae_training.sparse_autoencoder import architectures
from sae_training.sparse_autoencoder.losses import (
    MULTI_TOPK_FACTOR,
    Coefficients,
    Losses,
    Reconstruction,
    add_up,
    auxk_loss,
    ghost_grad_loss,
    n_auxk_rows,
)
from sae_training.sparse_autoencoder.normalization import BY_ROW, normalize, restore
from sae_training.sparse_autoencoder.start_values import centre

CACHED_ROWS = 1024  # of the decoder, that stay in cache from one pass over them to the next


class ForwardOutput(NamedTuple):
    """What `SparseAutoencoder.forward` returns; unpacks in this order."""

    sae_out: Tensor
    """Reconstruction (..., d_out)."""
    feature_acts: Tensor
    """Latent activations, (..., d_sae)."""
    loss: Tensor
    """mse_loss + l1_loss + ghost_grad_loss, a scalar."""
    mse_loss: Tensor
    """Mean over elements of the squared error over the row's centred norm.

    matryoshka: its mean over the nested dictionaries. gated and multi_topk: with their second reconstruction's added.
    """
    l1_loss: Tensor
    """The architecture's sparsity penalty times l1_coefficient; 0 for topk, batchtopk and matryoshka."""
    ghost_grad_loss: Tensor
    """The loss of the remedy for dead latents: ghost gradients, or AuxK times its coefficient; else 0."""


class SparseAutoencoder(HookedRootModule):
    """A sparse autoencoder over vectors of width `cfg.d_in`, with `cfg.d_sae` latents.

    `cfg` is a LanguageModelSAERunnerConfig, or any object with its attributes; attributes it lacks take that class's
    defaults. Parameters: W_enc (d_in, d_sae), b_enc (d_sae,), W_dec (d_sae, d_out) with rows of unit norm, b_dec
    (d_out,), d_out being d_in but for transcoders; jumprelu has log_threshold (d_sae,), gated r_mag and b_mag (d_sae,),
    a skip connection W_skip (d_in, d_out). W_enc lies in memory latent by latent, as W_dec does, so that picking a
    latent reads one stretch of it.
    """

    inference_threshold: Tensor
    """batchtopk: the pre-activation above which a latent is active outside training, a scalar."""

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        if not isinstance(cfg.d_in, int):
            raise ValueError(f"d_in: found {cfg.d_in!r}, expected the width of the activations as an int.")
        self.cfg = cfg
        self.d_in: int = cfg.d_in
        self.d_sae: int = cfg.d_sae
        self.is_transcoder = option(cfg, "target_hook_point") is not None
        self.d_out: int = option(cfg, "d_out") if self.is_transcoder else self.d_in
        if self.d_out is None:
            raise ValueError("d_out: found None, expected the width of the activations at target_hook_point as an int.")
        if option(cfg, "skip_connection") and not self.is_transcoder:
            raise ValueError("skip_connection: found True without target_hook_point, expected a transcoder.")
        self.dtype: torch.dtype = option(cfg, "dtype")
        self.device = torch.device(cfg.device)
        self.normalization: str = option(cfg, "normalize_activations")
        if self.normalization in BY_ROW and self.is_transcoder:
            raise ValueError(f"normalize_activations: found {self.normalization}, which a transcoder cannot undo.")
        self.architecture: str = option(cfg, "architecture")
        self.k: int = option(cfg, "k")
        self.multi_topk: bool = option(cfg, "multi_topk")
        self.matryoshka_widths = matryoshka_widths(cfg)
        self.l1_coefficient: float = option(cfg, "l1_coefficient")
        self.lp_norm: float = option(cfg, "lp_norm")
        self.scale_sparsity_penalty_by_decoder_norm: bool = option(cfg, "scale_sparsity_penalty_by_decoder_norm")
        self.jumprelu_bandwidth: float = option(cfg, "jumprelu_bandwidth")
        self.jumprelu_sparsity_loss_mode: str = option(cfg, "jumprelu_sparsity_loss_mode")
        self.jumprelu_tanh_scale: float = option(cfg, "jumprelu_tanh_scale")
        self.target_l0: float | None = option(cfg, "target_l0")
        self.use_ghost_grads: bool = option(cfg, "use_ghost_grads")
        self.auxk_coefficient: float = getattr(cfg, "resolved_auxk_coefficient", 0.0)
        self.auxk_k: int = getattr(cfg, "resolved_auxk_k", 0)
        self.choice = self.architecture
        """How the active latents are chosen: as the architecture does, of which matryoshka has two kinds."""
        if self.architecture == "matryoshka":
            self.choice = option(cfg, "matryoshka_selection")
        self.encoder_dtype = encoder_dtype(option(cfg, "encoder_matmul_dtype"), self.dtype, self.device)

        W_enc, W_dec = self.initial_weights(seed=option(cfg, "seed"))
        placed = {"dtype": self.dtype, "device": self.device}
        self.W_enc = nn.Parameter(W_enc.T.contiguous().to(**placed).T)
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae, **placed))
        self.W_dec = nn.Parameter(W_dec.to(**placed))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out, **placed))

        if self.architecture == "jumprelu":
            start = math.log(option(cfg, "jumprelu_init_threshold"))
            self.log_threshold = nn.Parameter(torch.full((self.d_sae,), start, **placed))
        if self.architecture == "gated":
            self.r_mag = nn.Parameter(torch.zeros(self.d_sae, **placed))
            self.b_mag = nn.Parameter(torch.zeros(self.d_sae, **placed))
        if option(cfg, "skip_connection"):
            self.W_skip = nn.Parameter(torch.zeros(self.d_in, self.d_out, **placed))
        if self.choice == "batchtopk":
            self.register_buffer("inference_threshold", torch.zeros((), **placed))

        self.hook_sae_in = HookPoint()
        self.hook_hidden_pre = HookPoint()
        self.hook_hidden_post = HookPoint()
        self.hook_sae_out = HookPoint()
        self.setup()

    def initial_weights(self, seed: int) -> tuple[Tensor, Tensor]:
        """Kaiming-uniform W_enc and W_dec, decoder rows of unit norm, the same for a seed on every device.

        The encoder starts as the decoder's transpose (Gao et al. 2024), which leaves far fewer latents dead; for
        standard the two are independent, as in mats. For a transcoder they are too, with encoder columns of unit norm.
        """
        generator = torch.Generator().manual_seed(seed)
        W_enc = nn.init.kaiming_uniform_(torch.empty(self.d_in, self.d_sae), generator=generator)
        W_dec = nn.init.kaiming_uniform_(torch.empty(self.d_sae, self.d_out), generator=generator)
        W_dec = W_dec / W_dec.norm(dim=1, keepdim=True)
        if self.is_transcoder:
            W_enc = W_enc / W_enc.norm(dim=0)
        elif self.architecture != "standard":
            W_enc = W_dec.T.clone()
        return W_enc, W_dec

    # ------------------------------------------------------------------------------------------------- the function

    def encode(self, x: Tensor) -> Tensor:
        """Latent activations (..., d_sae) of activations (..., d_in)."""
        check_width(x, "d_in", self.d_in)
        return self.activate(self.pre_activations(self.sae_input(self.normalize(x))), self.k)

    def decode(self, feature_acts: Tensor, x: Tensor | None = None) -> Tensor:
        """Reconstruction (..., d_out) of latent activations (..., d_sae).

        A skip connection, and normalisation row by row, need the activations `x` (..., d_in) that were encoded as well.
        """
        return self.restore(self.hook_sae_out(feature_acts @ self.W_dec + self.baseline(x)), x)

    def normalize(self, x: Tensor) -> Tensor:
        """Activations (..., d_in) in the units that training sees, in the autoencoder's dtype."""
        return normalize(x, self.normalization).to(self.dtype)

    def restore(self, rows: Tensor, x: Tensor | None) -> Tensor:
        """Reconstructions (..., d_in) in the units of the activations `x` that were encoded."""
        if self.normalization not in BY_ROW:
            return rows
        if x is None:
            raise ValueError(
                f"x: this autoencoder has normalize_activations {self.normalization}, whose inverse needs the "
                "activations that were encoded: decode(acts, x)."
            )
        return restore(rows, x.to(self.device), self.normalization)

    def baseline(self, x: Tensor | None) -> Tensor:
        """The reconstruction that no active latent leaves: b_dec (d_out,), and with a skip connection x @ W_skip."""
        if not self.has_skip_connection:
            return self.b_dec
        if x is None:
            raise ValueError("x: this transcoder has a skip connection, so decode needs its input: decode(acts, x).")
        return x.to(self.dtype) @ self.W_skip + self.b_dec

    @property
    def has_skip_connection(self) -> bool:
        return hasattr(self, "W_skip")

    def sae_input(self, x: Tensor) -> Tensor:
        """What the encoder multiplies, (..., d_in), of (normalised) activations."""
        check_width(x, "d_in", self.d_in)
        x = x.to(self.dtype)
        return self.hook_sae_in(x if self.is_transcoder else x - self.b_dec)

    def pre_activations(self, sae_in: Tensor) -> Tensor:
        return self.hook_hidden_pre(sae_in @ self.W_enc + self.b_enc)

    def activate(self, pre: Tensor, k: int) -> Tensor:
        """Latent activations of all pre-activations (..., d_sae)."""
        acts = self.activation(Code(pre))
        match self.choice:
            case "topk":
                acts = acts * architectures.top_k_mask(pre, k)
            case "batchtopk" if self.training:
                acts = acts * architectures.batch_top_k_mask(acts, k)
            case "batchtopk":
                acts = acts * (pre > self.inference_threshold)
        return self.hook_hidden_post(acts)

    def activation(self, pre: Code) -> Tensor:
        """Activations of the pre-activations that are chosen, of the shape of `pre.values`."""
        match self.architecture:
            case "jumprelu":
                return architectures.jumprelu(pre.values, pre.at(self.threshold), self.jumprelu_bandwidth)
            case "gated":
                at = pre.at
                return architectures.gated_activation(pre.values, at(self.b_enc), at(self.r_mag), at(self.b_mag))
            case _:
                return pre.values.relu()

    @property
    def threshold(self) -> Tensor:
        """jumprelu: the pre-activation (d_sae,) above which each latent is active."""
        return self.log_threshold.exp()

    def reconstruct(self, x: Tensor) -> Tensor:
        """Reconstruction (..., d_out) from activations `x` (..., d_in)."""
        return self.decode(self.encode(x), x)

    def forward(self, x: Tensor, dead_neuron_mask: Tensor | None = None, target: Tensor | None = None) -> ForwardOutput:
        """Reconstruct activations `x` (..., d_in), with all losses; leading dimensions are rows alike.

        `dead_neuron_mask` (d_sae,) bool marks the latents that the remedy for dead latents (ghost gradients or AuxK, in
        training mode only) works on; None means none. A transcoder's losses need the activations `target` (..., d_out)
        that it predicts; `reconstruct` does without.
        """
        if self.is_transcoder and target is None:
            raise ValueError("target: a transcoder's losses need the activations it predicts; or call reconstruct(x).")
        target = x if target is None else target
        check_width(x, "d_in", self.d_in)
        check_width(target, "d_out", self.d_out)
        rows = self.normalize(x).reshape(-1, self.d_in)
        target = self.normalize(target).reshape(-1, self.d_out)
        losses = self.losses(rows, target, Coefficients(self.l1_coefficient, self.k), dead_neuron_mask)
        return ForwardOutput(
            self.restore(losses.sae_out.view(*x.shape[:-1], self.d_out), x),
            losses.feature_acts.view(*x.shape[:-1], self.d_sae),
            losses.loss,
            losses.mse_loss,
            losses.l1_loss,
            losses.ghost_grad_loss,
        )

    # ------------------------------------------------------------------------------------------------------ losses

    def losses(
        self,
        x: Tensor,
        target: Tensor,
        coefficients: Coefficients,
        dead: Tensor | None = None,
        norm: Tensor | None = None,
    ) -> Losses:
        """Losses of reconstructing `target` (rows, d_out) from `x` (rows, d_in), both as `normalize` returns them.

        `dead` (d_sae,) bool marks the latents that the remedy works on. `norm`: see `losses.add_up`.
        """
        dead = dead if self.has_work(dead) else None
        sae_in = self.sae_input(x)
        made = self.dense_parts(sae_in, coefficients.k, dead)
        penalty = self.sparsity_penalty(made.pre, made.acts, coefficients.l1_coefficient)
        return add_up(made, target, norm, penalty, self.remedy_loss(sae_in, target, made, dead))

    def has_work(self, dead: Tensor | None) -> bool:
        """Whether the remedy for dead latents has work; yes off the CPU, where asking would wait for the device."""
        if dead is None or not self.training or not (self.use_ghost_grads or self.auxk_coefficient > 0):
            return False
        return dead.device.type != "cpu" or bool(dead.any())

    def dense_parts(self, sae_in: Tensor, k: int, dead: Tensor | None) -> Reconstruction:
        pre = self.pre_activations(sae_in)
        acts = self.activate(pre, k)
        multi_out = gate_out = error_hat = None
        if self.multi_topk:
            chosen = architectures.top_k_mask(pre, MULTI_TOPK_FACTOR * k)
            multi_out = (pre.relu() * chosen) @ self.W_dec + self.baseline(sae_in)
        if self.architecture == "gated":
            gate_out = pre.relu() @ self.W_dec.detach() + self.baseline(sae_in).detach()
        if dead is not None and self.auxk_coefficient > 0:
            few = pre[: n_auxk_rows(len(pre))].masked_fill(~dead, -torch.inf)
            error_hat = (few.relu() * architectures.top_k_mask(few, self.auxk_k)) @ self.W_dec
        return Reconstruction(Code(pre), Code(acts), self.dense_outputs(acts, sae_in), multi_out, gate_out, error_hat)

    def dense_outputs(self, acts: Tensor, sae_in: Tensor) -> Tensor:
        """(prefixes, rows, d_out): the reconstructions, from ever more of the latents."""
        if not self.matryoshka_widths:
            return self.hook_sae_out(acts @ self.W_dec + self.baseline(sae_in)).unsqueeze(0)
        edges = (0, *self.matryoshka_widths)
        blocks = [acts[:, i:j] @ self.W_dec[i:j] for i, j in zip(edges, edges[1:], strict=False)]
        outs = architectures.prefix_sums(torch.stack(blocks), self.baseline(sae_in))
        return torch.cat([outs[:-1], self.hook_sae_out(outs[-1]).unsqueeze(0)])

    def sparsity_penalty(self, pre: Code, acts: Code, l1_coefficient: float) -> Tensor:
        """l1_coefficient times the mean over rows of the architecture's penalty, a scalar."""
        if self.architecture not in architectures.PENALISED:
            return torch.zeros((), dtype=acts.values.dtype, device=acts.values.device)
        penalised = pre.values.relu() if self.architecture == "gated" else acts.values
        if self.scale_sparsity_penalty_by_decoder_norm:
            penalised = penalised * acts.at(self.W_dec.norm(dim=1))
        if self.architecture != "jumprelu":
            return l1_coefficient * architectures.lp_penalty(penalised, self.lp_norm).sum() / acts.n_rows
        if self.jumprelu_sparsity_loss_mode == "tanh":
            return l1_coefficient * (self.jumprelu_tanh_scale * penalised).tanh().sum() / acts.n_rows
        l0 = architectures.step_above(pre.values, pre.at(self.threshold), self.jumprelu_bandwidth).sum() / acts.n_rows
        return l1_coefficient * (l0 if self.target_l0 is None else (l0 / self.target_l0 - 1).pow(2))

    def remedy_loss(self, sae_in: Tensor, target: Tensor, made: Reconstruction, dead: Tensor | None) -> Tensor:
        sae_out = made.sae_outs[-1]
        if dead is None:
            return torch.zeros((), dtype=target.dtype, device=target.device)
        if made.error_hat is not None:
            n = len(made.error_hat)
            loss = auxk_loss(target[:n], (target[:n] - sae_out[:n]).detach(), made.error_hat)
            return self.auxk_coefficient * loss * dead.any()
        if dead.device.type == "cpu":
            dead_pre, W_dec = sae_in @ self.W_enc[:, dead] + self.b_enc[dead], self.W_dec[dead]
        else:  # picking the dead ones would wait for the device
            all_pre = made.pre.values if made.pre.entries is None else sae_in @ self.W_enc + self.b_enc
            dead_pre, W_dec = all_pre.masked_fill(~dead, -torch.inf), self.W_dec
        return ghost_grad_loss(target, sae_out, dead_pre, W_dec) * dead.any()

    # ------------------------------------------------------------------------------------------- start, and the decoder

    @torch.no_grad()
    def initialize_b_dec(self, activations: Tensor, method: str) -> None:
        """Set b_dec from a sample of activations (rows, d_out): "geometric_median", "mean" or "zeros"."""
        self.b_dec.copy_(centre(self.normalize(activations), method))

    @torch.no_grad()
    def initialize_transcoder(self, x: Tensor, target: Tensor, method: str) -> None:
        """Set b_dec from a sample of targets (rows, d_out), and the encoder from their inputs `x` (rows, d_in).

        The encoder starts as that of an autoencoder does: it sees inputs around their centre (b_enc = -centre @ W_enc),
        and its columns have the length that gives activations the size of the targets.
        """
        self.initialize_b_dec(target, method)
        x, target, centre_x = x.to(self.dtype), target.to(self.dtype), centre(x, method).to(self.dtype)
        size, target_size = (x - centre_x).norm(dim=1).mean(), (target - self.b_dec).norm(dim=1).mean()
        if size > 0 and target_size > 0:
            self.W_enc.mul_(target_size / size)
        self.b_enc.copy_(-(centre_x @ self.W_enc))
        if self.architecture == "gated":
            self.b_mag.copy_(self.b_enc)

    @property
    def has_unit_norm_decoder(self) -> bool:
        """Whether training keeps W_dec's rows at norm 1; not if the penalty counts the norms."""
        return not self.scale_sparsity_penalty_by_decoder_norm

    @torch.no_grad()
    def track_inference_threshold(self, code: Code | CodeFigures, step: int) -> None:
        """batchtopk: follow the smallest activation of each training batch, as a mean with a memory of 10 steps."""
        if self.choice == "batchtopk":
            smallest = code.smallest_active()
            weight = max(0.1, 1 / (step + 1))
            new = torch.lerp(self.inference_threshold, smallest.to(self.dtype), weight)
            self.inference_threshold.copy_(torch.where(smallest.isfinite(), new, self.inference_threshold))

    @torch.no_grad()
    def set_decoder_norm_to_unit_norm(self, unless: Tensor | bool = False) -> None:
        """Divide each row of W_dec by its L2 norm; a row of zeros stays zero, and all rows do where `unless` is true.

        Dividing rows of unit norm once more moves them by a rounding error, hence `unless`, read on the device.
        """
        norms = self.W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(self.dtype).tiny)
        self.W_dec.div_(torch.where(torch.as_tensor(unless, device=norms.device), 1.0, norms))

    @torch.no_grad()
    def remove_gradient_parallel_to_decoder_directions(self) -> None:
        """Take from W_dec's gradient what would only stretch or shrink its (unit) rows."""
        if self.W_dec.grad is None:
            raise ValueError("W_dec has no gradient: call backward() first.")
        for gradient, rows in zip(self.W_dec.grad.split(CACHED_ROWS), self.W_dec.split(CACHED_ROWS), strict=True):
            along = torch.linalg.vecdot(gradient, rows).unsqueeze(1)
            gradient.addcmul_(along, rows, value=-1)

    # ------------------------------------------------------------------------------------------------ name and files

    def get_name(self) -> str:
        """sparse_autoencoder_{model}_{hook}_{d_sae}, with _head{h} after the hook for a single head; of a transcoder
        transcoder_{model}_{hook}_{target hook}_{d_sae}.

        A local model is named by its folder alone.
        """
        model = Path(self.cfg.model_name).name if Path(self.cfg.model_name).is_absolute() else self.cfg.model_name
        hook = getattr(self.cfg, "resolved_hook_point", self.cfg.hook_point)
        if self.is_transcoder:
            target = getattr(self.cfg, "resolved_target_hook_point", option(self.cfg, "target_hook_point"))
            return f"transcoder_{model}_{hook}_{target}_{self.d_sae}"
        head = option(self.cfg, "hook_point_head_index")
        return f"sparse_autoencoder_{model}_{hook}{'' if head is None else f'_head{head}'}_{self.d_sae}"

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """All that is saved: the parameters and, for batchtopk, the threshold of inference."""
        return ((name, tensor.detach()) for name, tensor in self.state_dict().items())

    def save_model(self, path: str | Path) -> None:
        """Save to a folder (cfg.json + sae.safetensors), or to one file if `path` ends in .safetensors."""
        save_weights(Path(path), dict(self.weights()), self.cfg)

    @classmethod
    def load_from_pretrained(cls, path: str | Path, device: str | None = None) -> SparseAutoencoder:
        """Load a run folder, a folder or file written by `save_model`, or an old .pt / .pkl / .pkl.gz.

        `device` overrides the saved one; without it, a saved device that this machine lacks falls back to the CPU. Old
        files are read by an unpickler that builds tensors and plain config data and nothing else. It comes in inference
        mode (`eval`), where batchtopk uses its threshold.
        """
        cfg, tensors = load_weights(Path(path), device)
        sae = cls(cfg)
        sae.load_state_dict(tensors)
        return sae.eval()


def check_width(x: Tensor, name: str, width: int) -> None:
    if x.shape[-1] != width:
        raise ValueError(
            f"activations: the last dimension of {tuple(x.shape)} is {x.shape[-1]}, expected {name} = {width}."
        )


def matryoshka_widths(cfg: Any) -> tuple[int, ...]:
    """Sizes of the nested dictionaries, the whole last; empty for other architectures."""
    if option(cfg, "architecture") != "matryoshka":
        return ()
    widths = option(cfg, "matryoshka_widths") or [cfg.d_sae // 2**i for i in (4, 3, 2, 1)]
    return (*(width for width in widths if 0 < width < cfg.d_sae), cfg.d_sae)


def encoder_dtype(name: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Precision in which training chooses latents; for "auto", bfloat16 if that is fast."""
    if name != "auto":
        return getattr(torch, name)
    return torch.bfloat16 if dtype == torch.float32 and bfloat16_is_fast(device) else dtype
