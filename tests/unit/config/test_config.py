from __future__ import annotations

import dataclasses
import inspect
import json
import math
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae_training.config import CacheActivationsRunnerConfig
from sae_training.config import LanguageModelSAERunnerConfig as Config
from sae_training.config.checks import field_types, list_types
from sae_training.config.io import FIELD_NAMES, config_from_dict, config_to_dict
from sae_training.config.rules import OF_LISTS, OF_SINGLE, parameters, problems
from sae_training.config.types import LABELS

MATS_DEFAULTS: dict[str, Any] = {
    "model_name": "gelu-2l",
    "hook_point": "blocks.0.hook_mlp_out",
    "hook_point_layer": 0,
    "hook_point_head_index": None,
    "dataset_path": "NeelNanda/c4-tokenized-2b",
    "is_dataset_tokenized": True,
    "context_size": 128,
    "use_cached_activations": False,
    "cached_activations_path": None,
    "d_in": 512,
    "n_batches_in_buffer": 20,
    "total_training_tokens": 2_000_000,
    "store_batch_size": 32,
    "device": "cpu",
    "seed": 42,
    "dtype": torch.float32,
    "b_dec_init_method": "geometric_median",
    "expansion_factor": 4,
    "from_pretrained_path": None,
    "l1_coefficient": 1e-3,
    "lr": 3e-4,
    "lr_scheduler_name": "constantwithwarmup",
    "lr_warm_up_steps": 500,
    "train_batch_size": 4096,
    "use_ghost_grads": False,
    "feature_sampling_window": 2000,
    "dead_feature_window": 1000,
    "dead_feature_threshold": 1e-8,
    "log_to_wandb": True,
    "wandb_project": "mats_sae_training_language_model",
    "run_name": None,
    "wandb_entity": None,
    "wandb_log_frequency": 10,
    "n_checkpoints": 0,
}

OWN_DEFAULTS: dict[str, Any] = {
    "architecture": "standard",
    "n_latents": None,
    "file_format": None,
    "file_dtype": None,
    "apply_b_dec_to_input": True,
    "activation_fn": "relu",
    "residual_threshold": 1e-2,
    "max_iterations": None,
    "stop_on_duplicate_support": True,
    "k": 32,
    "ema_decay": None,
    "k_anneal_steps": 0,
    "layer_stride": 1,
    "seqpos_slice": (),
    "pack_sequences": True,
    "max_activation_norm_multiple": None,
    "dataset_weights": (),
    "sequence_separator_token": "auto",
    "multi_topk": False,
    "matryoshka_selection": "batchtopk",
    "target_hook_point": None,
    "d_out": None,
    "skip_connection": False,
    "jumprelu_bandwidth": 0.05,
    "jumprelu_init_threshold": 0.1,
    "jumprelu_init_l0": "auto",
    "jumprelu_sparsity_loss_mode": "step",
    "jumprelu_tanh_scale": 4.0,
    "lp_norm": 1.0,
    "scale_sparsity_penalty_by_decoder_norm": False,
    "target_l0": None,
    "auxk_coefficient": 0.0,
    "auxk_k": None,
    "feature_sampling_method": None,
    "dead_feature_window_tokens": None,
    "matryoshka_widths": (),
    "normalize_activations": "none",
    "lr_end": None,
    "lr_decay_steps": 0,
    "l1_warm_up_steps": 0,
    "n_restart_cycles": 1,
    "optimizer": "adam",
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "clip_grad_norm": None,
    "encoder_matmul_dtype": "auto",
    "lm_dtype": "auto",
    "model_processing": "default",
    "device_map": None,
    "load_in_8bit": False,
    "compile_lm": False,
    "prepend_bos": True,
    "exclude_special_tokens": False,
    "dataset_split": "train",
    "dataset_text_column": None,
    "on_bad_rows": "error",
    "streaming": None,
    "eval_dataset_path": None,
    "n_eval_batches": 10,
    "eval_every_steps": None,
    "checkpoint_every_steps": None,
    "checkpoint_every_minutes": 15,
    "grace_seconds": None,
    "keep_checkpoints": 2,
    "run_dir": "runs",
    "checkpoint_path": None,
    "resume": "auto",
    "wandb_mode": None,
    "parallel": "data",
    "mesh": (),
    "parallel_timeout_minutes": 30,
    "grad_acc_steps": 1,
    "micro_batch_size": None,
}


