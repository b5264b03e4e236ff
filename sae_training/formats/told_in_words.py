"""What `inspection.inspect` says of files, as text for people and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from sae_training.formats.doubts import without_codes


def in_words(told: Mapping[str, Any]) -> str:
    """The same for people: all of one, and a line for each of several."""
    ones, not_read = told["autoencoders"], told["not_read"]
    if len({one["path"] for one in ones.values()}) == 1 and not not_read:
        lines = [told["path"]]
        for name, one in ones.items():  # several if one file or folder holds them
            lines += [f"  {name}"] * (len(ones) > 1) + [f"  {line}" for line in about(one)]
        lines += [f"  {line}" for line in tensors_in_words(next(iter(ones.values())))]
    else:
        lines = [f"{told['path']}: {len(ones)} autoencoders; give the path of one for all that is known of it"]
        lines += [f"  {name:<40} {in_a_line(one)}" for name, one in ones.items()]
    lines += [f"not read: {name}: {why}" for name, why in not_read.items()]
    return without_codes("\n".join(lines) + "\n")


def in_a_line(one: Mapping[str, Any]) -> str:
    cfg = one.get("config", {})
    words = [one.get("format", one["family"])]
    if cfg:
        sets, d_in, d_sae = cfg.get("sets_of_latents", 1), cfg["d_in"], cfg["d_sae"]
        words += [cfg["architecture"], f"{d_in} -> {d_sae if sets == 1 else f'{sets} x {d_sae}'}"]
        words += [cfg["hook_point"] if "hook_point" in cfg else f"{cfg['reads'][0]} to {cfg['reads'][-1]}"]
    n = len(one.get("warnings", ()))
    words += [f"{n} warning{'s' * (n > 1)}"] if n else []
    words += [f"problem: {one['problem']}"] if one["problem"] else []
    return ", ".join(words)


def in_json(told: Mapping[str, Any]) -> str:
    """One object in strict JSON: what is no finite number there is null."""
    return json.dumps(strict(told), indent=2, allow_nan=False) + "\n"


def strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): strict(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def about(one: Mapping[str, Any]) -> Iterator[str]:
    name = one.get("format", one["family"])
    reader = f"read by {one['family']}" if one["family"] != name or "config" in one else "not read"
    yield f"format       {name} ({reader})"
    if one["problem"]:
        yield f"problem      {one['problem']}"
    if "load" in one:
        yield f"load it by   {one['load']}"
    if "convention" in one:
        yield f"convention   {one['convention']}"
    if one.get("missing"):
        yield f"not said     {', '.join(one['missing'])}; needed to load the model with it"
    for name, value in one.get("config", {}).items():
        yield f"  {name:<22} {', '.join(value) if name in ('reads', 'writes') else value}"
    for text in one.get("warnings", []):
        yield f"warning: {text}"


def tensors_in_words(one: Mapping[str, Any]) -> Iterator[str]:
    for file, parts in one["tensors"].items():
        yield file
        for name, part in parts.items():
            yield f"  {name:<22} {part['dtype']:<9} {' x '.join(map(str, part['shape'])) or 'scalar'}"
    for file, parts in one.get("figures", {}).items():
        yield f"{file}, weights"
        for name, told in parts.items():
            yield f"  {name:<22} {figures_in_words(told)}"


def figures_in_words(told: Mapping[str, Any]) -> str:
    words = f"{told['zeros']:.1%} zeros, {told['nan']:,} NaN, {told['infinite']:,} infinite"
    if told["least"] is not None:
        words += f", from {told['least']:.4g} to {told['largest']:.4g}"
    if norms := told.get("decoder_norms"):
        words += f"; norms of decoder rows {norms['least']:.4g} to {norms['largest']:.4g}, {norms['dead']:,} dead"
    return words
