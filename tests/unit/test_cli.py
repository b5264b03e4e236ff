from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch

from sae_analysis import cli as analysis_cli
from sae_training import cli
from sae_training.cli import main, parse, parse_train, table
from sae_training.config import LanguageModelSAERunnerConfig as Config
from sae_training.config.checks import field_types, plain_value, plain_values
from sae_training.config.fields import Origin
from sae_training.config.io import FIELD_NAMES, config_to_dict
from sae_training.config.left_out import Placed
from sae_training.config.values import read_value, without_retired_flags, written
from sae_training.formats import Facts, Given

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RECIPE = Config(
    architecture="topk",
    d_in=None,
    lr="auto",
    lr_warm_up_steps="auto",
    auxk_coefficient="auto",
    lr_scheduler_name="linearwarmupdecay",
    exclude_special_tokens=True,
    is_dataset_tokenized=None,
    log_to_wandb=False,
    device=DEVICE,
)


def run_python(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", **environment}
    return subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True)


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """Stands in for the module that trains, so that only the way there is tested. The folder runs/a is there."""
    (tmp_path / "runs" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    module = ModuleType("sae_training.lm_runner")
    monkeypatch.setitem(sys.modules, "sae_training.lm_runner", module)
    return module


def test_train_without_a_file_is_the_recipe() -> None:
    assert parse_train([]) == RECIPE


def test_transcoders_start_from_scaled_batches_unless_told_otherwise() -> None:
    words = ["--target_hook_point", "blocks.0.hook_mlp_out"]
    changes = {"target_hook_point": "blocks.0.hook_mlp_out", "normalize_activations": "expected_average_only_in"}
    assert parse_train(words) == dataclasses.replace(RECIPE, **changes)
    cfg = parse_train([*words, "--normalize_activations", "none"])
    assert cfg == dataclasses.replace(RECIPE, target_hook_point="blocks.0.hook_mlp_out")


def test_positionals_are_model_and_dataset() -> None:
    cfg = parse_train(["gpt2-small", "text.jsonl", "--k", "16"])
    assert cfg == dataclasses.replace(RECIPE, model_name="gpt2-small", dataset_path="text.jsonl", k=16)


def test_positionals_may_follow_a_flag() -> None:
    cfg = parse_train(["--k", "16", "gpt2-small", "text.jsonl"])
    assert (cfg.k, cfg.model_name, cfg.dataset_path) == (16, "gpt2-small", "text.jsonl")


@pytest.mark.parametrize("flag", ["--train_batch_size", "--train-batch-size"])
@pytest.mark.parametrize("joined", [True, False])
def test_flag_may_be_spelt_with_either_dash(flag: str, joined: bool) -> None:
    words = [f"{flag}=64"] if joined else [flag, "64"]
    assert parse_train(words).train_batch_size == 64


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--lr", "1e-4"], "lr", 1e-4),
        (["--lr", "auto"], "lr", "auto"),
        (["--d-in", "None"], "d_in", None),
        (["--d-in", "256"], "d_in", 256),
        (["--total-training-tokens", "2e5"], "total_training_tokens", 200_000),
        (["--total-training-tokens", "200_000"], "total_training_tokens", 200_000),
        (["--auxk-k", "1e2"], "auxk_k", 100),
        (["--dtype", "bfloat16"], "dtype", torch.bfloat16),
        (["--device", "cuda:1"], "device", "cuda:1"),
        (["--is-dataset-tokenized", "True"], "is_dataset_tokenized", True),
        (["--hook-point", "blocks.1.hook_z"], "hook_point", "blocks.1.hook_z"),
        (["--use-ghost-grads", "--auxk-coefficient", "0"], "use_ghost_grads", True),
        (["--no-prepend-bos"], "prepend_bos", False),
        (["--prepend_bos=False"], "prepend_bos", False),
        (["--log_to_wandb=True"], "log_to_wandb", True),
        (["--log-to-wandb", "true"], "log_to_wandb", True),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else None,
)
def test_flag_value(words: list[str], name: str, value: Any) -> None:
    assert getattr(parse_train(words), name) == value


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("--use_ghost_grads", True),
        ("--use-ghost-grads", True),
        ("--no-use-ghost-grads", False),
        ("--no_use_ghost_grads", False),
        ("--use_ghost_grads True", True),
        ("--use_ghost_grads TRUE", True),
        ("--use-ghost-grads=yes", True),
        ("--use_ghost_grads=1", True),
        ("--use_ghost_grads 1", True),
        ("--use_ghost_grads False", False),
        ("--use_ghost_grads=false", False),
        ("--use_ghost_grads No", False),
        ("--use_ghost_grads=0", False),
    ],
)
def test_switch_may_be_spelt_as_people_and_programs_do(words: str, value: bool) -> None:
    cfg = parse_train([*words.split(), "--auxk_coefficient=0", "demo", "text.jsonl"])
    assert (cfg.use_ghost_grads, cfg.model_name, cfg.dataset_path) == (value, "demo", "text.jsonl")


