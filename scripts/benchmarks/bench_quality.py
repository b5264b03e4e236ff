"""Trains ours and other packages on the same rows in the same order, and evaluates all with one function of ours.

    python scripts/benchmarks/bench_quality.py                          every system of SYSTEMS, one seed
    ... --seeds 0 1 2 --continue                                        three seeds; known results are not run again
    ... --systems ours:topk 'ours:topk:{"optimizer": "signum", "lr": 0.009}' --save saes
    ... --systems sae-lens:topk 'dictionary-learning:standard:{"l1_penalty": 0.1}'

A system is PACKAGE:ARCHITECTURE or PACKAGE:ARCHITECTURE:{JSON}, with settings under the package's own names: config
fields of ours, arguments of dictionary-learning's trainer, fields of the two configs of sae-lens and eai-sparsify. What
the JSON leaves out follows the command line's recipe for ours, and the package's own learning rate rule for the others,
whose windows for dead latents, warm-ups and threshold measurements are shortened to act within the run (`defaults`).

The rows are SmolLM2-135M's `blocks.8.hook_resid_post` on State of the Union addresses, in contexts of 128 tokens and
without the special tokens; in bfloat16 where the processor multiplies in it, else in float32 (the protocol's
`lm_dtype`). They are shuffled and harvested once, into a file that later calls read. Every system passes once over the
same rows, scaled by one factor to a mean norm of sqrt(d_in). The seed is that of a system's starting weights. Each
system has its own process, and each peer its own virtual environment (as in `bench_step.py`).

A trained autoencoder comes back as plain tensors (`bench_workers.Plain`) in the units of the model, and is evaluated on
held-out contexts in float32 (`evaluate`). The result is JSON on stdout and, a line per run, in --results. A table goes
to stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_training.activations_store import ActivationsStore
from sae_training.activations_store.position_rule import special_token_ids
from sae_training.cli import RECIPE
from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.language_model.harvest import at_site, put_back
from sae_training.language_model.hooks import hooked
from sae_training.language_model.load import LanguageModel, language_model_dtype, load_language_model
from sae_training.language_model.sites import find_hook_site
from sae_training.machine.interrupt import without_traceback
from sae_training.run.evals import prompts_of_a_pass
from scripts.benchmarks.bench_step import (
    PEERS,
    Entry,
    Failed,
    Worker,
    check_peer_pythons,
    longest,
    machine,
    peer_pythons,
    show,
    shown,
)
from scripts.benchmarks.bench_workers import RELU_TYPE, Plain
from scripts.demo import smollm2_model, state_of_the_union

CACHE = Path.home() / ".cache" / "sae-training"
SYSTEMS = (
    "ours:topk",
    "ours:batchtopk",
    "eai-sparsify:topk-signum",
    'eai-sparsify:topk-adam:{"lr": 1.2e-3}',
    "eai-sparsify:topk-adam",
    "dictionary-learning:topk",
    "dictionary-learning:batchtopk",
    "sae-lens:topk",
    "sae-lens:batchtopk",
    "dictionary-learning:standard",
)
WARM_UP_SHARE = 0.05  # of the run's steps: what the warm-ups of the peers, of 1000 and more steps, are shortened to
DEAD_WINDOW_SHARE = 0.1  # of the run: silent for so long is dead, in all packages, for their own remedies
THRESHOLD_RATE = 0.05  # per step: what the peers' running means of batchtopk's threshold are hastened to
CONTEXT_SIZE = 128
STORE_BATCH = 16  # contexts per pass of the language model
CHUNK = 4096  # rows encoded at a time

Change = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Spec:
    """One system of --systems."""

    word: str
    package: str
    architecture: str
    settings: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Rows:
    """The file of rows: tensors `rows` (n, d_in), in the order of training, and `held_out_tokens` (n, CONTEXT_SIZE)."""

    path: Path
    about: dict[str, Any]

    @property
    def d_in(self) -> int:
        return self.about["d_in"]

    @property
    def mean_norm(self) -> float:
        """Mean L2 norm of all rows of the file."""
        return self.about["mean_norm"]

    @property
    def scale(self) -> float:
        """Factor that brings the mean norm to sqrt(d_in)."""
        return math.sqrt(self.d_in) / self.mean_norm

    def chunks(self, start: int, stop: int) -> Iterator[Tensor]:
        """Rows `start` to `stop` in float32, CHUNK at a time, in the units of the model."""
        with safe_open(self.path, framework="pt") as file:
            stored = file.get_slice("rows")
            for i in range(start, stop, CHUNK):
                yield stored[i : min(i + CHUNK, stop)].float()

    def held_out_tokens(self) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor("held_out_tokens")


def main(words: list[str]) -> None:
    arguments = parse(words)
    torch.set_num_threads(arguments.threads)
    rows = open_rows(arguments)
    protocol = protocol_of(arguments, rows)
    known = results_of(arguments.results, protocol) if arguments.go_on else {}
    left_out: dict[str, str] = {}
    packages = dict.fromkeys(spec.package for spec in arguments.systems if spec.package != "ours")
    pythons = {"ours": sys.executable} | peer_pythons(packages, arguments.peer_python, left_out)
    comparison = Comparison(arguments, rows, protocol, pythons)
    width = longest(spec.word for spec in arguments.systems)
    results = []
    for seed in arguments.seeds:
        for spec in arguments.systems:
            if spec.package not in pythons:
                continue
            try:
                result = known.get(identity(spec, seed)) or comparison.result(spec, seed)
            except (Failed, OSError) as error:
                left_out[f"{spec.word} seed {seed}"] = str(error)
                show([f"left out: {spec.word} seed {seed}: {error}"])
                continue
            results.append(result)
            show(table([result], width))
    show(["", *table(results, width), *means(results, width)])
    show([f"left out: {name}: {reason}" for name, reason in left_out.items()])
    everything = {"machine": machine(arguments), "protocol": protocol, "results": results, "left_out": left_out}
    print(json.dumps(everything, indent=2))


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--systems", nargs="+", default=list(SYSTEMS), help="PACKAGE:ARCHITECTURE or PACKAGE:ARCHITECTURE:{JSON}")
    add("--seeds", nargs="+", type=int, default=[0], help="of the starting weights")
    add("--rows", type=number, default=1_000_000, help="rows to train on, once")
    add("--rows-file", type=Path, help="made if it is not there; more rows than --rows are fine")
    add("--model", default="smollm2", help="smollm2, or what --model_name of the command line takes")
    add("--hook-point", default="blocks.8.hook_resid_post")
    add("--text", default="state-of-the-union", help="that, or what --dataset_path of the command line takes")
    add("--held-out", type=int, default=256, help="contexts of 128 tokens to evaluate on")
    add("--d-sae", type=int, default=4608, help="latents, a multiple of the width of the rows")
    add("--k", type=int, default=32, help="active latents per row, TopK-type; the target of those that take one")
    add("--batch", type=int, default=4096, help="rows of a step")
    add("--dead-rows", type=number, default=131_072, help="last training rows that dead latents are counted on")
    add("--save", type=Path, metavar="FOLDER", help="keep the trained autoencoders there")
    add("--results", type=Path, default=CACHE / "quality_results.jsonl", help="file that each result is appended to")
    add("--continue", dest="go_on", action="store_true", help="take over what --results has, whatever its version")
    add("--peer-python", action="append", default=[], metavar="PEER=PYTHON", help="interpreter that has the peer")
    add("--threads", type=int, default=2)
    add("--device", default="cpu", help="cpu, cuda, cuda:1")
    arguments = parser.parse_args(words)
    check_peer_pythons(parser, arguments.peer_python)
    if arguments.rows < arguments.batch:
        parser.error(f"--rows: found {arguments.rows}, expected at least one --batch ({arguments.batch})")
    if arguments.rows_file is None:
        arguments.rows_file = CACHE / f"quality_rows_{arguments.rows}.safetensors"
    try:
        arguments.systems = [spec_of(word) for word in arguments.systems]
    except ValueError as error:
        parser.error(f"--systems: {error}")
    return arguments


def number(word: str) -> int:
    """An integer, as 1_000_000 or 1e6 as well."""
    return int(float(word))


def spec_of(word: str) -> Spec:
    package, _, rest = word.partition(":")
    architecture, _, settings = rest.partition(":")
    if package != "ours" and package not in PEERS:
        raise ValueError(f"found {word!r}, expected one of ours, {', '.join(PEERS)} before the first colon")
    known = [name for names in PEERS[package].architectures.values() for name in names] if package in PEERS else None
    if not architecture or (known and architecture not in known):
        raise ValueError(f"found {word!r}, expected an architecture of {package} after the first colon")
    try:
        return Spec(word, package, architecture, json.loads(settings or "{}"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{word!r}: the settings are not JSON: {error}") from None


# -------------------------------------------------------------------------------------------------------------- rows


def open_rows(arguments: argparse.Namespace) -> Rows:
    """The file of rows, harvested now if it is not there; SystemExit if it holds other rows than are asked for."""
    path = arguments.rows_file
    if not path.is_file():
        harvest_rows(arguments)
    with safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {}).get("about", "{}"))
    wanted = source_of(arguments)
    differing = {name: about.get(name) for name, value in wanted.items() if about.get(name) != value}
    if differing:
        raise SystemExit(
            f"--rows-file: {path} holds rows of {differing}, expected {wanted}; name another file, or delete it"
        )
    if about["rows"] < arguments.rows:
        raise SystemExit(f"--rows: found {arguments.rows}, but {path} holds {about['rows']}; name another file")
    if arguments.d_sae % about["d_in"]:
        raise SystemExit(f"--d-sae: found {arguments.d_sae}, expected a multiple of the rows' width {about['d_in']}")
    return Rows(path, about)


def source_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What decides which rows and held-out contexts there are, but for the number of rows."""
    return {
        "model": arguments.model,
        "hook_point": arguments.hook_point,
        "text": arguments.text,
        "context_size": CONTEXT_SIZE,
        "held_out": arguments.held_out,
        "lm_dtype": str(language_model_dtype("auto", arguments.device)).removeprefix("torch."),
        "shuffled_with_seed": 0,
    }


