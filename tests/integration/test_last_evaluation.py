"""An error in the last evaluation: what is trained is saved, the message says so, and both ways on work."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from processes import Command
from safetensors.torch import load_file, save_file
from small import SMALL_RUN

from sae_training.demo_data import DEMO_MODEL

BROKEN_ID = 77


def test_an_error_in_the_last_evaluation_costs_nothing_and_says_the_way_on(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in DEMO_MODEL.iterdir():
        if file.name != "model.safetensors":
            (model / file.name).write_bytes(file.read_bytes())
    weights = load_file(DEMO_MODEL / "model.safetensors")
    weights["model.embed_tokens.weight"][BROKEN_ID] = math.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})

    ids = torch.randint(100, 2000, (400, 40), generator=torch.Generator().manual_seed(0))
    for name, rows in (("train", ids), ("held_out", torch.where(ids < 1000, BROKEN_ID, ids))):
        lines = (json.dumps({"input_ids": row}) for row in rows.tolist())
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    fields: dict[str, Any] = {
        **SMALL_RUN,
        "model_name": str(model),
        "dataset_path": str(tmp_path / "train.jsonl"),
        "eval_dataset_path": str(tmp_path / "held_out.jsonl"),
        "is_dataset_tokenized": None,
        "eval_every_steps": 1000,
        "run_dir": str(tmp_path),
        "wandb_mode": "disabled",
    }
    (tmp_path / "run.json").write_text(json.dumps(fields))
    words = ["train", "--config", str(tmp_path / "run.json")]

    process = Command(tmp_path, *words)
    _, err = process.communicate()
    assert process.returncode == 1
    assert "hold NaN" in err
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert f"steps are trained and saved: {saved}. Once this is mended" in err
    assert "with --eval_every_steps 0 it finishes the run without evaluation." in err

    process = Command(tmp_path, *words, "--eval_every_steps", "0")
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert (tmp_path / "run" / "final" / "sae.safetensors").is_file()
