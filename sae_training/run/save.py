"""What a run saves: checkpoints, from which it continues, and folders of weights, which people load."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sae_training.config.io import config_to_dict
from sae_training.formats import pieces
from sae_training.formats.native import CONFIG_FILE, SPARSITY_FILE, WEIGHTS_FILE
from sae_training.machine.errors import first_line
from sae_training.machine.files import (
    NotEnoughDisk,
    disk_named,
    flush_to_disk,
    flush_tree_to_disk,
    step_number,
    write_safetensors,
    write_text,
)
from sae_training.machine.interrupt import stop_point
from sae_training.machine.phases import phase
from sae_training.machine.run_files import EVALUATION_FILE
from sae_training.parallel.ranks import (
    is_everyones,
    is_first,
    n_ranks,
    of_all,
    raised_together,
    rank,
    together,
    wait_for_all,
)
from sae_training.parallel.shard import Shard
from sae_training.run import checkpoint
from sae_training.run.state import Member, Run, check_finite
from sae_training.run.wandb_run import weights_artifacts

WAIT_FOR_ROOM = 600.0  # seconds
TRY_EVERY = 10.0

STORE = "store"  # the part of a checkpoint that the store is; of other ranks than the first store-1, store-2, ...


def save(run: Run, until_final: bool = False, in_background: bool = False) -> Path | None:
    """Save all that the run needs to go on as if it had not stopped; None, with a message, if the disk is full.

    `until_final`: after the last step, for the time of the evaluation. Such a checkpoint is without the buffer, which
    no step will use, stands beside those that are kept, and goes once final/ is there. `in_background`: if the run has
    room for a copy of its state, return None once that is made; `Run.take_saved` says what became of it.
    """
    run.take_saved(wait=True)
    for member in run.trained:
        check_finite(run, member, weights=True)
        check_same_weights(member)
    run.last_checkpoint_time = time.monotonic()
    recorded = [member for member in run.members if member.is_recorded]
    try:
        with raised_together():  # a disk may be full on one rank alone
            rows = {member.name: member.logger.position() for member in recorded}
        parts, in_pieces, texts = content_of(run, until_final)
        state = {
            "metrics_bytes": together(rows),
            "failures": together(run.own_failures),
            "hooks": together({own_store(): [site.name for site in run.store.sites.all]} if holds_rows(run) else {}),
            "language_model": run.language_model,
            "pending": list(run.pending),
            "until_final": until_final,
        }

        def write(step: int = run.step) -> Path:
            began = time.monotonic()
            for member in recorded:
                member.logger.flush_to_disk()  # because the checkpoint counts on these rows
            saved = checkpoint.save_checkpoint(run.folder.checkpoints, step, parts, state, texts, in_pieces)
            if not until_final and is_first():
                checkpoint.delete_old(run.folder.checkpoints, run.cfg.keep_checkpoints)
            run.save_seconds = time.monotonic() - began
            return saved

        if in_background and run.background is not None:
            try:
                parts = run.background.copied(parts)
            except (MemoryError, RuntimeError) as error:  # others may have taken what was free at the start
                run.background = None
                tqdm.write(f"No memory for a copy of the state ({first_line(error)}): steps wait for checkpoints.")
            else:
                run.background.begin(write)
                return None
        with phase("saving"):
            saved = write()
    except OSError as error:
        run.say_not_saved(error)
        return None
    if run.last_checkpoint is None:
        run.say_if_grace_is_short()
    run.last_checkpoint, run.has_extra_checkpoint = saved, until_final
    run.write_status("training")
    return saved


def own_store() -> str:
    return f"{STORE}-{rank()}" if rank() else STORE


def holds_rows(run: Run) -> bool:
    """Return whether this rank writes rows of the store."""
    return any(member.is_recorded for member in run.members) or run.store.deal is not None


def content_of(
    run: Run, until_final: bool
) -> tuple[dict[str, dict[str, Any]], dict[str, tuple[dict[str, Any], Shard]], dict[str, str]]:
    """Return what this rank has to save: its own parts, its pieces of parts of several ranks, and texts, by file."""
    parts: dict[str, dict[str, Any]] = {own_store(): run.store.state_dict()} if holds_rows(run) else {}
    if until_final and parts:
        parts[own_store()].pop("buffers", None)
    in_pieces: dict[str, tuple[dict[str, Any], Shard]] = {}
    texts = {}
    for member in run.members:
        if not member.is_written:
            continue
        sae, trainer_state = member.folded(), member.trainer.state_dict()
        if not member.is_scaled:
            trainer_state.pop("weights")  # because the part "sae" holds the same
        # Loaders read the part "sae". A run continues from the weights of "trainer" where these are others.
        of_member = {member.part("sae"): dict(sae.weights()), member.part("trainer"): trainer_state}
        if member.shard.is_all:
            parts |= of_member
        else:
            in_pieces |= {part: (content, member.shard) for part, content in of_member.items()}
        if member.is_recorded:
            texts[member.part(CONFIG_FILE)] = json.dumps(config_to_dict(sae.cfg), indent=2) + "\n"
    return parts, in_pieces, texts


def check_same_weights(member: Member) -> None:
    """Raise ArithmeticError unless all processes that train an autoencoder together have the same weights.

    Each makes the same updates. Where processors round otherwise, copies drift apart; b_dec, which every row changes,
    shows it first. All have copies of it, and of b_enc those that hold the same latents.
    """
    sae, shard = member.trainer.sae, member.shard
    if member.trainer.share.is_all and shard.is_all:
        return
    everyones = of_all([hashlib.sha256(pieces.as_bytes(bias)).digest() for bias in (sae.b_dec, sae.b_enc)])
    expected = [[everyones[0][0], everyones[number % shard.n][1]] for number in range(len(everyones))]
    others = [number for number, found in enumerate(everyones) if found != expected[number]]
    if others:
        raise ArithmeticError(
            f"parallel: ranks {others} have other weights than the first ranks that hold them, because their machines "
            "round otherwise; go on from the last checkpoint on machines of one kind."
        )


def saved_now(run: Run) -> Path | None:
    """Return the checkpoint of the step at which the run is, after saving it if there is none."""
    run.take_saved(wait=True)
    latest = run.last_checkpoint
    if latest is not None and step_number(latest) == run.step:
        return latest
    return save(run, until_final=run.step == run.cfg.total_training_steps)


def delete_extra(run: Run) -> None:
    """Delete the checkpoint that was for the time of the evaluation, if the run has one."""
    if run.has_extra_checkpoint and run.last_checkpoint is not None:
        if is_first():
            checkpoint.remove(run.last_checkpoint)
        wait_for_all()
        run.last_checkpoint = next(iter(checkpoint.complete_checkpoints(run.folder.checkpoints)), None)
        run.has_extra_checkpoint = False
        with contextlib.suppress(OSError):  # there are others in it
            run.folder.checkpoints.rmdir()


@contextlib.contextmanager
def saved_first(run: Run) -> Iterator[None]:
    """Save the run before an error leaves the context, and say so in the error, so that nothing trained is lost.

    For what depends on the world outside: a bad row or a network that fails, hours into a run. What is called in the
    context must, in its error, leave the run's state as it was. Of several processes one alone cannot save: after an
    error that the others do not have, the job goes on from its last checkpoint.
    """
    try:
        yield
    except Exception as error:
        if is_of_one_alone(error):
            error.add_note(f"The last checkpoint is {run.last_checkpoint or 'none'}; the same command goes on from it.")
        elif run.step > 0:
            error.add_note(saved_note(run))
        raise


def is_of_one_alone(error: Exception) -> bool:
    """Return whether the other processes may not have the error, so that this one cannot save: they would not join."""
    return n_ranks() > 1 and not is_everyones(error)


def saved_note(run: Run) -> str:
    try:
        saved = save(run)
    except Exception as second:  # the first error matters more
        return f"Not saved, because of another error: {second}. The last checkpoint is {run.last_checkpoint or 'none'}."
    if saved is None:
        return "Not saved (see above)."
    return (
        f"Step {run.step} of {run.cfg.total_training_steps} is saved in {saved}. Once this is mended, the same command "
        "goes on from there; where a field of the config has to change (lm_dtype for instance), begin a new run."
    )


def once_there_is_room(run: Run, write: Callable[[], None]) -> None:
    """Write what a run cannot do without. While the disk is full it waits, at most WAIT_FOR_ROOM, unless it is stopped.

    One of several processes does not wait: the others would not know.
    """
    began = time.monotonic()
    while True:
        try:
            return write()
        except NotEnoughDisk as error:
            waited = time.monotonic() - began
            if n_ranks() > 1 or waited >= WAIT_FOR_ROOM:
                raise
            if waited < TRY_EVERY:
                tqdm.write(f"{error} Waiting for room, at most {WAIT_FOR_ROOM / 60:.0f} minutes.")
            run.write_status("training")
        for _ in range(int(TRY_EVERY / 0.1)):
            stop_point()
            time.sleep(0.1)


def save_weights_folder(member: Member, folder: Path, evaluation: Mapping[str, Any] | None = None) -> None:
    """Save weights, config, log10 firing frequencies and an evaluation in `folder`, whole or not at all, and in wandb.

    wandb gets them as two artifacts, of the weights and of the frequencies. Of an autoencoder whose latents several
    processes hold, each writes its part of the weights.
    """
    partial = folder.with_name(folder.name + ".tmp")
    sae, log_frequency, shard = member.folded(), member.trainer.tracker.log_frequency(), member.shard
    weights = dict(sae.weights())

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        if shard.is_all:
            sae.save_model(partial)
            return
        partial.mkdir(parents=True)
        write_text(partial / CONFIG_FILE, json.dumps(config_to_dict(sae.cfg), indent=2) + "\n")
        pieces.begin(partial / WEIGHTS_FILE, weights, shard)

    def complete() -> None:
        write_safetensors(partial / SPARSITY_FILE, {"log_feature_sparsity": log_frequency})
        if evaluation is not None:
            write_text(partial / EVALUATION_FILE, json.dumps(evaluation, indent=2) + "\n")
        flush_tree_to_disk(partial)  # because the checkpoint goes once final/ is there
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
        flush_to_disk(folder.parent)

    try:
        with disk_named(partial.parent):
            if shard.is_all:
                begin()
                complete()
            else:
                fill = functools.partial(pieces.fill, partial / WEIGHTS_FILE, weights, shard)
                first, last = (begin, complete) if member.is_recorded else (None, None)
                checkpoint.one_after_another(first, fill if member.is_written else None, last)
    except BaseException:
        if member.is_recorded:
            shutil.rmtree(partial, ignore_errors=True)
        raise

    for artifact in weights_artifacts(folder, member.trainer.sae.get_name(), config_to_dict(member.cfg)):
        member.logger.log_artifact(artifact)