@torch.inference_mode()
def harvest_rows(arguments: argparse.Namespace) -> None:
    """Write the file of rows. A row goes straight to its place in the shuffled order, so all are held only once."""
    show([f"harvesting {arguments.rows:,} rows into {arguments.rows_file}"])
    model = load_model(arguments)
    cfg = LanguageModelSAERunnerConfig(
        d_in=None,
        model_name=arguments.model,
        hook_point=arguments.hook_point,
        dataset_path=str(state_of_the_union()) if arguments.text == "state-of-the-union" else arguments.text,
        is_dataset_tokenized=None,
        context_size=CONTEXT_SIZE,
        exclude_special_tokens=True,
        store_batch_size=STORE_BATCH,
        n_eval_batches=-(-arguments.held_out // STORE_BATCH),
        device=arguments.device,
    )
    store = ActivationsStore(cfg, model, notify=lambda text: show([text]))
    places = torch.randperm(arguments.rows, generator=torch.Generator().manual_seed(0))
    rows = torch.empty(arguments.rows, store.sites.input.d_in, dtype=model.cfg.dtype)
    done, norm_sum = 0, 0.0
    while done < len(rows):
        tokens = store.get_batch_tokens()
        new = store.get_activations(tokens)[store.keeps(tokens)][: len(rows) - done].cpu().to(rows.dtype)
        rows[places[done : done + len(new)]] = new
        norm_sum += new.float().norm(dim=1).double().sum().item()
        done += len(new)
    held_out = store.held_out_tokens()[: arguments.held_out]
    about = source_of(arguments) | {"rows": done, "d_in": store.sites.input.d_in, "mean_norm": norm_sum / done}
    path = arguments.rows_file
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    save_file({"rows": rows, "held_out_tokens": held_out}, unfinished, {"about": json.dumps(about)})
    unfinished.rename(path)


def load_model(arguments: argparse.Namespace) -> LanguageModel:
    name = smollm2_model() if arguments.model == "smollm2" else arguments.model
    return load_language_model(name, arguments.device, "auto")


# ---------------------------------------------------------------------------------------------------------- training


class Comparison:
    """Trains and evaluates one system after the other; the language model is loaded for the first that is evaluated."""

    def __init__(
        self, arguments: argparse.Namespace, rows: Rows, protocol: dict[str, Any], pythons: dict[str, str]
    ) -> None:
        self.arguments = arguments
        self.rows = rows
        self.protocol = protocol
        self.pythons = pythons

    @cached_property
    def held_out(self) -> HeldOut:
        return HeldOut(self.arguments, self.rows)

    def result(self, spec: Spec, seed: int) -> dict[str, Any]:
        sae, about = train(spec, seed, self.arguments, self.rows, self.pythons[spec.package])
        end = self.protocol["steps"] * self.protocol["batch"]
        metrics = evaluate(sae, self.held_out, self.rows.chunks(end - self.protocol["dead_rows"], end))
        result = {"system": spec.word, "seed": seed, "metrics": metrics, **about}
        result |= {"identity": identity(spec, seed), "protocol": self.protocol}
        append(self.arguments.results, result)
        return result


def defaults(spec: Spec, steps: int, batch: int) -> dict[str, Any]:
    """Settings that a system has besides its sizes where its JSON does not name them."""
    warm_up, dead_window = max(1, round(WARM_UP_SHARE * steps)), max(1, round(DEAD_WINDOW_SHARE * steps))
    match spec.package:
        case "ours":
            recipe = {name: value for name, value in RECIPE.items() if name not in ("architecture", "d_in", "device")}
            return recipe | {"dead_feature_window": dead_window}
        case "sae-lens":
            its_own = {
                "standard": {"l1_coefficient": 0.05},
                "batchtopk": {"topk_threshold_lr": THRESHOLD_RATE},
                "matryoshka": {"topk_threshold_lr": THRESHOLD_RATE},
            }
            return {"lr": 3e-4, "dead_feature_window": dead_window, **its_own.get(spec.architecture, {})}
        case "eai-sparsify":
            return {
                "lr": None,
                "lr_warmup_steps": warm_up,
                "auxk_alpha": 0.0,  # the package's own: with 1/32 the window below acts
                "dead_feature_threshold": dead_window * batch,
            }
        case _ if spec.architecture in RELU_TYPE:
            lr = {"standard": 1e-3, "gated": 5e-5, "jumprelu": 7e-5}[spec.architecture]
            penalty = {} if spec.architecture == "jumprelu" else {"l1_penalty": 0.05}
            return {"lr": lr, "warmup_steps": warm_up, "sparsity_warmup_steps": warm_up, **penalty}
        case _:
            return {
                "lr": None,
                "warmup_steps": warm_up,
                "dead_feature_threshold": dead_window * batch,
                "threshold_start_step": steps // 2,
                "threshold_beta": 1 - THRESHOLD_RATE,
            }


def train(
    spec: Spec, seed: int, arguments: argparse.Namespace, rows: Rows, python: str
) -> tuple[Plain, dict[str, Any]]:
    """Train a system in its own process; the autoencoder, in the units of the model, and what is known of the run."""
    steps = arguments.rows // arguments.batch
    sizes = {
        "d_in": rows.d_in,
        "d_sae": arguments.d_sae,
        "batch": arguments.batch,
        "k": arguments.k,
        "l0": arguments.k,
        "device": arguments.device,
        "steps": steps,
        "seed": seed,
        "config": defaults(spec, steps, arguments.batch) | spec.settings,
    }
    show([f"training {spec.word}, seed {seed}, {steps} steps"])
    worker = Worker(Entry(spec.word, spec.package, spec.architecture), python, arguments)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sae.safetensors"
        try:
            about = worker.ask(
                do="train",
                system=spec.package,
                architecture=spec.architecture,
                sizes=sizes,
                rows=str(rows.path),
                scale=rows.scale,
                save=str(file),
            )
        finally:
            worker.close()
        sae = in_model_units(load_plain(file), rows.scale)
    if not all(tensor.isfinite().all() for tensor in sae.tensors.values()):
        raise Failed("its weights are not finite")
    if arguments.save is not None:
        arguments.save.mkdir(parents=True, exist_ok=True)
        name = f"{re.sub(r'[^A-Za-z0-9.-]+', '_', spec.word).strip('_')}_seed{seed}.safetensors"
        sae.save(arguments.save / name)
        about["file"] = name
    return sae, {"settings": sizes["config"], **about}


def load_plain(path: Path) -> Plain:
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["plain"])
    return Plain(load_file(path), **facts)


