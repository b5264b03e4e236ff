# pyright: reportMissingImports=false
"""Write the files of circuit-tracer that the tests read, with what it computes from them itself.

python -m venv V && V/bin/pip install circuit-tracer==0.5.0
V/bin/python scripts/reference_files/make_circuit_tracer.py tests/reference_files
"""

from __future__ import annotations

import shutil
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch
from circuit_tracer.transcoder.activation_functions import JumpReLU
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder
from common import D_IN, D_SAE, inputs, random_tensors, save_expected
from safetensors.torch import load_file, save_file
from torch import nn

CONFIG = """model_name: Qwen/Qwen3-0.6B
model_kind: transcoder_set
feature_input_hook: mlp.hook_in
feature_output_hook: hook_mlp_out
scan: made
"""

VARIANTS = ("relu", "jumprelu", "skip", "decoder-by-columns")


@torch.no_grad()
def write(root: Path, name: str, seed: int) -> None:
    folder = root / f"circuit_tracer-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    act = JumpReLU(torch.zeros(D_SAE), 0.1) if name == "jumprelu" else nn.ReLU()
    transcoder = SingleLayerTranscoder(D_IN, D_SAE, act, layer_idx=3, skip_connection=name == "skip")
    transcoder = transcoder.float()
    transcoder.load_state_dict(random_tensors(transcoder.state_dict(), seed))
    file = folder / "layer_3.safetensors"
    transcoder.to_safetensors(str(file))
    if name == "decoder-by-columns":  # the layout of June 2025
        state = load_file(file)
        save_file(state | {"W_dec": state["W_dec"].T.contiguous()}, file)
    (folder / "config.yaml").write_text(CONFIG)
    x = inputs()
    acts = transcoder.encode(x)
    facts = {
        "package": f"circuit-tracer {version('circuit-tracer')}",
        "torch": torch.__version__,
        "path": "",
        "variant": f"transcoder {name.replace('-', ' ')}",
        "by": "circuit-tracer",
    }
    save_expected(folder, x, acts, transcoder.decode(acts, x), facts)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        for number, variant in enumerate(VARIANTS):
            write(Path(sys.argv[1]), variant, 500 + number)
