"""A run as it stands: the autoencoders that are trained together, the store that feeds them all, and where they go."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from sae_training.activations_store import ActivationsStore
from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.language_model.sites import Sites
from sae_training.run.folder import RunFolder
from sae_training.run.logger import RunLogger
from sae_training.run.progress import Progress
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.sparse_autoencoder.conversions import fold_input_scale
from sae_training.training.trainer import NonFiniteLoss, SAETrainer


@dataclass
class Member:
    """One autoencoder of a run, with its own config, folder and metrics.

    `name` says in what it differs from the others ("" if it is the only one, whose folder is the run's).
    """

    name: str
    cfg: LanguageModelSAERunnerConfig
    folder: Path
    sites: Sites
    store: ActivationsStore
    trainer: SAETrainer
    logger: RunLogger
    failure: str | None = None
    """Why its training was given up, while that of others goes on."""

    @property
    def sae(self) -> SparseAutoencoder:
        """The autoencoder for activations as the model has them: what is in training, or where training scales its
        batches, a copy with the scales folded in.
        """
        if not self.is_scaled:
            return self.trainer.sae
        folded = fold_input_scale(self.trainer.sae, *self.scales)
        folded.cfg = dataclasses.replace(self.cfg, normalize_activations="none")
        return folded

    @property
    def scales(self) -> tuple[float, float]:
        """What rows of its input and of its target are multiplied by before it is trained on them."""
        return self.store.scales[self.sites.input], self.store.scales[self.sites.target]

    @property
    def is_scaled(self) -> bool:
        """Whether training scales its batches (`normalize_activations`)."""
        return self.scales != (1.0, 1.0)

    def part(self, name: str) -> str:
        """The name of one of its files in a checkpoint."""
        return f"{self.name}/{name}" if self.name else name


@dataclass
class Run:
    """Everything with state in a training run; `step` counts finished optimizer steps."""

    cfg: LanguageModelSAERunnerConfig
    """As it was given: with lists, if it describes several autoencoders."""
    folder: RunFolder
    store: ActivationsStore
    members: list[Member]
    progress: Progress
    held_out: Tensor
    step: int = 0
    last_checkpoint: Path | None = None
    last_checkpoint_time: float = field(default_factory=time.monotonic)

    @property
    def saes(self) -> dict[str, SparseAutoencoder]:
        """The autoencoders by name, without those whose training was given up."""
        return {member.name: member.sae for member in self.trained}

    @property
    def sae(self) -> SparseAutoencoder:
        """The autoencoder of a run that has only one."""
        (member,) = self.members
        return member.sae

    @property
    def trained(self) -> list[Member]:
        return [member for member in self.members if member.failure is None]

    @property
    def n_training_tokens(self) -> int:
        return self.step * self.cfg.tokens_per_step

    def write_status(self, state: str) -> None:
        failed = {member.name: member.failure for member in self.members if member.failure}
        self.progress.write_status(state, self.step, self.last_checkpoint, **({"failed": failed} if failed else {}))


def check_finite(run: Run, member: Member, weights: bool = False) -> None:
    """NonFiniteLoss, with what to do, if the loss of any step (or, if asked, a weight now) is not finite.

    Where other autoencoders are still in training, this one's is given up with a message, and theirs goes on.
    """
    try:
        member.trainer.check_finite()
        if weights:
            member.trainer.check_weights()
    except NonFiniteLoss as error:
        message = (
            f"step {run.step}: {error}. Last good checkpoint: {run.last_checkpoint or 'none was saved yet'}. "
            f"Lower lr (now {member.trainer.lr(run.step - 1):.3g}), or raise lr_warm_up_steps, and begin anew with "
            'resume="never".'
        )
        if run.trained == [member]:
            raise NonFiniteLoss(message) from error
        member.failure = message
        tqdm.write(f"{member.name} is given up at {message}")
