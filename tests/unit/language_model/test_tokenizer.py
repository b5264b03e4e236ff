from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from texts import make_tokenizer, stories
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from sae_training.activations_store import ActivationsStore
from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.language_model.load import load_language_model, load_tokenizer

KINDS = ["gpt2", "llama", "gpt_neox", "qwen2", "gemma", "opt"]
GAMES = [[0, 0, 0, 5, 0, 0, 7, 9, 1, 2], [3, 0, 0, 4, 4]]


def model_folder(folder: Path, kind: str = "gpt2", vocab_size: int = 320, tied: bool = True) -> str:
    """A folder of weights and config.json, without a tokenizer."""
    sizes: dict[str, Any] = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 32, "head_dim": 8,
    }  # fmt: skip
    if kind == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    config = AutoConfig.for_model(
        kind, **sizes, vocab_size=vocab_size, bos_token_id=0, eos_token_id=0, pad_token_id=0, tie_word_embeddings=tied
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def store(folder: str, dataset: datasets.Dataset, model: Any = None, **options: Any) -> ActivationsStore:
    cfg = LanguageModelSAERunnerConfig(
        model_name=folder, hook_point="blocks.0.hook_resid_post", d_in=16, context_size=5, store_batch_size=3,
        exclude_special_tokens=True, n_eval_batches=0, n_batches_in_buffer=1000, **options,
    )  # fmt: skip
    return ActivationsStore(cfg, load_language_model(folder) if model is None else model, dataset)


@pytest.mark.parametrize("kind", KINDS)
def test_folder_without_tokenizer_files_has_no_tokenizer(kind: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path, kind)
    assert load_language_model(folder).tokenizer is None
    with pytest.raises(FileNotFoundError, match="holds no tokenizer files"):
        load_tokenizer(folder)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_ids_are_read_as_they_are_and_one_warning_says_so(kind: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path, kind)
    with pytest.warns(UserWarning, match="has no tokenizer, so no BOS") as told:
        read = store(folder, datasets.Dataset.from_dict({"tokens": GAMES}))
        tokens = read.get_batch_tokens()
    assert len([one for one in told if issubclass(one.category, UserWarning)]) == 1
    assert tokens.flatten().tolist() == GAMES[0] + GAMES[1]
    assert bool(read.keeps(tokens).all()), "no id is special"


def test_text_is_refused_for_the_missing_tokenizer(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="has no tokenizer, but dataset_path .* holds text"):
        store(folder, datasets.Dataset.from_dict({"text": stories()}))


def test_made_up_tokenizer_of_a_model_that_is_passed_in_does_not_count(tmp_path: Path) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    folder = model_folder(tmp_path)
    model = TransformerBridge.boot_transformers(folder, device="cpu")
    assert model.tokenizer is not None
    with pytest.warns(UserWarning, match="has no tokenizer"):
        read = store(folder, datasets.Dataset.from_dict({"tokens": GAMES}), model)
    assert read.get_batch_tokens().flatten().tolist() == GAMES[0] + GAMES[1]


@pytest.mark.parametrize("unknown", [None, "<unk>"])
def test_end_token_that_the_tokenizer_lacks_is_not_made_up(unknown: str | None, tmp_path: Path) -> None:
    """TransformerLens sets <|endoftext|>, whose id is that of <unk>, or the first after the vocabulary."""
    folder = model_folder(tmp_path, vocab_size=400)
    backend = make_tokenizer().backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=unknown).save_pretrained(folder)
    tokenizer = load_language_model(folder).tokenizer
    assert tokenizer.bos_token is None and tokenizer.eos_token is None
    with pytest.warns(UserWarning, match="neither a BOS nor an EOS"):
        read = store(folder, datasets.Dataset.from_dict({"text": stories()}))
    assert int(read.get_batch_tokens().max()) < len(backend.get_vocab())


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_half_a_tokenizer_is_an_error(name: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    parts = json.loads(make_tokenizer().backend_tokenizer.to_str())["model"]
    merges = "\n".join(" ".join(pair) for pair in parts["merges"])
    (tmp_path / name).write_text(json.dumps(parts["vocab"]) if name == "vocab.json" else merges)
    with pytest.raises(ValueError, match=r"model_name: the tokenizer of .* could not be read"):
        load_language_model(folder)


def test_weights_that_the_files_lack_are_not_made_up(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "llama", tied=False)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lack the weights lm_head\.weight"):
        load_language_model(folder)
