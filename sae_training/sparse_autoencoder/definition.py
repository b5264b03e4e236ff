"""The sparse autoencoder: the readable definition of what is trained, and its saved form.

sae_in       = x - b_dec
hidden_pre   = sae_in @ W_enc + b_enc
feature_acts = activation(hidden_pre)          which latents are active, and how: architectures.py
sae_out      = feature_acts @ W_dec + b_dec
loss         = mse_loss + penalty + remedy     architectures.py, losses.py, dead_latent_losses.py

A transcoder (`cfg.target_hook_point`) predicts other activations than it reads, for example the output of an MLP from
its input. Nothing is subtracted from its input (sae_in = x), and it may have a skip connection, sae_out + x @ W_skip.
With `normalize_activations` by row (normalization.py), each row of x is normalised first, and sae_out is brought back
to the row's size, though not that of a transcoder. Hook points and losses see the normalised rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from sae_training import formats
from sae_training.config.io import with_defaults
from sae_training.kernels.sparse_code import Code
from sae_training.machine.device import checked
from sae_training.machine.precision import at_least_float32, encoder_dtype
from sae_training.parallel.block import Block
from sae_training.parallel.shard import WHOLE, Shard
from sae_training.parallel.share import ALONE, Share
from sae_training.sparse_autoencoder import architectures
from sae_training.sparse_autoencoder.architectures import sparsity_penalty
from sae_training.sparse_autoencoder.checks import check_config, check_weights, check_width, matrices_of, without_heads
from sae_training.sparse_autoencoder.dead_latent_losses import n_own_auxk_rows, remedy_loss
from sae_training.sparse_autoencoder.hook_points import HookedRootModule, HookPoint
from sae_training.sparse_autoencoder.losses import (
    MULTI_TOPK_FACTOR,
    Coefficients,
    ForwardOutput,
    Losses,
    Reconstruction,
    Whole,
    reconstruction_loss,
)
from sae_training.sparse_autoencoder.many import Lazily
from sae_training.sparse_autoencoder.name import name_of
from sae_training.sparse_autoencoder.normalization import BY_ROW, normalize, restore
from sae_training.sparse_autoencoder.start_values import centre, centred_encoder, initial_weights

CACHED_ROWS = 1024  # of the decoder, that stay in the processor's cache between two passes over them


class SparseAutoencoder(HookedRootModule):
    """A sparse autoencoder over vectors of width `cfg.d_in`, with `cfg.d_sae` latents.

    `cfg` is a LanguageModelSAERunnerConfig, or any object with some of its attributes; the others take their defaults.
    Parameters: W_enc (d_in, d_sae), b_enc (d_sae,), W_dec (d_sae, d_out) with rows of unit norm, and b_dec (d_out,).
    d_out is d_in except for transcoders. jumprelu has log_threshold (d_sae,) too, gated r_mag and b_mag (d_sae,), and a
    skip connection W_skip (d_in, d_out). W_enc lies in memory latent by latent, as W_dec does, so that a latent's
    weights are one stretch of memory. All are float32, or float64 if `cfg.dtype` is. A narrower dtype is the one that
    training computes in (`training.mixed_precision`); for inference in it, call `to(dtype)`. Of a `shard`, there are
    the weights of its latents; `d_sae` is their number, and all ranks call the same methods.
    """

    inference_threshold: Tensor
    """batchtopk: the pre-activation above which a latent is active outside training, a scalar."""

    def __init__(self, cfg: Any, weights: Mapping[str, Tensor] | None = None, shard: Shard = WHOLE) -> None:
        """Start with the random weights of `cfg.seed`, or take over `weights` by name, as `weights()` gives them."""
        super().__init__()
        self.cfg = cfg
        self.full_cfg = known = with_defaults(cfg)
        check_config(known)
        self.d_in: int = cfg.d_in
        self.shard = shard.over(cfg.d_sae)
        self.d_sae: int = self.shard.size
        self.is_transcoder = known.target_hook_point is not None
        self.d_out = (known.d_out if self.is_transcoder else None) or self.d_in
        self.architecture = known.architecture
        self.normalization = known.normalize_activations
        self.k = known.k
        self.auxk_coefficient = known.resolved_auxk_coefficient
        self.auxk_k = known.resolved_auxk_k
        self.matryoshka_widths = tuple(map(self.shard.below, architectures.matryoshka_widths(known, cfg.d_sae)))
        self.choice = known.matryoshka_selection if known.architecture == "matryoshka" else known.architecture
        """How the active latents are chosen: by the architecture, or in one of matryoshka's two ways."""
        device = checked(known.device)
        self.encoder_dtype = encoder_dtype(known.encoder_matmul_dtype, known.dtype, device)

        sizes = (self.d_in, self.d_sae, self.d_out)
        start = (self.d_in, self.shard, self.d_out, known.architecture, self.is_transcoder, known.seed)
        W_enc, W_dec = initial_weights(*start) if weights is None else matrices_of(weights, *sizes)
        placed = {"dtype": at_least_float32(known.dtype), "device": device}
        self.W_enc = nn.Parameter(W_enc.T.contiguous().to(**placed).T)
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae, **placed))
        self.W_dec = nn.Parameter(W_dec.to(**placed))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out, **placed))

        if self.architecture == "jumprelu":
            self.log_threshold = nn.Parameter(torch.full_like(self.b_enc, math.log(known.jumprelu_init_threshold)))
        if self.architecture == "gated":
            self.r_mag = nn.Parameter(torch.zeros(self.d_sae, **placed))
            self.b_mag = nn.Parameter(torch.zeros(self.d_sae, **placed))
        if known.skip_connection:
            self.W_skip = nn.Parameter(torch.zeros(self.d_in, self.d_out, **placed))
        if self.choice == "batchtopk":
            self.register_buffer("inference_threshold", torch.zeros((), **placed))

        self.hook_sae_in = HookPoint()
        self.hook_hidden_pre = HookPoint()
        self.hook_hidden_post = HookPoint()
        self.hook_sae_out = HookPoint()
        self.setup()
        if weights is not None:
            check_weights(weights, self.state_dict())
            self.load_state_dict(dict(weights))

    @property
    def dtype(self) -> torch.dtype:
        return self.b_dec.dtype

    @property
    def device(self) -> torch.device:
        return self.b_dec.device

    # ------------------------------------------------------------------------------------------------- the function

    def encode(self, x: Tensor) -> Tensor:
        """Latent activations (..., d_sae) of activations (..., d_in)."""
        x = self.flat(x)
        check_width(x, "d_in", self.d_in)
        return self.code(self.sae_input(self.normalize(x)), self.k)[1]

    def decode(self, feature_acts: Tensor, x: Tensor | None = None) -> Tensor:
        """Reconstruction (..., d_out) of latent activations (..., d_sae).

        A skip connection and normalisation row by row also need the activations `x` (..., d_in) that were encoded. If
        these have an axis of heads, so has the reconstruction.
        """
        check_width(feature_acts, "d_sae", self.d_sae)
        flat = None if x is None else self.flat(x)
        out = self.hook_sae_out(self.shard.added(feature_acts @ self.W_dec) + self.baseline(flat))
        return self.shaped(self.restore(out, flat), x)

    def flat(self, x: Tensor) -> Tensor:
        return without_heads(x, self.full_cfg.hook_point, self.d_in)

    def shaped(self, out: Tensor, x: Tensor | None) -> Tensor:
        """Reconstructions (..., d_out) with the axis of heads that the activations `x` had, if they had one."""
        return out if x is None or self.is_transcoder or x.ndim == out.ndim else out.view(x.shape)

    def normalize(self, x: Tensor) -> Tensor:
        """Activations (..., d_in) in the units that training sees, in the autoencoder's dtype."""
        return normalize(x, self.normalization).to(self.dtype)

    def restore(self, rows: Tensor, x: Tensor | None) -> Tensor:
        """Reconstructions (..., d_in) in the units of the activations `x` that were encoded."""
        if self.normalization not in BY_ROW or self.is_transcoder:
            return rows
        if x is None:
            raise ValueError(
                f"x: this autoencoder has normalize_activations {self.normalization}, whose inverse needs the "
                "activations that were encoded: decode(acts, x)."
            )
        return restore(rows, x.to(self.device), self.normalization)

    def baseline(self, x: Tensor | None) -> Tensor:
        """The reconstruction without any active latent: b_dec (d_out,), plus x @ W_skip with a skip connection."""
        if not self.has_skip_connection:
            return self.b_dec
        if x is None:
            raise ValueError("x: this transcoder has a skip connection, so decode needs its input: decode(acts, x).")
        return x.to(self.W_skip.dtype) @ self.W_skip + self.b_dec

    @property
    def has_skip_connection(self) -> bool:
        return hasattr(self, "W_skip")

    def sae_input(self, x: Tensor) -> Tensor:
        """Input (..., d_in) of the encoder's product, from activations (..., d_in) as `normalize` returns them."""
        check_width(x, "d_in", self.d_in)
        x = x.to(self.dtype)
        return self.hook_sae_in(x if self.input_bias is None else x - self.input_bias)

    @property
    def input_bias(self) -> Tensor | None:
        """What is subtracted from the input, b_dec (d_in,); None for a transcoder, and where the config says so."""
        subtracts = not self.is_transcoder and self.full_cfg.apply_b_dec_to_input
        return self.shard.lent(self.b_dec) if subtracts else None

    def code(self, sae_in: Tensor, k: int, share: Share = ALONE) -> tuple[Tensor, Tensor]:
        """Pre-activations and latent activations, both (..., d_sae), of the encoder's input (..., d_in)."""
        pre = self.pre_activations(sae_in)
        if self.architecture != "matching_pursuit":
            return pre, self.activate(pre, k, share)
        return pre, self.hook_hidden_post(architectures.matching_pursuit(sae_in, self.W_dec, self.full_cfg))

    def pre_activations(self, sae_in: Tensor) -> Tensor:
        return self.hook_hidden_pre(sae_in.to(self.W_enc.dtype) @ self.W_enc + self.b_enc)

    def activate(self, pre: Tensor, k: int, share: Share = ALONE) -> Tensor:
        """Latent activations of all pre-activations (..., d_sae), which may be a process's `share` of a batch."""
        acts, shard = self.activation(Code(pre)), self.shard
        match self.choice:
            case "topk" | "abstopk" | "normtopk" | "lineartopk":
                acts = acts * architectures.top_k_mask(architectures.scores(self.choice, pre, self.W_dec), k, shard)
            case "groupmax":
                acts = acts * architectures.group_max_mask(acts, k)
            case "batchtopk" if self.training:
                acts = acts * architectures.batch_top_k_mask(acts, k, Block(share, shard))
            case "batchtopk":
                acts = acts * (pre > self.inference_threshold)
        return self.hook_hidden_post(acts)

    def activation(self, pre: Code) -> Tensor:
        """Activations (in the shape of `pre.values`) of pre-activations, for latents that are active."""
        match self.architecture:
            case "jumprelu":
                return architectures.jumprelu(pre.values, pre.at(self.threshold), self.full_cfg.jumprelu_bandwidth)
            case "gated":
                at = pre.at
                return architectures.gated_activation(pre.values, at(self.b_enc), at(self.r_mag), at(self.b_mag))
            case "abstopk" | "linear" | "lineartopk":
                return pre.values
            case "standard" if self.full_cfg.activation_fn == "tanh-relu":
                return pre.values.relu().tanh()
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
        """Reconstruct activations `x` (..., d_in), and return all losses; leading dimensions count as rows.

        `dead_neuron_mask` (d_sae,) bool marks the latents that the remedy for dead latents (ghost gradients or AuxK)
        revives, in training mode only; None means none. A transcoder's losses need the activations `target`
        (..., d_out) that it predicts; `reconstruct` does not need them.
        """
        if self.is_transcoder and target is None:
            raise ValueError("target: a transcoder's losses need the activations it predicts; or call reconstruct(x).")
        if self.is_transcoder and self.normalization in BY_ROW:
            raise ValueError(f"normalize_activations: {self.normalization} has no losses here; call reconstruct(x).")
        given, x = x, self.flat(x)
        target = x if target is None else target
        check_width(x, "d_in", self.d_in)
        check_width(target, "d_out", self.d_out)
        rows, target = self.normalize(x).reshape(-1, self.d_in), self.normalize(target).reshape(-1, self.d_out)
        losses = self.losses(rows, target, Coefficients(self.full_cfg.l1_coefficient, self.k), dead_neuron_mask)
        return ForwardOutput(
            self.shaped(self.restore(losses.sae_out.view(*x.shape[:-1], self.d_out), x), given),
            losses.feature_acts.view(*x.shape[:-1], self.d_sae),
            *losses.scalars(),
        )

    # ------------------------------------------------------------------------------------------------------ losses

    def losses(self, x: Tensor, target: Tensor, coefficients: Coefficients, dead: Tensor | None = None) -> Losses:
        """Losses of reconstructing `target` (rows, d_out) from `x` (rows, d_in), both as `normalize` returns them.

        `dead` (d_sae,) bool marks the latents to revive. `training.objective` is a faster way to the same numbers.
        """
        sae_in, dead, whole = self.sae_input(x), self.to_revive(dead), Whole(target, shard=self.shard)
        return self.add_up(self.dense_parts(sae_in, coefficients.k, dead, whole), whole, coefficients.l1_coefficient)

    def dense_parts(self, sae_in: Tensor, k: int, dead: Tensor | None, whole: Whole) -> Reconstruction:
        """All that the losses need of the own rows `sae_in` (rows, d_in), from their pre-activations (rows, d_sae)."""
        (pre, acts), shard = self.code(sae_in, k, whole.share), self.shard
        multi_out = gate_out = error_hat = None
        if self.full_cfg.multi_topk:
            chosen = architectures.top_k_mask(pre, MULTI_TOPK_FACTOR * k, shard)
            multi_out = shard.added((pre.relu() * chosen) @ self.W_dec) + self.baseline(sae_in)
        if self.architecture == "gated":
            gate_out = shard.added(pre.relu() @ self.W_dec.detach()) + self.baseline(sae_in).detach()
        if dead is not None and self.auxk_coefficient > 0:
            few = pre[: n_own_auxk_rows(whole)].masked_fill(~dead, -torch.inf)
            error_hat = shard.added((few.relu() * architectures.top_k_mask(few, self.auxk_k, shard)) @ self.W_dec)
        outs = self.dense_outputs(acts, sae_in)
        return Reconstruction(sae_in, Code(pre), Code(acts), outs, dead, multi_out, gate_out, error_hat)

    def dense_outputs(self, acts: Tensor, sae_in: Tensor) -> Tensor:
        """The reconstruction (1, rows, d_out), or matryoshka's (prefixes, rows, d_out) from ever more latents."""
        edges = (0, *(self.matryoshka_widths or (self.d_sae,)))
        blocks = [acts[:, i:j] @ self.W_dec[i:j] for i, j in zip(edges, edges[1:], strict=False)]
        outs = architectures.prefix_sums(self.shard.added(torch.stack(blocks)), self.baseline(sae_in))
        return torch.cat([outs[:-1], self.hook_sae_out(outs[-1]).unsqueeze(0)])

    def add_up(self, made: Reconstruction, whole: Whole, l1_coefficient: float, norm: Tensor | None = None) -> Losses:
        """The losses of the own rows, however their parts were made. `norm`: see `losses.reconstruction_loss`."""
        threshold = self.threshold if self.architecture == "jumprelu" else None
        mse_loss = reconstruction_loss(made, whole, norm)
        penalty = sparsity_penalty(made, self.full_cfg, l1_coefficient, self.W_dec, threshold, whole)
        remedy = remedy_loss(made, whole, self.auxk_coefficient, self.W_enc, self.b_enc, self.W_dec)
        return Losses(made.sae_outs[-1], made.acts, mse_loss + penalty + remedy, mse_loss, penalty, remedy)

    def to_revive(self, dead: Tensor | None) -> Tensor | None:
        """`dead` (d_sae,) if a remedy has work with it, else None. Off the CPU it always has, as asking would wait."""
        has_remedy = self.training and (self.full_cfg.use_ghost_grads or self.auxk_coefficient > 0)
        if dead is None or not has_remedy or (dead.device.type == "cpu" and not self.shard.any(dead.any())):
            return None
        return dead

    # ------------------------------------------------------------------------------------------- start, and the decoder

    @torch.no_grad()
    def initialize_b_dec(self, activations: Tensor, method: str) -> None:
        """Set b_dec from a sample of activations (rows, d_out): "geometric_median", "mean" or "zeros"."""
        self.b_dec.copy_(centre(self.normalize(activations), method))

    @torch.no_grad()
    def initialize_transcoder(self, x: Tensor, target: Tensor, method: str) -> None:
        """Set b_dec from a sample of targets (rows, d_out), and the encoder from their inputs `x` (rows, d_in)."""
        self.initialize_b_dec(target, method)
        W_enc, b_enc = centred_encoder(self.W_enc, x, target.to(self.dtype) - self.b_dec, method)
        self.W_enc.copy_(W_enc)
        self.b_enc.copy_(b_enc)
        if self.architecture == "gated":
            self.b_mag.copy_(b_enc)

    @property
    def has_unit_norm_decoder(self) -> bool:
        """Whether training keeps W_dec's rows at norm 1; not if the penalty counts the norms."""
        return not self.full_cfg.scale_sparsity_penalty_by_decoder_norm

    @torch.no_grad()
    def set_decoder_norm_to_unit_norm(self, unless: Tensor | bool = False) -> None:
        """Divide each row of W_dec by its L2 norm; do nothing if `unless` is true. A row of zeros stays zero.

        `unless` is read on the device. Dividing rows of unit norm again would move them by a rounding error.
        """
        norms = self.W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(self.dtype).tiny)
        self.W_dec.div_(torch.where(torch.as_tensor(unless, device=norms.device), 1.0, norms))

    @torch.no_grad()
    def remove_gradient_parallel_to_decoder_directions(self) -> None:
        """Remove from W_dec's gradient the part that would only change the length of its (unit) rows."""
        if self.W_dec.grad is None:
            raise ValueError("W_dec has no gradient: call backward() first.")
        for gradient, rows in zip(self.W_dec.grad.split(CACHED_ROWS), self.W_dec.split(CACHED_ROWS), strict=True):
            along = torch.linalg.vecdot(gradient, rows).unsqueeze(1)
            gradient.addcmul_(along, rows, value=-1)

    # ------------------------------------------------------------------------------------------------ name and files

    def get_name(self) -> str:
        """sparse_autoencoder_{model}_{hook}_{d_sae}; see `name.name_of`."""
        return name_of(with_defaults(self.cfg), self.cfg.d_sae)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """All that is saved, by name: the parameters and, for batchtopk, the threshold of inference."""
        return ((name, tensor.detach()) for name, tensor in self.state_dict().items())

    def save_model(self, path: str | Path) -> None:
        """Save to a folder (cfg.json + sae.safetensors), or to one file if `path` ends in .safetensors."""
        formats.native.write(Path(path), dict(self.weights()), self.cfg, self.shard)

    @classmethod
    def load_from_pretrained(
        cls,
        path: str | Path,
        device: str | None = None,
        hook_point: str | None = None,
        layer: int | None = None,
        **given: Unpack[formats.Facts],
    ) -> SparseAutoencoder:
        """Load a run folder, a folder or file that `save_model` wrote, or the files of another program (`formats`).

        `device` replaces the saved one. Without it, a saved device that this machine lacks becomes the CPU. Of files
        that hold several autoencoders, `hook_point` or `layer` chooses one. `given` (k, model_name, and the others
        of `Facts`) is what the files do not say. Nothing in a file is executed. The mode is that of `eval`.

        It expects the rows that it was trained on, which are those of TransformerLens: with `cfg.model_processing`
        "default", and a model with LayerNorm (GPT-2, Pythia), a row of the residual stream is that of transformers'
        `output_hidden_states` minus its mean, `h - h.mean(-1, keepdim=True)`.
        """
        with formats.blamed_on(Path(path)):
            return cls(*formats.load(Path(path), device, formats.Given(hook_point, layer, **given))).eval()

    @classmethod
    def load_many(
        cls, path: str | Path, device: str | None = None, **given: Unpack[formats.Facts]
    ) -> Mapping[str, SparseAutoencoder]:
        """The autoencoders of a file of several, or of the folders below `path`, by name; each is loaded when asked."""
        found = formats.read_many(Path(path), formats.Given(**given))
        return Lazily({name: partial(cls.of, loaded, Path(path), device) for name, loaded in found.items()})

    @classmethod
    def of(cls, loaded: formats.Loaded, path: Path, device: str | None) -> SparseAutoencoder:
        """The autoencoder that was read from `path`, in inference mode."""
        with formats.blamed_on(path):
            return cls(formats.config_of(loaded, path, device), formats.weights_of(loaded, path)).eval()
