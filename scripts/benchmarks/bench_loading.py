"""Memory and time of loading a large file: peak of the process over what it held before, relative to the weights.

    python scripts/benchmarks/bench_loading.py --gigabytes 4

Makes a file in the layouts of SAELens, of this package, of two .pt files, of Gemma Scope (.npz, stored and deflated, in
float32 and float16) and of mats (.pkl and .pkl.gz), loads it in a process of its own, and prints one JSON object a
layout. `inspect` is timed on it too. The first four are sparse files of zeros, which take no room on the disk; the
others are of random values, as packed zeros are refused, and take as much as the weights. --layouts chooses some.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
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


def npz(folder: Path, d_sae: int, dtype: str = "float32", compression: int = zipfile.ZIP_STORED) -> Path:
    shapes = {
        "W_enc": (D_IN, d_sae),
        "W_dec": (d_sae, D_IN),
        "threshold": (d_sae,),
        "b_enc": (d_sae,),
        "b_dec": (D_IN,),
    }
    with zipfile.ZipFile(folder / "params.npz", "w", compression, compresslevel=1) as archive:
        for name, shape in shapes.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                head = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, head)
                for part in random_parts(math.prod(shape), dtype):
                    file.write(part.tobytes())
    return folder


def random_parts(n_values: int, dtype: str) -> Iterator[np.ndarray]:
    """Values again and again, from further apart than what packs them looks back."""
    some = np.random.default_rng(0).standard_normal(2**20).astype(dtype)
    for first in range(0, n_values, len(some)):
        yield some[: n_values - first]


def pickled(folder: Path, d_sae: int, packed: bool = False) -> Path:
    """What pickle.dump writes for the same as `mats`, in a process of its own, which takes twice the weights."""
    path = folder / f"final.pkl{'.gz' if packed else ''}"
    subprocess.run([sys.executable, "-c", PICKLING, str(path), str(D_IN), str(d_sae)], check=True)
    return path


PICKLING = """
import gzip, pickle, sys
import torch
path, d_in, d_sae = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,)}
state = {name: torch.randn(2**20).repeat(-(-torch.Size(s).numel() // 2**20))[: torch.Size(s).numel()].view(s).clone()
         for name, s in shapes.items()}
with (gzip.open(path, "wb", compresslevel=1) if path.endswith(".gz") else open(path, "wb")) as file:
    pickle.dump({"cfg": {"hook_point": "blocks.8.hook_resid_pre"}, "state_dict": state}, file)
"""

LAYOUTS: dict[str, Callable[[Path, int], Path]] = {
    "saelens": saelens,
    "native": native,
    "openai": openai,
    "mats": mats,
    "npz": npz,
    "npz-float16": partial(npz, dtype="float16"),
    "npz-deflated": partial(npz, compression=zipfile.ZIP_DEFLATED),
    "npz-float16-deflated": partial(npz, dtype="float16", compression=zipfile.ZIP_DEFLATED),
    "pkl": pickled,
    "pkl.gz": partial(pickled, packed=True),
}


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
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    args = parser.parse_args()
    d_sae = max(1, round(args.gigabytes * 1e9 / (8 * D_IN) / D_IN)) * D_IN
    for layout in args.layouts:
        with tempfile.TemporaryDirectory() as folder:
            path = LAYOUTS[layout](Path(folder), d_sae)
            done = subprocess.run([sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        print(json.dumps({"layout": layout, "d_in": D_IN, "d_sae": d_sae, **json.loads(done.stdout)}))


if __name__ == "__main__":
    with without_traceback():
        main()
