"""Builds and runs one system's training, in its own process, for `bench_step.py` and `bench_quality.py`.

The process lives in the virtual environment of its system: each builder imports its own package, and only `ours`
imports sae_training. Requests are JSON lines on stdin, replies JSON lines on stdout; packages print to stderr.

    {"do": "build", "system": "sae-lens", "architecture": "topk", "sizes": {...}}    -> versions
    {"do": "step", "n": 3}                                                          -> {"ms": [...]}
    {"do": "finish"}                                                                -> {"l0": ..., "peak_mib": ...}

or, for a whole run on the rows of a file, saved in the form that `Plain` describes:

    {"do": "train", "system": ..., "architecture": ..., "sizes": {...}, "rows": FILE, "scale": 0.3, "save": FILE}
                                                                -> versions, {"seconds": ..., "config": {...}}
"""

from __future__ import annotations

import gc
import json
import os
import platform
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

N_BATCHES = 4  # different batches, used in turn
N_ATOMS = 8192  # at most, in the planted dictionary
ATOMS_PER_ROW = 20
SAMPLE_ROWS = 256  # rows encoded at a time where L0 is set or measured
LR = 1e-8  # so small that L0 stays where it was set; a config may name another
START_ROWS = 32_768  # rows that ours takes the decoder bias's starting value from
LONG_AGO = 10**9  # steps or tokens: more than any system waits before it calls a latent dead
RELU_TYPE = ("standard", "jumprelu", "gated")  # L0 follows from weights and biases, not from k
ENCODER_BIASES = ("b_enc", "encoder.bias", "b_gate", "b_mag", "gate_bias", "mag_bias")
GROUP_SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)  # matryoshka groups, as in the demo of dictionary-learning


@dataclass
class Sizes:
    d_in: int
    d_sae: int
    batch: int
    """Rows of a step."""
    k: int
    """Active latents per row of TopK-type systems."""
    l0: float
    """Active latents per row that ReLU-type systems are set to."""
    device: str = "cpu"
    dead_share: float = 0.0
    """Share of latents held dead, for AuxK to work on; 0 leaves the counters alone."""
    steps: int = 10**6
    """Steps of the whole run, which schedules follow."""
    seed: int = 0
    """Seed of the starting weights."""
    config: dict[str, Any] = field(default_factory=dict)
    """Further settings, under the system's own names; they win over all others."""

    @property
    def n_dead(self) -> int:
        return round(self.dead_share * self.d_sae)

    @property
    def matryoshka_widths(self) -> list[int]:
        """Nested dictionary sizes; the last is d_sae."""
        shares = [sum(GROUP_SHARES[: i + 1]) for i in range(len(GROUP_SHARES))]
        return [round(share * self.d_sae) for share in shares]


@dataclass
class Plain:
    """A trained autoencoder in one form for all systems; saved as one .safetensors.

    pre = (x - b_dec) @ W_enc + b_enc, or x @ W_enc + b_enc without `subtract_b_dec`; out = acts @ W_dec + b_dec; and

    | activation | acts                                                        | tensors besides            |
    |------------|-------------------------------------------------------------|----------------------------|
    | relu       | ReLU(pre)                                                   |                            |
    | topk       | ReLU of the k largest of a row                              |                            |
    | threshold  | ReLU(pre) where pre > threshold                             | threshold (d_sae,)         |
    | gated      | ReLU(e^r_mag * (pre - b_enc) + b_mag) where pre > 0         | r_mag and b_mag, (d_sae,)  |
    """

    tensors: dict[str, Tensor]
    """W_enc (d_in, d_sae), b_enc (d_sae,), W_dec (d_sae, d_in), b_dec (d_in,), and the activation's own."""
    activation: str
    k: int | None = None
    subtract_b_dec: bool = True

    def save(self, path: str | Path) -> None:
        from safetensors.torch import save_file

        facts = {"activation": self.activation, "k": self.k, "subtract_b_dec": self.subtract_b_dec}
        tensors = {name: tensor.detach().cpu().float().contiguous().clone() for name, tensor in self.tensors.items()}
        save_file(tensors, str(path), {"plain": json.dumps(facts)})


