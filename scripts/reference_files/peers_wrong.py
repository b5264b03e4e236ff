# pyright: reportMissingImports=false
"""Print the table of docs/formats.md of files that other programs read wrongly or not at all, and this one does not.

    python -m venv V && V/bin/pip install sae-lens==6.54.12
    PYTHONPATH=.:tests V/bin/python scripts/reference_files/peers_wrong.py tests/reference_files

Run it in an environment of each peer (eai-sparsify==1.3.3, dictionary-learning==0.1.0 and llamascopium==2.0.0b34 too),
whose rows it gives. Expected values are those of the program that wrote the file, or of its formula
(expected.safetensors). The peers' own loaders read the same files; only their downloads are replaced by the folder
here. A row is printed as it comes out, also if the peer is right. Units of Llama Scope's activations differ between
programs: of its files the activations are counted that are above zero and should not be, or the reverse.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_training.sparse_autoencoder import SparseAutoencoder

Peer = Callable[[Path, Tensor], tuple[Tensor, Tensor]]
Maker = Callable[[Path, Path], Path]
"""Makes a folder of files within the second folder, from the reference files in the first."""

EXPECTED = "expected.safetensors"
LLAMA_SCOPE = "llama_scope"


def saelens(path: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    from sae_lens import SAE

    sae = SAE.load_from_disk(path)
    return sae.encode(x), sae(x)


def saelens_of_model(path: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Its HookedSAETransformer, which encodes what the model computes at the hook, here `x`."""
    from sae_lens import SAE, HookedSAETransformer
    from transformer_lens import HookedTransformerConfig

    sae = SAE.load_from_disk(path)
    config = HookedTransformerConfig(
        n_layers=4, d_model=x.shape[1], n_ctx=len(x), d_head=4, n_heads=2, d_vocab=4, act_fn="relu", seed=0
    )
    model = HookedSAETransformer(config)
    model.add_hook(sae.cfg.metadata.hook_name, lambda value, hook: x.unsqueeze(0))
    _, cache = model.run_with_cache_with_saes(torch.zeros(1, len(x), dtype=torch.long), saes=[sae])
    ends = ("hook_sae_acts_post", "hook_sae_recons")
    acts, out = (next(value[0] for name, value in cache.items() if name.endswith(end)) for end in ends)
    return acts, out


def saelens_converted(loader: str, folder: str = "") -> Peer:
    """Its loader of a release on the hub, with the hub's files from here."""

    def read(path: Path, x: Tensor) -> tuple[Tensor, Tensor]:
        from sae_lens import SAE
        from sae_lens.loading import pretrained_sae_loaders as loaders

        place = path if path.is_dir() else path.parent
        inner = folder or place.name
        root = place.parents[inner.count("/")]
        loaders.hf_hub_download = lambda repo_id, filename, subfolder="", **_: str(root / subfolder / filename)  # type: ignore
        function, is_scope = getattr(loaders, loader), loader.startswith(LLAMA_SCOPE)

        def convert(path: Path, device: str, cfg_overrides: Any) -> tuple[Any, Any]:
            if "disk" in loader:
                return function(path, device)
            overrides = cfg_overrides if is_scope else {}
            if "gemma" in loader:  # sizes that it knows by the model's name
                overrides = dict(zip(("d_in", "d_sae"), np.load(place / "params.npz")["W_enc"].shape, strict=True))
            return function("google/gemma-scope-2b-pt-res", inner, cfg_overrides=overrides)[:2]

        sae = SAE.load_from_disk(path, dtype="float32", converter=convert)
        if is_scope:  # as from_pretrained does, which has the factor in its registry
            sae.fold_activation_norm_scaling_factor(math.sqrt(x.shape[1]) / llama_scope_norm(path))
        return sae.encode(x), sae(x)

    return read


def llama_scope_norm(path: Path) -> float:
    """The mean norm of inputs, in hyperparams.json of 2024 or among the weights of 2025."""
    about = path / "hyperparams.json"
    if about.is_file():
        return json.loads(about.read_text())["dataset_average_activation_norm"]["in"]
    tensors = load_file(path / "sae_weights.safetensors")
    return next(t.item() for name, t in tensors.items() if name.startswith("dataset_average_activation_norm"))


