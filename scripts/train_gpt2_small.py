"""Trains a ReLU + L1 autoencoder with ghost gradients on GPT-2 small's residual stream and 300M tokens of OpenWebText.

Needs the Hugging Face hub and a CUDA device. An interrupted run goes on when the script is started again.
"""

from __future__ import annotations

import torch

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.lm_runner import language_model_sae_runner
from sae_training.machine.interrupt import without_traceback


def config() -> LanguageModelSAERunnerConfig:
    return LanguageModelSAERunnerConfig(
        # What is encoded: the residual stream that enters block 2
        model_name="gpt2-small",
        hook_point="blocks.2.hook_resid_pre",
        hook_point_layer=2,
        d_in=768,
        dataset_path="Skylion007/openwebtext",
        is_dataset_tokenized=False,
        context_size=128,
        # The autoencoder: 49,152 latents
        expansion_factor=64,
        b_dec_init_method="geometric_median",
        dtype=torch.float32,
        # Training: 73,242 steps
        total_training_tokens=300_000_000,
        train_batch_size=4096,
        lr=4e-4,
        lr_scheduler_name="constantwithwarmup",
        lr_warm_up_steps=5000,
        l1_coefficient=8e-5,
        # Shuffling: 128 forward passes of 32 contexts fill the buffer with 524,288 activations, 1.6 GB in float32
        store_batch_size=32,
        n_batches_in_buffer=128,
        # Dead latents: silent for 5,000 steps
        use_ghost_grads=True,
        dead_feature_window=5000,
        feature_sampling_window=1000,
        dead_feature_threshold=1e-6,
        # Records
        log_to_wandb=True,
        wandb_project="mats_sae_training_gpt2",
        wandb_entity=None,
        wandb_log_frequency=100,
        checkpoint_path="checkpoints",
        n_checkpoints=10,
        # Machine
        device="cuda",
        seed=42,
    )


if __name__ == "__main__":
    with without_traceback():
        language_model_sae_runner(config())
