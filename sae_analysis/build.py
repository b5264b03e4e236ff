"""Build the analysis of a run: one pass over a corpus, from which everything that is known of each latent follows.

corpus --contexts with activations--> Gathered, for each autoencoder --> the tables of a store

Several processes share the passes (`sharing.py`). Each gathers what its own tell, and the first one puts all together.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from tqdm import tqdm

from sae_analysis.analysis import Analysis, open_analysis
from sae_analysis.corpus import CachedCorpus, Contexts, LiveCorpus
from sae_analysis.effects import effects_of
from sae_analysis.gathered import Gathered, Sizes, is_own
from sae_analysis.of_model import of_model
from sae_analysis.places import ANALYSIS_FOLDER, STORE_FILE
from sae_analysis.saved import Saved, Tensors
from sae_analysis.sharing import passes_of_turn
from sae_analysis.store.read import url_of
from sae_analysis.store.write import Writer, add_effect
from sae_analysis.subjects import Subject, check_device, hash_of, job_of, subjects_of
from sae_training.activations_store import ActivationsStore
from sae_training.config.io import CACHE_FIELDS, config_to_dict
from sae_training.formats import Facts, Given
from sae_training.language_model.load import fingerprint
from sae_training.machine.files import disk_named, flush_to_disk
from sae_training.machine.interrupt import StopAsked, StopRequest, TrainingInterrupted, stop_point
from sae_training.machine.lock import lock_beside
from sae_training.machine.phases import counted_phases, phase, progress_bar
from sae_training.machine.terminal import lasting
from sae_training.parallel.agreement import check_alike, code
from sae_training.parallel.ranks import (
    agree_on_stops,
    check_all_see,
    is_first,
    joined,
    n_ranks,
    of_all,
    of_first,
    raised_together,
    rank,
    wait_for_all,
)
from sae_training.run.record import Record
from sae_training.utils import Session

PACKAGE = Path(__file__).parent

SAVE_EVERY = 60.0  # seconds

Tell = Callable[[int, int, int], None]
"""Takes how many contexts are done, of how many, and the tokens of each."""


@counted_phases()
@lasting()
def build_analysis(
    source: str | Path | Session,
    n_tokens: int = 1_000_000,
    *,
    dataset: Any = None,
    output: str | Path | None = None,
    cached: str | Path | None = None,
    sizes: Sizes | None = None,
    effects: int | Sequence[int] = 0,
    seed: int = 0,
    anew: bool = False,
    hook_point: str | None = None,
    layer: int | None = None,
    **given: Unpack[Facts],
) -> Analysis | dict[str, Analysis]:
    """Analyse the latents of an autoencoder on `n_tokens` of text, and return the analysis.

    source: a run folder (of several autoencoders: all, from one pass, returned by name), a checkpoint, any file that
        `SparseAutoencoder.load_from_pretrained` takes, or (model, sae, store) of the session loader.
    dataset: a path, a name or a `datasets` object in place of the run's own training text.
    output: the folder that gets the analysis; without it the run's own, or `runs/<name of the file>`.
    cached: a folder of contexts that `sae-training cache` wrote, which replaces the language model, effects aside: the
        folder holds its unembedding, so that of the model only the tokenizer is loaded.
    sizes: how many examples of a latent are kept.
    effects: for how many latents to measure what ablating them does at their top examples (`effects.py`): those that
        the site lists first, or these. An analysis that is there gets those it lacks.

    hook_point, layer, given: those of `SparseAutoencoder.load_from_pretrained`, for what files leave out.

    A build that was stopped goes on where it was last saved, at most a minute before, and the result is the same.
    `anew` starts it again. A finished analysis with the same settings is returned as it is. Processes under torchrun
    share the work, and all return the analysis.
    """
    if n_tokens < 1:
        raise ValueError(f"n_tokens: found {n_tokens}, expected 1 or more.")
    if isinstance(effects, int) and effects < 0:
        raise ValueError(f"effects: found {effects}, expected a number of latents, 0 or more.")
    n_effects = effects if isinstance(effects, int) else len(effects)
    if cached is not None and dataset is not None:
        raise ValueError("cached: the text of a cache is its own; leave out dataset.")
    in_place = None if cached is None or n_effects else Path(cached).expanduser()  # effects need passes
    job = job_of(source)
    with joined(job):
        found = subjects_of(source, dataset, output, Given(hook_point, layer, **given), in_place)
        check_device(found.subjects[0].sae.device, job)
        build = Build(found.store, found.subjects, found.folder, n_tokens, sizes or Sizes(), seed, cached)
        opened = build_all(build, effects, anew)
    return opened if found.are_several else opened[found.subjects[0].name]


def build_all(build: Build, effects: int | Sequence[int], anew: bool) -> dict[str, Analysis]:
    """Build the analyses of all autoencoders, with `effects`, and return them by name."""
    store, subjects, folder = build.store, build.subjects, build.folder.parent
    d_sae = min(subject.sae.d_sae for subject in subjects)
    if not isinstance(effects, int) and (missing := [i for i in effects if not 0 <= i < d_sae]):
        raise ValueError(f"effects: found latents {missing}, expected 0 to {d_sae - 1}.")
    check_alike(build.facts() | {"anew": anew, "effects": effects, "the package's code": code(PACKAGE)})
    with (
        lock_beside(folder, "output") if is_first() else contextlib.nullcontext(),
        disk_named(folder.parent),
        StopRequest(tqdm.write, by_agreement=n_ranks() > 1) as stop,
    ):
        if anew:
            of_first(build.forget)
        try:
            is_there = build.is_there()
            if not is_there:
                with phase("reading the text"):
                    build.go_on()
            with Record(folder, "build") as record:  # once it is clear that it is no other build's folder
                build.run(is_there, record.progress)
                store.text.say_skipped()
                for subject in subjects:
                    add_effects(subject, store, effects)
        except StopAsked:
            assert stop.signal is not None
            raise TrainingInterrupted(
                f"Stopped by {stop.signal.name}; what was done is saved. The same command continues it.",
                exit_code=128 + stop.signal,
            ) from None
        wait_for_all()  # for the first, which writes
    return {subject.name: open_analysis(subject.folder) for subject in subjects}


class Build:
    """A build, which a kill may end at any moment: its folder is what it goes on from."""

    def __init__(
        self,
        store: ActivationsStore,
        subjects: Sequence[Subject],
        folder: Path,
        n_tokens: int,
        sizes: Sizes,
        seed: int,
        cached: str | Path | None,
    ) -> None:
        self.store, self.subjects, self.sizes = store, subjects, sizes
        self.context_size = int(store.text.cfg.context_size)
        n_contexts = math.ceil(n_tokens / self.context_size)
        sites = store.sites.all
        if cached is None:
            self.corpus = LiveCorpus(store, sites, n_contexts)
        else:
            self.corpus = CachedCorpus(store, sites, n_contexts, Path(cached).expanduser())
        self.gathered = {
            subject.name: Gathered(subject.sae, subject.sites, self.context_size, store.model.cfg.d_vocab, sizes, seed)
            for subject in subjects
        }
        settings = {
            "text": store.text.documents.given.name,
            "cached": None if cached is None else str(cached),
            "n_contexts": self.corpus.n_contexts,
            "seed": seed,
            "sizes": asdict(sizes),
            "rules": {name: config_to_dict(store.text.cfg)[name] for name in CACHE_FIELDS},
            "model": fingerprint(store.model),
        }
        self.settings = {subject.name: settings | {"sae": hash_of(subject.sae)} for subject in subjects}
        self.folder = folder / ANALYSIS_FOLDER / "building"
        self.saved, self.ids_file = Saved(self.folder), self.folder / "contexts.i4"

    def facts(self) -> dict[str, Any]:
        """Return what all processes must have alike."""
        of_each = {f"{name}, {key}": value for name, of in self.settings.items() for key, value in of.items()}
        return of_each | {"output": str(self.folder), "the text": self.store.text.documents.start()}

    # ------------------------------------------------------------------------------------------------------ the build

    def is_there(self) -> bool:
        """Return whether all analyses are written. ValueError if there are some with other settings."""
        return of_first(lambda: all([self.is_written(subject) for subject in self.subjects]))

    def run(self, is_there: bool, tell: Tell) -> None:
        """Make the pass, or the rest of it, and write what was found, unless it `is_there`; `tell` how far it is."""
        n = self.corpus.n_contexts
        tell(n if is_there else self.corpus.done, n, self.context_size)
        if is_there:
            if is_first():
                shutil.rmtree(self.folder, ignore_errors=True)  # which a power cut can have brought back
            tqdm.write(f"{self.folder.parent}: this analysis is there already.")
            return
        with phase("analysis", has_bar=True):
            try:
                self.make_pass(tell)
            except StopAsked:  # between two batches
                self.save()
                raise
        self.save()
        if is_first():
            self.write_all()
            agree_on_stops(True)
        else:
            self.gathered.clear()
            while not agree_on_stops():  # the first is writing
                stop_point()

    def make_pass(self, tell: Tell) -> None:
        corpus = self.corpus
        per_context = self.context_size
        bar = progress_bar("analysis", corpus.n_contexts * per_context, "tokens", corpus.done * per_context)
        saved = time.monotonic()
        passes = iter(corpus)
        with bar, self.ids_file.open("ab") if is_first() else contextlib.nullcontext() as ids:
            while True:
                before, own = corpus.done, []
                with raised_together():
                    for contexts in itertools.islice(passes, passes_of_turn(before // corpus.per_pass)):
                        if contexts is not None:
                            own.append(self.gather(contexts))
                if corpus.done == before:
                    return
                tokens = sorted(itertools.chain(*of_all(own)))
                if ids is not None:
                    ids.writelines(of_pass for _, of_pass in tokens)
                bar.update((corpus.done - before) * per_context)
                tell(corpus.done, corpus.n_contexts, per_context)
                if agree_on_stops(is_first() and time.monotonic() - saved > SAVE_EVERY):
                    if ids is not None:
                        ids.flush()
                    self.save()
                    saved = time.monotonic()

    def gather(self, contexts: Contexts) -> tuple[int, bytes]:
        """Gather what a pass tells, and return the number of its first context, and its tokens."""
        for gathered in self.gathered.values():
            gathered.add(contexts, self.store.rule)
        return contexts.first, contexts.tokens.cpu().numpy().astype("<i4").tobytes()

    def write_all(self) -> None:
        """Put together what all processes have gathered, write the stores, and delete what was saved."""
        for path in self.saved.parts:
            for name, gathered in self.gathered.items():
                gathered.merge(Tensors(path, f"{name}/"))
        ids = np.fromfile(self.ids_file, dtype="<i4").reshape(-1, self.context_size)
        for subject in self.subjects:
            if not self.is_written(subject):
                with phase("writing the analysis", has_bar=True):
                    self.write(subject, ids)
        shutil.rmtree(self.folder)

    def write(self, subject: Subject, ids: np.ndarray) -> None:
        """Write the store of one autoencoder beside its place, go on with what is there, and move it in."""
        partial = subject.folder / ANALYSIS_FOLDER / (STORE_FILE + ".part")
        partial.parent.mkdir(parents=True, exist_ok=True)
        writer = Writer(url_of(partial), 1, self.about(subject), between=heed_stops)
        writer.write(self.gathered[subject.name], of_model(self.store.model, subject.sites.target), ids, self.sizes)
        flush_to_disk(partial)  # because what was saved goes next
        partial.rename(partial.with_name(STORE_FILE))
        flush_to_disk(partial.parent)

    # -------------------------------------------------------------------------------------------------- what is saved

    def save(self) -> None:
        """Save all that has been gathered, whole or not at all. All processes do it together."""
        tensors = {
            f"{name}/{key}": value
            for name, gathered in self.gathered.items()
            for key, value in gathered.state().items()
        }
        metadata = {"corpus": json.dumps(self.corpus.state()), "settings": json.dumps(self.settings)}
        self.saved.write(tensors, metadata)

    def go_on(self) -> None:
        """Take up what was saved, if anything was. ValueError if it is of another build."""
        of_first(lambda: self.folder.mkdir(parents=True, exist_ok=True))
        metadata = self.saved.begin()
        with raised_together():
            check_all_see(self.folder, "output")
            if metadata is not None:
                check_same(self.folder, "an unfinished build", json.loads(metadata["settings"]), self.settings)
                self.corpus.go_on(json.loads(metadata["corpus"]))
                self.take_up()
                tqdm.write(f"Going on after {self.corpus.done:,} of {self.corpus.n_contexts:,} contexts.")
            if is_first():
                self.ids_file.touch()
                with self.ids_file.open("rb+") as ids:
                    ids.truncate(self.corpus.done * self.context_size * 4)

    def take_up(self) -> None:
        """Read this process's part of what was saved, by as many processes or by another number."""
        for name, gathered in self.gathered.items():
            own, *others = [Tensors(path, f"{name}/", is_own) for path in (self.saved.file, *self.saved.parts)]
            if is_first():
                gathered.load(own)
            else:
                gathered.merge(own)
            for state in others:
                gathered.merge(state)

    def forget(self) -> None:
        """Delete what an unfinished build has left."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for subject in self.subjects:
            for file in (STORE_FILE, STORE_FILE + ".part"):
                (subject.folder / ANALYSIS_FOLDER / file).unlink(missing_ok=True)

    def is_written(self, subject: Subject) -> bool:
        """Return whether the subject's analysis is there. ValueError if it is, with other settings."""
        path, name = subject.folder / ANALYSIS_FOLDER / STORE_FILE, subject.name
        if path.is_file():
            check_same(
                path, "a finished analysis", {name: open_analysis(path).about["settings"]}, {name: self.settings[name]}
            )
        return path.is_file()

    def about(self, subject: Subject) -> dict[str, Any]:
        cfg = subject.sae.full_cfg
        return {
            "name": subject.name,
            "settings": self.settings[subject.name],
            "source": subject.source,
            "model": cfg.model_name,
            "text": self.store.text.documents.given.name.strip("'"),
            "hook_point": subject.sites.input.name,
            "target_hook_point": subject.sites.target.name,
            "architecture": subject.sae.architecture,
            "d_in": subject.sae.d_in,
            "d_sae": subject.sae.d_sae,
            "context_size": self.context_size,
            "n_contexts": self.corpus.done,
        }