def sparsify(path: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # whose kernels need a GPU
    from sparsify import SparseCoder

    coder = SparseCoder.load_from_disk(path, device="cpu")
    with torch.autocast("cpu", enabled=False):
        top = coder.encode(x)
        out = coder.decode(top.top_acts, top.top_indices)
    return torch.zeros(len(x), coder.num_latents).scatter(1, top.top_indices, top.top_acts), out


def dictionary_learning(path: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    from dictionary_learning.utils import load_dictionary

    dictionary, _ = load_dictionary(str(path), "cpu")
    acts = dictionary.encode(x)
    return acts, dictionary.decode(acts)


def llamascopium(path: Path, x: Tensor, fold: bool = False) -> tuple[Tensor, Tensor]:
    from llamascopium.models.sae import SparseAutoEncoder
    from make_llamascopium import run

    return run(SparseAutoEncoder.from_pretrained(str(path), fold_activation_scale=fold), x)


def made_skip_transcoder(references: Path, root: Path) -> Path:
    """One whose output is as wide as its input, as in a model: a copy of the reference file with random weights."""
    source, folder = references / "saelens-skip-transcoder", root / "skip"
    folder.mkdir()
    cfg = json.loads((source / "cfg.json").read_text())
    tensors, expected = load_file(source / "sae_weights.safetensors"), load_file(source / EXPECTED)
    d_in, generator = cfg["d_in"], torch.Generator().manual_seed(0)
    for name, shape in {"W_dec": (cfg["d_sae"], d_in), "b_dec": (d_in,), "W_skip": (d_in, d_in)}.items():
        tensors[name] = torch.randn(shape, generator=generator)
    x, acts = expected["x"], expected["acts"]
    out = acts @ tensors["W_dec"] + tensors["b_dec"] + x @ tensors["W_skip"].T
    save_file(tensors, folder / "sae_weights.safetensors")
    save_file({"x": x, "acts": acts, "out": out}, folder / EXPECTED)
    (folder / "cfg.json").write_text(json.dumps(cfg | {"d_out": d_in}))
    (folder / "expected.json").write_text("{}")
    return folder


def made_as_by_train_sae(name: str, references: Path, root: Path) -> Path:
    """Saved as llamascopium's train_sae does: config.json of before training, and weights with the norm folded."""
    from llamascopium.models.sae import SparseAutoEncoder
    from make_llamascopium import run

    sae, x = SparseAutoEncoder.from_pretrained(str(references / name)), load_file(references / name / EXPECTED)["x"]
    folder = root / name
    folder.mkdir()
    sae.cfg.save_hyperparameters(folder)
    sae.save_pretrained(folder, fold_activation_scale=True)
    acts, out = run(sae, x)  # now of norm_activation inference: nothing is left to do
    save_file({"x": x, "acts": acts, "out": out}, folder / EXPECTED)
    (folder / "expected.json").write_text(json.dumps({"given": {"norm_factor": 1.0}}))
    return folder


CASES: list[tuple[str, str, str | Maker, str, Peer]] = [
    ("sae_lens", "sae-lens", "saelens-checkpoint-batchtopk", "a checkpoint of batchtopk", saelens),
    ("sae_lens", "sae-lens", "saelens-checkpoint-standard-scaled", "a checkpoint with activation_scaler.json", saelens),
    ("sae_lens", "sae-lens", "saelens-checkpoint-standard-whitened", "a checkpoint with whitening", saelens),
    ("sae_lens", "sae-lens", "saelens-v3-tanh-relu", "cfg.json of version 3 with tanh-relu", saelens),
    ("sae_lens", "sae-lens", "saelens-v5-finetuned", "scaling factors of decode", saelens),
    ("sae_lens", "sae-lens", "saelens-v5-log-threshold", "log_threshold", saelens),
    ("sae_lens", "sae-lens", made_skip_transcoder, "a skip transcoder in HookedSAETransformer", saelens_of_model),
    ("sae_lens", "sae-lens", "sparsify-topk", "sparsify's files", saelens_converted("sparsify_disk_loader")),
    (
        "sae_lens", "sae-lens", "dictionary_learning-autoencoder-new", "dictionary_learning's AutoEncoderNew",
        saelens_converted("dictionary_learning_sae_huggingface_loader_1"),
    ),
    (
        "sae_lens", "sae-lens", "gemma_scope_1-embedding", "Gemma Scope's autoencoder of embeddings",
        saelens_converted("gemma_2_sae_huggingface_loader", "embedding/width_4k/average_l0_6"),
    ),
    (
        "sae_lens", "sae-lens", "llama_scope-2024-jumprelu", "Llama Scope, with decoder rows not of norm 1",
        saelens_converted("llama_scope_sae_huggingface_loader"),
    ),
    (
        "sae_lens", "sae-lens", "llama_scope-2025-jumprelu", "Llama Scope R1, with decoder rows not of norm 1",
        saelens_converted("llama_scope_r1_distill_sae_huggingface_loader"),
    ),
    ("sparsify", "eai-sparsify", "sparsify-legacy-signed", "`signed` of July 2024", sparsify),
    (
        "dictionary_learning", "dictionary-learning", "dictionary_learning-topk-without-k",
        "top-k without the buffer k", dictionary_learning,
    ),
    ("dictionary_learning", "dictionary-learning", "dictionary_learning-backup-topk", "a backup", dictionary_learning),
    (
        "llamascopium", "llamascopium", "llama_scope-topk-folded-after-its-config", "topk as train_sae saves it",
        llamascopium,
    ),
    (
        "llamascopium", "llamascopium", partial(made_as_by_train_sae, "llama_scope-relu"), "relu as train_sae saves it",
        llamascopium,
    ),
    (
        "llamascopium", "llamascopium", partial(made_as_by_train_sae, "llama_scope-jumprelu"),
        "jumprelu as train_sae saves it", llamascopium,
    ),
    (
        "llamascopium", "llamascopium", "llama_scope-jumprelu", "jumprelu as its analyses load it, folded",
        partial(llamascopium, fold=True),
    ),
    (
        "llamascopium", "llamascopium", "llama_scope-jumprelu-transcoder",
        "a jumprelu transcoder as its analyses load it, folded", partial(llamascopium, fold=True),
    ),
]  # fmt: skip


def difference(read: Peer, folder: Path, path: Path) -> str:
    """Of activations and of outputs, from what the originating program or formula gives; or the error."""
    expected = load_file(folder / EXPECTED)
    x, acts, out = expected["x"], expected["acts"], expected["out"]
    try:
        found_acts, found_out = read(path, x)
    except Exception as error:  # whatever the peer raises is what the row says
        return f"not read: {type(error).__name__}: {' '.join(str(error).split())[:90]}".replace("|", "/")
    if folder.name.startswith(LLAMA_SCOPE):
        wrong, active = ((found_acts > 0) != (acts > 0)).sum(), (acts > 0).sum()
        off = (found_out - out).abs().max().item()
        return f"{wrong} of {active} on or off wrongly, and off by {off:.2g} of {out.abs().max().item():.2g}"
    off = [(found - known).abs().max().item() for found, known in ((found_acts, acts), (found_out, out))]
    sizes = [known.abs().max().item() for known in (acts, out)]
    return f"off by {off[0]:.2g} of {sizes[0]:.2g}, and {off[1]:.2g} of {sizes[1]:.2g}"


def ours(given: dict[str, Any]) -> Peer:
    def read(path: Path, x: Tensor) -> tuple[Tensor, Tensor]:
        sae = SparseAutoencoder.load_from_pretrained(path, **given)
        return sae.encode(x), sae.reconstruct(x)

    return read


@torch.no_grad()
def main() -> None:
    import reference  # pyright: ignore[reportMissingImports] - tests/reference.py

    warnings.simplefilter("ignore")
    references = Path(sys.argv[1]).resolve()
    print("| file | read by | activations, and outputs | here |\n|---|---|---|---|")
    for module, package, name, what, read in CASES:
        if importlib.util.find_spec(module) is None:
            continue
        where = name if isinstance(name, str) else "made by the script"
        folder = references / name if isinstance(name, str) else name(references, Path(tempfile.mkdtemp()))
        facts = reference.facts_of(folder)
        path = folder / facts.get("path", "")
        theirs, mine = (difference(way, folder, path) for way in (read, ours(facts.get("given", {}))))
        print(f"| {what} ({where}) | {package} {version(package)} | {theirs} | {mine} |")


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
