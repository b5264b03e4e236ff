"""Releases of one file for each place: told apart by tensors and names, which give the place and k."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import reference

from sae_training.sparse_autoencoder import SparseAutoencoder


@pytest.mark.parametrize(
    ("name", "model", "hook_point", "is_centred"),
    [
        ("goodfire-relu-bfloat16", "meta-llama/Llama-3.1-8B-Instruct", "blocks.19.hook_resid_post", False),
        ("qwen_scope-topk", "Qwen/Qwen3-1.7B-Base", "blocks.7.hook_resid_post", False),
        ("attention_saes-hook-z", "gpt2-small", "blocks.5.attn.hook_z", True),
        ("qresearch-relu", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "blocks.19.hook_resid_post", False),
    ],
)
def test_names_give_model_and_place(name: str, model: str, hook_point: str, is_centred: bool) -> None:
    cfg = reference.loaded(reference.ROOT / name).cfg
    assert (cfg.model_name, cfg.hook_point, cfg.apply_b_dec_to_input) == (model, hook_point, is_centred)
    assert cfg.file_dtype == ("bfloat16" if "bfloat16" in name else "float32")


def test_k_of_qwen_scope_is_in_the_repository_s_name_or_is_given(tmp_path: Path) -> None:
    folder = reference.ROOT / "qwen_scope-topk"
    shutil.copy(folder / reference.facts_of(folder)["path"], tmp_path)
    path = tmp_path / "layer7.sae.pt"
    with pytest.raises(ValueError, match=r"k \(L0_<k> in the repository's name\) is missing.*give k="):
        SparseAutoencoder.load_from_pretrained(path)
    cfg = SparseAutoencoder.load_from_pretrained(path, k=3).cfg
    assert (cfg.k, cfg.model_name, cfg.hook_point) == (3, "unknown", "blocks.7.hook_resid_post")


def test_an_attention_sae_needs_its_config_to_be_known(tmp_path: Path) -> None:
    shutil.copy(reference.ROOT / "attention_saes-hook-z" / "gpt2-small_L5_Hcat_z.pt", tmp_path)
    with pytest.raises(ValueError, match="found a dict with 'W_enc'.*which no format that is read has"):
        SparseAutoencoder.load_from_pretrained(tmp_path / "gpt2-small_L5_Hcat_z.pt")


def test_an_attention_sae_by_another_name_is_known_by_its_config(tmp_path: Path) -> None:
    folder = reference.ROOT / "attention_saes-hook-z"
    shutil.copy(folder / "gpt2-small_L5_Hcat_z.pt", tmp_path / "mine.pt")
    config = {"act_name": "blocks.5.attn.hook_z", "model_name": "gelu-2l", "seq_len": 64}
    (tmp_path / "mine_cfg.json").write_text(json.dumps(config))
    for path in (tmp_path / "mine.pt", folder / "gpt2-small_L5_Hcat_z.pt"):
        assert SparseAutoencoder.load_from_pretrained(path).cfg.model_processing == "default"
    cfg = SparseAutoencoder.load_from_pretrained(tmp_path / "mine.pt").cfg
    assert (cfg.model_name, cfg.context_size, cfg.hook_point_layer) == ("gelu-2l", 64, 5)
