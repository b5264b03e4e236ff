"""The names in docs/coming-from.md: those of the columns "ours" and "here" exist, and the weights go where it says."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import json
import re
import typing
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sae_training import cli
from sae_training.config import CacheActivationsRunnerConfig, LanguageModelSAERunnerConfig
from sae_training.config.checks import field_types, value_problems
from sae_training.config.toy import SAEToyModelRunnerConfig
from sae_training.sparse_autoencoder import SparseAutoencoder

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
CONFIGS = (LanguageModelSAERunnerConfig, CacheActivationsRunnerConfig, SAEToyModelRunnerConfig)
SOURCE = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "sae_training").rglob("*.py"))


def choices(hint: Any) -> set[Any]:
    """Return the literals in an annotation, however deep."""
    parts = typing.get_args(hint)
    return {*parts} if typing.get_origin(hint) is typing.Literal else set().union(*map(choices, parts))


CHOICES = set().union(*(choices(hint) for cfg in CONFIGS for hint in field_types(cfg).values()))
FLAGS = {name for verb in cli.VERBS.values() for name in field_types(verb)}


# ------------------------------------------------------------------------------------------------ tables of the page


def tables() -> Iterator[tuple[list[str], list[list[str]]]]:
    for found in re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip().strip("|").split(" |")] for line in found.strip().split("\n")]
        rows = [[cell.strip("| ").strip() for cell in row] for row in rows]
        yield rows[0], rows[2:]


def names_of_ours() -> list[str]:
    found: list[str] = []
    for header, rows in tables():
        for column in {"ours", "here"} & {*header}:
            for row in rows:
                assert len(row) == len(header), row
                found += re.findall(r"`([^`]+)`", row[header.index(column)])
    return sorted(set(found))


@functools.cache
def attributes() -> set[str]:
    """Return what autoencoders of all kinds have: parameters and hook points among it."""
    kinds = ("standard", "jumprelu", "gated", "batchtopk")
    return {name for kind in kinds for name in dir(SparseAutoencoder(config_of(kind)))}


def config_of(architecture: str, **options: Any) -> LanguageModelSAERunnerConfig:
    return LanguageModelSAERunnerConfig(
        **{"architecture": architecture, "d_in": 6, "expansion_factor": 2, "k": 3} | options  # pyright: ignore
    )


# ----------------------------------------------------------------------------------------------------------- resolving


def is_config_field(name: str) -> bool:
    """Return whether `field` or `field=value` is a config's, and accepts the value."""
    field, sign, value = name.partition("=")
    owners = [cfg for cfg in CONFIGS if field in {one.name for one in fields(cfg)}]
    if not sign:
        return bool(owners)
    return any(not value_problems({field: ast.literal_eval(value)}, cfg) for cfg in owners)


def is_value(name: str) -> bool:
    """Return whether a text in quotes is a choice of some config field."""
    return name.startswith('"') and ast.literal_eval(name) in CHOICES