@dataclass
class System:
    step: Callable[[Tensor], object]
    """One training step on a batch (rows, d_in)."""
    version: str
    encode: Callable[[Tensor], Tensor] | None = None
    """Activations (rows, d_in) to latent activations; zeros are inactive."""
    module: nn.Module | None = None
    before_step: Callable[[], object] = lambda: None
    """Called before each step, untimed."""
    start: Callable[[Tensor], object] = lambda rows: None
    """What the system does with data before it trains; called with the first START_ROWS rows of a whole run."""
    plain: Callable[[], Plain] | None = None
    """The autoencoder as it is now; called at the end, because it may change the optimizer's state."""
    config: Callable[[], dict[str, Any]] = dict
    """All settings, as the system itself holds them."""


# ----------------------------------------------------------------------------------------------------------- floors


def floors(name: str, sizes: Sizes) -> System:
    """Dense matmuls into allocated memory: "encoder" or "six" (all of a dense step), then the dtype."""
    kind, dtype_name = name.split("-")
    dtype = getattr(torch, dtype_name)
    placed = {"dtype": dtype, "device": sizes.device}
    W_enc = torch.randn(sizes.d_in, sizes.d_sae, **placed) / sizes.d_in**0.5
    acts = torch.empty(sizes.batch, sizes.d_sae, **placed)

    def encoder(x: Tensor) -> None:
        torch.mm(x, W_enc, out=acts)

    if kind == "encoder":
        return System(cast_first(encoder, dtype), torch.__version__)

    W_dec = W_enc.T.contiguous()
    d_acts, d_W_enc, d_W_dec = torch.empty_like(acts), torch.empty_like(W_enc), torch.empty_like(W_dec)
    out = torch.empty(sizes.batch, sizes.d_in, **placed)
    d_x = torch.empty_like(out)

    def six(x: Tensor) -> None:
        torch.mm(x, W_enc, out=acts)
        torch.mm(acts, W_dec, out=out)
        torch.mm(out, W_dec.T, out=d_acts)
        torch.mm(acts.T, out, out=d_W_dec)
        torch.mm(x.T, d_acts, out=d_W_enc)
        torch.mm(d_acts, W_enc.T, out=d_x)

    return System(cast_first(six, dtype), torch.__version__)


def cast_first(step: Callable[[Tensor], None], dtype: torch.dtype) -> Callable[[Tensor], None]:
    """Return `step` on batches in `dtype`; each batch is cast once, at its first use (the untimed steps of `build`)."""
    cast: dict[int, Tensor] = {}

    def run(x: Tensor) -> None:
        if x.data_ptr() not in cast:
            cast[x.data_ptr()] = x.to(dtype)
        step(cast[x.data_ptr()])

    return run


# ------------------------------------------------------------------------------------------------------------- ours


