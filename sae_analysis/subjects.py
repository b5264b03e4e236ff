"""What is analysed: the autoencoders that a path or a session names, and the store that serves them."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sae_analysis.places import folder_of, name_of
from sae_training.activations_store import ActivationsStore
from sae_training.activations_store.cache_parts import parts_on_disk
from sae_training.activations_store.store import without_cache
from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.config.io import check_known, with_defaults
from sae_training.config.sweep import is_several, variants
from sae_training.config.types import MAY_BE_NEGATIVE
from sae_training.formats import Given
from sae_training.formats.loaded import OF_ANOTHER_TEXT
from sae_training.language_model.load import LanguageModel, model_of
from sae_training.language_model.model_parts import ModelParts
from sae_training.language_model.sites import Sites, find_sites, merged, sites_on_disk
from sae_training.machine.device import count
from sae_training.machine.phases import phase
from sae_training.parallel.ranks import n_ranks
from sae_training.run.folder import is_run_folder, read_run_config
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.utils import Session


@dataclass(frozen=True)
class Subject:
    """An autoencoder, and the folder whose `analysis/` gets what is found."""

    name: str
    sae: SparseAutoencoder
    sites: Sites
    folder: Path
    path: Path | None
    """What the autoencoder was read from; None if it was given."""

    @property
    def source(self) -> str | None:
        """Where `path` is, seen from `folder`, so that both can be moved together."""
        return None if self.path is None else os.path.relpath(self.path.resolve(), self.folder.resolve())


@dataclass(frozen=True)
class Subjects:
    """Autoencoders that are analysed in one pass."""

    subjects: list[Subject]
    store: ActivationsStore
    folder: Path
    are_several: bool


@dataclass(frozen=True)
class Job:
    """What processes that share a build need to know before they meet (`parallel.ranks.joined`)."""

    device: str
    parallel_timeout_minutes: float


def job_of(source: str | Path | Session) -> Job:
    """Return the job of analysing what `source` names; the CPU serves where the device of a run is not there."""
    cfg = LanguageModelSAERunnerConfig()
    if not isinstance(source, (str, Path)):
        cfg = with_defaults(source[1].cfg)
    elif is_run_folder(folder := folder_of(Path(source).expanduser())):
        cfg = read_run_config(folder)
    device = torch.device(cfg.device).type
    return Job(device if count(device) else "cpu", cfg.parallel_timeout_minutes)


def check_device(found: torch.device, job: Job) -> None:
    """Raise ValueError for processes that would all use one GPU."""
    if n_ranks() > 1 and found.type == "cuda" and job.device != "cuda":
        raise ValueError(
            f"device: found {found} in files outside of a run, which several processes would share; expected the "
            "folder of a run, or one process."
        )


def subjects_of(
    source: str | Path | Session,
    dataset: Any,
    output: str | Path | None,
    given: Given = Given(),  # noqa: B008 - it is frozen
    cached: Path | None = None,
) -> Subjects:
    """Load what `source` names. ValueError or FileNotFoundError, as the session loader raises them.

    cached: a folder of activations, whose parts of the language model stand in for it, if it holds them.
    """
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        with phase("reading the autoencoder"):
            found = autoencoders_in(path, given)
        check_positive(found)
        for sae in found.values():
            check_known(sae.cfg, dataset_path=dataset)
        model, sites = model_or_parts(found, cached)
        are_several = len(found) > 1 or is_run_of_several(path)
        paths = {name: path / name if are_several else path for name in found}
        folder = Path(output).expanduser() if output is not None else folder_of(path)
    else:
        if given != Given():
            raise ValueError("a session has a model, a place and a text; give other ones to the session loader.")
        model, sae, store = source
        are_several, found = False, {with_defaults(sae.cfg).resolved_run_name: sae}
        paths = {}
        folder = Path(output).expanduser() if output is not None else Path("runs") / next(iter(found))
        check_positive(found)
        sites = {name: find_sites(sae.cfg, model, is_trained=True) for name, sae in found.items()}
    cfg = without_cache(next(iter(found.values())).cfg)
    if dataset is not None:  # of which the run's split and column say nothing
        cfg = dataclasses.replace(cfg, **OF_ANOTHER_TEXT)
    if isinstance(dataset, str | Path):
        cfg, dataset = dataclasses.replace(cfg, dataset_path=str(dataset)), None
    with phase("reading the text"):
        store = ActivationsStore(cfg, model, dataset, sites=merged(sites.values()))
    subjects = [
        Subject(name, sae.eval(), sites[name], folder / name if are_several else folder, paths.get(name))
        for name, sae in found.items()
    ]
    return Subjects(subjects, store, folder, are_several)


def model_or_parts(
    found: dict[str, SparseAutoencoder], cached: Path | None
) -> tuple[LanguageModel | ModelParts, dict[str, Sites]]:
    """Return the language model of autoencoders, or what a cache holds of it, and the sites of each of them."""
    cfg = next(iter(found.values())).cfg
    if cached is not None:
        sites = {name: sites_on_disk(sae.cfg, sae.d_in, sae.W_dec.shape[1]) for name, sae in found.items()}
        hooks = [site.name for site in merged(sites.values()).all]
        with phase("reading the unembedding"):
            if (parts := parts_on_disk(cached, cfg, hooks)) is not None:
                return parts, sites
    with phase("loading the language model"):
        model = model_of(cfg)
    return model, {name: find_sites(sae.cfg, model, is_trained=True) for name, sae in found.items()}


def autoencoders_in(path: Path, given: Given) -> dict[str, SparseAutoencoder]:
    """Return the autoencoders of a run folder, or the one of anything else that can be loaded, by name."""
    load = partial(SparseAutoencoder.load_from_pretrained, **asdict(given))
    if is_run_of_several(path):
        return {name: load(path / name) for name in variants(read_run_config(path))}
    return {name_of(path): load(path)}


def check_positive(found: dict[str, SparseAutoencoder]) -> None:
    """Raise ValueError for an autoencoder whose activations may be negative: "fires" means above 0 everywhere here."""
    for name, sae in found.items():
        if sae.architecture in MAY_BE_NEGATIVE:
            raise ValueError(
                f"{name}: architecture: found {sae.architecture}, whose activations may be below 0, and an analysis "
                "counts a latent as active above 0 only; nothing was analysed. `sae-training eval` takes this "
                "autoencoder."
            )


def is_run_of_several(path: Path) -> bool:
    return is_run_folder(path) and is_several(read_run_config(path))


def hash_of(sae: SparseAutoencoder) -> str:
    """Return a hash of the weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(sae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