@pytest.mark.parametrize(
    ("words", "value"),
    [("then_live", "then_live"), ("True", True), ("true", True), ("1", True), ("False", False)],
)
@pytest.mark.parametrize("joined", [True, False])
def test_switch_with_a_third_value(words: str, value: Any, joined: bool) -> None:
    flags = [f"--use_cached_activations={words}"] if joined else ["--use_cached_activations", words]
    assert parse_train([*flags, "demo", "--cached_activations_path", "x"]).use_cached_activations == value


@pytest.mark.parametrize(
    ("words", "value"),
    [("--streaming None", None), ("--streaming=null", None), ("--streaming", True), ("--no-streaming", False)],
)
def test_switch_that_may_be_left_open(words: str, value: Any) -> None:
    assert parse_train(words.split()).streaming is value


@pytest.mark.parametrize("word", ["None", "none", "null"])
def test_nothing_may_be_spelt_in_three_ways(word: str) -> None:
    cfg = parse_train(["--run_name", word, "--d_in", word, "--clip_grad_norm", word])
    assert (cfg.run_name, cfg.d_in, cfg.clip_grad_norm) == (None, None, None)


def test_none_is_a_separator() -> None:
    assert parse_train(["--sequence_separator_token", "none"]).sequence_separator_token == "none"
    assert parse_train(["--sequence_separator_token", "50256"]).sequence_separator_token == 50256


def test_command_line_of_a_wandb_agent() -> None:
    cfg = parse_train(["--lr=0.0004", "--k=64", "--use_ghost_grads=False", "--model_name=demo"])
    assert cfg == dataclasses.replace(RECIPE, lr=0.0004, k=64, model_name="demo")


def test_switch_value_does_not_swallow_a_positional() -> None:
    cfg = parse_train(["--log-to-wandb", "False", "false", "demo"])
    assert (cfg.log_to_wandb, cfg.model_name, cfg.dataset_path) == (False, "false", "demo")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--layers", "4", "8", "12"], [4, 8, 12]),
        (["--layers", "4", "8", "demo", "demo"], [4, 8]),
        (["--layers", "4,8"], [4, 8]),
        (["--layers", "3"], 3),
        (["--layers", "all", "--layer_stride", "2"], "all"),
        (["--layer_stride", "2"], "all"),
    ],
)
def test_layers(words: list[str], expected: Any) -> None:
    assert parse_train(["--hook_point", "blocks.{layer}.hook_resid_pre", *words]).hook_point_layer == expected


@pytest.mark.parametrize(
    ("words", "paths", "weights"),
    [
        (["--dataset_path", "a.jsonl,b.jsonl", "--dataset_weights", "0.7,0.3"], ["a.jsonl", "b.jsonl"], (0.7, 0.3)),
        (["--dataset-weights=1,2.5", "--dataset-path=a,b", "gpt2"], ["a", "b"], (1, 2.5)),
        (["--dataset_path", "a.jsonl", "gpt2"], "a.jsonl", ()),
    ],
)
def test_several_datasets(words: list[str], paths: Any, weights: tuple[float, ...]) -> None:
    cfg = parse_train(words)
    assert (cfg.dataset_path, cfg.dataset_weights) == (paths, weights)


def test_one_layer_needs_a_place_in_the_hooks_name_too() -> None:
    with pytest.raises(ValueError, match="layers: found 2 with hook_point 'blocks.1.hook_resid_pre', expected {layer}"):
        parse_train(["--layers", "2", "--hook_point", "blocks.1.hook_resid_pre"])


