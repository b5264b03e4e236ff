"""Measures the embedded model on the held-out text and writes its README.md."""

from __future__ import annotations

import argparse
import math
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from sae_training.machine.precision import bfloat16_is_fast
from scripts.demo_data.corpus import Corpus, describe, write_atomically
from scripts.demo_data.tokens import END_OF_TEXT, encode, windows

PROMPTS = ("The whale", "Fellow citizens of the Senate", "And it came to pass", "Mrs. ", "Climate: ", "The wound ")


@torch.no_grad()
def mean_nll(model: LlamaForCausalLM, rows: Tensor) -> float:
    """Mean negative log-likelihood in nats a token, in float32."""
    model.eval()
    total = sum(model(input_ids=b, labels=b).loss.item() * len(b) for b in rows.split(16))
    model.train()
    return total / len(rows)


def unigram_nll(train: Tensor, targets: Tensor, vocab_size: int) -> float:
    """Mean nats a token of the token frequencies of `train` with add-one smoothing."""
    counts = torch.bincount(train, minlength=vocab_size).double() + 1
    return float(-(counts / counts.sum()).log()[targets].mean())


@torch.no_grad()
def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, seed: int) -> str:
    """The prompt with 60 tokens drawn after it, as a Markdown quotation."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([tokenizer(END_OF_TEXT + prompt)["input_ids"]])
    for _ in range(60):
        odds = torch.softmax(model(input_ids=ids).logits[:, -1] / 0.7, dim=-1)
        ids = torch.cat([ids, torch.multinomial(odds, 1, generator=generator)], dim=1)
    return "> " + str(tokenizer.decode(ids[0, 1:])).replace("\n", "\n> ")


class Figures(NamedTuple):
    """Held-out tokens and bytes a token; nats a token of the model and of the unigram."""

    tokens: int
    token_bytes: float
    model: float
    unigram: float

    def row(self, nll: float) -> str:
        """Perplexity a token and bits a byte."""
        return f"{math.exp(nll):.2f} | {nll / math.log(2) / self.token_bytes:.3f}"


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, context: int) -> Figures:
    """Score the held-out text."""
    stream, held_out = encode(corpus.train, tokenizer), encode(corpus.held_out, tokenizer)
    rows = windows(held_out, context)
    token_bytes = sum(len(d.text.encode()) for d in corpus.held_out) / len(held_out)
    nlls = mean_nll(model, rows), unigram_nll(stream, rows[:, 1:], len(tokenizer))
    return Figures(rows[:, 1:].numel(), token_bytes, *nlls)


class Training(NamedTuple):
    """What the card says about the run; seconds are of CPU time."""

    steps: int
    tokens: int
    stream: int
    seconds: float
    loss: float


def write_model_card(corpus: Corpus, run: Training, args: argparse.Namespace) -> None:
    """Measure the model as it was saved and write README.md from the measurements."""
    folder = args.out / "model"
    model = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    figures = measure(model, tokenizer, corpus, args.context)
    model.eval()
    samples = "\n\n".join(sample(model, tokenizer, prompt, args.seed) for prompt in PROMPTS)
    c, epochs = model.config, run.tokens / run.stream
    precision = "bfloat16 autocast" if bfloat16_is_fast("cpu") else "float32"
    blocks = f"Muon (learning rate {args.muon_lr:g}) for the matrices of the blocks, " if args.muon_lr else ""
    card = f"""---
license: cc0-1.0
language: en
---
# The embedded demo language model

A Llama of {model.num_parameters():,} parameters: {c.num_hidden_layers} layers, d_model {c.hidden_size}, \
{c.num_attention_heads} heads, SwiGLU {c.intermediate_size}, context {args.context},
tied embeddings, byte-level BPE of {len(tokenizer):,} tokens. `{END_OF_TEXT}` is both BOS and EOS; the tokenizer does
not add it by itself, and every training context began with it. The model imitates the books it has read, and is of no
use beyond showing software at work.

| held-out text (see `../text/README.md`) | perplexity a token | bits a byte |
|---|---|---|
| this model | {figures.row(figures.model)} |
| token frequencies of the training text (unigram, add-one smoothing) | {figures.row(figures.unigram)} |

Both rows: the same {figures.tokens:,} tokens ({figures.token_bytes:.2f} bytes a token), \
in contexts of BOS + {args.context - 1} tokens.

**Data.** {describe(corpus.train)}; {run.stream:,} tokens of public-domain text from package
registries: the sources are in `../text/README.md`.

**Licence.** CC0 1.0.

**Training.** {run.steps:,} steps of {args.batch} contexts, {run.tokens:,} tokens ({epochs:.1f} epochs), \
{run.seconds / 60:.0f} CPU minutes.
{blocks}AdamW ({args.adam_lr:g}) for the rest, weight decay 0.1, 2% of
warm-up and a cosine to 0, {precision}; last training loss {run.loss:.3f} nats. Weights are stored in float16;
config.json asks for float32 arithmetic.

**Samples** (temperature 0.7):

{samples}

**How to remake it.** `python scripts/demo_data/train_demo_lm.py`, again and again until it says that it is finished.
Another machine or number of threads rounds otherwise, so a remade model is not bit-identical.
"""
    write_atomically(folder / "README.md", card.encode())
