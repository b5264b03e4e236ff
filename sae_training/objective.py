"""What a training step minimises: reconstruction, sparsity penalty, and the remedy for dead latents.

There is one definition and two ways to the latent codes in it: dense, where every pre-activation is at hand (what
`SparseAutoencoder.forward` shows and what any architecture falls back to), and sparse, where only the active entries
are ever computed in full (`selection`, `sparse_code`). Both give the same losses and gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_training import architectures, triton_kernels
from sae_training.losses import auxk_loss, centred_norm, ghost_grad_loss, mean_normalised_error
from sae_training.selection import Encoder, above_threshold, top_k_of_batch, top_k_of_rows
from sae_training.sparse_code import (
    Code,
    CodeFigures,
    Entries,
    concatenate,
    fixed_size_entries,
    offsets_of,
    pre_activations_at,
)

if TYPE_CHECKING:
    from sae_training.sparse_autoencoder import SparseAutoencoder

AUXK_ROWS_SHARE, AUXK_MIN_ROWS = 32, 128
"""AuxK looks at one row in 32 (at least 128 rows, or all): a random sample, since rows are shuffled.

Its loss is a mean over rows, so the expected gradient is that of all rows; with k_aux = d_in / 2 it would otherwise
have several times the entries of the step itself. Latents dead after 500k rows of SmolLM2, batch 2048, for two seeds:
30 and 26 with 256 rows, 33 and 29 with 128, 31 and 20 with 64; explained variance 0.9228 in all.
"""
MULTI_TOPK_FACTOR, MULTI_TOPK_WEIGHT = 4, 1 / 8


@dataclass(frozen=True)
class Coefficients:
    """What schedules set anew in each step."""

    l1_coefficient: float
    k: int


@dataclass(frozen=True)
class Losses:
    """Losses of a batch; `loss` is the sum of the three others. See `sparse_autoencoder.ForwardOutput`."""

    sae_out: Tensor
    code: Code | CodeFigures
    """Figures alone, where the batch went through in parts."""
    loss: Tensor
    mse_loss: Tensor
    l1_loss: Tensor
    ghost_grad_loss: Tensor

    @property
    def feature_acts(self) -> Tensor:
        """Latent activations as (rows, d_sae)."""
        assert isinstance(self.code, Code), "the codes of a batch in parts are not kept"
        return self.code.dense()

    def detach(self) -> Losses:
        code = self.code.detach() if isinstance(self.code, Code) else self.code
        return Losses(self.sae_out.detach(), code, *(t.detach() for t in self.scalars()))

    def scalars(self) -> tuple[Tensor, ...]:
        return self.loss, self.mse_loss, self.l1_loss, self.ghost_grad_loss


@dataclass(frozen=True)
class Reconstruction:
    """What the encoder and decoder make of a batch of `rows` rows; all but `sae_outs` may be missing."""

    pre: Code
    """Pre-activations, dense or at the active entries."""
    acts: Code
    sae_outs: Tensor
    """(prefixes, rows, d_out): one reconstruction, or one for each nested dictionary, the whole last."""
    multi_out: Tensor | None = None
    """From MULTI_TOPK_FACTOR * k latents, (rows, d_out)."""
    gate_out: Tensor | None = None
    """From the gate's ReLU through the frozen decoder, (rows, d_out)."""
    error_hat: Tensor | None = None
    """What AuxK's dead latents predict of the error, (auxk_rows, d_out)."""


