"""Makes one whole training run of sae-lens' own runner, in its environment, for `bench_loop.py --peer`.

Reads one JSON object from stdin and prints one to stdout; what the package prints goes to stderr.

    {"model": FOLDER, "layer": 8, "dataset": FILE.jsonl, "variant": "default", "d_in": 576, "d_sae": 4608, "k": 32,
     "steps": 58, "config": {...}}

`config` holds fields of its LanguageModelSAERunnerConfig (batch, context and store batch sizes). Other fields are those
of VARIANTS, or the defaults; nothing goes to wandb or to disk. The run reads the residual stream after block `layer`.
An untimed run of WARM_UP_STEPS steps comes first, and loads the model. The reply:

    seconds            of runner.run()
    first_step_after_s of them before the first step: the first filling of the buffer
    forward_s, step_s  of them in the language model and in the autoencoder's steps
    steps, rows, rows_harvested, first_loss, last_loss, lm_dtype, version, torch, python, threads, config
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

WARM_UP_STEPS = 2
BFLOAT16_WEIGHTS = {"center_writing_weights": False, "dtype": "bfloat16"}  # the first is what it sets by default

# Fields of its config; "huggingface" is the one that stops an ordinary transformers model at the hook, in the
# precision of the folder.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "autocast": {"autocast_lm": True},
    "bfloat16": {"model_from_pretrained_kwargs": BFLOAT16_WEIGHTS},
    "huggingface": {"model_class_name": "AutoModelForCausalLM"},
}


@dataclass
class Watch:
    """What happens inside a run, seen through its two main functions."""

    forward_s: float = 0.0
    step_s: float = 0.0
    first_step_at: float | None = None
    rows: int = 0
    rows_harvested: int = 0
    losses: list[torch.Tensor] = field(default_factory=list)

    def around_forward(self, get_activations: Callable[..., Any]) -> Callable[..., Any]:
        def call(store: Any, tokens: torch.Tensor) -> Any:
            start = time.perf_counter()
            activations = get_activations(store, tokens)
            self.forward_s += time.perf_counter() - start
            self.rows_harvested += tokens.numel()
            return activations

        return call

    def around_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def call(trainer: Any, batch: torch.Tensor) -> Any:
            start = time.perf_counter()
            if self.first_step_at is None:
                self.first_step_at = start
            output = step(trainer, batch)
            self.step_s += time.perf_counter() - start
            self.rows += len(batch)
            self.losses.append(output.loss.detach())
            return output

        return call


def answer(request: dict[str, Any]) -> dict[str, Any]:
    if not Path(request["dataset"]).is_file():
        raise ValueError(f"dataset: found {request['dataset']!r}, expected a .jsonl file")
    if not (Path(request["model"]) / "config.json").is_file():
        raise ValueError(f"model: found {request['model']!r}, expected a folder in Hugging Face layout")
    let_in(request["model"])
    warm, _, _ = train(request, WARM_UP_STEPS)
    runner, watch, (start, end) = train(request, request["steps"], warm.model)
    assert watch.first_step_at is not None
    return {
        "seconds": end - start,
        "first_step_after_s": watch.first_step_at - start,
        "forward_s": watch.forward_s,
        "step_s": watch.step_s,
        "steps": len(watch.losses),
        "rows": watch.rows,
        "rows_harvested": watch.rows_harvested,
        "first_loss": watch.losses[0].item(),
        "last_loss": watch.losses[-1].item(),
        "lm_dtype": str(next(runner.model.parameters()).dtype).removeprefix("torch."),
        "version": version("sae-lens"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "config": json.loads(json.dumps(runner.cfg.to_dict(), default=str)),
    }


def let_in(folder: str) -> None:
    """Make HookedTransformer accept `folder` as a model's name.

    It can read a folder of Llama's architecture, but refuses names that are not in its list.
    """
    from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES

    OFFICIAL_MODEL_NAMES.append(folder)


def train(request: dict[str, Any], steps: int, model: Any = None) -> tuple[Any, Watch, tuple[float, float]]:
    """Train, and return the runner, what was seen in its run, and when runner.run() began and ended."""
    from datasets import load_dataset
    from sae_lens import LanguageModelSAETrainingRunner  # pyright: ignore[reportMissingImports]
    from sae_lens.training.activations_store import ActivationsStore  # pyright: ignore[reportMissingImports]
    from sae_lens.training.sae_trainer import SAETrainer  # pyright: ignore[reportMissingImports]

    cfg = runner_config(request, steps)
    dataset: Any = load_dataset("json", data_files=request["dataset"], split="train", streaming=cfg.streaming)
    runner = LanguageModelSAETrainingRunner(cfg, override_dataset=dataset, override_model=model)
    watch = Watch()
    with (
        patch.object(ActivationsStore, "get_activations", watch.around_forward(ActivationsStore.get_activations)),
        patch.object(SAETrainer, "step", watch.around_step(SAETrainer.step)),
    ):
        start = time.perf_counter()
        runner.run()
        return runner, watch, (start, time.perf_counter())


def runner_config(request: dict[str, Any], steps: int) -> Any:
    from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig  # pyright: ignore[reportMissingImports]
    from sae_lens.saes.topk_sae import TopKTrainingSAEConfig  # pyright: ignore[reportMissingImports]

    fields = VARIANTS[request["variant"]] | request["config"]
    hooked = fields.get("model_class_name", "HookedTransformer") == "HookedTransformer"
    layer = request["layer"]
    return LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(d_in=request["d_in"], d_sae=request["d_sae"], k=request["k"]),
        model_name=request["model"],
        hook_name=f"blocks.{layer}.hook_resid_post" if hooked else f"model.layers.{layer}",
        dataset_path=request["dataset"],
        is_dataset_tokenized=False,
        training_tokens=steps * fields["train_batch_size_tokens"],
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=None,
        **fields,
    )


def main() -> None:
    reply_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    try:
        reply = answer(json.load(sys.stdin))
    except Exception as error:
        traceback.print_exc()
        reply = {"error": f"{type(error).__name__}: {error}"}
    reply_to.write(json.dumps(reply) + "\n")
    reply_to.flush()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):  # the program that started this one says what there is to say
        main()