def test_layers_need_a_place_in_the_hooks_name() -> None:
    with pytest.raises(ValueError, match=r"hook_point: .* expected \{layer\} where the number goes"):
        parse_train(["--layers", "1", "2", "--hook_point", "blocks.1.hook_resid_pre"])


def test_commas_give_several_values() -> None:
    cfg = parse_train(["--lr", "1e-3,auto", "--k", "16,32"])
    assert (cfg.lr, cfg.k) == ([1e-3, "auto"], [16, 32])


def test_file_gives_the_defaults_and_flags_win(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("k: 8\nlr: 1e-3\nexpansion_factor: 16\n")
    cfg = parse_train(["--config", str(path), "--lr", "2e-3", "demo"])
    assert cfg == Config(k=8, lr=2e-3, expansion_factor=16, model_name="demo")


@pytest.mark.filterwarnings("error")
def test_file_of_a_whole_config_is_that_config(tmp_path: Path) -> None:
    written = Config(dtype=torch.float64, d_in=64, run_name="x", lr="auto", architecture="topk")
    (tmp_path / "run.json").write_text(json.dumps(config_to_dict(written)))
    assert parse_train([f"--config={tmp_path / 'run.json'}"]) == written


def test_file_may_leave_the_device_to_the_machine(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("device: auto\n")
    assert parse_train(["--config", str(tmp_path / "run.yaml")]).device == DEVICE


def test_flag_can_mend_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("architecture: topk\nd_in: 4\nk: 32\n")
    assert parse_train(["--config", str(path), "--k", "2"]).k == 2


def test_wrong_value_in_the_file_names_file_and_field(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("k: many\n")
    with pytest.raises(ValueError, match=r"run.yaml: these values are wrong\nk: found 'many'"):
        parse_train(["--config", str(path)])


@pytest.mark.parametrize(
    ("words", "verb"),
    [
        (["resume", "runs/a"], cli.Resume(run=Path("runs/a"))),
        (["eval", "runs/a", "--debug"], cli.Eval(run=Path("runs/a"), debug=True)),
        (["report", "runs/a"], cli.Report(run=Path("runs/a"))),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else None,
)
def test_verb(words: list[str], verb: cli.Verb) -> None:
    assert parse(words) == verb


@pytest.mark.parametrize(
    ("words", "parallel"),
    [
        (["--distribute_layers"], "layers"),
        (["--distribute-layers", "demo", "demo"], "layers"),
        (["--distribute_layers", "True", "demo"], "layers"),
        (["--distribute_layers=yes", "--parallel", "layers"], "layers"),
        (["--distribute_modules"], "layers"),
        (["--distribute_layers", "False"], "data"),
        (["--no-distribute_layers"], "data"),
    ],
)
def test_a_switch_of_sparsify_stands_for_our_field(words: list[str], parallel: str) -> None:
    cfg = parse_train(words)
    assert cfg.parallel == parallel
    assert cfg.model_name == ("demo" if "demo" in words else RECIPE.model_name)


def test_the_flags_of_a_plan_are_those_of_training() -> None:
    cfg = parse_train(["--parallel", "data,latents", "--mesh", "2,4"])
    assert (cfg.parallel, cfg.mesh) == ("data,latents", (2, 4))


def test_a_switch_of_sparsify_with_another_value_of_our_field_is_refused() -> None:
    with pytest.raises(
        ValueError, match="distribute_layers: found it with --parallel=data, expected --parallel layers"
    ):
        parse_train(["--distribute_layers", "--parallel", "data"])
    with pytest.raises(SystemExit):
        parse(["report", "run", "--distribute_layers"])


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["train", "--l1-coeficient", "3"], "--l1-coefficient"),
        (["train", "--architecture", "top"], "did you mean 'topk'?"),
        (["train", "--optimizer", "adan"], "'adam'"),
        (["train", "--k", "1.5"], "found '1.5', expected a whole number"),
        (["trian"], "train, resume, eval, report"),
        (["resume"], "RUN"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "hint",
)
def test_wrong_words_exit_with_2_and_a_hint(words: list[str], answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert answer in capsys.readouterr().err


def test_help_of_every_verb_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from sae_training.cli import parse\n"
        "for verb in ([], ['train'], ['resume'], ['eval'], ['report'], ['plan']):\n"
        "    try: parse([*verb, '--help'])\n"
        "    except SystemExit as stop: assert not stop.code\n"
        "print('torch' in sys.modules)\n"
    )
    done = run_python("-c", code)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "False"


def test_help_of_train_shows_every_field_with_its_text_but_those_of_loaded_autoencoders() -> None:
    done = run_python("-m", "sae_training", "train", "--help")
    assert done.returncode == 0
    for name in FIELD_NAMES:
        assert (f"--{name.replace('_', '-')} " in done.stdout) is (name not in field_types(Origin)), name
    assert "Optimizer steps" not in done.stdout  # properties are no flags
    assert "Latents per input dimension: d_sae = d_in * expansion_factor." in done.stdout
    assert "Show the traceback of an error." in done.stdout


def test_a_config_file_may_hold_fields_that_are_no_flags(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("file_format: saelens 6\nfile_dtype: bfloat16\nactivation_fn: relu\nmax_iterations: null\n")
    cfg = parse_train(["--config", str(file), "--k", "16"])
    assert (cfg.file_format, cfg.file_dtype, cfg.k) == ("saelens 6", "bfloat16", 16)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], {}),
        (["--k", "4", "--norm-factor=0.5"], {"k": 4, "norm_factor": 0.5}),
        (
            ["--model-name", "m", "--hook-point", "h", "--target-hook-point", "t", "--layer", "0"],
            {"model_name": "m", "hook_point": "h", "target_hook_point": "t", "layer": 0},
        ),
        (["--dataset-path", "demo", "--context-size", "64"], {"dataset_path": "demo", "context_size": 64}),
    ],
)
def test_eval_and_build_take_what_files_leave_out(words: list[str], said: dict[str, Any]) -> None:
    verb = parse(["eval", "a.pt", *words])
    built = analysis_cli.parse(["build", "a.pt", *words])
    assert isinstance(verb, cli.Eval)
    assert isinstance(built, analysis_cli.Build)
    assert verb.said() == built.said() == said