def only_problem(**values: Any) -> str:
    """The one line that a config with these values is refused with."""
    with pytest.raises(ValueError) as caught:
        Config(**values)
    head, *lines = str(caught.value).splitlines()
    assert head == "LanguageModelSAERunnerConfig: 1 problem", lines
    return lines[0]


def test_defaults_are_those_of_mats_and_the_design() -> None:
    cfg = Config()
    assert {name: getattr(cfg, name) for name in FIELD_NAMES} == MATS_DEFAULTS | OWN_DEFAULTS


def test_readme_example_constructs_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    cfg = Config(
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
    assert cfg.d_sae == 49152
    assert cfg.resolved_run_name == "49152-L1-8e-05-LR-0.0004-Tokens-3.000e+08"
    assert cfg.resolved_run_dir == "checkpoints"
    assert capsys.readouterr() == ("", "")


def test_construction_imports_no_wandb_and_writes_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from sae_training.config import LanguageModelSAERunnerConfig as C; C();"
        "print([m for m in ('wandb', 'datasets', 'transformer_lens') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[3]), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"], ids=["object", "name"])
def test_dtype_becomes_a_torch_dtype(dtype: Any) -> None:
    assert Config(dtype=dtype).dtype is torch.bfloat16


@pytest.mark.parametrize("device", [torch.device("cuda", 1), "cuda:1"], ids=["object", "name"])
def test_device_is_stored_as_text(device: Any) -> None:
    assert Config(device=device).device == "cuda:1"


def test_lm_dtype_is_stored_as_text() -> None:
    assert Config(lm_dtype=torch.float16).lm_dtype == "float16"  # pyright: ignore


def test_paths_are_stored_as_text(tmp_path: Path) -> None:
    assert Config(run_dir=tmp_path).run_dir == str(tmp_path)  # pyright: ignore


def test_whole_floats_and_numpy_numbers_become_ints() -> None:
    cfg = Config(total_training_tokens=2e6, k=np.int64(8))  # pyright: ignore
    assert (type(cfg.total_training_tokens), cfg.total_training_tokens) == (int, 2_000_000)
    assert (type(cfg.k), cfg.k) == (int, 8)


