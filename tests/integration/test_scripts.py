from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from small import D_IN, D_SAE, SMALL_RUN
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args
from wandb_file import history, the_run, wandb_files

from sae_training.activations_store.shuffle_buffer import ShuffleBuffer
from sae_training.cli import parse_train
from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.config.io import FIELD_NAMES
from sae_training.language_model.harvest import harvest
from sae_training.language_model.sites import find_hook_site
from scripts.benchmarks import bench_loop, bench_quality, bench_step, bench_workers
from scripts.benchmarks.machine import VECTOR_FLAGS
from scripts.demo import DEMO

ROOT = Path(__file__).parents[2]
SWEEP: dict[str, Any] = yaml.safe_load((ROOT / "scripts" / "sweep.yaml").read_text(encoding="utf-8"))


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -------------------------------------------------------------------------------------------------- train_gpt2_small


def test_gpt2_config_is_the_readme_example() -> None:
    example = LanguageModelSAERunnerConfig(
        model_name="gpt2-small",
        hook_point="blocks.2.hook_resid_pre",
        hook_point_layer=2,
        d_in=768,
        dataset_path="Skylion007/openwebtext",
        is_dataset_tokenized=False,
        expansion_factor=64,
        b_dec_init_method="geometric_median",
        lr=0.0004,
        l1_coefficient=0.00008,
        lr_scheduler_name="constantwithwarmup",
        train_batch_size=4096,
        context_size=128,
        lr_warm_up_steps=5000,
        n_batches_in_buffer=128,
        total_training_tokens=1_000_000 * 300,
        store_batch_size=32,
        use_ghost_grads=True,
        feature_sampling_window=1000,
        dead_feature_window=5000,
        dead_feature_threshold=1e-6,
        log_to_wandb=True,
        wandb_project="mats_sae_training_gpt2",
        wandb_entity=None,
        wandb_log_frequency=100,
        device="cuda",
        seed=42,
        n_checkpoints=10,
        checkpoint_path="checkpoints",
        dtype=torch.float32,
    )
    assert load_script("train_gpt2_small").config() == example


def test_gpt2_config_has_the_sizes_its_comments_say() -> None:
    cfg = load_script("train_gpt2_small").config()
    # 768 * 64 latents; 300e6 / 4096 = 73242.2 steps; 128 * 32 * 128 rows of 768 * 4 bytes
    assert (cfg.d_sae, cfg.total_training_steps, cfg.buffer_rows) == (49_152, 73_242, 524_288)


# ------------------------------------------------------------------------------------------------------------- sweep


def agent_command(parameters: dict[str, Any]) -> list[str]:
    """The command line that `wandb agent` makes of sweep.yaml and one choice of its parameters."""
    parts = create_sweep_command_args({"args": {name: {"value": value} for name, value in parameters.items()}})
    parts["env"] = ["/usr/bin/env"]
    words: list[str] = []
    for word in create_sweep_command(list(SWEEP["command"])):
        words += parts[word[2:-1]] if word.startswith("${") else [word]
    return words


def choices() -> Iterator[dict[str, Any]]:
    """Each combination of the parameters of sweep.yaml."""
    options = [p["values"] if "values" in p else [p["value"]] for p in SWEEP["parameters"].values()]
    for values in itertools.product(*options):
        yield dict(zip(SWEEP["parameters"], values, strict=True))


def test_sweep_parameters_are_config_fields() -> None:
    assert SWEEP["parameters"].keys() <= set(FIELD_NAMES)


def test_sweep_maximises_a_metric_that_runs_log() -> None:
    assert SWEEP["metric"] == {"name": "metrics/CE_loss_score", "goal": "maximize"}
    assert SWEEP["method"] == "grid"


@pytest.mark.parametrize("parameters", list(choices()), ids=lambda p: f"lr={p['lr']},k={p['k']}")
def test_sweep_command_parses_to_the_chosen_values(parameters: dict[str, Any]) -> None:
    words = agent_command(parameters)
    assert words[:3] == ["/usr/bin/env", "python", "scripts/sweep_run.py"]
    cfg = parse_train(words[3:])
    assert {name: getattr(cfg, name) for name in parameters} == parameters


def test_sweep_run_name_differs_between_runs_of_one_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    make = load_script("sweep_run").config
    names = []
    for run_id in ("first123", "second45"):
        monkeypatch.setenv("WANDB_RUN_ID", run_id)
        names.append(make(["--run_name=gpt2"]).run_name)
    assert names == ["gpt2-first123", "gpt2-second45"]


