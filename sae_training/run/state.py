"""A run as it stands: the autoencoders that are trained together, the store that feeds them all, and where they go."""

from __future__ import annotations

import dataclasses
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Literal

from torch import Tensor
from tqdm import tqdm

from sae_training.activations_store import ActivationsStore
from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.language_model.sites import Sites
from sae_training.machine.files import NotEnoughDisk
from sae_training.machine.paths import command
from sae_training.parallel.ranks import is_first, n_ranks, of_all, together
from sae_training.parallel.shard import Shard
from sae_training.run.background import Background
from sae_training.run.folder import RunFolder
from sae_training.run.logger import RunLogger
from sae_training.run.progress import Progress
from sae_training.run.watchdog import Watchdog
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.sparse_autoencoder.conversions import fold_input_scale
from sae_training.training.trainer import NonFiniteLoss, SAETrainer

Due = Literal["window", "evaluation", "snapshot"]
"""What may follow a step: the end of a window of firing counts, an evaluation, a snapshot of the weights."""


@dataclass
class Member:
    """One autoencoder of a run, with its own config, folder and metrics."""

    name: str
    """What distinguishes it from the others, and its folder within the run's; "" for the only one of a run."""
    cfg: LanguageModelSAERunnerConfig
    folder: Path
    sites: Sites
    store: ActivationsStore
    trainer: SAETrainer
    logger: RunLogger
    failure: str | None = None
    """Why its training was given up, while that of others goes on."""
    is_recorded: bool = True
    """Whether this process writes what it leaves; if not, another one does, which trains it too."""
    said: set[str] = field(default_factory=set)
    """The figures of which it has been said that they are wrong."""

    def folded(self) -> SparseAutoencoder:
        """Return the autoencoder for activations in the model's own units.

        It is the one in training or, where training scales its batches, a copy with the scales folded in.
        """
        if not self.is_scaled:
            return self.trainer.sae
        folded = fold_input_scale(self.trainer.sae, *self.scales)
        folded.cfg = dataclasses.replace(self.cfg, normalize_activations="none")
        return folded

    @property
    def scales(self) -> tuple[float, float]:
        """The factors by which training multiplies the rows of its input and of its target."""
        return self.store.scales[self.sites.input], self.store.scales[self.sites.target]

    @property
    def is_scaled(self) -> bool:
        """Whether training scales its batches (`normalize_activations`)."""
        return self.scales != (1.0, 1.0)

    def tell(self, message: str) -> None:
        """Say something of the autoencoder, on the rank that records it; on all but the first rank stdout is off."""
        if self.is_recorded:
            tqdm.write(message, file=sys.stdout if is_first() else sys.stderr)

    @property
    def shard(self) -> Shard:
        """The latents that this process holds: all of them, or a part of those of the processes that train it."""
        return self.trainer.sae.shard

    @property
    def is_written(self) -> bool:
        """Whether this process writes its weights, or its part of them: of processes with copies, the first does."""
        return self.trainer.share.rank == 0

    def part(self, name: str) -> str:
        """Return the name that one of its files has in a checkpoint."""
        return (PurePosixPath(self.name) / name).as_posix()