def test_every_fact_that_files_leave_out_has_a_flag() -> None:
    assert field_types(Placed).keys() == field_types(Given).keys()
    assert Facts.__annotations__.keys() | {"hook_point", "layer"} == field_types(Given).keys()


def test_every_field_has_one_line_of_help() -> None:
    # tyro breaks the help at each line end of the source
    files = [ROOT / "sae_training" / "config" / name for name in ("fields.py", "run.py")]
    lines = [line for file in files for line in file.read_text().splitlines()]
    documented = {
        lines[i - 1].split(":")[0].strip()
        for i, line in enumerate(lines)
        if line.startswith('    """') and line.endswith('."""') and len(line) <= 100
    }
    assert set(FIELD_NAMES) - documented <= {"normalize_activations"}  # its type takes lines


def test_no_words_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert not stopped.value.code
    assert "sae-training" in capsys.readouterr().out


def test_our_errors_are_one_message_and_exit_code_1() -> None:
    done = run_python("-m", "sae_training", "train", "--config", "none.yaml")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == ("error: none.yaml: no such config file, expected .yaml or .json; check the path\n")


@pytest.mark.parametrize("by_flag", [True, False], ids=["flag", "environment"])
def test_debug_shows_the_traceback(
    by_flag: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAE_TRAINING_DEBUG", "0" if by_flag else "1")
    words = ["train", "--config", "none.yaml", *(["--debug"] if by_flag else [])]
    assert main(words) == 1
    assert "Traceback" in capsys.readouterr().err


def test_notes_of_an_error_are_shown(runner: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def resume_run(run: Path) -> None:
        error = ValueError(f"{run}: broken")
        error.add_note("last good checkpoint: step_8")
        raise error

    vars(runner)["resume_run"] = resume_run
    assert main(["resume", "runs/a"]) == 1
    assert capsys.readouterr().err == "error: runs/a: broken\nlast good checkpoint: step_8\n"


def test_interruption_exits_with_its_own_code(runner: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    class Interrupted(KeyboardInterrupt):
        exit_code = 143

    def train(cfg: Config) -> None:
        raise Interrupted(f"saved {cfg.model_name}")

    vars(runner)["language_model_sae_runner"] = train
    assert main(["train", "demo", "demo"]) == 143
    assert capsys.readouterr().err == "saved demo\n"


def test_loss_that_is_not_finite_is_one_message(runner: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def resume_run(_: Path) -> None:
        raise ArithmeticError("step 7: the loss is nan")

    vars(runner)["resume_run"] = resume_run
    assert main(["resume", "runs/a"]) == 1
    assert capsys.readouterr().err == "error: step 7: the loss is nan\n"


def test_plain_interruption_exits_with_130(runner: ModuleType) -> None:
    def resume_run(_: Path) -> None:
        raise KeyboardInterrupt

    vars(runner)["resume_run"] = resume_run
    assert main(["resume", "runs/a"]) == 130


def test_ctrl_c_that_an_import_has_swallowed_is_no_import_error(runner: ModuleType, capsys: Any) -> None:
    def resume_run(_: Path) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except BaseException:  # as a package does that can do without another
            raise ImportError("half a module") from None

    vars(runner)["resume_run"] = resume_run
    before = signal.getsignal(signal.SIGINT)
    assert main(["resume", "runs/a"]) == 130
    assert capsys.readouterr().err.startswith("Stopped.") and signal.getsignal(signal.SIGINT) is before


def test_errors_that_are_not_ours_are_not_hidden(runner: ModuleType) -> None:
    def resume_run(_: Path) -> None:
        raise IndexError("a bug")

    vars(runner)["resume_run"] = resume_run
    with pytest.raises(IndexError):
        main(["resume", "runs/a"])


def test_eval_prints_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module = ModuleType("sae_training.run.evals")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(module)["evaluate_run"] = lambda _: {"explained variance": 0.912345, "l0": 32}
    assert main(["eval", "runs/a"]) == 0
    said = capsys.readouterr()
    assert said.out == "explained variance  0.9123\nl0                  32\n"
    assert re.fullmatch(r"Time: .*; \d+\.\d s in all\.\n", said.err)


def test_warnings_of_a_verb_are_one_line_each(runner: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def resume_run(run: Path) -> None:
        warnings.warn(f"{run}: no tokenizer", stacklevel=1)
        warnings.warn("a library\nbreaks its lines", FutureWarning, stacklevel=2)

    vars(runner)["resume_run"] = resume_run
    shown = warnings.showwarning
    assert main(["resume", "runs/a"]) == 0
    assert capsys.readouterr().err == "warning: runs/a: no tokenizer\nwarning: a library breaks its lines\n"
    assert warnings.showwarning is shown


def test_table_of_nothing_is_empty() -> None:
    assert table({}) == ""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--k 16 32 demo demo", {"k": [16, 32], "model_name": "demo"}),
        ("--lr 1e-3 3e-3", {"lr": [1e-3, 3e-3]}),
        ("--k=16 32 demo", {"k": [16, 32], "model_name": "demo"}),
        ("--k=16 --lr=0.001", {"k": 16, "lr": 0.001}),
        ("--l1-coefficient 1e-3, 3e-3 --architecture standard", {"l1_coefficient": [1e-3, 3e-3]}),
        ("--hook_point blocks.{layer}.hook_mlp_out --layers 0, 2", {"hook_point_layer": [0, 2]}),
        ("--hook_point blocks.{layer}.hook_mlp_out --layers All", {"hook_point_layer": "all"}),
        ("train.model demo --k 32 64", {"k": [32, 64], "model_name": "train.model", "dataset_path": "demo"}),
        ("--k [16,32] demo", {"k": [16, 32], "model_name": "demo"}),
        ("--k [16, 32] demo", {"k": [16, 32], "model_name": "demo"}),
        ("--k=[16, 32] demo", {"k": [16, 32], "model_name": "demo"}),
        ("--k [16] demo", {"k": [16], "model_name": "demo"}),
        ("--k 2_0,3e1 demo", {"k": [20, 30], "model_name": "demo"}),
        ("--lr auto 1e-3 demo", {"lr": ["auto", 1e-3], "model_name": "demo"}),
        ("--seqpos_slice -8 128 demo", {"seqpos_slice": (-8, 128), "model_name": "demo"}),
        ("--seqpos_slice () demo", {"seqpos_slice": (), "model_name": "demo"}),
        ("--seqpos_slice -1: demo", {"seqpos_slice": (-1, None), "model_name": "demo"}),
        ("--seqpos_slice=1: demo demo", {"seqpos_slice": (1, None), "dataset_path": "demo"}),
        ("--seqpos_slice :-1 demo", {"seqpos_slice": (None, -1), "model_name": "demo"}),
        ("--seqpos_slice ::4", {"seqpos_slice": (None, None, 4)}),
        ("--seqpos_slice -1,None demo", {"seqpos_slice": (-1, None), "model_name": "demo"}),
        ("--seqpos_slice -1 None demo", {"seqpos_slice": (-1, None), "model_name": "demo"}),
        ("--seqpos_slice=[-1, null] demo", {"seqpos_slice": (-1, None), "model_name": "demo"}),
        ("--seqpos_slice=(None, -3) demo", {"seqpos_slice": (None, -3), "model_name": "demo"}),
        ("--architecture topk batchtopk demo", {"architecture": ["topk", "batchtopk"], "model_name": "demo"}),
        ("--dataset_path a.jsonl,b.jsonl demo", {"dataset_path": ["a.jsonl", "b.jsonl"], "model_name": "demo"}),
        ("--dataset_path ['a','b'] demo", {"dataset_path": ["a", "b"], "model_name": "demo"}),
        (
            "--hook_point blocks.{layer}.hook_mlp_out --layers 4 8 12 demo text",
            {"hook_point_layer": [4, 8, 12], "model_name": "demo", "dataset_path": "text"},
        ),
    ],
)
def test_lists_may_be_written_apart(words: str, expected: dict[str, Any]) -> None:
    cfg = parse_train(words.split())
    assert {name: getattr(cfg, name) for name in expected} == expected


def test_every_default_is_read_back_from_the_text_that_help_shows() -> None:
    types = field_types(Config)
    for cfg in (Config(), RECIPE):
        for name, value in config_to_dict(cfg).items():
            assert plain_value(read_value(written(value), types[name]), types[name]) == plain_values(cfg)[name]


def test_retired_flag_is_dropped_with_one_warning() -> None:
    with pytest.warns(FutureWarning, match="sae: no longer a field of Toy") as caught:
        verb = parse(["toy", "--sae", "jumprelu_init_threshold=0.5", "lr_decay_steps=10", "--k", "3"])
    assert len(caught) == 1
    assert isinstance(verb, cli.Toy)
    assert (verb.jumprelu_init_threshold, verb.lr_decay_steps, verb.k) == (0.5, 10, 3)


@pytest.mark.parametrize("words", ["--old demo", "--old=2 demo", "--old 2 demo", "--old False demo", "demo --old"])
def test_value_of_a_retired_flag_goes_with_it(words: str) -> None:
    class WithOldField:
        RETIRED: ClassVar = {"old": "leave it out"}

    with pytest.warns(FutureWarning, match="old: no longer a field of WithOldField; leave it out"):
        assert without_retired_flags(words.split(), WithOldField) == ["demo"]


@pytest.mark.parametrize("words", ["--grad-acc-steps 2,4", "--seqpos-slice 1:b"])
def test_a_list_where_a_number_belongs_is_shown(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_train(words.split())
    assert "expected a whole number" in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--multi_topk", "nope", "demo", "demo"], "multi_topk: found 'nope', expected True or False"),
        (["cache", "--prepend-bos", "0x1", "demo", "demo"], "prepend_bos: found '0x1', expected True or False"),
        (
            ["train", "demo", "demo", "more"],
            r"found 3 words .*\(demo, demo, more\), expected at most 2 \(MODEL DATASET\)",
        ),
        (["eval", "a", "b"], r"expected at most 1 \(RUN\)"),
        (["toy", "demo"], "found 1 words .* expected none"),
    ],
)
def test_a_word_too_many_is_named(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(words)


@pytest.mark.parametrize("word", ["null", "None"])
def test_a_text_that_is_never_none_is_not_called_null(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["train", "demo", "demo", f"--run_dir={word}"])
    assert "does not take" in "".join(capsys.readouterr())
    assert parse_train(["demo", "demo", f"--run_dir='{word}'"]).run_dir == word
    assert parse_train(["demo", "demo", f"--run_name={word}"]).run_name is None
