"""Reads back what the wandb client writes in offline mode: its .wandb file."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import wandb
from wandb.proto import wandb_internal_pb2

RECORD: Any = wandb_internal_pb2.Record  # pyright: ignore[reportAttributeAccessIssue]


def wandb_files(folder: Path) -> list[Path]:
    wandb.teardown()  # a finished run may still be on its way from wandb's service to the disk
    return sorted((folder / "wandb").glob("*run-*/*.wandb"))


def wandb_records(file: Path) -> list[Any]:
    """Read the LevelDB log that wandb writes: 32 KiB blocks of records with 7-byte headers."""
    data, records, parts = file.read_bytes(), [], b""
    place = 7  # the file's own header
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # no header fits into the rest of this block
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(RECORD.FromString(parts))
            parts = b""
    return records


def history(file: Path) -> list[dict[str, Any]]:
    rows = []
    for record in wandb_records(file):
        if record.WhichOneof("record_type") == "history":
            row: dict[str, Any] = {}
            for item in record.history.item:
                *outer, name = item.nested_key or [item.key]
                place = row
                for key in outer:
                    place = place.setdefault(key, {})
                place[name] = json.loads(item.value_json)
            rows.append(row)
    return rows


def the_run(file: Path) -> Any:
    return next(r.run for r in wandb_records(file) if r.WhichOneof("record_type") == "run")


def artifacts(file: Path) -> dict[str, Any]:
    found = [
        record.request.log_artifact.artifact if record.WhichOneof("record_type") == "request" else record.artifact
        for record in wandb_records(file)
        if record.WhichOneof("record_type") == "artifact"
        or (
            record.WhichOneof("record_type") == "request"
            and record.request.WhichOneof("request_type") == "log_artifact"
        )
    ]
    return {artifact.name: artifact for artifact in found}
