"""The config of a small run on the bundled language model."""

from __future__ import annotations

from typing import Any

# 12 steps of 64 tokens on 4 refills of a small buffer: every part of a run happens at least once.
SMALL_RUN: dict[str, Any] = {
    "model_name": "demo",
    "hook_point": "blocks.1.hook_resid_post",
    "d_in": 256,
    "lm_dtype": "float32",
    "dataset_path": "demo",
    "context_size": 16,
    "expansion_factor": 2,
    "b_dec_init_method": "mean",
    "total_training_tokens": 768,
    "train_batch_size": 64,
    "store_batch_size": 4,
    "n_batches_in_buffer": 4,
    "lr_warm_up_steps": 4,
    "n_eval_batches": 1,
    "wandb_log_frequency": 2,
    "eval_every_steps": 5,
    "feature_sampling_window": 4,
    "dead_feature_window": 3,
    "log_to_wandb": False,
    "run_name": "run",
}
