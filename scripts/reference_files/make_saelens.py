"""Write the files of SAELens that the tests read, with what SAELens itself computes from them.

    python -m venv V && V/bin/pip install sae-lens==6.54.12
    V/bin/python scripts/reference_files/make_saelens.py tests/reference_files

Each folder holds cfg.json and sae_weights.safetensors as SAELens writes them, and its encode and decode of 12 rows.
Files of versions 3 to 5 are written to their layout, and the expected values are SAELens 6's reading of them, unless it
reads them otherwise than they were written: then they are the formula of the old version, and `expected.json` says so.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import sae_lens
import torch
from common import D_IN, D_OUT, D_SAE, inputs, random_tensors, save_expected
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening
from safetensors.torch import load_file, save_file

METADATA = {"model_name": "gpt2-small", "hook_name": "blocks.3.hook_resid_pre", "context_size": 64, "prepend_bos": True}
NORMS = ("constant_norm_rescale", "layer_norm", "expected_average_only_in")
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")

RESULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("standard", {}),
    "standard-not-centred": ("standard", {"apply_b_dec_to_input": False}),
    "standard-wide": ("standard", {"d_sae": D_SAE + 3}),
    "standard-narrow": ("standard", {"d_sae": D_IN - 3}),
    "standard-square": ("standard", {"d_sae": D_IN}),
    "standard-bfloat16": ("standard", {"dtype": "bfloat16"}),
    "standard-hook-z": ("standard", {"reshape_activations": "hook_z"}),
    "topk": ("topk", {"k": 4}),
    "topk-rescale": ("topk", {"k": 4, "rescale_acts_by_decoder_norm": True}),
    "topk-more-than-positive": ("topk", {"k": 14}),
    "abstopk": ("abstopk", {"k": 4}),
    "abstopk-rescale": ("abstopk", {"k": 4, "rescale_acts_by_decoder_norm": True}),
    "jumprelu": ("jumprelu", {}),
    "jumprelu-not-centred": ("jumprelu", {"apply_b_dec_to_input": False}),
    "gated": ("gated", {}),
    "matching-pursuit": ("matching_pursuit", {"residual_threshold": 0.5, "max_iterations": 5}),
    "matching-pursuit-not-centred": ("matching_pursuit", {"apply_b_dec_to_input": False}),
    "matching-pursuit-repeats": ("matching_pursuit", {"stop_on_duplicate_support": False, "residual_threshold": 0.0}),
    **{name.replace("_", "-"): (name, {"d_out": D_OUT, "apply_b_dec_to_input": False}) for name in TRANSCODERS},
    **{f"standard-{norm.replace('_', '-')}": ("standard", {"normalize_activations": norm}) for norm in NORMS},
    "jumprelu-layer-norm": ("jumprelu", {"normalize_activations": "layer_norm"}),
    "gated-constant-norm-rescale": ("gated", {"normalize_activations": "constant_norm_rescale"}),
    "topk-rescale-layer-norm": (
        "topk",
        {"k": 4, "rescale_acts_by_decoder_norm": True, "normalize_activations": "layer_norm"},
    ),
    "transcoder-layer-norm": (
        "transcoder",
        {"d_out": D_OUT, "apply_b_dec_to_input": False, "normalize_activations": "layer_norm"},
    ),
}

CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "checkpoint-batchtopk": ("batchtopk", {"k": 4}),
    "checkpoint-batchtopk-plain": ("batchtopk", {"k": 4, "rescale_acts_by_decoder_norm": False}),
    "checkpoint-matryoshka": ("matryoshka_batchtopk", {"k": 4, "matryoshka_widths": [4, 8, D_SAE]}),
    "checkpoint-standard-scaled": ("standard", {"normalize_activations": "expected_average_only_in"}),
    "checkpoint-topk-scaled": ("topk", {"k": 4, "normalize_activations": "expected_average_only_in"}),
    "checkpoint-gated-scaled": ("gated", {"normalize_activations": "expected_average_only_in"}),
    "checkpoint-jumprelu-scaled": ("jumprelu", {"normalize_activations": "expected_average_only_in"}),
    "checkpoint-standard-whitened": ("standard", {"normalize_activations": "covariance_whitening"}),
    "checkpoint-gated-whitened-not-centred": (
        "gated",
        {"normalize_activations": "covariance_whitening", "apply_b_dec_to_input": False},
    ),
    "checkpoint-topk-whitened": ("topk", {"k": 4, "normalize_activations": "covariance_whitening"}),
}


def facts(**more: Any) -> dict[str, Any]:
    return {"package": f"sae-lens {sae_lens.__version__}", "torch": torch.__version__, **more}


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def metadata(architecture: str, options: dict[str, Any]) -> dict[str, Any]:
    about = dict(METADATA)
    if options.get("reshape_activations") == "hook_z":
        about["hook_name"] = "blocks.3.attn.hook_z"
    if architecture in TRANSCODERS:
        about |= {"hook_name": "blocks.3.ln2.hook_normalized", "hook_name_out": "blocks.3.hook_mlp_out"}
    return about


def made(get: Any, architecture: str, options: dict[str, Any], seed: int) -> Any:
    """An autoencoder of SAELens with random weights."""
    sae_class, config_class = get(architecture)
    values = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "architecture": architecture,
        **options,
    }
    cfg = config_class.from_dict({**values, "architecture": architecture, "metadata": metadata(architecture, options)})
    sae = sae_class(cfg)
    sae.load_state_dict(random_tensors(sae.state_dict(), seed))
    if architecture == "matching_pursuit":  # its training keeps unit norms, without which the pursuit diverges
        sae.W_dec.data /= sae.W_dec.norm(dim=1, keepdim=True)
    return sae.eval()


@torch.no_grad()
def run(sae: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Latent activations, and the output of forward: with skip connection, brought back from normalised rows."""
    return sae.encode(x), sae(x)


