from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.language_model.load import load_language_model
from sae_training.language_model.twins import switch_in
from sae_training.lm_runner import run_config


@pytest.mark.slow
def test_compiled_runs_repeat_exactly_and_the_next_run_is_not_compiled(
    small_config: Callable[..., LanguageModelSAERunnerConfig],
) -> None:
    model = load_language_model("demo", lm_dtype="float32")
    first = run_config(small_config(compile_lm=True), model)
    again = run_config(small_config(compile_lm=True, run_name="again"), model)
    assert torch.equal(first.sae.W_dec, again.sae.W_dec)
    assert all((switch := switch_in(block)) is not None and switch.compiled is not None for block in model.blocks)
    run_config(small_config(run_name="eager", total_training_tokens=64), model)
    assert all((switch := switch_in(block)) is not None and switch.compiled is None for block in model.blocks)