def in_model_units(sae: Plain, scale: float) -> Plain:
    """x -> sae(scale * x) / scale: biases and thresholds are divided by `scale`, and the weights stay."""
    in_units = {"b_enc", "b_dec", "b_mag", "threshold"}
    tensors = {name: tensor / scale if name in in_units else tensor for name, tensor in sae.tensors.items()}
    return dataclasses.replace(sae, tensors=tensors)


# -------------------------------------------------------------------------------------------------------- evaluation


def encode(sae: Plain, x: Tensor) -> Tensor:
    """Latent activations (rows, d_sae) of rows (n, d_in); see `bench_workers.Plain`."""
    of = sae.tensors
    pre = (x - of["b_dec"] if sae.subtract_b_dec else x) @ of["W_enc"] + of["b_enc"]
    match sae.activation:
        case "relu":
            return pre.relu()
        case "topk":
            values, latents = pre.topk(sae.k or 0, dim=1, sorted=False)
            return torch.zeros_like(pre).scatter(1, latents, values.relu())
        case "threshold":
            return torch.where(pre > of["threshold"], pre.relu(), 0)
        case "gated":
            return torch.where(pre > 0, (of["r_mag"].exp() * (pre - of["b_enc"]) + of["b_mag"]).relu(), 0)
        case other:
            raise ValueError(f"activation: found {other!r}")