def write_result(folder: Path, architecture: str, options: dict[str, Any], seed: int) -> None:
    sae = made(get_sae_class, architecture, options, seed)
    sae.save_model(folder)
    x = inputs()
    if options.get("reshape_activations") == "hook_z":
        sae.turn_on_forward_pass_hook_z_reshaping()
        x = x.view(-1, 2, D_IN // 2)
    if options.get("dtype") == "bfloat16":  # computed in float32 from the rounded weights
        sae = sae.float()
        sae.dtype = torch.float32
    save_expected(folder, x, *run(sae, x), facts(variant=f"6, {architecture}", by="sae-lens"))


@torch.no_grad()
def write_checkpoint(folder: Path, architecture: str, options: dict[str, Any], seed: int) -> None:
    """A checkpoint, with what its training gave the activations; expected is that, the training class, and back."""
    sae = made(get_sae_training_class, architecture, options, seed)
    x = inputs()
    sae.save_model(folder)
    scaler = ActivationScaler()
    if options.get("normalize_activations") == "expected_average_only_in":
        scaler.scaling_factor = 2.7
    if options.get("normalize_activations") == "covariance_whitening":
        matrix = torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        mean = torch.linspace(-0.5, 0.7, D_IN, dtype=torch.float64)
        scaler.whitening = ActivationWhitening(mean, matrix, torch.linalg.inv(matrix))
    if options.get("normalize_activations"):
        scaler.save(str(folder / "activation_scaler.json"))
    if "batchtopk" not in architecture:
        z = scaler.scale(x)
        acts, out = sae.encode(z), scaler.unscale(sae.decode(sae.encode(z)))
    else:  # as saved at the end of training, when the threshold takes the place of the batch
        sae.save_inference_model(folder / "result")
        result = sae_lens.SAE.load_from_disk(folder / "result")
        acts, out = run(result, x)
        shutil.rmtree(folder / "result")
    save_expected(folder, x, acts, out, facts(variant=f"6, checkpoint of {architecture}", by="sae-lens"))


# ------------------------------------------------------------------------------------------------------ old versions

OLD = {
    "d_in": D_IN,
    "d_sae": D_SAE,
    "dtype": "torch.float32",
    "device": "cuda",
    "model_name": "gpt2-small",
    "hook_name": "blocks.3.hook_resid_pre",
    "hook_layer": 3,
    "hook_head_index": None,
    "activation_fn_str": "relu",
    "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False,
    "sae_lens_training_version": "3.1.0",
    "prepend_bos": True,
    "dataset_path": "Skylion007/openwebtext",
    "context_size": 128,
    "normalize_activations": False,
}
V4 = {
    "sae_lens_training_version": "4.0.0",
    "normalize_activations": "none",
    "architecture": "standard",
    "dataset_trust_remote_code": True,
    "activation_fn_kwargs": {},
    "neuronpedia_id": None,
    "model_from_pretrained_kwargs": {"center_writing_weights": False},
    "seqpos_slice": [None],
}
OLD_FILES: dict[str, dict[str, Any]] = {
    "v3": {},
    "v3-scaled": {"normalize_activations": True},
    "v3-tanh-relu": {"activation_fn_str": "tanh-relu"},
    "v4": V4,
    "v4-jumprelu": V4 | {"architecture": "jumprelu"},
    "v4-gated": V4 | {"architecture": "gated"},
    "v5-topk-as-activation": V4 | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}},
    "v5-topk": V4 | {"architecture": "topk", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}},
    "v5-layer-norm": V4 | {"normalize_activations": "layer_norm"},
    "v5-finetuned": V4 | {"finetuning_scaling_factor": True},
    "v5-ones": V4,
    "v5-log-threshold": V4 | {"architecture": "jumprelu"},
}


