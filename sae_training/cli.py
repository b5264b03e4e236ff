"""The command line `sae-training`: a verb for each thing to be done with runs, caches and files.

`runs | attach | logs | stop | rm | completion`, the verbs over jobs, are in `jobs_verbs.py`, `sync | reproduce` in
`after_verbs.py`. tyro turns the config's fields into flags, `config.values` reads their values. Parsing is apart from
doing: `parse` and `parse_train` give values, `main` acts on them. The modules that do the work are imported only inside
the verb that needs them, because torch takes over a second to import and `--help` should answer at once.
"""

from __future__ import annotations

import contextlib
import io
import sys
import typing
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, assert_never

import tyro
from tyro.conf import FlagConversionOff, Positional, arg, subcommand
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from sae_training.after_verbs import Reproduce, RunFolder, Sync, carry_out_after_verb, evaluation_in_words, table
from sae_training.config import CacheActivationsRunnerConfig, LanguageModelSAERunnerConfig
from sae_training.config.checks import field_types, fields_marked
from sae_training.config.fields import Origin
from sae_training.config.io import FIELD_NAMES, config_from_dict
from sae_training.config.left_out import LeftOut, Measured
from sae_training.config.toy import SAEToyModelRunnerConfig
from sae_training.config.types import OneOrMany
from sae_training.config.values import (
    check_alone,
    in_one_word,
    in_our_names,
    is_no_name,
    is_readable,
    metavar,
    read_value,
    without_retired_flags,
    written,
)
from sae_training.flags import (
    RECIPE,
    Common,
    ConfigFile,
    Detach,
    InRunDir,
    ModelAndText,
    hiding,
    train_defaults,
    with_words,
)
from sae_training.jobs.detach import Wanted, detach
from sae_training.jobs.found import RUN_DIR, folder_named
from sae_training.jobs_verbs import JobVerb, carry_out_job_verb, in_long
from sae_training.machine.console import exit_code
from sae_training.machine.log import is_detached, told_to_log
from sae_training.machine.phases import counted_phases, is_speaker, phase, say
from sae_training.machine.terminal import lasting
from sae_training.plan_verb import Plan, config_first, planned


@hiding(Origin)  # which training takes no other values of than the defaults
@dataclass(kw_only=True)
class Train(LanguageModelSAERunnerConfig, ModelAndText, Detach, Common, ConfigFile):
    """Train a sparse autoencoder on the activations of a language model.

    The defaults are the recommended recipe: TopK with AuxK, d_in from the model, learning rate and warm-up by measured
    rules, then a line to 0, no training on special tokens (BOS), a GPU if there is one, no Weights & Biases; for a
    transcoder also batches at a mean norm of sqrt(d). With --config FILE the file's values are the defaults, and
    fields that the file leaves out have the defaults of LanguageModelSAERunnerConfig; flags win over both. A switch is
    written --flag, --no-flag or --flag with true, false, yes, no, on, off, 1 or 0; a list is written 4,8,12, 4 8 12 or
    [4, 8, 12]; nothing is written None or null.
    """

    def __post_init__(self) -> None:
        """Check nothing: these are raw flags, and the config made from them checks itself."""


@dataclass(kw_only=True)
class Resume(Detach, InRunDir):
    """Go on with an interrupted run.

    What it reads may lie elsewhere now, under other names: it must be the same model and the same text.
    """

    run: RunFolder
    """Name of a run, or its folder."""

    model_name: str | None = None
    """Language model, if it has another name or path here."""

    dataset_path: OneOrMany[str] | None = None
    """Text, likewise."""

    eval_dataset_path: str | None = None
    """Text for evaluation, likewise."""

    cached_activations_path: str | None = None
    """Folder of activations, likewise."""

    device: str | None = None
    """Device, if this machine has not that of the run; auto takes what there is."""


@dataclass(kw_only=True)
class Eval(Measured, Common):
    """Measure a trained autoencoder on held-out text.

    Of a run of this program, or of the files of another: flags say what these leave out.
    """

    run: Annotated[Path, Positional, arg(metavar="RUN")]
    """Run folder, checkpoint, or file or folder of weights."""


@dataclass(kw_only=True)
class Report(Common):
    """Write report.html, the training curves of a run; of a folder of runs runs.html, a page of them all."""

    run: RunFolder
    """Run folder, or a folder of runs."""

    watch: bool = False
    """Keep the page of all runs fresh until Ctrl-C, also where it is open in a browser."""


@dataclass(kw_only=True)
class Cache(CacheActivationsRunnerConfig, ModelAndText, Detach, Common):
    """Write activations to disk, for `train --use-cached-activations True --cached-activations-path FOLDER`.

    Without special tokens (BOS), as in the recipe of `train`. The same command goes on with an unfinished cache.
    """

    def __post_init__(self) -> None:
        """Check nothing, as in Train."""