def is_dotted(name: str) -> bool:
    """Return whether the name can be imported, from the package or as an attribute of SparseAutoencoder."""
    if name.startswith("SparseAutoencoder."):
        return hasattr(SparseAutoencoder, name.removeprefix("SparseAutoencoder."))
    if not name.startswith(("sae_training.", "sae_analysis.")):
        return False
    parts = name.split(".")
    for n in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for part in parts[n:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def is_attribute(name: str) -> bool:
    """Return whether it is a parameter or a hook point of an autoencoder."""
    return name in attributes()


def is_written(name: str) -> bool:
    """Return whether it is a metric or a file name that the package writes."""
    return bool(re.fullmatch(r"(\w+/[\w-]+)|([\w]+\.(json|safetensors|jsonl|html))", name)) and f'"{name}"' in SOURCE


def is_flag(name: str) -> bool:
    return name.startswith("--") and name.removeprefix("--").replace("-", "_") in FLAGS


def exists(name: str) -> bool:
    ways = (is_config_field, is_value, is_dotted, is_written, is_flag, is_attribute, cli.VERBS.__contains__)
    return any(way(name) for way in ways)


@pytest.fixture(scope="module")
def hooks() -> set[str]:
    from sae_training.language_model.load import load_language_model

    return {*load_language_model("demo").hook_dict}


def test_the_page_has_many_names_of_ours() -> None:
    assert len(names_of_ours()) > 120
    assert PAGE.count("\n") < 250


@pytest.mark.parametrize("name", [name for name in names_of_ours() if not re.match(r"blocks\.|hook_embed", name)])
def test_a_name_of_ours_exists(name: str) -> None:
    assert exists(name)


def test_hooks_of_ours_exist(hooks: set[str]) -> None:
    named = [*re.findall(r"`((?:blocks\.[N\di]\.[\w.]+)|hook_embed)`", PAGE)]
    assert len(named) > 6
    assert not [name for name in named if re.sub(r"blocks\.[Ni\d]+\.", "blocks.0.", name) not in hooks]


def test_dotted_names_and_flags_elsewhere_in_the_page_exist() -> None:
    dotted = {name for name in re.findall(r"`([\w.]+)`", PAGE) if name.startswith(("sae_training.", "sae_analysis."))}
    assert not [name for name in dotted if not is_dotted(name) and importlib.util.find_spec(name) is None]
    commands = re.findall(r"`sae-training ([^`]+)`", PAGE)
    assert not [words for words in commands if words.split()[0] not in cli.VERBS]
    assert not [
        flag for words in commands for flag in re.findall(r"--\w+", words) if flag != "--flags" and not is_flag(flag)
    ]


NO_NAMES = ["contxt_size", 'optimizer="muon"', '"muon"', "sae_training.nothing", "metrics/none", "--none", "cfg.yaml"]


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_name_that_does_not_exist_is_found_out(name: str) -> None:
    assert not exists(name)


# -------------------------------------------------------------------------------------------------------------- weights

D_IN, D_SAE = 6, 12


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(n: int, d: int, seed: int) -> SimpleNamespace:
    return SimpleNamespace(weight=drawn(n, d, seed=seed), bias=drawn(n, seed=seed + 1))


LINEAR = {"encoder": linear(D_SAE, D_IN, 1), "decoder": linear(D_IN, D_SAE, 3)}
LENS = {"W_enc": drawn(D_IN, D_SAE, seed=5), "W_dec": drawn(D_SAE, D_IN, seed=6)}
VECTORS = {
    name: drawn(D_SAE, seed=7 + i)
    for i, name in enumerate(("b_enc", "b_gate", "gate_bias", "mag_bias", "b_mag", "r_mag", "latent_bias", "b_E"))
}
OUT = {name: drawn(D_IN, seed=20 + i) for i, name in enumerate(("b_dec", "bias", "decoder_bias", "pre_bias", "b_D"))}
MOSS = {"W_E": drawn(D_IN, D_SAE, seed=30), "W_D": drawn(D_SAE, D_IN, seed=31)}
T: dict[str, Any] = {
    **LINEAR, **LENS, **VECTORS, **OUT, **MOSS, "threshold": torch.full((D_SAE,), 0.3, dtype=torch.float64),
    "d_in": D_IN,
}  # fmt: skip
X = drawn(20, D_IN, seed=40)


def topk(pre: Tensor, k: int = 3) -> Tensor:
    top = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())


def jump(pre: Tensor) -> Tensor:
    return torch.where(pre > T["threshold"], pre, 0.0).relu()


def of_openai(x: Tensor) -> Tensor:
    """The forward pass of v5: rows are normalised by their unbiased deviation, and so brought back."""
    mean, std = x.mean(dim=-1, keepdim=True), x.std(dim=-1, keepdim=True)
    acts = topk(((x - mean) / std - T["pre_bias"]) @ T["encoder"].weight.T + T["latent_bias"])
    return (acts @ T["decoder"].weight.T + T["pre_bias"]) * std + mean