@torch.no_grad()
def write_old(folder: Path, options: dict[str, Any], seed: int) -> None:
    cfg = OLD | options
    name = folder.name.removeprefix("saelens-")
    architecture = "topk" if cfg["activation_fn_str"] == "topk" else cfg.get("architecture", "standard")
    k = {"k": cfg["activation_fn_kwargs"]["k"]} if architecture == "topk" else {}
    norm = cfg["normalize_activations"] if isinstance(cfg["normalize_activations"], str) else "none"
    sae = made(get_sae_class, architecture, {**k, "normalize_activations": norm}, seed)
    state, x = dict(sae.state_dict()), inputs()
    acts, out, by = *run(sae, x), "sae-lens"
    if name == "v3-tanh-relu":
        acts = torch.relu((x - state["b_dec"]) @ state["W_enc"] + state["b_enc"]).tanh()
        out, by = acts @ state["W_dec"] + state["b_dec"], "the formula of sae-lens 3 (sae-lens 6 reads relu)"
    if name == "v5-finetuned":
        factors = random_tensors({"scaling_factor": torch.ones(D_SAE)}, seed + 1)["scaling_factor"]
        state["scaling_factor"] = factors
        out = (acts * factors) @ state["W_dec"] + state["b_dec"]
        by = "the formula of sae-lens 5 (sae-lens 6 does not load it)"
    if name == "v5-ones":
        state["scaling_factor"] = torch.ones(D_SAE)
    if name == "v5-log-threshold":
        state["log_threshold"] = state.pop("threshold").log()
        by = "sae-lens 6 from exp(log_threshold) (sae-lens 6 does not load log_threshold)"
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_expected(folder, x, acts, out, facts(variant=f"{name.replace('-', ', ', 1)}", by=by))


def main(root: Path) -> None:
    seed = 0
    for files, write in ((RESULTS, write_result), (CHECKPOINTS, write_checkpoint)):
        for name, (architecture, options) in files.items():
            seed += 1
            write(fresh(root / f"saelens-{name}"), architecture, options, seed)
    for name, options in OLD_FILES.items():
        seed += 1
        write_old(fresh(root / f"saelens-{name}"), options, seed)
    for path in sorted(root.glob("saelens-*")):
        shapes = {key: tuple(tensor.shape) for key, tensor in load_file(path / "sae_weights.safetensors").items()}
        expected = load_file(path / "expected.safetensors")
        print(path.name, shapes, f"L0 {(expected['acts'] != 0).float().sum(1).mean():.1f}")


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main(Path(sys.argv[1]))
