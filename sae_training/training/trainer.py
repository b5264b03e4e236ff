"""Train one autoencoder: the step, with the optimizer and the counters that it needs."""

from __future__ import annotations

import sys
from typing import NamedTuple, cast

import torch
from torch import Tensor

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.config.rules import check_for_training
from sae_training.config.types import WITH_PENALTY
from sae_training.kernels.sparse_code import Code, CodeFigures
from sae_training.machine.allocator import keep_freed_memory
from sae_training.parallel.shard import BY_LATENT
from sae_training.parallel.share import ALONE, Share
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.sparse_autoencoder.losses import Coefficients, Losses, Whole, centred_norm, wide
from sae_training.training.dead_latents import FiringTracker
from sae_training.training.gradient_exchange import GradientExchange
from sae_training.training.mixed_precision import check_dtype
from sae_training.training.objective import objective
from sae_training.training.optim import check_installed, make_optimizer, moments, step_unless
from sae_training.training.resampling import resample
from sae_training.training.schedules import annealed_k, lr_at, warm_up_factor
from sae_training.training.thresholds import THRESHOLDS, TargetL0, groups_of, threshold_lr


class StepResult(NamedTuple):
    """What logging needs of a step. The tensors are detached, and nothing has been read off the device."""

    target: Tensor
    """What the rows here should be reconstructed as, (rows, d_out), as `SparseAutoencoder.normalize` returns it."""
    out: Losses
    """Those of the whole batch; `sae_out` of the rows here."""
    lr: float
    l1_coefficient: float
    share: Share = ALONE


class NonFiniteLoss(ArithmeticError):
    """The loss, a gradient or a weight became NaN or infinite."""


