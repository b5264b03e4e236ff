# pyright: reportMissingImports=false
"""Write files of dictionary_learning's forks, which no registry has, with what their own code computes from them.

    git -C crosscoder_learning checkout b2363ed       # of github.com/science-of-finetuning/crosscoder_learning
    git -C older checkout 48debb2                     # of github.com/jkminder/dictionary_learning
    PYTHONPATH=crosscoder_learning V/bin/python scripts/reference_files/make_forks.py tests b2363ed
    PYTHONPATH=older V/bin/python scripts/reference_files/make_forks.py tests 48debb2

V needs what dictionary-learning==0.1.0 needs. The older code scales all places of a crosscoder by one number.
"""

from __future__ import annotations

import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from common import D_IN, D_SAE, save_expected
from dictionary_learning.dictionary import (
    BatchTopKCrossCoder,
    BatchTopKSAE,
    CrossCoder,
    GatedAutoEncoder,
    JumpReluAutoEncoder,
)
from make_crosscoders import K, N, Numbers
from torch import Tensor

BY = {
    "b2363ed": "crosscoder_learning of science-of-finetuning at b2363ed",
    "48debb2": "dictionary_learning of jkminder at 48debb2",
}
COMPILED = "_orig_mod."
SOME_PLACES: dict[str, Any] = {"encoder_layers": [0, 2], "init_with_transpose": False}

VARIANTS: dict[str, dict[str, tuple[Any, dict[str, Any]]]] = {
    "b2363ed": {
        "crosscoder": (CrossCoder, {}),
        "compiled": (CrossCoder, {"file": "model_final.pt"}),
        "normalised": (CrossCoder, {"target_rms": 2.5}),
        "some-places": (CrossCoder, {"target_rms": 2.5, **SOME_PLACES}),
        "batchtopk": (BatchTopKCrossCoder, {"code_normalization": "CROSSCODER", "target_rms": 2.5}),
        "batchtopk-sae": (BatchTopKCrossCoder, {"code_normalization": "SAE"}),
        "batchtopk-mixed": (BatchTopKCrossCoder, {"code_normalization": "MIXED"}),
        "batchtopk-none": (BatchTopKCrossCoder, {"code_normalization": "NONE"}),
        "batchtopk-decoupled": (BatchTopKCrossCoder, {"code_normalization": "DECOUPLED"}),
        "sae": (BatchTopKSAE, {}),
        "sae-normalised": (BatchTopKSAE, {"target_rms": 2.5}),
        "sae-pickle": (BatchTopKSAE, {"target_rms": 2.5, "file": "model_final.pt"}),
        "gated": (GatedAutoEncoder, {}),
        "jumprelu": (JumpReluAutoEncoder, {}),
    },
    "48debb2": {
        "normalised-together": (CrossCoder, {"target_rms": 2.5}),
        "batchtopk-normalised-together": (BatchTopKCrossCoder, {"code_normalization": "SAE", "target_rms": 2.5}),
    },
}


def values(name: str, tensor: Tensor, numbers: Numbers) -> Tensor:
    if name == "threshold":
        return numbers.between(0.3, 1.2, *tensor.shape)
    if tensor.dtype.is_floating_point and not name.startswith(("activation", "target")):
        if name == "decoder.weight":
            return numbers.decoder(*tensor.shape, axis=1)
        return numbers.tensor(*tensor.shape, size=0.3 if tensor.ndim == 1 or "bias" in name else 0.5)
    return tensor


def write(root: Path, name: str, kind: Any, options: dict[str, Any], seed: int, commit: str) -> None:
    is_sae, options = kind not in (CrossCoder, BatchTopKCrossCoder), dict(options)
    folder = root / ("reference_files" if is_sae else "reference_crosscoders") / f"dictionary_learning_fork-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    numbers, file = Numbers(seed), options.pop("file", "")
    x = numbers.rows()
    x = x[:, 0].contiguous() if is_sae else x
    if "target_rms" in options:
        options["activation_mean"] = numbers.tensor(*x.shape[1:])
        options["activation_std"] = numbers.between(0.2, 1, *x.shape[1:])
    sizes = {"activation_dim": D_IN, "dict_size": D_SAE}
    sizes |= {} if is_sae else {"num_layers": N}
    sizes |= {"k": K} if kind in (BatchTopKSAE, BatchTopKCrossCoder) else {}
    made = kind(**sizes, **options)
    made.load_state_dict({part: values(part, tensor, numbers) for part, tensor in made.state_dict().items()})
    if name == "compiled":  # as of before normalisers and code_normalization
        old = {part: tensor for part, tensor in made.state_dict().items() if part.startswith(("encoder", "decoder"))}
        torch.save({COMPILED + part: tensor for part, tensor in old.items()}, folder / file)
    elif file:
        torch.save(made.state_dict(), folder / file)
    else:
        made.save_pretrained(folder)
        (folder / "README.md").unlink()
    loaded = made if file else kind.from_pretrained(str(folder), from_hub=True)
    acts = loaded.encode(x)
    facts = {"package": BY[commit], "by": BY[commit], "path": file, "variant": name.replace("-", " ")}
    save_expected(folder, x, acts, loaded.decode(acts), facts | {"torch": torch.__version__})


if __name__ == "__main__":
    with suppress(KeyboardInterrupt), torch.no_grad():
        which = sys.argv[2]
        first = 900 if which == "b2363ed" else 950
        for number, (variant, (its_kind, its_options)) in enumerate(VARIANTS[which].items()):
            write(Path(sys.argv[1]), variant, its_kind, its_options, first + number, which)
