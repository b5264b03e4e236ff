"""The verb `plan`: what it reads, what it prints, and what it says to wrong flags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small import D_IN, D_SAE, N_LAYERS, SMALL_RUN

from sae_training.cli import main
from sae_training.flags import RECIPE


def told(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(["plan", *words]) == code
    out, err = capsys.readouterr()
    return err if code else " ".join(out.split())  # long lines are wrapped


def in_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    return json.loads(told(capsys, *words, "--json"))


LAYERS = (
    "demo",
    "demo",
    "--hook_point",
    "blocks.{layer}.hook_resid_post",
    "--layers",
    "all",
    "--expansion_factor",
    "2",
)


def test_a_config_file_and_the_same_flags_give_one_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(SMALL_RUN))
    flags = [f"--{name}={value}" for name, value in SMALL_RUN.items()]
    of_file = told(capsys, str(path), "--gpus", "2", "--architecture", "topk")
    assert of_file == told(capsys, "--gpus", "2", "--config", str(path), "--architecture", "topk")
    others = {"lr": "3e-4", "auxk_coefficient": "0", "exclude_special_tokens": "False"}
    assert not others.keys() - RECIPE.keys()
    assert of_file == told(capsys, *flags, *(f"--{n}={v}" for n, v in others.items()), "--gpus", "2")
    assert f"topk {D_IN} x {D_SAE}" in of_file


def test_json_has_bytes_seconds_and_the_best_way(capsys: pytest.CaptureFixture[str]) -> None:
    plan = in_json(capsys, *LAYERS, "--gpus", str(N_LAYERS))
    assert plan["autoencoders"]["n"] == plan["gpus"] == N_LAYERS
    names = ["one GPU", "layers", "data", "latents"]
    assert [way["parallel"] for way in plan["ways"]] == names  # a prime number makes no mesh
    for way in plan["ways"]:
        assert way["memory"]["peak"] > way["memory"]["in_use"] > 0
        assert way["tokens_per_s"] == pytest.approx(plan["rows_per_step"] / sum(way["seconds_per_step"].values()))
    assert plan["best"]["fits"]


def test_the_gpus_need_not_be_here_and_are_in_bfloat16(capsys: pytest.CaptureFixture[str]) -> None:
    assert "weights in bfloat16" in told(capsys, "demo", "demo", "--hook_point", "blocks.1.hook_resid_post")
    text = told(
        capsys, "demo", "demo", "--hook_point", "blocks.1.hook_resid_post", "--device", "cpu", "--lm_dtype", "float32"
    )
    assert "weights in float32" in text


def test_a_model_that_nobody_knows_is_given_by_its_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("nobody/knows", "demo", "--hook_point", "blocks.9.hook_resid_post", "--gpus", "2")
    assert "give --d_model, --n_layers and --n_params" in told(capsys, *words, code=1)
    sizes = ("--d_model", "1024", "--n_layers", "10", "--n_params", "400_000_000")
    plan = in_json(capsys, *words, *sizes)
    assert plan["language_model"]["params"] == 400_000_000


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--gpus", "0"], "gpus: found 0, expected more than 0"),
        (["--nodes", "-1"], "nodes: found -1, expected more than 0"),
        (["--efficiency", "1.5"], "efficiency: found 1.5, expected more than 0 and at most 1"),
        (["--gpus", "8", "--lm_gpus", "3"], "lm_gpus: found 3 with 8 GPUs a node, expected a divisor"),
        (["--hook_point", "blocks.99.hook_resid_post"], f"names block 99, but this model has {N_LAYERS}"),
        (["--hook_point", "blocks.0.hook_thing"], "hook_point: found blocks.0.hook_thing, whose width is not known"),
        (["--d_in", "64"], f"d_in: found 64, but blocks.0.hook_mlp_out of this model is {D_IN} wide; leave d_in out"),
        (["nothing.yaml"], "nothing.yaml: no such config file"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "answer",
)
def test_wrong_flags_are_named(words: list[str], answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer in told(capsys, *words, *([] if "yaml" in words[0] else ["--model_name", "demo"]), code=1)


def test_memory_smaller_than_the_model_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("meta-llama/Llama-3.1-70B", "demo", "--hook_point", "blocks.60.hook_resid_post")
    assert "spread it over 2 GPUs or more (--lm_gpus)" in told(capsys, *words, "--gpus", "8")
    assert "Best: --parallel data" in told(capsys, *words, "--gpus", "8", "--lm_gpus", "8")


def test_a_model_in_8_bits(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--d_model", "1024", "--n_layers", "10", "--d_mlp", "4096", "--d_vocab", "50_000")
    words = ("nobody/knows", "demo", "--hook_point", "blocks.9.hook_resid_post", *sizes)
    block = 4 * 1024 * 1024 + 2 * 1024 * 4096
    plan = in_json(capsys, *words, "--load_in_8bit", "--model_processing", "none")
    assert plan["language_model"]["bytes"] == 10 * block + 2 * 2 * 1024 * 50_000
    assert in_json(capsys, *words)["language_model"]["bytes"] == 2 * (10 * block + 2 * 1024 * 50_000)


def test_a_cache_is_planned_by_its_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--cache", "--total_training_tokens", "1280", "--store_batch_size", "2", "--context_size", "16")
    plan = in_json(capsys, *LAYERS, *words)
    record = 4 + N_LAYERS * D_IN * 2
    assert plan["rows"] == 1280 * 15 // 16  # without BOS
    assert plan["bytes"] == plan["rows"] * record
    both = in_json(capsys, *LAYERS, *words, "--form", "both", "--stored_dtype", "int8", "--gpus", "2")
    assert both["bytes"] == (plan["rows"] + 1280) * (4 + N_LAYERS * (D_IN + 4))
    assert both["passes"] == pytest.approx(plan["passes"] / 2)
    text = told(capsys, *LAYERS, *words)
    assert "GB on disk" in text and "Processes" not in text


def test_a_cache_says_how_processes_share_it(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--cache", "--gpus", "2", "--store_batch_size", "2", "--context_size", "16", *LAYERS)
    rows = told(capsys, *words)
    assert "Processes make passes in turn, 1 each, and append the rows to buckets of their own" in rows
    n = 256 * 2**20 // (2 * 16 * (4 + N_LAYERS * D_IN * 2))
    contexts = told(capsys, *words, "--form", "contexts")
    assert f"in turn, {n:,} each, and write these as a shard of contexts." in contexts
    both = told(capsys, *words, "--form", "both")
    assert f"{n:,} each, and write these as a shard of contexts, and append the rows" in both