class SAETrainer:
    """Trains `sae` on batches. Moments, counters and averages are its state; all else is a function of the step.

    `share`: the rows of each batch that this process computes; `sae.shard`: the latents that it holds. All processes
    together make the same step as one that computes the whole batch, up to the order of sums.
    """

    def __init__(self, sae: SparseAutoencoder, cfg: LanguageModelSAERunnerConfig, share: Share = ALONE) -> None:
        if not isinstance(sae, SparseAutoencoder):
            raise TypeError(
                f"sae: found a {type(sae).__name__}, expected a SparseAutoencoder; a Crosscoder is read from files and "
                "not trained here."
            )
        check_for_training(cfg)
        check_dtype(cfg.dtype)
        self.sae = sae
        self.cfg = cfg
        self.share = share
        self.exchange = GradientExchange(dict(sae.named_parameters()), share, sae.shard)
        self.masters = {name: in_memory_order(p) for name, p in sae.named_parameters()}
        """The parameters as the optimizer sees them: over the same memory, with W_enc as (d_sae, d_in)."""
        betas = (cfg.adam_beta1, cfg.adam_beta2)
        self.optimizer = make_optimizer(cfg.optimizer, groups_of(self.masters), cfg.resolved_lr, betas)
        self.tracker = FiringTracker(
            sae.d_sae,
            cfg.dead_feature_window,
            cfg.dead_feature_window_tokens,
            sae.device,
            sae.shard,
        )
        self.target_l0 = TargetL0(cfg, sae.device)
        self.average = {} if cfg.ema_decay is None else {name: p.detach().clone() for name, p in sae.named_parameters()}
        self.non_finite = torch.zeros((), device=sae.device)
        keep_freed_memory()

    @torch.enable_grad()  # because notebooks often switch gradients off for good
    def step(self, x: Tensor, step: int, target: Tensor | None = None) -> StepResult:
        """One optimizer step (the `step`-th, from 0) on a batch of activations (rows, d_in).

        A transcoder learns to predict `target` (rows, d_out). An autoencoder's target is x itself. Where processes
        share the rows, each gives its own: of tokens_per_step rows, those that `Deal.own_of_batch` returns.
        """
        if self.sae.is_transcoder and target is None:
            raise ValueError("target: a transcoder's step needs the activations it predicts: step(x, step, target).")
        lr, coefficients = self.lr(step), Coefficients(self.l1_coefficient(step), self.k(step))
        self.sae.train()
        raw, x = x, self.sae.normalize(x)
        target = x if target is None or target is raw else self.sae.normalize(target)
        out = self.backward(x, target, coefficients)

        if self.sae.has_unit_norm_decoder:
            self.sae.remove_gradient_parallel_to_decoder_directions()
        if self.cfg.clip_grad_norm is not None:
            clip_gradients(self.sae, self.cfg.clip_grad_norm, self.share)

        not_finite = ~torch.isfinite(out.loss.detach() + self.sae.shard.summed(self.gradient_sum()))
        self.update(lr, not_finite)
        if self.sae.has_unit_norm_decoder:
            self.sae.set_decoder_norm_to_unit_norm(unless=not_finite)
        self.target_l0.follow(self.sae, out.code, unless=not_finite)
        self.update_average(step)
        track_inference_threshold(self.sae, out.code, step)
        self.tracker.update(out.code)
        return StepResult(target, out, lr, coefficients.l1_coefficient, self.share)

    def backward(self, x: Tensor, target: Tensor, coefficients: Coefficients) -> Losses:
        """Compute the losses of a batch, and leave their gradients in the parameters.

        The batch goes through whole, or in parts of micro_batch_size rows (with grad_acc_steps, of train_batch_size).
        Parts give the gradient of the whole batch, because they use its row norms, with two exceptions: batchtopk
        chooses k latents a row within each part, and remedies for dead latents see each part alone.
        """
        dead, shard, share = self.tracker.dead(), self.sae.shard, self.share
        n_rows = len(x) if share.is_all else self.cfg.tokens_per_step
        sizes = sizes_of_parts(n_rows, part_size(self.cfg))
        if len(sizes) == 1 and share.is_all and shard.is_all:
            out = objective(self.sae, x, target, coefficients, dead)
            out.loss.backward()
            return out.detach()
        counts = [share.count(size) for size in sizes]  # of the rows here in each part
        mean_row = share.summed(wide(target).mean(dim=0, keepdim=True) * (len(x) / n_rows))
        norms = centred_norm(wide(target), mean_row)
        outs, scalars, code, n_done = [], [], CodeFigures(), 0
        for size, rows, wanted, norm in zip(sizes, *(t.split(counts) for t in (x, target, norms)), strict=True):
            part = objective(self.sae, rows, Whole(wanted, share, shard, size), coefficients, dead, norm=norm)
            weight = len(rows) / n_rows
            n_done += size
            with self.exchange.exchanged(is_last=n_done == n_rows):
                (part.loss * weight).backward()
            part = part.detach()
            outs.append(part.sae_out)
            scalars.append(torch.stack(part.scalars()) * weight)
            code.add(cast("Code", part.code))
        scalars = share.summed(torch.stack(scalars).sum(dim=0))
        return Losses(torch.cat(outs), code.of_all(share).of_all_latents(shard), *scalars)

    def resample(self, x: Tensor, target: Tensor, step: int) -> int:
        """Give dead latents new directions from rows `x` (n, d_in) and their `target` (n, d_out); return how many.

        `step` is the number of finished steps. See `resampling.resample`.
        """
        method = self.cfg.feature_sampling_method
        assert method is not None
        generator = torch.Generator().manual_seed(self.cfg.seed + step)
        numbers = resample(self.sae, self.by_latent(), self.tracker.dead(), x, target, method, generator, self.share)
        self.tracker.restart(self.sae.shard.own_numbers(numbers))
        return len(numbers)

    def by_latent(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Values that belong to latents beside their weights: moments (d_sae, ...), and averaged weights by name."""
        masters = {name: master for name, master in self.masters.items() if name in BY_LATENT}
        found = [value for master in masters.values() for value in moments(self.optimizer, master).values()]
        return [moment for moment in found if moment.ndim], self.average

    def gradient_sum(self) -> Tensor:
        """A scalar that is not finite if any gradient is not.

        Only the biases' gradients are read, because a matrix's gradient, with 16 MB and more to read, is made of the
        same numbers times activations that the loss has seen.
        """
        gradients = [p.grad for p in self.sae.parameters() if p.grad is not None and p.ndim == 1]
        return torch.stack([gradient.sum(dtype=torch.float32) * 0 for gradient in gradients]).sum()

    def update(self, lr: float, not_finite: Tensor) -> None:
        """Do the optimizer's step, or none where the loss is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = threshold_lr(self.cfg, lr) if THRESHOLDS in group else lr
        for name, parameter in self.sae.named_parameters():
            gradient, master = parameter.grad, self.masters[name]
            master.grad = gradient if gradient is None or master is parameter else gradient.T
        step_unless(not_finite, self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)  # because the next autoencoder of the run can use their memory
        self.sae.zero_grad(set_to_none=True)
        self.non_finite += not_finite

    @torch.no_grad()
    def update_average(self, step: int) -> None:
        """Update the exponential moving average of the weights, if there is one.

        The decay is at most (n + 1) / (n + 10) after n steps, so that nothing is left of the random start.
        """
        for name, parameter in self.sae.named_parameters() if self.average else ():
            decay = min(float(self.cfg.ema_decay or 0), (step + 1) / (step + 10))
            self.average[name].lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def take_average(self) -> None:
        """Replace the weights by their averages, if there are any, at the end of training."""
        for name, parameter in self.sae.named_parameters() if self.average else ():
            parameter.copy_(self.average[name])
        if self.average and self.sae.has_unit_norm_decoder:
            self.sae.set_decoder_norm_to_unit_norm()

    def check_finite(self) -> None:
        """Raise NonFiniteLoss if the loss of any step so far was not finite. Reads one number off the device."""
        if self.non_finite.item():
            raise NonFiniteLoss(
                "the loss is not finite, or a gradient (NaN or infinite); the weights were not updated with it"
            )

    def check_weights(self) -> None:
        """Raise NonFiniteLoss if a weight is not finite, because an update can overflow before a loss shows it."""
        for name, weight in self.sae.weights():
            # A sum is read three times as fast; of huge weights it may be infinite though they are not.
            is_bad = ~weight.sum().isfinite() and ~weight.isfinite().all()
            if self.sae.shard.any(is_bad):
                raise NonFiniteLoss(f"{name} holds values that are not finite (NaN or infinite)")

    def lr(self, step: int) -> float:
        return lr_at(self.cfg, step)

    def l1_coefficient(self, step: int) -> float:
        if self.cfg.architecture not in WITH_PENALTY:
            return 0.0
        return self.cfg.l1_coefficient * warm_up_factor(step, self.cfg.l1_warm_up_steps)

    def k(self, step: int) -> int:
        return annealed_k(step, self.cfg.k, self.sae.shard.d_sae, self.cfg.k_anneal_steps)

    # ------------------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {
            "weights": dict(self.sae.weights()),
            "optimizer": {
                f"{key}.{name}": value
                for name, master in self.masters.items()
                for key, value in moments(self.optimizer, master).items()
            },
            "tracker": self.tracker.state_dict(),
            "target_l0": self.target_l0.state_dict(),
            "average": self.average,
        }

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        self.sae.load_state_dict(state["weights"])
        for full_name, value in state["optimizer"].items():
            key, name = full_name.split(".", 1)
            if value.is_floating_point():
                value = wide(value)  # because checkpoints of earlier versions hold moments in the config's dtype
            self.optimizer.state[self.masters[name]][key] = value.to(self.sae.device)
        self.tracker.load_state_dict(state["tracker"])
        self.target_l0.load_state_dict(state.get("target_l0", {}))
        for name, average in self.average.items():
            average.copy_(state["average"][name])


