"""How a run begins or goes on: its autoencoders with their starting weights, or as the newest checkpoint has them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from sae_training import formats
from sae_training.activations_store import ActivationsStore
from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.config.io import WATCHING_FIELDS, config_differences, config_from_dict, config_to_dict
from sae_training.config.sweep import is_several
from sae_training.config.types import FIXED_K, ONLY_LOADED
from sae_training.formats import pieces
from sae_training.formats.native import CONFIG_FILE
from sae_training.language_model.load import LanguageModel, fingerprint
from sae_training.language_model.sites import Sites
from sae_training.machine.paths import PATH_FIELDS
from sae_training.machine.phases import phase
from sae_training.parallel.division import Division
from sae_training.parallel.ranks import of_all, raised_together
from sae_training.run import checkpoint
from sae_training.run.folder import RunFolder, write_config
from sae_training.run.logger import RunLogger, UnheardLogger
from sae_training.run.progress import Progress
from sae_training.run.save import STORE, check_same_weights
from sae_training.run.state import Member, Run
from sae_training.run.wandb_run import WandbOptions
from sae_training.run.watch import recall
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.sparse_autoencoder.conversions import fold_decoder_norms, fold_input_scale
from sae_training.sparse_autoencoder.normalization import BY_ROW
from sae_training.training.thresholds import start_thresholds
from sae_training.training.trainer import SAETrainer

SAMPLE_ROWS = 32_768  # of the buffer, from which b_dec starts and scales are measured; as many as Gao et al. 2024 use

Singles = dict[str, tuple[LanguageModelSAERunnerConfig, Sites]]
"""What is to be trained: by name, the config of each autoencoder, and its sites."""


def open_run(
    cfg: LanguageModelSAERunnerConfig,
    singles: Singles,
    names: Sequence[str],
    folder: RunFolder,
    store: ActivationsStore,
    held_out: Tensor,
    part: Division,
) -> Run:
    """Return a new run, or the one in `folder` as its newest undamaged checkpoint has it.

    `singles` are trained by this rank as its `part` says, `names` those of all ranks.

    If the run cannot start, a folder that was made for it is removed.
    """
    members: list[Member] = []
    try:
        trainers = {
            name: SAETrainer(SparseAutoencoder(single, shard=part.shard), single, part.share)
            for name, (single, _) in singles.items()
        }
        with phase("reading the checkpoint"):
            latest = checkpoint.newest_valid(folder.checkpoints, notify=tqdm.write)
            state = load_state(latest, store) if latest else {}
        if latest:
            tqdm.write(f"Continuing {folder.path} after step {state['step']}.")
        else:
            state = {"step": 0, "metrics_bytes": dict.fromkeys(singles, 0), "failures": {}}
            check_room_for_checkpoints(cfg, folder, trainers, store, part)
        for name, (single, sites) in singles.items():
            path = folder.path / name.replace("/", "_")  # the run's own folder for the only one, whose name is ""
            if is_several(cfg) and part.is_recorder:
                write_config(path, single)
            logger = UnheardLogger()
            if part.is_recorder:
                logger = open_logger(single, folder, path, state["metrics_bytes"][name])
            failure = state["failures"].get(name)
            members.append(Member(name, single, path, sites, store, trainers[name], logger, failure, part.is_recorder))
        for member in members:
            if latest:
                check_same_run(latest, member)
                read = partial(checkpoint.read_part, latest, shard=member.shard)
                sae, trainer = (read(member.part(name)) for name in ("sae", "trainer"))
                member.trainer.load_state_dict({"weights": sae, **trainer})
            else:
                store.sample(1)  # fills the buffer, which is a phase of its own
                with phase("starting weights"):
                    start_weights(member)
                check_same_weights(member)
    except BaseException:
        for member in members:
            member.logger.close(exit_code=1)
        folder.discard_if_new()
        raise
    progress = Progress(cfg, folder, first_step=state["step"])
    step, pending = state["step"], state.get("pending", [])
    run = Run(cfg, folder, store, members, progress, held_out, step, tuple(names), pending, latest)
    run.has_extra_checkpoint, run.failures = state.get("until_final", False), dict(state["failures"])
    recall(run)
    run.write_status("training")
    return run


def load_state(latest: Path, store: ActivationsStore) -> dict[str, Any]:
    """Return the state of the checkpoint `latest`, after the store has taken its part."""
    state = checkpoint.read_state(latest)
    if not isinstance(state["metrics_bytes"], dict):
        raise ValueError(
            f"{latest}: was written by an earlier version, which this one cannot continue; begin a new run with "
            'resume="never".'
        )
    check_same_language_model(state["language_model"], store.model, latest)
    store.load_state_dict(checkpoint.read_part(latest, STORE))
    hooks = {site.name for site in store.sites.all}
    for part, its_hooks in state.get("hooks", {}).items():  # which other ranks wrote
        if part != STORE and hooks & {*its_hooks}:
            store.load_part(checkpoint.read_part(latest, part))
    return state


def open_logger(cfg: LanguageModelSAERunnerConfig, folder: RunFolder, path: Path, resume_at: int) -> RunLogger:
    """Open the log of the autoencoder in `path`; those of a run of several are a group in wandb."""
    wandb = WandbOptions.of_member(cfg, folder.path, path) if cfg.log_to_wandb else None
    return RunLogger(path, config=config_to_dict(cfg), wandb=wandb, resume_at=resume_at, notify=tqdm.write)


# Of an autoencoder's config in a checkpoint; where batches are scaled, it is that of weights for raw activations.
DIFFER_IN_A_CHECKPOINT = (*WATCHING_FIELDS, *PATH_FIELDS, "normalize_activations")


def check_same_run(latest: Path, member: Member) -> None:
    """Raise ValueError if the checkpoint is that of a run with another config, which somebody has copied here."""
    if not member.is_recorded:
        return
    saved = config_from_dict(json.loads((latest / member.part(CONFIG_FILE)).read_text(encoding="utf-8")))
    if differences := config_differences(saved, member.cfg, ignore=DIFFER_IN_A_CHECKPOINT):
        lines = [f"  {name}: {its!r} there, {ours!r} in this run" for name, (its, ours) in differences.items()]
        raise ValueError("\n".join([f"{latest}: is a checkpoint of another run; move it away.", *lines]))


def check_same_language_model(expected: str, model: LanguageModel, latest: Path) -> None:
    found = fingerprint(model)
    if found != expected:
        raise ValueError(
            f"model_name: the language model's weights (fingerprint {found}) are not those that {latest} was trained "
            f"on ({expected}; earlier versions of this package counted otherwise); give the same model or precision, "
            'or begin a new run with resume="never".'
        )


def check_room_for_checkpoints(
    cfg: LanguageModelSAERunnerConfig,
    folder: RunFolder,
    trainers: dict[str, SAETrainer],
    store: ActivationsStore,
    part: Division,
) -> None:
    """Raise NotEnoughDisk if the checkpoints of this run, at their largest, cannot fit: what all ranks write, once.

    If they cannot for one rank, whose disk may be another, it is raised there, and on the others an OSError names it.
    """
    if cfg.checkpoint_every_minutes is None and cfg.checkpoint_every_steps is None:
        return
    written = [trainer.sae for trainer in trainers.values() if part.share.rank == 0]  # of copies, one is written
    own_weights = sum(p.numel() * p.element_size() for sae in written for p in sae.parameters())
    width, holds_rows = sum(site.d_in for site in store.sites.all), part.is_recorder or store.deal is not None
    own_buffers = store.n_buffered * (width * store.model.cfg.dtype.itemsize + 8) if holds_rows else 0
    weights, buffers = map(sum, zip(*of_all((own_weights, own_buffers)), strict=True))
    # Each holds weights and Adam's two moments, and where batches are scaled the weights for raw activations too. A new
    # one is written before the oldest is deleted.
    copies = 4 if cfg.normalize_activations == "expected_average_only_in" else 3
    with raised_together():
        checkpoint.check_free_disk(
            folder.path,
            (cfg.keep_checkpoints + 1) * (copies * weights + buffers) + weights,
            f"{cfg.keep_checkpoints + 1} checkpoints (keep_checkpoints, and one being written) need",
        )


# -------------------------------------------------------------------------------------------------- starting weights


def start_weights(member: Member) -> None:
    """Take the weights of the pretrained file if the config names one; else start from a sample of rows."""
    sae, cfg, store = member.trainer.sae, member.cfg, member.store
    if cfg.normalize_activations == "expected_average_only_in":  # the same each time, so a site may be measured twice
        store.measure_scales(SAMPLE_ROWS, member.sites)
    if cfg.from_pretrained_path is not None:
        start_from_pretrained(member)
        return
    sample = store.sample(SAMPLE_ROWS, member.sites)
    if sae.is_transcoder:
        sae.initialize_transcoder(sample.x, sample.target, cfg.b_dec_init_method)
    else:
        sae.initialize_b_dec(sample.x, cfg.b_dec_init_method)
    if remark := start_thresholds(sae, sample.x, sample.target):
        member.tell(f"{member.name}: {remark}." if member.name else f"{remark}.")


def start_from_pretrained(member: Member) -> None:
    """Take the weights of the file, which are for raw activations, in the scale and the norms that training keeps."""
    sae, cfg = member.trainer.sae, member.cfg
    assert cfg.from_pretrained_path is not None
    try:
        saved, tensors = formats.load(Path(cfg.from_pretrained_path))
    except (OSError, ValueError) as error:
        raise type(error)(f"from_pretrained_path: {error}") from error
    check_fits(saved, tensors, cfg, sae)
    tensors = {name: pieces.own_part(name, tensor, tensor.shape, sae.shard) for name, tensor in tensors.items()}
    sae.load_state_dict(tensors)
    scale, target_scale = member.scales
    in_training = fold_input_scale(sae, 1 / scale, 1 / target_scale)
    if sae.has_unit_norm_decoder and sae.architecture in FIXED_K:
        in_training.set_decoder_norm_to_unit_norm()
    elif sae.has_unit_norm_decoder:
        in_training = fold_decoder_norms(in_training)
    sae.load_state_dict(in_training.state_dict())


def check_fits(
    saved: LanguageModelSAERunnerConfig,
    tensors: dict[str, Tensor],
    cfg: LanguageModelSAERunnerConfig,
    sae: SparseAutoencoder,
) -> None:
    """Raise ValueError unless a run of `cfg`, with the autoencoder `sae`, can start from the weights of a file."""
    if (saved.target_hook_point is None) != (cfg.target_hook_point is None):
        kinds = ["an autoencoder" if c.target_hook_point is None else "a transcoder" for c in (saved, cfg)]
        raise ValueError(
            f"from_pretrained_path: it holds {kinds[0]}, expected {kinds[1]}, as target_hook_point has it; change one."
        )
    modes = [c.normalize_activations if c.normalize_activations in BY_ROW else "none" for c in (saved, cfg)]
    if modes[0] != modes[1]:
        raise ValueError(
            f"from_pretrained_path: it was trained with normalize_activations {modes[0]}, this config has {modes[1]}; "
            "set normalize_activations to match."
        )
    for name in ("apply_b_dec_to_input", "activation_fn"):
        if getattr(saved, name) != getattr(cfg, name):
            raise ValueError(f"from_pretrained_path: it has {name} {getattr(saved, name)}, which is not trained.")
    if saved.architecture in ONLY_LOADED:
        raise ValueError(f"from_pretrained_path: its architecture is {saved.architecture}, which is not trained.")
    for name, sizes in (("W_enc", "(d_in, d_sae)"), ("W_dec", "(d_sae, d_out)")):
        found, expected = tuple(tensors[name].shape), pieces.whole_shape(name, sae.state_dict()[name], sae.shard)
        if found != expected:
            raise ValueError(
                f"from_pretrained_path: its {name} is {found}, this config's {expected} {sizes}; set expansion_factor "
                "and hooks to match."
            )
    if tensors.keys() != sae.state_dict().keys():
        raise ValueError(
            f"from_pretrained_path: its tensors are {', '.join(tensors)}, those of architecture {sae.architecture} are "
            f"{', '.join(sae.state_dict())}; set architecture (and skip_connection) to that of the file."
        )
