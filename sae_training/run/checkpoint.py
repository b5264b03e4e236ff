"""Resumable checkpoints: safetensors and JSON in a folder that is complete or does not count.

    checkpoints/step_<n>/   one .safetensors per part of the state, state.json for the rest,
                            manifest.json (written last): size and SHA-256 of every other file

Of several processes each reads a share of the files, for the manifest and when the checkpoint is verified.

A checkpoint is written under another name and renamed once it is on the disk, so that a kill at any moment leaves the
previous one as it was.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from sae_training.formats import pieces
from sae_training.machine.files import (
    SPARE_BYTES,
    check_free_disk,
    disk_named,
    flush_to_disk,
    free_bytes,
    sha256,
    step_number,
)
from sae_training.parallel.balance import shared_out
from sae_training.parallel.ranks import is_first, n_ranks, of_all, of_first, raise_together, rank, together
from sae_training.parallel.shard import WHOLE, Shard

MANIFEST = "manifest.json"

STATE = "state.json"


def save_checkpoint(
    parent: Path,
    step: int,
    parts: dict[str, dict[str, Any]],
    state: dict[str, Any],
    extra_files: dict[str, str],
    in_pieces: Mapping[str, tuple[dict[str, Any], Shard]] | None = None,
) -> Path:
    """Write parent/step_<step> and return it.

    `parts` maps the name of a file (without its ending; a/b is b in the folder a) to a nested dict whose leaves are
    tensors or JSON values. `state` is plain JSON, `extra_files` are texts to put beside the rest. Several ranks give
    each its own parts and extra files; the first one's state is written. Of `in_pieces` each gives its shard of the
    same parts. Raises OSError if the disk of any of them is full; then nothing is left of it.
    """
    own, cut, leaves = {}, {}, {}
    for part, content in parts.items():
        own[part], leaves[part] = split(content)
    for part, (content, shard) in (in_pieces or {}).items():
        piece, leaves[part] = split(content)
        cut[part] = piece, shard
    held = [*own.values(), *(piece for piece, _ in cut.values())]
    n_bytes = sum(t.numel() * t.element_size() for part in held for t in part.values())
    n_bytes, leaves = sum(of_all(n_bytes)), {part: of for some in of_all(leaves) for part, of in some.items()}
    final, partial = parent / f"step_{step}", parent / f"step_{step}.tmp"

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        make_room(parent, n_bytes)
        partial.mkdir(parents=True)
        for part, (piece, shard) in cut.items():
            begin_part(part, piece, shard)

    def begin_part(part: str, tensors: dict[str, Tensor], shard: Shard) -> None:
        (partial / part).parent.mkdir(exist_ok=True)
        pieces.begin(partial / f"{part}.safetensors", tensors, shard)

    def write_parts() -> None:
        for part, tensors in own.items():
            begin_part(part, tensors, WHOLE)
        for part, (tensors, shard) in (cut | {part: (tensors, WHOLE) for part, tensors in own.items()}).items():
            pieces.fill(partial / f"{part}.safetensors", tensors, shard)
        for name, text in extra_files.items():
            (partial / name).write_text(text, encoding="utf-8")
        if is_first():
            (partial / STATE).write_text(json.dumps({"step": step, "leaves": leaves, **state}), encoding="utf-8")

    def complete() -> None:
        if final.exists():
            remove(final)
        os.replace(partial, final)
        flush_to_disk(parent)

    try:
        one_after_another(begin if is_first() else None, write_parts)
        write_manifest(partial)
        one_after_another(complete if is_first() else None)
    except BaseException as error:
        if is_first():
            shutil.rmtree(partial, ignore_errors=True)
        with disk_named(parent):
            if isinstance(error, OSError) and error.errno is not None and error.filename is None:  # of an open file
                raise OSError(f"{parent}: a checkpoint could not be written ({error}).") from error
            raise
    return final


def one_after_another(*steps: Callable[[], None] | None) -> None:
    """Do each step once all ranks have done the one before. An error of any rank ends it on all, by an OSError."""
    for step in steps:
        error: BaseException | None = None
        try:
            if step is not None:
                step()
        except BaseException as caught:
            error = caught
        raise_together(error)


def read_state(folder: Path) -> dict[str, Any]:
    """Return the `state` that `save_checkpoint` was given, without verifying it."""
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    del state["leaves"]
    return state


def read_part(folder: Path, part: str, shard: Shard = WHOLE) -> dict[str, Any]:
    """Return one of the `parts` that `save_checkpoint` was given, or the shard's piece of it, without verifying it."""
    leaves = json.loads((folder / STATE).read_text(encoding="utf-8"))["leaves"]
    path = folder / f"{part}.safetensors"
    return join(load_file(path) if shard.is_all else pieces.read(path, shard), leaves[part])


def complete_checkpoints(parent: Path) -> list[Path]:
    """Return the checkpoint folders that were written to the end, newest first."""
    folders = [p for p in parent.glob("step_*") if step_number(p) >= 0 and (p / MANIFEST).is_file()]
    return sorted(folders, key=step_number, reverse=True)


