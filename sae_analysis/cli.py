"""The command line: `sae-analysis build | export`, also as `python -m sae_analysis`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, assert_never

import tyro
from tyro.conf import FlagConversionOff, Positional, arg, subcommand

from sae_training.cli import registry
from sae_training.config.checks import field_types
from sae_training.config.left_out import Placed
from sae_training.config.values import in_one_word
from sae_training.flags import Detach
from sae_training.jobs.detach import Wanted, detach
from sae_training.machine.console import exit_code
from sae_training.machine.log import is_detached, told_to_log
from sae_training.machine.phases import counted_phases, is_speaker, phase, say
from sae_training.machine.terminal import lasting

Run = Annotated[str, Positional, arg(metavar="RUN")]


@dataclass(kw_only=True)
class Common:
    """The flags of every verb."""

    debug: bool = False
    """Show the traceback of an error."""


@dataclass(kw_only=True)
class Build(Placed, Detach, Common):
    """Analyse the latents of an autoencoder, in one pass over a text.

    The result is analysis/analysis.sqlite in the run's folder, or in runs/NAME for the files of another program; flags
    say what these leave out. The same command goes on with an unfinished build. Processes under torchrun share it.
    """

    run: Run
    """Run folder (of several autoencoders: all of them), checkpoint, or file or folder of weights."""

    tokens: int = 1_000_000
    """Tokens of the text, 2_000_000 or 2e6."""

    dataset: str | None = None
    """Text; without it the run's own training text."""

    output: Path | None = None
    """Folder that gets the result; without it the run's."""

    cached: Path | None = None
    """Folder of contexts that `sae-training cache --form contexts` wrote, in place of the language model."""

    effects: int = 0
    """For so many latents, what ablating them at their top examples does to the next token's prediction."""

    seed: int = 0
    """Of the random examples."""

    anew: bool = False
    """Delete what an earlier build has left, and begin again."""


@dataclass(kw_only=True)
class Export(Common):
    """Write an analysis as a site to look at, or as files for other programs."""

    run: Run
    """Run folder with an analysis, or the file of one."""

    output: Annotated[Path, Positional, arg(metavar="OUT")]
    """Folder to write."""

    format: Literal["site", "parquet", "jsonl", "neuronpedia"] = "site"
    """site: OUT/index.html; parquet: tables; jsonl: a document a latent; neuronpedia: the layout of its imports."""


Verb = Build | Export
VERBS: dict[str, type[Any]] = {"build": Build, "export": Export}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; wrong flags leave through SystemExit(2)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    with told_to_log(["sae-analysis", *argv]):
        return exit_code(argv, lambda: run_verb(parse(argv), argv))


def parse(argv: Sequence[str]) -> Verb:
    """Return the command that the words say; wrong words leave through SystemExit(2)."""
    name, *words = argv or ["--help"]
    if name in VERBS:
        words = in_one_word(words, field_types(VERBS[name]))
    return tyro.cli(
        Annotated[Build, subcommand("build")] | Annotated[Export, subcommand("export")],  # pyright: ignore
        args=[name, *words],
        prog="sae-analysis",
        description="Explore the latents of trained sparse autoencoders.",
        registry=registry,
        config=(FlagConversionOff,),
    )


def run_verb(verb: Verb, argv: Sequence[str]) -> None:
    """Carry out a command, and say how long each phase took; or start it as a job of its own."""
    if isinstance(verb, Detach) and verb.detach and not is_detached():
        sys.stdout.write(detach(job_of(verb), "sae_analysis", argv))
        return
    with lasting() if isinstance(verb, Build) else nullcontext(), counted_phases() as phases:
        carry_out(verb)
        if is_speaker():
            sys.stdout.flush()  # has the result, which scripts read; so the times go to stderr, after it
            say(phases.line())


def job_of(build: Build) -> Wanted:
    """Return the job that the command is, for `--detach`."""
    from sae_analysis.places import ANALYSIS_FOLDER, folder_of

    folder = (build.output or folder_of(Path(build.run))).resolve()
    return Wanted("build", f"{folder.name}-{ANALYSIS_FOLDER}", folder.parent, folder / ANALYSIS_FOLDER)


def carry_out(verb: Verb) -> None:
    match verb:
        case Build():
            with phase("starting"):
                from sae_analysis.build import build_analysis
            built = build_analysis(
                verb.run, verb.tokens, dataset=verb.dataset, output=verb.output, cached=verb.cached,
                effects=verb.effects, seed=verb.seed, anew=verb.anew, **verb.said(),
            )  # fmt: skip
            analyses = built.values() if isinstance(built, dict) else [built]
            for analysis in analyses if is_speaker() else ():
                sys.stdout.write(f"{analysis.summary()}\n")
        case Export():
            from sae_analysis.analysis import open_analysis
            from sae_analysis.export import export

            sys.stdout.write(f"{export(open_analysis(verb.run), verb.output, verb.format)}\n")
        case _:
            assert_never(verb)