@dataclass
class Run:
    """Everything with state in a training run."""

    cfg: LanguageModelSAERunnerConfig
    """As it was given: with lists, if it describes several autoencoders."""
    folder: RunFolder
    store: ActivationsStore
    members: list[Member]
    progress: Progress
    held_out: Tensor
    step: int = 0
    """How many optimizer steps are finished."""
    names: tuple[str, ...] = ()
    """The names of all autoencoders of the run, in order, those of other ranks included."""
    pending: list[Due] = field(default_factory=list)
    """What follows the last finished step and is still to be done, in order."""
    last_checkpoint: Path | None = None
    has_extra_checkpoint: bool = False
    """Whether that one is for the time of the evaluation only."""
    last_checkpoint_time: float = field(default_factory=time.monotonic)
    save_seconds: float | None = None
    """How long the last checkpoint took to write."""
    watchdog: Watchdog = field(default_factory=Watchdog)
    failures: dict[str, str] = field(default_factory=dict)
    """Why autoencoders were given up, by name, those of other ranks as far as they have told it."""
    language_model: str = ""
    """The fingerprint of the language model."""
    background: Background | None = None
    """What writes checkpoints while steps go on; None: they wait for each."""

    @property
    def saes(self) -> dict[str, SparseAutoencoder]:
        """The autoencoders by name, without those whose training was given up."""
        return {member.name: member.folded() for member in self.trained}

    @property
    def sae(self) -> SparseAutoencoder:
        """The autoencoder of a run that has only one."""
        (member,) = self.members
        return member.folded()

    @property
    def trained(self) -> list[Member]:
        return [member for member in self.members if member.failure is None]

    @property
    def own_failures(self) -> dict[str, str]:
        return {member.name: member.failure for member in self.members if member.failure}

    @property
    def recorded(self) -> list[Member]:
        """Those in training that this process writes down, or its part of them."""
        return [member for member in self.trained if member.is_recorded or not member.shard.is_all]

    @property
    def n_training_tokens(self) -> int:
        return self.step * self.cfg.tokens_per_step

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close what is open; if the run did not come to its end, status.json says so."""
        with suppress(Exception):  # which was not what ended the run
            self.take_saved(wait=True)
        # A disk that is full must not hide what went wrong first, which may well be the same.
        unheard = nullcontext() if error is None else suppress(NotEnoughDisk)
        try:
            if isinstance(error, NotEnoughDisk):
                error.add_note(
                    f"Last checkpoint: {self.last_checkpoint or 'none was saved yet'}. Once there is room, the same "
                    f"command continues the run, and so does: {command('resume', self.folder.path)}"
                )
            if error is not None:
                with unheard:
                    self.write_status("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
        finally:
            self.progress.close()
            for member in self.members:
                with unheard:
                    member.logger.close(exit_code=0 if error is None else 1)

    @property
    def is_saving(self) -> bool:
        """Whether a checkpoint is being written in the background."""
        return self.background is not None and self.background.writing is not None

    def take_saved(self, wait: bool = False) -> None:
        """Take note of the checkpoint that was written in the background, once it is there; `wait` for it."""
        if self.background is None or not (wait or self.background.is_done()):
            return
        try:
            saved = self.background.take()
        except OSError as error:
            self.say_not_saved(error)
            return
        if saved is not None:
            if self.last_checkpoint is None:
                self.say_if_grace_is_short()
            self.last_checkpoint, self.has_extra_checkpoint = saved, False
            self.write_status("training")

    def say_if_grace_is_short(self) -> None:
        seconds, grace = self.save_seconds or 0, self.cfg.grace_seconds
        if grace is not None and seconds > grace:
            tqdm.write(
                f"grace_seconds: a checkpoint takes {seconds:.1f} s to write, longer than {grace:g}: after SIGTERM the "
                "run goes on from the one before; lower checkpoint_every_minutes, or n_batches_in_buffer."
            )

    def say_not_saved(self, error: OSError) -> None:
        again = " The next that is due is tried again." if self.step < self.cfg.total_training_steps else ""
        tqdm.write(f"Checkpoint not saved; the last one is {self.last_checkpoint or 'none'}.{again} {error}")

    def write_status(self, state: str) -> None:
        known = self.failures | self.own_failures
        failures = {name: known[name] for name in self.names if name in known}
        figures: dict[str, Any] = {"failed": failures} if failures else {}
        figures |= {"alerts": self.watchdog.alerts} if self.watchdog.alerts else {}
        self.progress.write_status(state, self.step, self.last_checkpoint, **figures)


def check_any_left(run: Run) -> None:
    """Raise NonFiniteLoss once no process of the job has an autoencoder in training any more.

    Processes tell each other here which they have given up.
    """
    if n_ranks() > 1:
        run.failures |= together(run.own_failures)
        if not any(of_all(bool(run.trained))):
            raise NonFiniteLoss("\n".join(["every autoencoder of the job is given up", *run.failures.values()]))


def check_finite(run: Run, member: Member, weights: bool = False) -> None:
    """Raise NonFiniteLoss, saying what to do, if the loss of any step (or, with `weights`, a weight now) is not finite.

    While other autoencoders are in training, this one is given up with a message instead, and the run goes on.
    """
    try:
        member.trainer.check_finite()
        if weights:
            member.trainer.check_weights()
    except NonFiniteLoss as error:
        run.take_saved(wait=True)
        message = (
            f"step {run.step}: {error}. Last good checkpoint: {run.last_checkpoint or 'none was saved yet'}. "
            f"Lower lr (now {member.trainer.lr(run.step - 1):.3g}), or raise lr_warm_up_steps, and begin anew with "
            'resume="never".'
        )
        if run.trained == [member] and member.trainer.share.n * member.shard.n == n_ranks():  # none trains another
            raise NonFiniteLoss(message) from error
        member.failure = message
        member.tell(f"{member.name} is given up at {message}")