def test_int_is_accepted_for_a_float() -> None:
    assert Config(checkpoint_every_minutes=1).checkpoint_every_minutes == 1


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"k": "32"}, "k: found '32' (str), expected a whole number; write 32 without quotes"),
        ({"k": True}, "k: found True (bool), expected a whole number; change it"),
        ({"k": 2.5}, "k: found 2.5 (float), expected a whole number; change it"),
        (
            {"log_to_wandb": 1},
            "log_to_wandb: found 1 (int), expected True or False; change it",
        ),
        ({"d_in": "x"}, "d_in: found 'x' (str), expected a whole number or None; change it"),
        ({"lr": "1e-4"}, "lr: found '1e-4' (str), expected a number or auto; write 1e-4"),
        ({"lr": "fast"}, "lr: found 'fast', expected one of a number, auto; choose one"),
        ({"run_dir": 3}, "run_dir: found 3 (int), expected text; change it"),
        ({"lr": math.nan}, "lr: found nan, expected a finite number; change it"),
        ({"lr": 0}, "lr: found 0, expected more than 0; change it"),
        ({"store_batch_size": -1}, "store_batch_size: found -1, expected more than 0; change it"),
        ({"l1_coefficient": -1.0}, "l1_coefficient: found -1.0, expected 0 or more; change it"),
        ({"adam_beta2": 1}, "adam_beta2: found 1, expected at least 0 and less than 1; change it"),
        ({"context_size": 1}, "context_size: found 1, expected at least 2; change it"),
        (
            {"sequence_separator_token": "eot"},
            "sequence_separator_token: found 'eot', expected one of a whole number, auto, bos, eos, sep, none; did",
        ),
        ({"n_eval_batches": -1}, "n_eval_batches: found -1, expected 0 or more; change it"),
        ({"dataset_path": ["a", ""]}, "dataset_path: found '', expected some text"),
        ({"dataset_path": ["a", 1]}, "dataset_path: found 1 (int) in a list, expected text"),
        ({"lr": ["1e-3", 2e-3]}, "lr: found '1e-3' (str) in a list, expected a number"),
        ({"use_cached_activations": "live"}, "use_cached_activations: found 'live', expected one of True or False, th"),
        ({"k": [[8, 16]]}, "k: found [[8, 16]] (list), expected a whole number"),
        (
            {"dataset_path": ["a", "b"], "dataset_weights": (0.5, 0)},
            "dataset_weights: found 0, expected more than 0; change it",
        ),
        ({"dataset_weights": 0.5}, "dataset_weights: found 0.5 (float), expected a list of numbers; change it"),
        ({"sequence_separator_token": -1}, "sequence_separator_token: found -1, expected 0 or more; change it"),
        ({"model_name": " "}, "model_name: found ' ', expected some text; give one or leave"),
        ({"run_name": ".."}, "run_name: found '..', expected a name that a folder can have"),
        (
            {"b_dec_init_method": "geometric-median"},
            "b_dec_init_method: found 'geometric-median', expected one of geometric_median, mean, "
            "zeros; did you mean 'geometric_median'?",
        ),
        (
            {"dtype": "floot32"},
            "dtype: found 'floot32', expected one of float32, bfloat16, float16, float64; did you mean 'float32'?",
        ),
        (
            {"device": "gpu"},
            "device: found 'gpu', expected one of cpu, cuda, mps, xpu; did you mean 'cuda'?",
        ),
        (
            {"lr_scheduler_name": "cosine"},
            "lr_scheduler_name: found 'cosine', expected one of constant, constantwithwarmup, "
            "linearwarmupdecay, cosineannealing, cosineannealingwarmup, "
            "cosineannealingwarmrestarts; did you mean 'cosineannealing'?",
        ),
    ],
    ids=lambda part: "-".join(f"{n}={v}" for n, v in part.items()) if type(part) is dict else "",
)
def test_wrong_value_is_named_with_what_to_do(values: dict[str, Any], line: str) -> None:
    assert only_problem(**values).startswith(line)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {"architecture": "topk", "d_in": 8, "k": 33},
            "k: found 33, expected at most d_sae = 32 (d_in 8 x expansion_factor 4); lower k or raise expansion_factor",
        ),
        (
            # 3 x 32 x 128 = 12288 rows; the half is 6144; two batches of 8192 need 4 passes of 4096
            {"n_batches_in_buffer": 3, "train_batch_size": 8192},
            "train_batch_size: found 8192, expected at most 6144, half of the buffer of 12288 rows "
            "(n_batches_in_buffer 3 x store_batch_size 32 x context_size 128); "
            "raise n_batches_in_buffer to 4 or lower train_batch_size",
        ),
        (
            {"total_training_tokens": 4095},
            "total_training_tokens: found 4095, expected at least one batch of "
            "train_batch_size = 4096; raise it or lower train_batch_size",
        ),
        (
            {"use_ghost_grads": True, "auxk_coefficient": 0.03},
            "use_ghost_grads: found True with auxk_coefficient 0.03, expected one remedy for dead "
            "latents; set use_ghost_grads to False or auxk_coefficient to 0",
        ),
        ({"mesh": (2, 4)}, "mesh: found [2, 4] with parallel data, expected none; leave it out, or set data,latents"),
        (
            {"parallel": "data,latents"},
            "mesh: found [] with parallel data,latents, expected two numbers: groups of processes, which share the "
            "rows, and processes of a group, which share the latents; give for instance 2,4 for 2 groups of 4",
        ),
        (
            {"run_dir": "a", "checkpoint_path": "b"},
            "checkpoint_path: found 'b' with run_dir 'a', expected one of them (checkpoint_path is "
            "the old name of run_dir); leave checkpoint_path out",
        ),
        (
            {"dataset_path": ["a", "b"], "dataset_weights": [1, 2, 3]},
            "dataset_weights: found 3 weights with a list of 2 paths in dataset_path, expected one for each path; "
            "change one of them",
        ),
        (
            {"dataset_path": "a", "dataset_weights": [1]},
            "dataset_weights: found 1 weight with the single path 'a' in dataset_path, expected none, or a list of "
            "paths; change one of them",
        ),
    ],
    ids=["k", "batch", "tokens", "remedies", "mesh", "no mesh", "run_dir", "weights", "weights_of_one"],
)
def test_values_that_do_not_fit_together(values: dict[str, Any], line: str) -> None:
    assert only_problem(**values) == line