def of_saelens_gated(x: Tensor) -> Tensor:
    s = x - T["b_dec"]
    magnitudes = (s @ (T["W_enc"] * T["r_mag"].exp()) + T["b_mag"]).relu()
    return (s @ T["W_enc"] + T["b_gate"] > 0) * magnitudes @ T["W_dec"] + T["b_dec"]


def of_gated_auto_encoder(x: Tensor) -> Tensor:
    pre = (x - T["decoder_bias"]) @ T["encoder"].weight.T
    acts = (pre + T["gate_bias"] > 0) * (T["r_mag"].exp() * pre + T["mag_bias"]).relu()
    return acts @ T["decoder"].weight.T + T["decoder_bias"]


def of_linear(activation: Any, bias: str, decoder: Tensor) -> Any:
    pre_bias = T[bias]
    return lambda x: activation((x - pre_bias) @ T["encoder"].weight.T + T["encoder"].bias) @ decoder + pre_bias


def of_lens(activation: Any, subtracts: bool) -> Any:
    return lambda x: activation((x - T["b_dec"] * subtracts) @ T["W_enc"] + T["b_enc"]) @ T["W_dec"] + T["b_dec"]


THEIRS: dict[str, Any] = {
    "SAELens, standard or topk": of_lens(torch.relu, True),
    "SAELens, jumprelu": of_lens(jump, True),
    "SAELens, gated": of_saelens_gated,
    "SAELens, apply_b_dec_to_input False": of_lens(torch.relu, False),
    "sparsify": of_linear(topk, "b_dec", T["W_dec"]),
    "dictionary_learning AutoEncoder": of_linear(torch.relu, "bias", T["decoder"].weight.T),
    "AutoEncoderTopK": of_linear(topk, "b_dec", T["decoder"].weight.T),
    "BatchTopKSAE": of_linear(jump, "b_dec", T["decoder"].weight.T),
    "GatedAutoEncoder": of_gated_auto_encoder,
    "JumpReluAutoEncoder": of_lens(jump, False),
    "OpenAI v5": of_openai,
    "OpenMOSS": lambda x: topk(x @ T["W_E"] + T["b_E"]) @ T["W_D"] + T["b_D"],
}


def rows_of_weights() -> list[list[str]]:
    (rows,) = [rows for header, rows in tables() if header[0] == "file of"]
    return rows


@pytest.mark.parametrize("row", rows_of_weights(), ids=lambda row: row[0])
def test_weights_go_where_the_page_says(row: list[str]) -> None:
    file, architecture, *cells, also = row
    (theirs,) = [forward for name, forward in THEIRS.items() if file.startswith(name)]
    names = {**T, "c": eval(found[1], T.copy()) if (found := re.search(r"c = (.*)", file)) else None}
    names["threshold"] = T["threshold"][0] if architecture == "batchtopk" else T["threshold"]
    extra = dict(part.split(" = ") for part in also.split(", ") if " = " in part)
    options = {"normalize_activations": "layer_norm"} if "layer_norm" in also else {}
    cfg = config_of("standard" if architecture == "the same" else architecture, dtype="float64", **options)
    sae = SparseAutoencoder(cfg).eval()
    places = dict(zip(("W_enc", "b_enc", "W_dec", "b_dec"), cells, strict=True)) | extra
    sae.load_state_dict({name: eval(text, names.copy()) for name, text in places.items()})
    torch.testing.assert_close(sae.reconstruct(X), theirs(X), rtol=1e-4, atol=1e-4)


def test_the_example_reads_a_file_of_sparsify(tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    space: dict[str, Any] = {}
    exec(block, space)
    theirs = {"encoder.weight": T["encoder"].weight, "encoder.bias": T["encoder"].bias}
    tensors = theirs | {"W_dec": T["W_dec"], "b_dec": T["b_dec"]}
    save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, tmp_path / "sae.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"k": 3, "d_in": D_IN, "expansion_factor": 2}))
    sae = space["from_sparsify"](tmp_path, "gpt2", "blocks.8.hook_resid_post")
    torch.testing.assert_close(sae.reconstruct(X.float()).double(), THEIRS["sparsify"](X), rtol=1e-4, atol=1e-4)