def objective(
    sae: SparseAutoencoder,
    x: Tensor,
    target: Tensor,
    coefficients: Coefficients,
    dead: Tensor | None = None,
    sparse: bool = False,
    norm: Tensor | None = None,
) -> Losses:
    """Losses of reconstructing `target` (rows, d_out) from `x` (rows, d_in), both normalised as `sae.normalize` does.

    `norm` (rows, 1) is the rows' share of `centred_norm` for the batch that they are a part of; None: they are all.

    `dead` (d_sae,) bool marks what the remedy works on. `sparse` asks for the sparse way; codes that are not sparse go
    the dense way all the same.
    """
    dead = dead if has_work(sae, dead) else None
    sae_in = sae.sae_input(x)
    entries = choose(sae, sae_in.detach(), coefficients.k) if sparse else None
    if entries is None:
        made = dense_parts(sae, sae_in, coefficients.k, dead)
    else:
        made = sparse_parts(sae, sae_in, entries, coefficients.k, dead)

    norm = centred_norm(wide(target)) if norm is None else norm
    mse_loss = mean_normalised_error(made.sae_outs, target, norm)
    if made.multi_out is not None:
        mse_loss = mse_loss + MULTI_TOPK_WEIGHT * mean_normalised_error(made.multi_out, target, norm)
    if made.gate_out is not None:
        mse_loss = mse_loss + mean_normalised_error(made.gate_out, target, norm)
    penalty = sparsity_penalty(sae, made.pre, made.acts, coefficients.l1_coefficient)
    remedy = remedy_loss(sae, sae_in, target, made, dead)
    return Losses(made.sae_outs[-1], made.acts, mse_loss + penalty + remedy, mse_loss, penalty, remedy)


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def has_work(sae: SparseAutoencoder, dead: Tensor | None) -> bool:
    """Whether the remedy for dead latents has work; yes off the CPU, where asking would wait for the device."""
    if dead is None or not sae.training or not (sae.use_ghost_grads or sae.auxk_coefficient > 0):
        return False
    return dead.device.type != "cpu" or bool(dead.any())


