"""Tokens that a tokenizer has and the model has not: only those that occur in a text matter."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import documents_of, make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from sae_training import cli
from sae_training.language_model.load import check_tokenizer_fits, load_language_model, load_tokenizer
from sae_training.text.stream import TokenStream

SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "llama": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
}
TOKENIZER = make_tokenizer(bos_token="<s>", eos_token="<s>")
N_IDS = len(TOKENIZER)
ADDED = st.lists(st.sampled_from(["<pad>", "<mask>", "<|user|>", "catdog", "zebra"]), unique=True, max_size=4)


def folder_of(path: Path, kind: str, tokenizer: Any, vocab_size: int = N_IDS, **config: Any) -> str:
    config = {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 0, **SIZES[kind], **config}
    pad = config.pop("pad_token_id", None)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    if pad is not None:  # as after `model.config.pad_token_id = tokenizer.pad_token_id`
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token_id": pad}))
    return str(path)


def padded() -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<|user|>"]})
    assert tokenizer.pad_token_id == N_IDS
    return tokenizer


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("in_config", [False, True])
def test_model_with_an_unused_added_token_is_loaded_and_trained_on(
    kind: str, in_config: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(tmp_path / "model", kind, padded(), pad_token_id=N_IDS if in_config else None)
    assert load_tokenizer(folder).pad_token_id == N_IDS
    (tmp_path / "text.txt").write_text("the cat sat on the mat and then it ran over the hill again " * 200)
    monkeypatch.chdir(tmp_path)
    words = ["train", folder, "text.txt", "--hook_point=blocks.1.hook_resid_pre", "--context_size=16", "--k=2"]
    words += ["--total_training_tokens=512", "--train_batch_size=64", "--store_batch_size=4", "--lm_dtype=float32"]
    words += ["--n_batches_in_buffer=4", "--n_eval_batches=1", "--expansion_factor=2"]
    assert cli.main(words) == 0, capsys.readouterr().err


def test_added_token_that_occurs_is_refused_with_its_id(tmp_path: Path) -> None:
    model = load_language_model(folder_of(tmp_path, "gpt2", padded()))
    text = documents_of(["the cat sat <pad> on the mat " * 20])
    stream = TokenStream(text, model.tokenizer, 8, vocab_size=model.cfg.d_vocab)
    with pytest.raises(ValueError, match=f"token id {N_IDS}, but the model's vocabulary has {N_IDS} ids"):
        stream.next_contexts(1)


def test_bos_that_the_model_lacks_may_be_left_out() -> None:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    text = ["the cat sat on the mat"]
    with pytest.raises(ValueError, match=rf"for BOS, token id {N_IDS}, .*, or set prepend_bos to False"):
        TokenStream(documents_of(text), tokenizer, 4, vocab_size=N_IDS)
    assert TokenStream(documents_of(text), tokenizer, 4, False, vocab_size=N_IDS).next_contexts(1).max() < N_IDS


def test_tokenizer_of_chess_moves_needs_no_letters(tmp_path: Path) -> None:
    vocabulary = {move: i for i, move in enumerate(["e4", "e5", "Nf3", "Nc6"])}
    backend = Tokenizer(models.WordLevel(vocabulary))  # pyright: ignore[reportCallIssue]
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")
    model = load_language_model(folder_of(tmp_path, "gpt2", tokenizer, vocab_size=4))
    stream = TokenStream(documents_of(["e4 e5 Nf3 Nc6 " * 5]), model.tokenizer, 4, False, vocab_size=model.cfg.d_vocab)
    assert stream.next_contexts(1).tolist() == [[0, 1, 2, 3]]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    special=ADDED,
    plain=ADDED,
    words=st.lists(st.sampled_from(["the", "cat", "zebra", "<pad>", "<mask>", "catdog", "x"]), min_size=8, max_size=12),
    n_known=st.integers(N_IDS - 2, N_IDS + 5),
)
def test_a_text_is_refused_if_and_only_if_an_id_occurs_that_the_model_lacks(
    special: list[str], plain: list[str], words: list[str], n_known: int
) -> None:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_tokens(plain)
    check_tokenizer_fits(tokenizer, n_known, "model")
    text = " ".join(words)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = TokenStream(documents_of([text]), tokenizer, 4, False, vocab_size=n_known)
    if max(ids) < n_known:
        assert stream.next_contexts(1)[0].tolist() == ids[:4]
    else:
        with pytest.raises(ValueError, match=f"token id {max(ids)}, but the model's vocabulary has {n_known} ids"):
            stream.next_contexts(1)