def decode(sae: Plain, acts: Tensor) -> Tensor:
    return acts @ sae.tensors["W_dec"] + sae.tensors["b_dec"]


class HeldOut:
    """The language model on the held-out contexts: clean, and with the activations changed at the hook.

    Positions of special tokens (the BOS at the start) are not trained on: they stay clean and do not count as rows.
    Cross-entropies are means over all tokens but the first of each context, in nats.
    """

    @torch.inference_mode()
    def __init__(self, arguments: argparse.Namespace, rows: Rows) -> None:
        show(["the language model on the held-out contexts, clean and with zeros"])
        self.model = load_model(arguments)
        self.site = find_hook_site(self.model, arguments.hook_point)
        self.tokens = rows.held_out_tokens().to(arguments.device)
        self.special = special_token_ids(self.model).to(arguments.device)
        seen: list[Tensor] = []

        def look(clean: Tensor) -> Tensor:
            seen.append(clean)
            return clean

        self.ce_clean = self.cross_entropy(look)
        self.rows = torch.cat(seen).float()
        """(n, d_in)"""
        self.ordinary = self.rows.norm(dim=1) <= 2 * rows.mean_norm
        """(n,) bool: not one of the few rows of huge norm, which dominate the variance."""
        self.ce_ablated = self.cross_entropy(torch.zeros_like)

    @torch.inference_mode()
    def cross_entropy(self, change: Change) -> float:
        """With `change`, from rows (n, d_in) to as many, at work on the activations."""
        total = 0.0
        for prompts in self.tokens.split(prompts_of_a_pass(self.tokens.shape[1], self.model)):
            keep = ~torch.isin(prompts, self.special)
            splice = partial(self.splice, keep=keep, change=change)
            with hooked(self.model, [], [(self.site.name, splice)]):
                logits = self.model(prompts, return_type="logits")
            for tokens, predicted in zip(prompts, logits, strict=True):  # one prompt at a time: float32 is large
                total += torch.nn.functional.cross_entropy(predicted[:-1].float(), tokens[1:], reduction="sum").item()
        return total / self.tokens[:, 1:].numel()

    def splice(self, activations: Tensor, keep: Tensor, change: Change) -> Tensor:
        changed = at_site(activations, self.site).clone()
        changed[keep] = change(changed[keep]).to(changed.dtype)
        return put_back(activations, changed, self.site)