def n_auxk_rows(n_rows: int) -> int:
    return min(n_rows, max(AUXK_MIN_ROWS, n_rows // AUXK_ROWS_SHARE))


# ---------------------------------------------------------------------------------------------------------- dense way


def dense_parts(sae: SparseAutoencoder, sae_in: Tensor, k: int, dead: Tensor | None) -> Reconstruction:
    pre = sae.pre_activations(sae_in)
    acts = sae.activate(pre, k)
    multi_out = gate_out = error_hat = None
    if sae.multi_topk:
        chosen = architectures.top_k_mask(pre, MULTI_TOPK_FACTOR * k)
        multi_out = (pre.relu() * chosen) @ sae.W_dec + sae.baseline(sae_in)
    if sae.architecture == "gated":
        gate_out = pre.relu() @ sae.W_dec.detach() + sae.baseline(sae_in).detach()
    if dead is not None and sae.auxk_coefficient > 0:
        few = pre[: n_auxk_rows(len(pre))].masked_fill(~dead, -torch.inf)
        error_hat = (few.relu() * architectures.top_k_mask(few, sae.auxk_k)) @ sae.W_dec
    return Reconstruction(Code(pre), Code(acts), dense_outputs(sae, acts, sae_in), multi_out, gate_out, error_hat)


def dense_outputs(sae: SparseAutoencoder, acts: Tensor, sae_in: Tensor) -> Tensor:
    """(prefixes, rows, d_out): the reconstructions, from ever more of the latents."""
    if not sae.matryoshka_widths:
        return sae.hook_sae_out(acts @ sae.W_dec + sae.baseline(sae_in)).unsqueeze(0)
    edges = (0, *sae.matryoshka_widths)
    blocks = [acts[:, i:j] @ sae.W_dec[i:j] for i, j in zip(edges, edges[1:], strict=False)]
    outs = architectures.prefix_sums(torch.stack(blocks), sae.baseline(sae_in))
    return torch.cat([outs[:-1], sae.hook_sae_out(outs[-1]).unsqueeze(0)])


# --------------------------------------------------------------------------------------------------------- sparse way


def choose(sae: SparseAutoencoder, sae_in: Tensor, k: int) -> Entries | None:
    """The active latents of a batch `sae_in` (rows, d_in); None if the machine or the batch asks for the dense way."""
    n = min(MULTI_TOPK_FACTOR * k if sae.multi_topk else k, sae.d_sae)
    if not has_sparse_way(sae, n):
        return None
    encoder = encoder_of(sae, sae_in, sae.W_enc.detach(), sae.b_enc.detach())
    match sae.choice:
        case "topk":
            return top_k_of_rows(encoder, n)
        case "batchtopk":
            return top_k_of_batch(encoder, k)
        case "jumprelu":  # just below the threshold there is no activation, but a gradient to the threshold
            limit = (sae.threshold - sae.jumprelu_bandwidth / 2).detach()
            # Rounding the product, compared with limit - b_enc, must not hide an entry; one too many does no harm.
            margin = 2 * torch.finfo(sae.encoder_dtype).eps * (limit.abs() + sae.b_enc.detach().abs())
            return above_threshold(encoder, limit - margin)
        case _:
            return above_threshold(encoder, 0.0)


def encoder_of(sae: SparseAutoencoder, sae_in: Tensor, W_enc: Tensor, b_enc: Tensor) -> Encoder:
    """The encoder's product for `sae_in` (rows, d_in) with these weights, which may be those of some latents only.

    A transcoder's input is not centred: in a low precision its mean, and b_enc against it, would cost the digits of
    what differs from row to row. So rows come without their mean, whose product goes into the bias.
    """
    if sae.is_transcoder:
        mean = sae_in.mean(dim=0)
        sae_in, b_enc = sae_in - mean, b_enc + mean @ W_enc
    return Encoder(sae_in, W_enc, b_enc, sae.encoder_dtype)


def has_sparse_way(sae: SparseAutoencoder, n_active: int) -> bool:
    """Whether the sparse way works on the device, and pays with `n_active` latents a row.

    On a GPU only for a fixed number on each row: how many others there are, only the device knows, and asking waits.
    """
    if sae.device.type == "cpu":
        return sae.dtype in (torch.float32, torch.float64)
    return sae.choice == "topk" and triton_kernels.use_triton(sae.device, sae.dtype, sae.d_sae, n_active)


def sparse_parts(
    sae: SparseAutoencoder, sae_in: Tensor, entries: Entries, k: int, dead: Tensor | None
) -> Reconstruction:
    # AuxK's entries ride along as more rows of the same code, so that all weight gradients come from one pass.
    aux = None
    if dead is not None and sae.auxk_coefficient > 0:
        choose_dead = dead_entries if dead.device.type == "cpu" else dead_entries_of_all
        aux = choose_dead(sae, sae_in.detach(), dead)
    encoded, encoder_rows = [entries], [sae_in.detach()]
    if aux is not None:
        encoded.append(aux)
        encoder_rows.append(sae_in.detach()[: aux.n_rows])
    all_pre = pre_activations_at(
        concatenate(encoded),
        encoder_rows[0] if aux is None else torch.cat(encoder_rows),
        None if sae.is_transcoder else sae.b_dec,
        sae.W_enc,
        sae.b_enc,
    )
    pre, aux_pre = Code(all_pre[: len(entries.latents)], entries), all_pre[len(entries.latents) :]

    multi = None
    if sae.multi_topk:
        multi, pre = pre, top_k_of_entries(pre, k)
    acts = pre.with_values(sae.activation(pre))
    to_decode = [by_prefix(acts, sae.matryoshka_widths)]
    if multi is not None:
        to_decode.append(multi.with_values(multi.values.relu()))
    if aux is not None and dead is not None:
        # Live latents, which `dead_entries_of_all` may hold, take no part.
        to_decode.append(Code(aux_pre.relu() * dead[aux.latents], aux))
    outs = decode_together(to_decode, sae.W_dec)

    baseline = sae.baseline(sae_in)
    sae_outs = architectures.prefix_sums(outs.pop(0).view(-1, len(sae_in), sae.W_dec.shape[1]), baseline)
    multi_out = outs.pop(0) + baseline if multi is not None else None
    error_hat = outs.pop(0) if aux is not None else None
    gate_out = None
    if sae.architecture == "gated":
        gate_out = pre.with_values(pre.values.relu()).decode(sae.W_dec.detach()) + baseline.detach()
    return Reconstruction(pre, acts, sae_outs, multi_out, gate_out, error_hat)


def dead_entries(sae: SparseAutoencoder, sae_in: Tensor, dead: Tensor) -> Entries:
    """The k_aux dead latents with the largest pre-activations on each of AuxK's rows."""
    numbers = dead.nonzero().flatten()
    few = sae_in[: n_auxk_rows(len(sae_in))]
    encoder = encoder_of(sae, few, sae.W_enc.detach()[:, numbers], sae.b_enc.detach()[numbers])
    among_dead = top_k_of_rows(encoder, sae.auxk_k)
    return Entries(numbers[among_dead.latents], among_dead.offsets, sae.d_sae)


def dead_entries_of_all(sae: SparseAutoencoder, sae_in: Tensor, dead: Tensor) -> Entries:
    """`dead_entries` without asking which latents are dead: the live ones' bias is -inf.

    Always k_aux to a row; where fewer latents are dead, live ones fill the rest.
    """
    bias = sae.b_enc.detach().masked_fill(~dead, -torch.inf)
    encoder = encoder_of(sae, sae_in[: n_auxk_rows(len(sae_in))], sae.W_enc.detach(), bias)
    return top_k_of_rows(encoder, sae.auxk_k)


def top_k_of_entries(code: Code, k: int) -> Code:
    """The k largest of the entries of each row, of which there is the same number on every row."""
    entries = code.at_entries
    per_row = code.values.view(entries.n_rows, -1)
    values, places = per_row.topk(k, dim=1, sorted=False)
    latents = entries.latents.view_as(per_row).gather(1, places)
    return Code(values.flatten(), fixed_size_entries(latents, entries.d_sae))


def by_prefix(code: Code, widths: tuple[int, ...]) -> Code:
    """The entries of latents below widths[0] on all rows, then on as many new rows those below widths[1], and so on."""
    entries = code.entries
    if entries is None or len(widths) < 2:
        return code
    new_rows = entries.rows
    for width in widths[:-1]:
        new_rows = new_rows + entries.n_rows * (entries.latents >= width)
    new_rows, order = new_rows.sort(stable=True)
    offsets = offsets_of(new_rows, len(widths) * entries.n_rows)
    return Code(code.values.index_select(0, order), Entries(entries.latents[order], offsets, entries.d_sae))


def decode_together(codes: list[Code], W_dec: Tensor) -> list[Tensor]:
    """The reconstructions (rows, d_out), without baseline, of several codes, from one product."""
    together = Code(torch.cat([code.values for code in codes]), concatenate([code.at_entries for code in codes]))
    return list(together.decode(W_dec).split([code.n_rows for code in codes]))


# ---------------------------------------------------------------------------------------------- penalties and remedies


def sparsity_penalty(sae: SparseAutoencoder, pre: Code, acts: Code, l1_coefficient: float) -> Tensor:
    """l1_coefficient times the mean over rows of the architecture's penalty, a scalar."""
    if sae.architecture not in architectures.PENALISED:
        return torch.zeros((), dtype=acts.values.dtype, device=acts.values.device)
    penalised = pre.values.relu() if sae.architecture == "gated" else acts.values
    if sae.scale_sparsity_penalty_by_decoder_norm:
        penalised = penalised * acts.at(sae.W_dec.norm(dim=1))
    if sae.architecture != "jumprelu":
        return l1_coefficient * architectures.lp_penalty(penalised, sae.lp_norm).sum() / acts.n_rows
    if sae.jumprelu_sparsity_loss_mode == "tanh":
        return l1_coefficient * (sae.jumprelu_tanh_scale * penalised).tanh().sum() / acts.n_rows
    l0 = architectures.step_above(pre.values, pre.at(sae.threshold), sae.jumprelu_bandwidth).sum() / acts.n_rows
    return l1_coefficient * (l0 if sae.target_l0 is None else (l0 / sae.target_l0 - 1).pow(2))


def remedy_loss(
    sae: SparseAutoencoder, sae_in: Tensor, target: Tensor, made: Reconstruction, dead: Tensor | None
) -> Tensor:
    sae_out = made.sae_outs[-1]
    if dead is None:
        return torch.zeros((), dtype=target.dtype, device=target.device)
    if made.error_hat is not None:
        n = len(made.error_hat)
        loss = auxk_loss(target[:n], (target[:n] - sae_out[:n]).detach(), made.error_hat)
        return sae.auxk_coefficient * loss * dead.any()
    if dead.device.type == "cpu":
        dead_pre, W_dec = sae_in @ sae.W_enc[:, dead] + sae.b_enc[dead], sae.W_dec[dead]
    else:  # picking the dead ones would wait for the device
        all_pre = made.pre.values if made.pre.entries is None else sae_in @ sae.W_enc + sae.b_enc
        dead_pre, W_dec = all_pre.masked_fill(~dead, -torch.inf), sae.W_dec
    return ghost_grad_loss(target, sae_out, dead_pre, W_dec) * dead.any()
