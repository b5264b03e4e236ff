"""Write a file of e2e_sae that the tests read, with what it computes from it itself.

Of the package, one file is run (models/sparsifiers.py), because its wheel lacks modules that the others import.
pip download --no-deps e2e-sae==2.1.1 and unpack it into FOLDER
python scripts/reference_files/make_e2e_sae.py tests/reference_files FOLDER
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from common import D_IN, D_SAE, inputs, random_tensors, save_expected

PLACES = ("blocks.2.hook_resid_pre", "blocks.6.hook_resid_pre")
CONFIG = "tlens_model_name: gpt2-small\nsaes:\n  dict_size_to_input_ratio: 2.0\n  sae_positions: [hook_resid_pre]\n"


def sparsifiers(folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location("sparsifiers", folder / "e2e_sae" / "models" / "sparsifiers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def write(root: Path, package: Path) -> None:
    folder = root / "e2e_sae-many-places"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    saes = torch.nn.ModuleDict({p.replace(".", "-"): sparsifiers(package).SAE(D_IN, D_SAE) for p in PLACES})
    for number, sae in enumerate(saes.values()):
        sae.load_state_dict(random_tensors(sae.state_dict(), 600 + number))
    torch.save(saes.state_dict(), folder / "samples_400000.pt")
    (folder / "final_config.yaml").write_text(CONFIG)
    x = inputs()
    out, acts = saes[PLACES[1].replace(".", "-")](x)
    facts = {
        "package": "e2e-sae 2.1.1",
        "torch": torch.__version__,
        "path": "samples_400000.pt",
        "given": {"hook_point": PLACES[1]},
        "variant": "many places",
        "by": "e2e_sae",
    }
    save_expected(folder, x, acts, out, facts)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        write(Path(sys.argv[1]), Path(sys.argv[2]))