def clip_gradients(sae: SparseAutoencoder, largest: float, share: Share) -> None:
    """Scale all gradients so that their norm together, over all latents, is at most `largest`."""
    if sae.shard.is_all:
        torch.nn.utils.clip_grad_norm_(sae.parameters(), largest)
        return
    squares = {name: p.grad.pow(2).sum() for name, p in sae.named_parameters() if p.grad is not None}
    by_latent = torch.stack([square for name, square in squares.items() if name in BY_LATENT]).sum()
    others = [square for name, square in squares.items() if name not in BY_LATENT]
    norm = share.of_first(torch.stack([sae.shard.summed(by_latent), *others]).sum().sqrt())
    torch.nn.utils.clip_grads_with_norm_(sae.parameters(), largest, norm)


def part_size(cfg: LanguageModelSAERunnerConfig) -> int:
    """Return how many rows of a batch go through at once, at most."""
    return cfg.micro_batch_size or (cfg.train_batch_size if cfg.grad_acc_steps > 1 else sys.maxsize)


def sizes_of_parts(n_rows: int, size: int) -> list[int]:
    """Return how many of `n_rows` rows go through at once, time after time."""
    return [min(size, n_rows - start) for start in range(0, n_rows, size)]


def check_trainable(cfg: LanguageModelSAERunnerConfig) -> None:
    """Raise ValueError or ImportError if no step can be made with the config's dtype or optimizer."""
    check_for_training(cfg)
    check_dtype(cfg.dtype)
    check_installed(cfg.optimizer)


def in_memory_order(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """A parameter over the same memory that is contiguous, because fused Adam copies any other in every step."""
    return parameter if parameter.is_contiguous() else torch.nn.Parameter(parameter.detach().T)


@torch.no_grad()
def track_inference_threshold(sae: SparseAutoencoder, code: Code | CodeFigures, step: int) -> None:
    """batchtopk: follow the smallest activation of each training batch, as a running mean over about 10 steps."""
    if sae.choice != "batchtopk":
        return
    smallest = code.smallest_active()
    new = torch.lerp(sae.inference_threshold, smallest.to(sae.dtype), max(0.1, 1 / (step + 1)))
    sae.inference_threshold.copy_(torch.where(smallest.isfinite(), new, sae.inference_threshold))