def ours(architecture: str, sizes: Sizes) -> System:
    import sae_training
    from sae_training.config import LanguageModelSAERunnerConfig
    from sae_training.config.io import config_to_dict
    from sae_training.sparse_autoencoder import SparseAutoencoder
    from sae_training.training.trainer import SAETrainer

    if sizes.d_sae % sizes.d_in:
        raise ValueError(f"d_sae: found {sizes.d_sae}, expected a multiple of d_in = {sizes.d_in}")
    fields: dict[str, Any] = {
        "d_in": sizes.d_in,
        "expansion_factor": sizes.d_sae // sizes.d_in,
        "architecture": architecture,
        "k": sizes.k,
        "train_batch_size": sizes.batch,
        # The config demands a buffer of two batches, which is not used here.
        "store_batch_size": 32,
        "context_size": 128,
        "n_batches_in_buffer": -(-2 * sizes.batch // (32 * 128)),
        "total_training_tokens": sizes.batch * sizes.steps,
        "lr": LR,
        "lr_warm_up_steps": 0,
        "device": sizes.device,
        "seed": sizes.seed,
        "log_to_wandb": False,
    }
    if architecture == "matryoshka":
        fields["matryoshka_widths"] = tuple(sizes.matryoshka_widths)
    if sizes.n_dead:
        fields["auxk_coefficient"] = 1 / 32
    cfg = LanguageModelSAERunnerConfig(**fields | sizes.config)
    sae = SparseAutoencoder(cfg)
    trainer = SAETrainer(sae, cfg)
    steps = count()

    def hold_dead() -> None:
        trainer.tracker.steps_since_fired[: sizes.n_dead] = LONG_AGO
        trainer.tracker.tokens_since_fired[: sizes.n_dead] = LONG_AGO

    def plain() -> Plain:
        trainer.check_finite()
        tensors = dict(sae.weights())
        match sae.choice:
            case "topk":
                return Plain(tensors, "topk", sae.k)
            case "batchtopk":
                tensors["threshold"] = tensors.pop("inference_threshold").expand(sae.d_sae)
                return Plain(tensors, "threshold")
            case "jumprelu":
                tensors["threshold"] = tensors.pop("log_threshold").exp()
                return Plain(tensors, "threshold")
            case "gated":
                return Plain(tensors, "gated")
            case _:
                return Plain(tensors, "relu")

    return System(
        step=lambda x: trainer.step(x, next(steps)),
        version=commit(Path(sae_training.__path__[0]).parent),
        encode=sae.encode,
        module=sae,
        before_step=hold_dead,
        start=lambda rows: sae.initialize_b_dec(rows, cfg.b_dec_init_method),
        plain=plain,
        config=lambda: config_to_dict(cfg) | {"resolved_lr": cfg.resolved_lr},
    )


def commit(folder: Path) -> str:
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ---------------------------------------------------------------------------------------------------------- sae-lens


def sae_lens(architecture: str, sizes: Sizes) -> System:
    """SAETrainer.step with the package's defaults, but for sizes, learning rate and what `sizes.config` names."""
    from sae_lens.config import SAETrainerConfig  # pyright: ignore[reportMissingImports]
    from sae_lens.saes import (  # pyright: ignore[reportMissingImports]
        batchtopk_sae,
        gated_sae,
        jumprelu_sae,
        matryoshka_batchtopk_sae,
        standard_sae,
        topk_sae,
    )
    from sae_lens.training.sae_trainer import SAETrainer  # pyright: ignore[reportMissingImports]

    module, name = {
        "standard": (standard_sae, "StandardTrainingSAE"),
        "topk": (topk_sae, "TopKTrainingSAE"),
        "batchtopk": (batchtopk_sae, "BatchTopKTrainingSAE"),
        "matryoshka": (matryoshka_batchtopk_sae, "MatryoshkaBatchTopKTrainingSAE"),
        "jumprelu": (jumprelu_sae, "JumpReLUTrainingSAE"),
        "gated": (gated_sae, "GatedTrainingSAE"),
    }[architecture]
    make_config = getattr(module, f"{name}Config")
    of_sae, of_trainer = settings_of(make_config, sizes.config)
    its_sizes: dict[str, Any] = {"d_in": sizes.d_in, "d_sae": sizes.d_sae, "dtype": "float32", "device": sizes.device}
    if architecture not in RELU_TYPE:
        its_sizes["k"] = sizes.k
    if architecture == "matryoshka":
        its_sizes["matryoshka_widths"] = sizes.matryoshka_widths
    sae = getattr(module, name)(make_config(**its_sizes | of_sae))
    its_run = {
        "total_training_samples": sizes.batch * sizes.steps,
        "train_batch_size_samples": sizes.batch,
        "lr": LR,
        "lr_end": of_trainer.get("lr", LR) / 10,  # as its runner sets it; the default schedule is constant
        "device": sizes.device,
    }
    cfg = SAETrainerConfig(**its_run | of_trainer)
    trainer = SAETrainer(cfg, sae, data_provider=iter(()))

    def step(x: Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    def hold_dead() -> None:
        trainer.n_forward_passes_since_fired[: sizes.n_dead] = LONG_AGO

    def plain() -> Plain:
        tensors = dict(sae.state_dict())
        sae.process_state_dict_for_saving_inference(tensors)  # as its own saving does: decoder norms folded, threshold
        if architecture == "gated":
            tensors["b_enc"] = tensors.pop("b_gate")
        activation = {"standard": "relu", "topk": "topk", "gated": "gated"}.get(architecture, "threshold")
        k = sae.cfg.k if activation == "topk" else None
        return Plain(tensors, activation, k, subtract_b_dec=sae.cfg.apply_b_dec_to_input)

    return System(
        step,
        version("sae-lens"),
        encode=lambda x: sae.encode_with_hidden_pre(x)[0],
        module=sae,
        before_step=hold_dead,
        plain=plain,
        config=lambda: {"sae": sae.cfg.to_dict(), "trainer": asdict(cfg)},
    )


def settings_of(config_class: Any, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings that are fields of a dataclass, and the others."""
    names = {f.name for f in fields(config_class)}
    mine = {name: value for name, value in settings.items() if name in names}
    return mine, {name: value for name, value in settings.items() if name not in names}


# ------------------------------------------------------------------------------------------------------ eai-sparsify


def eai_sparsify(architecture: str, sizes: Sizes) -> System:
    """The part of Trainer.fit that trains one SparseCoder on a batch: the package has no function for it.

    The loss is "fvu". Left out: accumulation, wandb, the language model with the masking of its output, k_decay_steps.
    A learning rate of None is the rule of the package.
    """
    from schedulefree import ScheduleFreeWrapper  # pyright: ignore[reportMissingImports]
    from sparsify.config import SparseCoderConfig, TrainConfig  # pyright: ignore[reportMissingImports]
    from sparsify.sign_sgd import SignSGD  # pyright: ignore[reportMissingImports]
    from sparsify.sparse_coder import SparseCoder  # pyright: ignore[reportMissingImports]
    from transformers import get_linear_schedule_with_warmup

    torch.set_float32_matmul_precision("high")  # as Trainer.fit
    of_sae, of_run = settings_of(SparseCoderConfig, {"num_latents": sizes.d_sae, "k": sizes.k} | sizes.config)
    timed = {"lr": LR, "lr_warmup_steps": 0, "auxk_alpha": 1 / 32 if sizes.n_dead else 0.0}
    cfg = TrainConfig(SparseCoderConfig(**of_sae), optimizer=architecture.split("-")[1], **timed | of_run)
    sae = SparseCoder(sizes.d_in, cfg.sae, sizes.device, dtype=torch.float32)
    lr = cfg.lr or (2e-4 if cfg.optimizer == "adam" else 5e-3) / (sae.num_latents / (2**14)) ** 0.5
    if cfg.optimizer == "adam":
        optimizer = torch.optim.Adam(sae.parameters(), lr=lr)
        schedulers = [get_linear_schedule_with_warmup(optimizer, cfg.lr_warmup_steps, sizes.steps)]
    else:
        optimizer = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=lr), momentum=0.95)
        optimizer.train()
        schedulers = []
    since_fired = torch.zeros(sae.num_latents, device=sizes.device, dtype=torch.long)
    did_fire = torch.zeros(sae.num_latents, device=sizes.device, dtype=torch.bool)

    def step(x: Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        dead = since_fired > cfg.dead_feature_threshold if cfg.auxk_alpha > 0 else None
        total_variance = (x - x.mean(0)).pow(2).sum()
        out = sae(x=x, y=x, dead_mask=dead, total_variance=total_variance)
        did_fire[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        if cfg.auxk_alpha > 0:
            float(out.auxk_loss.detach())
        loss = out.fvu + cfg.auxk_alpha * out.auxk_loss + out.multi_topk_fvu / 8
        loss.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
        with torch.no_grad():
            since_fired.add_(len(x))
            since_fired[did_fire] = 0
            did_fire.zero_()

    def hold_dead() -> None:
        since_fired[: sizes.n_dead] = LONG_AGO

    def start(rows: Tensor) -> None:
        sae.b_dec.data = rows[: sizes.batch].mean(0)

    def plain() -> Plain:
        if isinstance(optimizer, ScheduleFreeWrapper):
            optimizer.eval()  # pyright: ignore[reportAttributeAccessIssue] - the averaged weights, as its saving does
        tensors = {"W_enc": sae.encoder.weight.T, "b_enc": sae.encoder.bias, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
        return Plain(tensors, "topk", sae.cfg.k)

    return System(
        step,
        version("eai-sparsify"),
        encode=lambda x: sae.encode(x).top_acts,
        module=sae,
        before_step=hold_dead,
        start=start,
        plain=plain,
        config=lambda: asdict(cfg) | {"lr": lr},
    )


# ----------------------------------------------------------------------------------------------- dictionary-learning


def dictionary_learning(architecture: str, sizes: Sizes) -> System:
    """The trainers' update() with the package's defaults, but for sizes, learning rate, warm-ups and `sizes.config`.

    The latter holds arguments of the trainer, and its attribute dead_feature_threshold.
    """
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer  # pyright: ignore[reportMissingImports]
    from dictionary_learning.trainers.gdm import GatedSAETrainer  # pyright: ignore[reportMissingImports]
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer  # pyright: ignore[reportMissingImports]
    from dictionary_learning.trainers.matryoshka_batch_top_k import (  # pyright: ignore[reportMissingImports]
        MatryoshkaBatchTopKTrainer,
    )
    from dictionary_learning.trainers.standard import StandardTrainer  # pyright: ignore[reportMissingImports]
    from dictionary_learning.trainers.top_k import TopKTrainer  # pyright: ignore[reportMissingImports]

    trainer_class = {
        "standard": StandardTrainer,
        "topk": TopKTrainer,
        "batchtopk": BatchTopKTrainer,
        "matryoshka": MatryoshkaBatchTopKTrainer,
        "jumprelu": JumpReluTrainer,
        "gated": GatedSAETrainer,
    }[architecture]
    arguments: dict[str, Any] = {
        "steps": sizes.steps,
        "activation_dim": sizes.d_in,
        "dict_size": sizes.d_sae,
        "layer": 0,
        "lm_name": "",
        "lr": LR,
        "warmup_steps": 0,
        "seed": sizes.seed,
        "device": sizes.device,
    }
    if architecture in RELU_TYPE:
        arguments["sparsity_warmup_steps"] = None
    else:
        arguments |= {"k": sizes.k, "threshold_start_step": 0}  # in a long run nearly all steps come after it
    if architecture == "jumprelu":
        arguments["target_l0"] = sizes.l0
    if architecture == "matryoshka":
        arguments["group_fractions"] = list(GROUP_SHARES)
    arguments |= sizes.config
    dead_after = arguments.pop("dead_feature_threshold", None)
    trainer = trainer_class(**arguments)
    if dead_after is not None:
        trainer.dead_feature_threshold = dead_after
    steps = count()

    def encode(x: Tensor) -> Tensor:
        # By default these two encode with the threshold of inference.
        batch_wise = architecture in ("batchtopk", "matryoshka")
        return trainer.ae.encode(x, use_threshold=False) if batch_wise else trainer.ae.encode(x)

    def hold_dead() -> None:
        if architecture not in RELU_TYPE:
            trainer.num_tokens_since_fired[: sizes.n_dead] = LONG_AGO

    def plain() -> Plain:
        ae = trainer.ae
        if architecture in ("jumprelu", "matryoshka"):
            tensors = {name: getattr(ae, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        else:
            tensors = {"W_enc": ae.encoder.weight.T, "W_dec": ae.decoder.weight.T}
            if architecture == "gated":
                tensors |= {"b_enc": ae.gate_bias, "r_mag": ae.r_mag, "b_mag": ae.mag_bias, "b_dec": ae.decoder_bias}
            else:
                b_dec = ae.bias if architecture == "standard" else ae.b_dec
                tensors |= {"b_enc": ae.encoder.bias, "b_dec": b_dec}
        match architecture:
            case "topk":
                return Plain(tensors, "topk", int(ae.k))
            case "standard" | "gated":
                return Plain(tensors, "relu" if architecture == "standard" else "gated")
            case _:  # the threshold is negative until batchtopk has measured one
                tensors["threshold"] = torch.as_tensor(ae.threshold).expand(sizes.d_sae)
                return Plain(tensors, "threshold", subtract_b_dec=architecture != "jumprelu")

    return System(
        lambda x: trainer.update(next(steps), x),
        version("dictionary-learning"),
        encode,
        trainer.ae,
        before_step=hold_dead,
        plain=plain,
        config=lambda: arguments | {"dead_feature_threshold": dead_after} | trainer.config,
    )


BUILDERS: dict[str, Callable[[str, Sizes], System]] = {
    "floors": floors,
    "ours": ours,
    "sae-lens": sae_lens,
    "eai-sparsify": eai_sparsify,
    "dictionary-learning": dictionary_learning,
}

# ---------------------------------------------------------------------------------------------------- data and its L0


@torch.no_grad()
def planted_batches(sizes: Sizes) -> list[Tensor]:
    """Batches (rows, d_in) of sparse sums of planted directions with noise; mean square 1 per element.

    The i-th of n directions is chosen with a probability that falls like 1 / sqrt(i), so latents fire unequally.
    """
    generator = torch.Generator().manual_seed(0)
    n_atoms = min(sizes.d_sae, N_ATOMS)
    atoms = nn.functional.normalize(torch.randn(n_atoms, sizes.d_in, generator=generator))
    batches = []
    for _ in range(N_BATCHES):
        places = torch.rand(sizes.batch, ATOMS_PER_ROW, generator=generator) ** 2 * n_atoms
        strengths = 0.5 + torch.rand(sizes.batch, ATOMS_PER_ROW, generator=generator)
        x = nn.functional.embedding_bag(places.long(), atoms, per_sample_weights=strengths, mode="sum")
        x += 0.02 * torch.randn(x.shape, generator=generator)
        batches.append((x / x.pow(2).mean().sqrt()).to(sizes.device))
    return batches


@torch.no_grad()
def mean_l0(encode: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Mean number of active latents per row."""
    active = [(encode(rows) != 0).sum() for rows in x.split(SAMPLE_ROWS)]
    return torch.stack(active).sum().item() / len(x)


@torch.no_grad()
def set_l0(system: System, x: Tensor, l0: float) -> None:
    """Set all encoder biases to the constant, found by bisection, with which about `l0` latents fire per row of `x`."""
    if system.module is None or system.encode is None:
        raise ValueError("L0 can only be set of an autoencoder")
    biases = [p for name, p in system.module.named_parameters() if name in ENCODER_BIASES]
    if not biases:
        raise ValueError(f"no encoder bias found: none of {', '.join(ENCODER_BIASES)} is a parameter")
    low, high = -100.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        for bias in biases:
            bias.fill_(middle)
        found = mean_l0(system.encode, x[:SAMPLE_ROWS])
        if abs(found - l0) < 0.005 * l0:
            return
        low, high = (middle, high) if found < l0 else (low, middle)


# ----------------------------------------------------------------------------------------------------------- memory


def memory_mib(name: str) -> float:
    """MiB of a line of /proc/self/status (VmRSS, VmHWM, VmData)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(name)


def used_mib(device: str) -> float:
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated() / 2**20
    try:
        return memory_mib("VmRSS")
    except (OSError, KeyError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peak_mib(device: str) -> float:
    """Highest use since `forget_peak`, or since the start on systems without /proc."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        return memory_mib("VmHWM")
    except (OSError, KeyError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def forget_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # the peak then includes that of building
        return


def limit_memory() -> None:
    """Limit this process to the memory that is free now, so that it fails rather than the machine.

    There is no limit with CUDA, which reserves more address space than any limit.
    """
    if torch.cuda.is_available():
        return
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available_kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        limit = memory_mib("VmData") * 2**20 + 0.9 * available_kib * 2**10
        resource.setrlimit(resource.RLIMIT_DATA, (int(limit), resource.getrlimit(resource.RLIMIT_DATA)[1]))
    except (OSError, KeyError, StopIteration):
        return


# ----------------------------------------------------------------------------------------------------------- worker


def warm_up(builder: Callable[[str, Sizes], System], architecture: str, sizes: Sizes) -> None:
    """Take two steps of a very small system, so that imports and lazily loaded code do not count as a step's memory."""
    small = replace(sizes, d_in=8, d_sae=64, batch=16, k=2)
    with suppress(ValueError, RuntimeError):  # config fields may fit the true sizes only
        system = builder(architecture, small)
        for x in planted_batches(small)[:2]:
            system.before_step()
            system.step(x)
    gc.collect()


class Worker:
    system: System

    def build(self, system: str, architecture: str, sizes: dict[str, Any]) -> dict[str, Any]:
        self.sizes = Sizes(**sizes)
        device = self.sizes.device
        if device.startswith("cuda"):
            torch.cuda.set_device(torch.device(device).index or 0)
        self.batches = planted_batches(self.sizes)
        self.turn = 0
        warm_up(BUILDERS[system], architecture, self.sizes)
        torch.manual_seed(0)
        self.before_mib = used_mib(device)
        self.system = BUILDERS[system](architecture, self.sizes)
        # The first steps fill the optimizer's state and every cache.
        self.steps(1)
        if architecture in RELU_TYPE:
            set_l0(self.system, self.batches[0], self.sizes.l0)
        forget_peak(device)
        self.steps(N_BATCHES)
        return self.versions()

    def versions(self) -> dict[str, Any]:
        return {
            "version": self.system.version,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if self.sizes.device.startswith("cuda") else None,
        }

    def train(
        self, system: str, architecture: str, sizes: dict[str, Any], rows: str, scale: float, save: str
    ) -> dict[str, Any]:
        """Train on the first sizes.steps batches of a file's tensor `rows` in its order, each row times `scale`.

        The seconds are those of the steps and of the system's own start, without reading the rows.
        """
        from safetensors import safe_open

        self.sizes = Sizes(**sizes)
        torch.manual_seed(self.sizes.seed)
        self.system = BUILDERS[system](architecture, self.sizes)
        if self.system.plain is None:
            raise ValueError(f"{system} cannot be trained")
        with safe_open(rows, framework="pt") as file:
            stored, batch = file.get_slice("rows"), self.sizes.batch

            def read(start: int, stop: int) -> Tensor:
                return (stored[start:stop].float() * scale).to(self.sizes.device)

            seconds = self.timed(self.system.start, read(0, min(START_ROWS, stored.get_shape()[0])))
            for i in range(self.sizes.steps):
                seconds += self.timed(self.system.step, read(i * batch, (i + 1) * batch))
        self.system.plain().save(save)
        config = json.loads(json.dumps(self.system.config(), default=str))
        return self.versions() | {"seconds": seconds, "config": config}

    def timed(self, action: Callable[[Tensor], object], x: Tensor) -> float:
        """Seconds that `action` takes with `x`."""
        self.wait()
        start = time.perf_counter()
        action(x)
        self.wait()
        return time.perf_counter() - start

    def steps(self, n: int) -> list[float]:
        """Milliseconds of each of `n` steps."""
        times = []
        for _ in range(n):
            x = self.batches[self.turn % N_BATCHES]
            self.turn += 1
            self.system.before_step()
            times.append(1000 * self.timed(self.system.step, x))
        return times

    def wait(self) -> None:
        if self.sizes.device.startswith("cuda"):
            torch.cuda.synchronize()

    def finish(self) -> dict[str, Any]:
        peak = peak_mib(self.sizes.device) - self.before_mib
        l0 = None if self.system.encode is None else mean_l0(self.system.encode, self.batches[0])
        return {"l0": l0, "peak_mib": peak}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        limit_memory()
        match request:
            case {"do": "build", **arguments}:
                return self.build(**arguments)
            case {"do": "step", "n": n}:
                return {"ms": self.steps(n)}
            case {"do": "finish"}:
                return self.finish()
            case {"do": "train", **arguments}:
                return self.train(**arguments)
            case _:
                raise ValueError(f"unknown request {request}")


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    worker = Worker()
    for line in sys.stdin:
        try:
            reply = worker.answer(json.loads(line))
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):  # the program that started this one says what there is to say
        main()