@pytest.mark.parametrize(
    "values",
    [
        {"d_in": 4, "k": 32},  # standard has no k
        {"architecture": "topk", "d_in": 8, "k": 32},  # k = d_sae
        {"d_in": None, "architecture": "topk", "k": 10**6},  # d_sae is not known yet
        {"n_batches_in_buffer": 2},  # the batch is exactly half of the buffer
        {"total_training_tokens": 4096},
        {"total_training_tokens": 4096, "lr_warm_up_steps": 10**6},
        {"auxk_coefficient": 0.03},
        {"auxk_coefficient": "auto", "use_ghost_grads": True},  # auto is 0 for standard
        {"run_dir": "a", "checkpoint_path": "a"},
        {"lr_warm_up_steps": 0, "n_eval_batches": 0, "l1_coefficient": 0},
        {"checkpoint_every_minutes": None},
    ],
    ids=str,
)
def test_values_at_the_edge_are_accepted(values: dict[str, Any]) -> None:
    cfg = Config(**values)
    assert {name: getattr(cfg, name) for name in values} == values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"matryoshka_widths": (8, 16)},
            "matryoshka_widths: found (8, 16) with architecture standard, expected matryoshka; set one of them",
        ),
        (
            {"architecture": "matryoshka", "matryoshka_widths": (16, 8), "d_in": 512},
            "matryoshka_widths: found [16, 8], expected sizes of nested dictionaries, ascending and at most d_sae = "
            "2048; for instance d_sae / 8, d_sae / 4 and d_sae / 2",
        ),
        (
            {"multi_topk": True},
            "multi_topk: found True with architecture standard, expected topk; set one of them",
        ),
        (
            {"target_l0": 50.0},
            "target_l0: found 50.0 with architecture standard, expected jumprelu; set one of them",
        ),
        (
            {"architecture": "jumprelu", "d_in": 8, "target_l0": 17},
            "target_l0: found 17, expected at most 16, half of d_sae: thresholds are above 0, and so is about half of "
            "all pre-activations; lower it, or raise expansion_factor",
        ),
        (
            {"architecture": "jumprelu", "d_in": 8, "jumprelu_init_l0": 20.5},
            "jumprelu_init_l0: found 20.5, expected at most 16, half of d_sae: thresholds are above 0, and so is about "
            "half of all pre-activations; lower it, or raise expansion_factor",
        ),
        (
            {"optimizer": "adam8bit", "feature_sampling_method": "l2"},
            "optimizer: found adam8bit with feature_sampling_method l2, expected adam or signum, whose moments can be "
            "reset latent by latent; change one of them",
        ),
        (
            {"optimizer": "adam8bit", "dtype": "float64"},
            "optimizer: found adam8bit with dtype float64, expected adam or signum; change one of them",
        ),
    ],
)
def test_option_of_another_architecture_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        Config(**values)
    assert str(raised.value).splitlines()[1:] == [message]


@pytest.mark.parametrize(
    "bounds", [(1,), (-1,), (5, 5), (0, 128, 0), (1, 2, 3, 4), (200, 300), (128, None), (None, 0), (None, None, 0)]
)
def test_a_slice_without_positions_is_refused(bounds: tuple[int, ...]) -> None:
    assert only_problem(seqpos_slice=bounds).startswith(f"seqpos_slice: found {list(bounds)} with context_size 128")


@pytest.mark.parametrize(
    ("given", "bounds"),
    [
        *[(bounds, bounds) for bounds in [(), (1, 128), (-8, 128), (0, -1), (0, 128, 4), (-1, None), (None,)]],
        ("-1:", (-1, None)),
        ("1:", (1, None)),
        (":-1", (None, -1)),
        ("[::2]", (None, None, 2)),
        (" -3 : ", (-3, None)),
        (slice(-1, None), (-1, None)),
        (slice(4), (None, 4)),
        (slice(1, None, 2), (1, None, 2)),
        ([-1, None], (-1, None)),
    ],
)
def test_slices_of_positions(given: Any, bounds: tuple[int | None, ...]) -> None:
    cfg = Config(seqpos_slice=given)
    assert cfg.seqpos_slice == bounds
    assert config_from_dict(json.loads(json.dumps(config_to_dict(cfg)))) == cfg