@dataclass(kw_only=True)
class Pretokenize(Detach, Common):
    """Tokenise a data set once, into a local folder that `train` and `cache` take as DATASET."""

    model: Annotated[str, Positional, arg(metavar="MODEL")]
    """Language model whose tokenizer it is for."""

    dataset: Annotated[str, Positional, arg(metavar="DATASET")]
    """Text, as for train."""

    output: Annotated[Path, Positional, arg(metavar="OUTPUT")]
    """Folder to write."""

    dataset_split: str = "train"
    """Split of the dataset."""

    dataset_text_column: str | None = None
    """Column that holds the text; None finds it."""

    streaming: bool | None = None
    """Read the dataset as a stream."""

    on_bad_rows: Literal["error", "skip"] = "error"
    """At a row of another type than its column's: error stops, skip leaves it out and counts it."""

    n_processes: int | None = None
    """Processes that tokenise; None is one for each processor."""


@dataclass(kw_only=True)
class Toy(SAEToyModelRunnerConfig, Common):
    """Train on synthetic data whose dictionary is known, and score what was found.

    The folder that is printed holds scores.json and picture.html.
    """

    def __post_init__(self) -> None:
        """Check nothing, as in Train."""


@dataclass(kw_only=True)
class Inspect(LeftOut, Common):
    """Say what an autoencoder's files are, of this program or another, by names, headers and configs alone.

    Format, config in our words, tensors, the units of activations, and a warning for each known trap. Of a folder of
    many, all. Flags say what files leave out. No weight is read without --full, no model is loaded, nothing executed.
    """

    path: Annotated[Path, Positional, arg(metavar="PATH")]
    """File or folder."""

    full: bool = False
    """Read the weights too, a slice at a time: norms of the decoder's rows, dead rows, zeros, NaN."""

    json: bool = False
    """Print one JSON object."""


OwnVerb = Train | Resume | Eval | Report | Sync | Reproduce | Cache | Pretokenize | Toy | Inspect | Plan
Verb = OwnVerb | JobVerb


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; wrong flags leave through SystemExit(2)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    with told_to_log(["sae-training", *argv]):
        return exit_code(argv, lambda: run_verb(parse(argv), argv))


def run_verb(verb: Verb, argv: Sequence[str]) -> None:
    """Carry out a command, and say how long each phase took; or start it as a job of its own."""
    if isinstance(verb, JobVerb):
        carry_out_job_verb(verb, completion_of_flags)
        return
    if isinstance(verb, Detach) and verb.detach and not is_detached():
        sys.stdout.write(detach(job_of(verb), "sae_training", argv))
        return
    is_job = isinstance(verb, Train | Resume | Reproduce | Cache | Pretokenize | Toy)
    with lasting() if is_job else nullcontext(), counted_phases() as phases:
        carry_out(verb)
        if not isinstance(verb, Train | Resume | Reproduce | Cache):  # whose jobs say it themselves
            sys.stdout.flush()  # has the result, which scripts read; so the times go to stderr, after it
            say(phases.line())


def carry_out(verb: OwnVerb) -> None:
    match verb:
        case Train():
            with phase("starting"):
                from sae_training.lm_runner import language_model_sae_runner
            language_model_sae_runner(config_of(verb))
        case Resume():
            with phase("starting"):
                from sae_training.lm_runner import resume_run
            resume_run(folder_named(verb.run, verb.run_dir), **elsewhere(verb))
        case Eval():
            with phase("starting"):
                from sae_training.run.evals import evaluate_run
            figures = evaluate_run(verb.run, **verb.said())
            sys.stdout.write(evaluation_in_words(figures, verb.run, **verb.said()))
        case Report():
            with phase("starting"):
                from sae_training.report.run_page import report_run
            sys.stdout.write(f"{report_run(verb.run, verb.watch)}\n")
        case Sync() | Reproduce():
            carry_out_after_verb(verb)
        case Cache():
            with phase("starting"):
                from sae_training.cache_activations_runner import cache_activations_runner
            folder = cache_activations_runner(cache_config_of(verb))
            if is_speaker():
                sys.stdout.write(f"{folder}\n")
        case Pretokenize():
            with phase("starting"):
                from sae_training.pretokenize import pretokenize
            fields = ("dataset_split", "dataset_text_column", "streaming", "on_bad_rows", "n_processes")
            named = {name: getattr(verb, name) for name in fields}
            sys.stdout.write(f"{pretokenize(verb.model, verb.dataset, verb.output, **named)}\n")
        case Toy():
            with phase("starting"):
                from sae_training.toy_model_runner import toy_model_sae_runner
            names = field_types(SAEToyModelRunnerConfig)
            result = toy_model_sae_runner(SAEToyModelRunnerConfig(**{name: getattr(verb, name) for name in names}))
            sys.stdout.write(table(result.scores) + f"{result.folder}\n")
        case Inspect():
            with phase("starting"):
                from sae_training.formats import inspection
            told = inspection.inspect(verb.path, verb.full, **verb.said())
            sys.stdout.write(inspection.in_json(told) if verb.json else inspection.in_words(told))
        case Plan():
            sys.stdout.write(planned(verb))
        case _:
            assert_never(verb)


