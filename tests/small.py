"""The config of a small run on the bundled language model, that model's sizes, and what its text says."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from sae_training.demo_data import DEMO_MODEL

_MODEL = json.loads((DEMO_MODEL / "config.json").read_text(encoding="utf-8"))
D_IN, N_LAYERS, VOCAB = _MODEL["hidden_size"], _MODEL["num_hidden_layers"], _MODEL["vocab_size"]
D_HEAD = D_IN // _MODEL["num_attention_heads"]
D_SAE = 2 * D_IN  # of SMALL_RUN

# 12 steps of 64 tokens on 4 refills of a small buffer: every part of a run happens at least once.
SMALL_RUN: dict[str, Any] = {
    "model_name": "demo",
    "hook_point": "blocks.1.hook_resid_post",
    "d_in": D_IN,
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


def text_of(path: Path) -> str:
    """What a gzipped file of text holds."""
    return gzip.decompress(path.read_bytes()).decode()