@pytest.mark.parametrize("given", ["last", "a:b", -1, ["1", None], (1.5, None)])
def test_what_is_no_slice_is_refused(given: Any) -> None:
    assert "expected a list of whole numbers" in only_problem(seqpos_slice=given)


@pytest.mark.parametrize("separator", ["bos", "eos", 5])
def test_separator_is_refused_where_no_documents_are_joined(separator: Any) -> None:
    line = only_problem(pack_sequences=False, sequence_separator_token=separator)
    assert line.startswith(f"sequence_separator_token: found {separator!r} with pack_sequences False, expected auto")


def test_list_is_no_value_of_a_field_that_takes_one() -> None:
    assert only_problem(context_size=[64, 128]) == (
        "context_size: found [64, 128] (list), expected a whole number; give one value "
        "(lists are for hook_point, hook_point_layer, architecture, expansion_factor, k, l1_coefficient, lr, "
        "lr_warm_up_steps, seed)"
    )


def test_all_problems_come_in_one_error() -> None:
    with pytest.raises(ValueError) as caught:
        Config(k="x", lr=-1, optimizer="sgd", total_training_tokens=1)  # pyright: ignore
    lines = str(caught.value).splitlines()
    assert lines[0] == "LanguageModelSAERunnerConfig: 4 problems"
    assert [line.split(":")[0] for line in lines[1:]] == [
        "k",
        "lr",
        "optimizer",
        "total_training_tokens",
    ]


def test_unknown_keyword_answers_with_the_nearest_field() -> None:
    with pytest.raises(TypeError, match="l1_coeficient: .* did you mean 'l1_coefficient'?"):
        Config(l1_coeficient=1)  # pyright: ignore


def test_unknown_keywords_are_named_all_at_once() -> None:
    with pytest.raises(TypeError) as caught:
        Config(learning_rate=1, zzz=2)  # pyright: ignore
    assert str(caught.value).splitlines() == [
        "learning_rate: not a field of LanguageModelSAERunnerConfig; did you mean 'lr'?",
        "zzz: not a field of LanguageModelSAERunnerConfig; see the files of sae_training/config for the fields",
    ]


def test_signature_shows_the_fields() -> None:
    assert tuple(inspect.signature(Config).parameters) == FIELD_NAMES


def test_replace_checks_again_and_keeps_the_rest() -> None:
    cfg = Config(d_in=None, architecture="topk", k=64, lr="auto", dtype=torch.float64)
    filled = dataclasses.replace(cfg, d_in=256)
    assert (filled.d_sae, filled.k, filled.dtype) == (1024, 64, torch.float64)
    with pytest.raises(ValueError, match="at most d_sae = 16"):
        dataclasses.replace(cfg, d_in=4)


def test_finished_config_has_no_problems() -> None:
    assert problems(Config(dtype=torch.bfloat16)) == []


def test_rules_ask_only_for_fields_and_all_are_asked_of_a_run() -> None:
    named = {name for rule in (*OF_SINGLE, *OF_LISTS) for name in parameters(rule)}
    assert named <= {*FIELD_NAMES, "d_sae"}


def test_sizes_follow_from_the_fields() -> None:
    cfg = Config(d_in=768, total_training_tokens=10_000, train_batch_size=4096, n_batches_in_buffer=20)
    assert cfg.d_sae == 3072
    assert cfg.total_training_steps == 2
    assert cfg.buffer_rows == cfg.tokens_per_buffer == 81_920


def test_d_sae_is_unknown_without_d_in() -> None:
    assert Config(d_in=None).d_sae is None


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({}, "2048-L1-0.001-LR-0.0003-Tokens-2.000e+06"),
        ({"architecture": "topk"}, "2048-K-32-LR-0.0003-Tokens-2.000e+06"),
        ({"d_in": None, "lr": "auto"}, "4x-L1-0.001-LR-auto-Tokens-2.000e+06"),
        ({"run_name": "mine"}, "mine"),
    ],
    ids=["standard", "topk", "unknown width", "given"],
)
def test_run_name(values: dict[str, Any], name: str) -> None:
    assert Config(**values).resolved_run_name == name


