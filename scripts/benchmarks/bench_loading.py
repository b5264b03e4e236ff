"""Memory and time of loading a large file: peak of the process over what it held before, relative to the weights.

    python scripts/benchmarks/bench_loading.py --gigabytes 4

Makes a sparse file of zeros (no room on the disk) in the layouts of SAELens, of this package, and of two .pt files,
loads it in a process of its own, and prints one JSON object a layout. `inspect` is timed on it too.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from sae_training.machine.interrupt import without_traceback

D_IN = 4096

CHILD = """
import json, resource, sys, time
from pathlib import Path
from sae_training.formats.inspection import inspect
from sae_training.sparse_autoencoder import SparseAutoencoder
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
path = Path(sys.argv[1])
start, held = time.perf_counter(), peak()
inspect(path)
inspected, of_headers = time.perf_counter() - start, peak() - held
start = time.perf_counter()
sae = SparseAutoencoder.load_from_pretrained(path)
n_bytes = sum(p.nbytes for p in sae.parameters())
print(json.dumps({"weights_bytes": n_bytes, "peak_over_weights": (peak() - held) / n_bytes,
    "load_seconds": time.perf_counter() - start, "inspect_seconds": inspected, "inspect_peak_bytes": of_headers}))
"""


def saelens(folder: Path, d_sae: int) -> Path:
    about = {"model_name": "gpt2", "hook_name": "blocks.3.hook_resid_pre", "sae_lens_version": "6.54.12"}
    values = {"architecture": "standard", "normalize_activations": "none", "apply_b_dec_to_input": True}
    cfg = {"d_in": D_IN, "d_sae": d_sae, "dtype": "float32", "metadata": about, **values}
    return write(folder, cfg, "sae_weights.safetensors", d_sae)


def native(folder: Path, d_sae: int) -> Path:
    cfg = {"d_in": D_IN, "expansion_factor": d_sae // D_IN, "architecture": "standard"}
    return write(folder, cfg, "sae.safetensors", d_sae)


def openai(folder: Path, d_sae: int) -> Path:
    """W_dec the other way than it lies in our memory. torch leaves the values out of the file."""
    shapes = {"encoder.weight": (d_sae, D_IN), "decoder.weight": (D_IN, d_sae), "latent_bias": (d_sae,)}
    return write_pt(folder, {name: torch.empty(shape) for name, shape in {**shapes, "pre_bias": (D_IN,)}.items()})


def mats(folder: Path, d_sae: int) -> Path:
    """W_enc the other way than it lies in our memory."""
    shapes = {"W_enc": (D_IN, d_sae), "W_dec": (d_sae, D_IN), "b_enc": (d_sae,), "b_dec": (D_IN,)}
    state = {name: torch.empty(shape) for name, shape in shapes.items()}
    return write_pt(folder, {"cfg": {"hook_point": "blocks.8.hook_resid_pre"}, "state_dict": state})


def write_pt(folder: Path, content: dict[str, Any]) -> Path:
    with torch.serialization.skip_data():
        torch.save(content, folder / "8.pt")
    return folder / "8.pt"


def write(folder: Path, cfg: dict[str, object], name: str, d_sae: int) -> Path:
    shapes = {"W_enc": [D_IN, d_sae], "W_dec": [d_sae, D_IN], "b_enc": [d_sae], "b_dec": [D_IN]}
    head, start = {}, 0
    for tensor, shape in shapes.items():
        end = start + 4 * math.prod(shape)
        head[tensor], start = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}, end
    text = json.dumps(head).encode()
    with (folder / name).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + start)
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4)
    args = parser.parse_args()
    d_sae = max(1, round(args.gigabytes * 1e9 / (8 * D_IN) / D_IN)) * D_IN
    for layout in (saelens, native, openai, mats):
        with tempfile.TemporaryDirectory() as folder:
            path = layout(Path(folder), d_sae)
            done = subprocess.run([sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        print(json.dumps({"layout": layout.__name__, "d_in": D_IN, "d_sae": d_sae, **json.loads(done.stdout)}))


if __name__ == "__main__":
    with without_traceback():
        main()