VERBS: dict[str, type[Any]] = {cls.__name__.lower(): cls for cls in typing.get_args(Verb)}


def parse(argv: Sequence[str]) -> Verb:
    """Return the command that the words say; wrong words leave through SystemExit(2)."""
    name, *words = argv or ["--help"]
    words = in_long(words) if name == "logs" else words
    if cls := VERBS.get(name):
        types = field_types(cls)
        given, words = words, in_one_word(in_our_names(without_retired_flags(words, cls), types), types)
        words = config_first(words) if cls is Plan else words
        check_alone(given, words, types, [n.upper() for n in fields_marked(cls, Positional)])
    defaults: dict[str, Mapping[str, Any]] = {
        "train": train_defaults(words) if name == "train" else RECIPE,
        "plan": {"device": "auto", **train_defaults(words)} if name == "plan" else RECIPE,
        "cache": {"exclude_special_tokens": True, "device": "auto"},
    }
    verbs: Any = typing.Union[  # noqa: UP007 - the parts are not plain classes
        tuple(
            Annotated[cls, subcommand(verb, default=cls(**defaults[verb])) if verb in defaults else subcommand(verb)]
            for verb, cls in VERBS.items()
        )
    ]
    verb = tyro.cli(
        verbs,
        args=[name, *words],
        prog="sae-training",
        description="Train and evaluate sparse autoencoders on language models.",
        registry=registry,
        config=(FlagConversionOff,),
    )
    for name in ("model", "dataset"):
        word = getattr(verb, name, None)
        if word is not None and is_no_name(word) and not Path(word).exists():
            raise ValueError(
                f"{name.upper()}: found {word!r}, expected the name or path of a {name}; a value stands right after "
                f"its flag, a list with commas (4,8,12), and a folder of this name is written ./{word}"
            )
    return verb


def parse_train(argv: Sequence[str]) -> LanguageModelSAERunnerConfig:
    """Return the checked config for the words after `train`."""
    verb = parse(["train", *argv])
    assert isinstance(verb, Train)
    return config_of(verb)


def config_of(train: Train) -> LanguageModelSAERunnerConfig:
    """Return the config that the flags describe, checked, with a device chosen if none was named."""
    return config_from_dict(with_words({name: getattr(train, name) for name in FIELD_NAMES}, train))


def elsewhere(resume: Resume) -> dict[str, Any]:
    """Return the fields of a run's config that the flags change."""
    names = ("model_name", "dataset_path", "eval_dataset_path", "cached_activations_path", "device")
    given = {name: value for name in names if (value := getattr(resume, name)) is not None}
    if given.get("device") == "auto":
        from sae_training.machine.device import automatic

        given["device"] = automatic()
    return given


def cache_config_of(cache: Cache) -> CacheActivationsRunnerConfig:
    """Return the config of a cache that the flags describe, checked."""
    values = {name: getattr(cache, name) for name in field_types(CacheActivationsRunnerConfig)}
    return CacheActivationsRunnerConfig(**with_words(values, cache))


def job_of(verb: Detach) -> Wanted:
    """Return the job that the command is, for `--detach`: the folder of what it will write, as far as it is known."""
    match verb:
        case Train():
            cfg = config_of(verb)
            name, run_dir = cfg.resolved_run_name.replace("/", "_"), Path(cfg.resolved_run_dir)
            return Wanted("train", name, run_dir, None if cfg.resume == "never" else run_dir / name)
        case Resume():
            folder = folder_named(verb.run, verb.run_dir).resolve()
            return Wanted("train", folder.name, folder.parent, folder)
        case Cache():
            folder = Path(cache_config_of(verb).cached_activations_path).expanduser().resolve()
            return Wanted("cache", folder.name, Path(RUN_DIR), folder)
        case Pretokenize():
            return Wanted("pretokenize", verb.output.resolve().name, Path(RUN_DIR), None)
        case _:
            raise AssertionError(verb)


def completion_of_flags(shell: str) -> str:
    """Return what tyro prints for a shell that completes verbs and flags."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        parse(["--tyro-print-completion", shell])
    return out.getvalue()


registry = ConstructorRegistry()


@registry.primitive_rule
def _value_of_a_field(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Read every flag with `read_value`: by tyro's own rules lists stand apart, and numbers are not written 2e6."""
    if not is_readable(info.type):
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar(info.type),
        instance_from_str=lambda words: read_value(words[0], info.type),
        is_instance=lambda _: True,  # defaults were checked where they came from
        str_from_instance=lambda value: [written(value)],
    )