def test_layer_is_filled_into_the_hook_point() -> None:
    cfg = Config(hook_point="blocks.{layer}.hook_resid_post", hook_point_layer=8)
    assert cfg.resolved_hook_point == "blocks.8.hook_resid_post"


@pytest.mark.parametrize(
    ("values", "lr"),
    [
        ({"lr": 1e-4}, 1e-4),
        # 2e6 tokens are 488 steps of 4096; d_sae = 512 * 4 = 2**11, so sqrt(d_sae / 2**14) is 8**-0.5
        ({"lr": "auto"}, 3.7e-3 * 8**0.5 / (488 / 250) ** 0.5),
        ({"lr": "auto", "architecture": "topk", "total_training_tokens": 4096 * 25_000}, 3.7e-4 * 8**0.5),
        ({"lr": "auto", "total_training_tokens": 4096 * 100, "expansion_factor": 32}, 3.7e-3),  # a short run
        ({"lr": "auto", "total_training_tokens": 4096 * 100, "expansion_factor": 1}, 1e-2),  # the most there is
    ],
    ids=["number", "standard", "topk", "short", "narrow"],
)
def test_resolved_lr(values: dict[str, Any], lr: float) -> None:
    assert Config(**values).resolved_lr == pytest.approx(lr)


def test_automatic_lr_asks_for_d_in() -> None:
    cfg = Config(lr="auto", d_in=None)
    with pytest.raises(ValueError, match="^lr: found 'auto' with d_in None"):
        _ = cfg.resolved_lr


@pytest.mark.parametrize(("steps", "warm_up"), [(1, 0), (40, 10), (4000, 1000), (10**6, 1000)], ids=str)
def test_automatic_warm_up_is_a_quarter_and_at_most_a_thousand(steps: int, warm_up: int) -> None:
    cfg = Config(lr_warm_up_steps="auto", total_training_tokens=4096 * steps)
    assert cfg.resolved_lr_warm_up_steps == warm_up


def test_given_warm_up_is_kept() -> None:
    assert Config(lr_warm_up_steps=7).resolved_lr_warm_up_steps == 7


def test_lr_end_is_a_tenth_unless_given() -> None:
    assert Config(lr=5e-4).lr_end_value == pytest.approx(5e-5)
    assert Config(lr=5e-4, lr_end=0.0).lr_end_value == 0.0


@pytest.mark.parametrize(
    ("values", "coefficient"),
    [
        ({"auxk_coefficient": 0.5}, 0.5),
        ({"auxk_coefficient": "auto"}, 0.0),
        ({"auxk_coefficient": "auto", "architecture": "topk"}, 0.25),
    ],
    ids=["number", "standard", "topk"],
)
def test_resolved_auxk_coefficient(values: dict[str, Any], coefficient: float) -> None:
    assert Config(**values).resolved_auxk_coefficient == coefficient


@pytest.mark.parametrize(("d_in", "auxk_k"), [(1, 1), (256, 128), (512, 256), (576, 256), (768, 512), (4096, 2048)])
def test_automatic_auxk_k_is_a_power_of_two_near_half_of_d_in(d_in: int, auxk_k: int) -> None:
    assert Config(d_in=d_in).resolved_auxk_k == auxk_k


def test_given_auxk_k_needs_no_d_in() -> None:
    assert Config(d_in=None, auxk_k=100).resolved_auxk_k == 100


def test_automatic_auxk_k_asks_for_d_in() -> None:
    with pytest.raises(ValueError, match="^auxk_k: found None with d_in None"):
        _ = Config(d_in=None).resolved_auxk_k


def test_evals_come_every_ten_logged_rows_unless_given() -> None:
    assert Config(wandb_log_frequency=30).eval_every == 300
    assert Config(eval_every_steps=7).eval_every == 7