def test_sweep_run_logs_to_wandb() -> None:
    assert load_script("sweep_run").config([]).log_to_wandb


# 12 steps, evaluated at 5, 10 and the end; without a run_name, as in sweep.yaml.
AGENT_RUN = {name: value for name, value in SMALL_RUN.items() if name not in ("run_name", "log_to_wandb")} | {
    "d_in": None,
    "lr": 0.001,
    "k": 4,
    "architecture": "topk",
    "use_ghost_grads": True,
    "auxk_coefficient": 0,
    "prepend_bos": False,
}


@pytest.fixture(scope="module")
def agent_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder that the script left after a call as `wandb agent` makes it."""
    folder = tmp_path_factory.mktemp("agent")
    sweep_settings = folder / "wandb" / "sweep-swp12345" / "config-run67890.yaml"  # the agent writes it
    sweep_settings.parent.mkdir(parents=True)
    swept = {name: {"value": AGENT_RUN[name]} for name in ("lr", "k")}
    sweep_settings.write_text(yaml.safe_dump({"wandb_version": 1, **swept}))
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder),
        "WANDB_SWEEP_ID": "swp12345",
        "WANDB_RUN_ID": "run67890",
        "WANDB_SWEEP_PARAM_PATH": str(sweep_settings),
    }
    words = agent_command(AGENT_RUN | {"run_dir": str(folder / "runs")})
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (run_folder,) = (folder / "runs").iterdir()
    return run_folder


def test_agent_run_is_finished_in_a_folder_with_its_id(agent_run: Path) -> None:
    assert agent_run.name == "2x-K-4-LR-0.001-Tokens-7.680e+02-run67890"
    assert json.loads((agent_run / "status.json").read_text())["state"] == "finished"


def test_agent_run_has_the_swept_values(agent_run: Path) -> None:
    config = json.loads((agent_run / "config.json").read_text())["config"]
    assert {name: config[name] for name in AGENT_RUN if name != "d_in"} == {
        name: value for name, value in AGENT_RUN.items() if name != "d_in"
    }


def test_agent_run_is_logged_to_the_run_of_the_agent(agent_run: Path) -> None:
    (file,) = wandb_files(agent_run)
    assert file.name == "run-run67890.wandb"
    run = the_run(file)
    assert (run.run_id, run.sweep_id) == ("run67890", "swp12345")


def test_agent_run_logs_the_metric_of_the_sweep(agent_run: Path) -> None:
    (file,) = wandb_files(agent_run)
    scores = [row["_step"] for row in history(file) if SWEEP["metric"]["name"] in row]
    assert scores == [5, 10, 12]


# -------------------------------------------------------------------------------------------------------- bench_step


def bench(*words: str) -> tuple[dict[str, Any], str]:
    """The JSON and the table that the script printed for tiny sizes."""
    sizes = ["--d-in=16", "--batch=64", "--k=4", "--l0=6", "--rounds=2", "--threads=1"]
    command = [sys.executable, str(ROOT / "scripts" / "benchmarks" / "bench_step.py"), *sizes, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def benched() -> tuple[dict[str, Any], str]:
    return bench("--d-sae=64", "--peers", "sae-lens", "--peer-python=sae-lens=/no/such/python")


def test_bench_step_times_ours_and_the_floors(benched: tuple[dict[str, Any], str]) -> None:
    systems = benched[0]["systems"]
    floors = [f"floor/{name}" for name in bench_step.FLOORS if bench_step.floor_problem(name, "cpu") is None]
    assert list(systems) == [*floors, "ours/topk", "ours/standard"]
    for row in systems.values():
        assert len(row["times_ms"]) == 2 * 2
        assert min(row["times_ms"]) <= row["median_ms"] <= max(row["times_ms"])


def test_bench_step_has_the_sparsity_that_was_asked_for(benched: tuple[dict[str, Any], str]) -> None:
    systems = benched[0]["systems"]
    assert systems["ours/topk"]["l0"] == 4
    assert systems["ours/standard"]["l0"] == pytest.approx(6, rel=0.1)


def test_bench_step_goes_on_without_a_peer_that_is_not_there(benched: tuple[dict[str, Any], str]) -> None:
    result, table = benched
    peers = {name for name in result["left_out"] if not name.startswith("floor/")}
    assert peers == {"sae-lens/topk", "sae-lens/standard"}
    assert "No such file" in result["left_out"]["sae-lens/topk"]
    assert "left out: sae-lens/topk" in table


def test_bench_step_says_what_it_left_out_and_on_which_processor(
    monkeypatch: pytest.MonkeyPatch, benched: tuple[dict[str, Any], str]
) -> None:
    machine = benched[0]["machine"]
    assert machine["cpu"]
    assert set(machine["vector_flags"]) <= set(VECTOR_FLAGS)
    monkeypatch.setattr(bench_step, "bfloat16_is_fast", lambda device: False)
    labels = [entry.label for entry in bench_step.entries(bench_step.parse(["--ours", "topk"]), [])]
    assert labels == ["floor/encoder-float32", "floor/six-float32", "ours/topk"]
    assert "bfloat16" in (bench_step.floor_problem("six-bfloat16", "cpu") or "")
    monkeypatch.setattr(bench_step, "bfloat16_is_fast", lambda device: True)
    assert bench_step.floor_problem("six-bfloat16", "cpu") is None


def test_bench_step_sweeps_and_holds_latents_dead() -> None:
    words = ["--ours", "topk", "--dead-share=0.5", "--sweep-factors", "2", "--sweep-ks"]
    result, table = bench("--sweep", *words)
    (point,) = result["points"]
    assert point["sizes"]["d_sae"] == 32
    assert set(point["ratio_to_floor"]) == {"ours/topk", "ours/topk+auxk"}
    assert "encoder grown" in table


def test_bench_step_sweep_covers_widths_then_sparsities() -> None:
    arguments = bench_step.parse(["--sweep"])
    points = bench_step.sweep_points(arguments)
    assert [arguments.d_in * factor for factor, _, _ in points[:6]] == [4032, 8064, 16128, 32832, 65664, 131328]
    assert points[6:] == [(28, 16, 16.0), (28, 32, 32.0), (28, 64, 64.0), (28, 128, 128.0), (28, 256, 256.0)]


def test_bench_step_ratio_compares_like_with_like() -> None:
    peer, mine = (bench_step.Entry(label, "", name) for label, name in (("p", "topk-adam"), ("o", "topk")))
    with_auxk = bench_step.Entry("o+auxk", "ours", "topk", dead_share=0.5)
    assert peer.family == mine.family != with_auxk.family


# -------------------------------------------------------------------------------------------------------- bench_loop

LOOP_SIZES = {"n_batches_in_buffer": 4, "store_batch_size": 2, "train_batch_size": 128, "expansion_factor": 2, "k": 4}
LOOP_WORDS = [
    *("--model=demo", "--dataset=demo", "--hook=blocks.1.hook_resid_post"),
    *(f"--config={json.dumps(LOOP_SIZES)}", "--tokens=1_100"),
]


def loop(*words: str) -> tuple[dict[str, Any], str]:
    """The JSON and the messages of the script for a few small steps on the bundled model."""
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        bench_loop.main([*LOOP_WORDS, "--rounds=1", *words])
    return json.loads(out.getvalue()), err.getvalue()


@pytest.fixture(scope="module")
def looped() -> tuple[dict[str, Any], str]:
    return loop("--peer", "--peer-python=sae-lens=/no/such/python")


def test_bench_loop_divides_the_floor_by_the_run(looped: tuple[dict[str, Any], str]) -> None:
    result, _ = looped
    assert (result["steps"], result["tokens"]) == (8, 1024)
    assert set(result["tokens_per_s"]) == {"ours", "floor"}
    speed = result["tokens_per_s"]
    assert result["ours_over_floor"] == pytest.approx(speed["ours"] / speed["floor"], abs=0.001)
    assert speed["ours"] < result["tokens_per_s_after_first_fill"]["ours"]


def test_bench_loop_goes_on_without_a_peer_that_is_not_there(looped: tuple[dict[str, Any], str]) -> None:
    result, messages = looped
    assert result["ours_over_peer"] == {}
    assert "No such file" in result["left_out"]["default"]
    assert "left out: default: cannot start sae-lens" in messages


def test_bench_loop_counts_the_rows_that_a_run_harvests(demo_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = bench_loop.bench_config(bench_loop.parse([*LOOP_WORDS, "--tokens=3_000"]))
    n_filled = []
    refill = ShuffleBuffer.refill

    def counting(buffer: ShuffleBuffer, name: str) -> None:
        n_filled.append(buffer.served)
        refill(buffer, name)

    monkeypatch.setattr(ShuffleBuffer, "refill", counting)
    bench_loop.time_run(cfg, demo_model)
    assert len(n_filled) > 1
    assert sum(n_filled) == bench_loop.rows_harvested(cfg)


def test_bench_loop_floor_is_the_same_function_as_the_hook(demo_model: Any) -> None:
    cfg = bench_loop.bench_config(bench_loop.parse(LOOP_WORDS))
    tokens = torch.arange(3, 67).view(2, 32)
    (expected,) = harvest(demo_model, tokens, [find_hook_site(demo_model, cfg.hook_point)])
    with torch.inference_mode():
        found = bench_loop.bare_model(cfg, demo_model)(input_ids=tokens, use_cache=False).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_bench_loop_compares_the_recipe_of_the_demo() -> None:
    cfg = bench_loop.bench_config(bench_loop.parse(["--model=demo", "--tokens=2_000_000"]))
    expected = LanguageModelSAERunnerConfig(**DEMO, model_name="demo", n_eval_batches=0, eval_every_steps=0)
    assert cfg == expected


# ----------------------------------------------------------------------------------------------------- bench_quality

QUALITY_SYSTEMS = ["ours:topk", 'ours:standard:{"l1_coefficient": 1e-4, "lr": 0.01}']


def quality(folder: Path, *words: str) -> tuple[dict[str, Any], str]:
    """The JSON and the table that the script printed for a few small steps on the bundled model."""
    source = ["--model=demo", "--text=demo", "--hook-point=blocks.1.hook_resid_post", "--held-out=8"]
    sizes = ["--rows=3_000", "--batch=256", f"--d-sae={D_SAE}", "--k=8", "--dead-rows=1_000", "--threads=1"]
    files = [f"--rows-file={folder / 'rows.safetensors'}", f"--results={folder / 'results.jsonl'}"]
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        bench_quality.main([*source, *sizes, *files, *words])
    return json.loads(out.getvalue()), err.getvalue()


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("quality")
    return folder, *quality(folder, "--systems", *QUALITY_SYSTEMS, f"--save={folder}")


def test_bench_quality_evaluates_what_it_trained(compared: tuple[Path, dict[str, Any], str]) -> None:
    folder, result, table = compared
    assert [row["system"] for row in result["results"]] == QUALITY_SYSTEMS
    topk, standard = (row["metrics"] for row in result["results"])
    assert 0 < topk["l0"] <= 8 < standard["l0"]
    for metrics in (topk, standard):
        assert 0.1 < metrics["ev"] < 1
        assert 0.1 < metrics["ev_ordinary"] < 1
        assert metrics["ce_clean"] < metrics["ce_sae"] < metrics["ce_ablated"]
        assert 0 <= metrics["dead_held_out"] < 1
    assert "CE score" in table
    saved = bench_quality.load_plain(folder / result["results"][0]["file"])
    assert (saved.activation, saved.k, saved.tensors["W_enc"].shape) == ("topk", 8, (D_IN, D_SAE))


def test_bench_quality_continues_with_what_is_missing(compared: tuple[Path, dict[str, Any], str]) -> None:
    folder, before, _ = compared
    result, table = quality(folder, "--systems", "ours:topk", "--seeds", "0", "1", "--continue")
    first, second = result["results"]
    assert first == before["results"][0]
    assert second["seed"] == 1
    assert second["metrics"]["ev"] != first["metrics"]["ev"]
    assert table.count("training ours:topk") == 1
    assert "mean" in table


def test_bench_quality_refuses_rows_of_another_source(compared: tuple[Path, dict[str, Any], str]) -> None:
    folder, _, _ = compared
    arguments = bench_quality.parse(["--rows=3_000", "--batch=256", f"--rows-file={folder / 'rows.safetensors'}"])
    with pytest.raises(SystemExit, match="'model': 'demo'"):
        bench_quality.open_rows(arguments)


@pytest.mark.parametrize("architecture", ["standard", "topk", "batchtopk", "jumprelu", "gated", "matryoshka"])
def test_bench_quality_plain_form_is_the_same_function_in_other_units(architecture: str) -> None:
    sizes = bench_workers.Sizes(d_in=16, d_sae=64, batch=32, k=4, l0=4, config={"lr": 0.01})
    system = bench_workers.ours(architecture, sizes)
    x = 3 + torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    system.start(x)
    for _ in range(20):
        system.step(x)
    assert system.plain is not None and system.module is not None
    plain = system.plain()
    with torch.no_grad():
        expected = system.module.eval()(x)
        scaled = bench_quality.in_model_units(plain, scale=0.5)
        acts = bench_quality.encode(scaled, 2 * x)
        torch.testing.assert_close(acts, 2 * expected.feature_acts)
        torch.testing.assert_close(bench_quality.decode(scaled, acts), 2 * expected.sae_out)