def add_effects(subject: Subject, store: ActivationsStore, wanted: int | Sequence[int]) -> None:
    """Measure the effects of some latents that the subject's analysis lacks, and add them to it.

    Each process measures those of every n-th latent, and the first one writes, while no other reads.
    """
    analysis = open_analysis(subject.folder)
    if isinstance(wanted, int):
        wanted = analysis.clearest(wanted) if wanted else []
    there = analysis.reader.with_effects()
    missing = [latent for latent in wanted if latent not in there]
    with phase("effects", has_bar=True), progress_bar("effects", len(missing), "latents") as bar:
        for start in range(0, len(missing), n_ranks()):
            turn = missing[start : start + n_ranks()]
            heed_stops()
            with raised_together():
                own = None
                if rank() < len(turn):
                    examples = analysis.latent(turn[rank()]).examples("top")
                    own = effects_of(store.model, subject.sae, examples, store.padded)
            for latent, effects in zip(turn, of_all(own), strict=False):
                if is_first() and effects is not None:
                    add_effect(analysis.reader, latent, effects)
            bar.update(len(turn))


def heed_stops() -> None:
    """Raise StopAsked, on all processes, if one was asked to stop. All of them must call it."""
    agree_on_stops()
    stop_point()


def check_same(where: Path, what: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise ValueError, saying where they differ, unless `what` is saved there has the settings of this build."""
    if found == wanted:
        return
    if found.keys() != wanted.keys():
        lines = [f"  autoencoders: {', '.join(found)} -> {', '.join(wanted)}"]
    else:
        pairs = {
            key: (old[key], new[key]) for old, new in zip(found.values(), wanted.values(), strict=True) for key in new
        }
        lines = [f"  {key}: {old!r} -> {new!r}" for key, (old, new) in pairs.items() if old != new]
    raise ValueError(
        f"{where} holds {what} with other settings:\n" + "\n".join(lines) + "\nGive the old ones to "
        "keep it, anew (--anew) to delete it and begin again, or another output."
    )