def test_weights_of_a_cache_are_checked_too() -> None:
    with pytest.raises(ValueError, match="dataset_weights: found 1 weight with a list of 2 paths"):
        CacheActivationsRunnerConfig(dataset_path=["a", "b"], dataset_weights=(1.0,))
    cfg = CacheActivationsRunnerConfig(dataset_path=("a", "b"), dataset_weights=[1, 2])  # pyright: ignore
    assert (cfg.dataset_path, cfg.dataset_weights) == (["a", "b"], (1, 2))


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {"hook_point_layer": [0, 1]},
            r"hook_point: found 'blocks.0.hook_mlp_out' with layers \[0, 1\], expected {layer}",
        ),
        ({"seqpos_slice": (5, 5)}, r"seqpos_slice: found \[5, 5\] with context_size 128"),
        ({"shard_size_mb": 0}, "shard_size_mb: found 0, expected more than 0"),
        ({"context_size": 1}, "context_size: found 1, expected at least 2"),
    ],
)
def test_config_of_a_cache_is_checked_as_a_run_is(values: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=f"^CacheActivationsRunnerConfig: 1 problem\n{line}"):
        CacheActivationsRunnerConfig(**values)


def test_every_field_that_may_be_a_list_has_a_label_for_the_names_of_autoencoders() -> None:
    hints = field_types(Config)
    forms = {name: {typing.get_origin(option) for option in list_types(hint)} for name, hint in hints.items()}
    assert {name for name, of in forms.items() if of == {list, tuple}} == {*LABELS}


# ----------------------------------------------------------------------------------------- defaults in proportion


@pytest.mark.parametrize("tokens", [50_000, 60_000, 100_000, 300_000, 1_000_000, 2_000_000, 10**9])
@pytest.mark.parametrize("several", [{}, {"architecture": "topk", "k": [8, 16, 32]}])
def test_open_buffer_and_evaluation_are_in_proportion_to_the_run(tokens: int, several: dict[str, Any]) -> None:
    cfg = Config(total_training_tokens=tokens, **several)
    rows = cfg.total_training_steps * cfg.tokens_per_step
    assert cfg.buffer_rows <= rows / 3
    evaluation = cfg.n_eval_batches * cfg.passes_of_an_eval_batch
    least = cfg.n_eval_batches == 1
    assert least or evaluation <= (rows / (cfg.store_batch_size * cfg.context_size) + evaluation) / 5
    assert cfg.n_batches_in_buffer <= 20
    assert cfg.n_eval_batches <= 10
    assert cfg.passes_of_an_eval_batch == (5 if several else 3)


@pytest.mark.parametrize(
    ("tokens", "batches", "eval_batches"), [(4096, 2, 1), (60_000, 4, 1), (300_000, 20, 6), (2_000_000, 20, 10)]
)
def test_open_sizes_of_some_runs(tokens: int, batches: int, eval_batches: int) -> None:
    cfg = Config(total_training_tokens=tokens)
    assert (cfg.n_batches_in_buffer, cfg.n_eval_batches) == (batches, eval_batches)


def test_given_sizes_stay_and_open_ones_follow_the_run() -> None:
    given = Config(total_training_tokens=60_000, n_batches_in_buffer=20, n_eval_batches=10)
    assert (given.n_batches_in_buffer, given.n_eval_batches) == (20, 10)
    short = Config(total_training_tokens=60_000)
    long = dataclasses.replace(short, total_training_tokens=2_000_000)
    assert (long.n_batches_in_buffer, long.n_eval_batches) == (20, 10)
    larger_steps = dataclasses.replace(short, train_batch_size=16_384)
    assert larger_steps.n_batches_in_buffer == 8
    stored = config_from_dict(json.loads(json.dumps(config_to_dict(short))))
    assert dataclasses.replace(stored, total_training_tokens=2_000_000).n_batches_in_buffer == 4


def test_cache_holds_out_what_any_run_may_ask_for() -> None:
    assert CacheActivationsRunnerConfig(total_training_tokens=4096).n_eval_batches == 10


@pytest.mark.parametrize(
    ("given", "kept"), [(range(3), (0, 3)), (range(2, 9, 3), (2, 9, 3)), (slice(1, None), (1, None))]
)
def test_positions_may_be_a_range(given: Any, kept: tuple[int | None, ...]) -> None:
    assert Config(d_in=8, seqpos_slice=given).seqpos_slice == kept