@torch.inference_mode()
def evaluate(sae: Plain, held_out: HeldOut, last_rows: Iterator[Tensor]) -> dict[str, float | int]:
    """What a trained autoencoder, in the units of the model, does with rows and contexts it was not trained on.

    | key           | what                                                                                         |
    |---------------|----------------------------------------------------------------------------------------------|
    | ev            | 1 - sum of squared errors / sum of squares around the mean row, held-out rows                |
    | ev_ordinary   | the same over the rows of at most twice the mean norm of all training rows, and their mean   |
    | l0            | mean number of active latents, held-out rows                                                 |
    | ce_clean, ce_sae, ce_ablated | cross-entropy clean, with reconstructions, with zeros; nats per token         |
    | ce_score      | (ce_ablated - ce_sae) / (ce_ablated - ce_clean)                                              |
    | dead_held_out | share of latents that fire on none of the held-out rows                                      |
    | dead_train    | share that fire on none of `last_rows` (training rows, in chunks), with the weights of the end |
    """
    sae = dataclasses.replace(sae, tensors={name: t.to(held_out.rows.device) for name, t in sae.tensors.items()})
    squared_errors: list[Tensor] = []
    counts: list[Tensor] = []
    for x in held_out.rows.split(CHUNK):
        acts = encode(sae, x)
        squared_errors.append((decode(sae, acts) - x).pow(2).sum(dim=1))
        counts.append((acts > 0).sum(dim=0))
    fired = torch.stack(counts).sum(dim=0)
    fired_last = torch.stack([(encode(sae, x.to(fired.device)) > 0).sum(dim=0) for x in last_rows]).sum(dim=0)
    errors, ordinary = torch.cat(squared_errors), held_out.ordinary
    clean, ablated = held_out.ce_clean, held_out.ce_ablated
    with_sae = held_out.cross_entropy(lambda x: decode(sae, encode(sae, x.float())))
    return {
        "ev": explained_variance(held_out.rows, errors),
        "ev_ordinary": explained_variance(held_out.rows[ordinary], errors[ordinary]),
        "l0": fired.sum().item() / len(errors),
        "ce_clean": clean,
        "ce_sae": with_sae,
        "ce_ablated": ablated,
        "ce_score": (ablated - with_sae) / (ablated - clean),
        "dead_held_out": share(fired == 0),
        "dead_train": share(fired_last == 0),
    }