def newest_valid(parent: Path, notify: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint whose files are as they were written; None if there is none.

    A damaged one is renamed step_<n>.damaged, so that it never counts again, and `notify` is told, on the first of
    several ranks. All of them call this, and get the same.
    """
    folders = of_first(lambda: complete_checkpoints(parent))
    for folder in folders:
        wrong = damage(folder)
        if wrong is None:
            return folder
        aside = set_aside(folder)
        if is_first():
            rest = (
                "Trying the one before it."
                if folder != folders[-1]
                else "There is none before it: the run begins from the beginning."
            )
            notify(f"{wrong} It was set aside as {aside.name}. {rest}")
    return None


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint. All ranks call this."""
    aside = folder.with_name(f"{folder.name}.damaged")

    def rename() -> None:
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)

    one_after_another(rename if is_first() else None)
    return aside


def delete_old(parent: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and those that a killed run left half-written."""
    for folder in complete_checkpoints(parent)[keep:]:
        remove(folder)
    for partial in parent.glob("step_*.tmp"):
        shutil.rmtree(partial)


def make_room(parent: Path, n_bytes: int) -> None:
    """Delete the oldest checkpoints where only that makes room for another; raise NotEnoughDisk if it does not.

    The newest stays: it is what a run goes on from while the other is being written.
    """
    older = complete_checkpoints(parent)[1:]
    sizes = {folder: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) for folder in older}
    if free_bytes(parent) + sum(sizes.values()) >= n_bytes + SPARE_BYTES:
        while older and free_bytes(parent) < n_bytes + SPARE_BYTES:
            remove(older.pop())
    check_free_disk(parent, n_bytes)


def remove(folder: Path) -> None:
    """Delete a checkpoint, first what makes it count: a kill in between leaves nothing that looks complete."""
    (folder / MANIFEST).unlink()
    shutil.rmtree(folder)


# ---------------------------------------------------------------------------------------------------------- manifest


def write_manifest(folder: Path) -> None:
    """Write the manifest of the files in `folder`. All ranks call this."""

    def listed() -> dict[str, int]:
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}

    sizes, own = of_first(listed), dict[str, dict[str, Any]]()

    def read_share() -> None:
        for name in own_share(sizes):
            flush_to_disk(folder / name)
            own[name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}

    one_after_another(read_share)
    entries = together(own)

    def write() -> None:
        manifest = folder / MANIFEST
        text = json.dumps({name: entries[name] for name in sizes}, indent=1) + "\n"
        manifest.write_text(text, encoding="utf-8")
        flush_to_disk(manifest)
        for inner in sorted({(folder / name).parent for name in sizes} | {folder}, reverse=True):
            flush_to_disk(inner)

    one_after_another(write if is_first() else None)


def own_share(sizes: Mapping[str, int]) -> list[str]:
    """Return the files that this rank reads of those with these sizes, so that all ranks read about as many bytes."""
    shares = shared_out(sizes, min(n_ranks(), len(sizes)))
    return shares[rank()] if rank() < len(shares) else []


def verify(folder: Path) -> None:
    """Raise ValueError if a file differs from the manifest: first in size, then in its hash. All ranks call this."""
    if (wrong := damage(folder)) is not None:
        raise ValueError(wrong)


def damage(folder: Path) -> str | None:
    """Return on all ranks alike in what a file differs from the manifest, None if all are as they were written.

    The first rank compares sizes. A file that only another rank cannot read is not damaged: that is an OSError.
    """

    def promised() -> tuple[dict[str, tuple[int, str]], str | None]:
        try:
            return read_manifest(folder), None
        except ValueError as error:
            return {}, str(error)

    expected, wrong = of_first(promised)
    if wrong is not None:
        return wrong
    differing: dict[str, bool] = {}

    def read_share() -> None:
        for name in own_share({name: n_bytes for name, (n_bytes, _) in expected.items()}):
            if sha256(folder / name) != expected[name][1]:
                differing[name] = True
                return

    one_after_another(read_share)
    everyones = together(differing)
    for name in expected:  # the same is named by any number of ranks
        if name in everyones:
            return (
                f"{folder / name}: its content is not what was written (SHA-256 differs); this checkpoint is damaged."
            )
    return None


def read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Return the size and SHA-256 of each file; ValueError without a readable manifest, or if a size is another."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise ValueError(f"{folder}: no {MANIFEST}, so this checkpoint was never finished.")
    try:
        entries = json.loads(manifest.read_text(encoding="utf-8"))
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
        if STATE not in expected:
            raise KeyError(STATE)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{manifest}: not a readable manifest ({error!r}); this checkpoint is damaged.") from error
    for name, (n_bytes, _) in expected.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != n_bytes:
            found = "no such file" if size is None else f"{size} bytes"
            raise ValueError(f"{path}: found {found}, expected {n_bytes} bytes; this checkpoint is damaged.")
    return expected


# --------------------------------------------------------------------------------------------- nested dicts <-> files


def split(content: dict[str, Any], prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a nested dict by "outer/inner" names, and a nested dict of all else."""
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Tensor):
            tensors[prefix + name] = value
        elif isinstance(value, dict):
            inner, rest[name] = split(value, f"{prefix}{name}/")
            tensors |= inner
        else:
            rest[name] = value
    return tensors, rest


def join(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """Return the nested dict of which `split` made these."""
    content = json.loads(json.dumps(rest))
    for name, tensor in tensors.items():
        *outer, last = name.split("/")
        place = content
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = tensor
    return content