def explained_variance(rows: Tensor, squared_errors: Tensor) -> float:
    """Of rows (n, d_in) with a squared error (n,) each."""
    around_mean = (rows - rows.mean(dim=0)).double().pow(2).sum()
    return 1 - (squared_errors.double().sum() / around_mean).item()


def share(mask: Tensor) -> float:
    return mask.double().mean().item()


# ------------------------------------------------------------------------------------------------------------ result


def protocol_of(arguments: argparse.Namespace, rows: Rows) -> dict[str, Any]:
    """What all systems of a comparison share."""
    steps = arguments.rows // arguments.batch
    return source_of(arguments) | {
        "rows_in_file": rows.about["rows"],
        "mean_norm": rows.mean_norm,
        "scale": rows.scale,
        "steps": steps,
        "batch": arguments.batch,
        "d_in": rows.d_in,
        "d_sae": arguments.d_sae,
        "k": arguments.k,
        "dead_rows": min(arguments.dead_rows, steps * arguments.batch),
    }


def identity(spec: Spec, seed: int) -> str:
    """One text for one system, settings and seed, however the JSON was written."""
    return json.dumps([spec.package, spec.architecture, spec.settings, seed], sort_keys=True)


def results_of(path: Path, protocol: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The results of a file that have the same protocol, by identity; of several the last."""
    if not path.is_file():
        return {}
    results = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {result["identity"]: result for result in results if result["protocol"] == protocol}


def append(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")


COLUMNS = {
    "EV": ("ev", 4),
    "ordinary": ("ev_ordinary", 4),
    "CE score": ("ce_score", 4),
    "L0": ("l0", 1),
    "dead": ("dead_held_out", 4),
    "dead train": ("dead_train", 4),
    "seconds": ("seconds", 1),
}


def table(results: list[dict[str, Any]], width: int) -> list[str]:
    lines = [f"{'':{width}} seed" + "".join(f"{name:>11}" for name in COLUMNS)]
    for result in results:
        values = figures(result)
        cells = [f"{shown(values[key], digits):>11}" for key, digits in COLUMNS.values()]
        lines.append(f"{result['system']:{width}}{result['seed']:>5}" + "".join(cells))
    return lines


def means(results: list[dict[str, Any]], width: int) -> list[str]:
    """Mean and, below it, standard deviation over the seeds of each system that was run with several."""
    by_system: dict[str, list[dict[str, float]]] = defaultdict(list)
    for result in results:
        by_system[result["system"]].append(figures(result))
    lines = []
    for system, runs in by_system.items():
        if len(runs) > 1:
            for name, of in (("mean", statistics.fmean), ("sd", statistics.stdev)):
                cells = [f"{of([run[key] for run in runs]):>11.{digits}f}" for key, digits in COLUMNS.values()]
                lines.append(f"{system if name == 'mean' else '':{width}}{name:>5}" + "".join(cells))
    return lines


def figures(result: dict[str, Any]) -> dict[str, float]:
    return result["metrics"] | {"seconds": result["seconds"]}


if __name__ == "__main__":
    with without_traceback("The same command goes on with what is missing."):
        main(sys.argv[1:])
