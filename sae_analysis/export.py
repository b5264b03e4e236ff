"""Write an analysis as files for other programs, or as a site to look at.

site          index.html and its data, which opens from the disk (`site/`)
parquet       latents.parquet, a row a latent; examples.parquet, a row an example
jsonl         latents.jsonl, a document a latent with its examples (what mongoimport takes)
neuronpedia   release, model, sourceset and source.jsonl; features/ and activations/batch-<i>.jsonl.gz
"""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from sae_analysis.analysis import Analysis, Example, Latent
from sae_analysis.site.export import export_site
from sae_training.machine.files import written_beside
from sae_training.machine.phases import progress_bar

PER_BATCH = 1024  # latents in a file of Neuronpedia's, as its own generator writes them
SLICE = 256  # latents whose examples are in memory at once


def export(analysis: Analysis, folder: str | Path, form: str = "site") -> Path:
    """Write the analysis into `folder` in one of the forms above, and return the folder; of a site its index.html.

    Each file is written whole or not at all; a site that is there is replaced once the new one is complete.
    """
    folder = Path(folder).expanduser()
    if form not in ("site", *FORMS):
        raise ValueError(f"format: found {form!r}, expected one of site, {', '.join(FORMS)}.")
    if form == "site":
        return export_site(analysis, folder)
    folder.mkdir(parents=True, exist_ok=True)
    FORMS[form](analysis, folder)
    return folder


def each(analysis: Analysis) -> Iterator[Latent]:
    n = analysis.about["d_sae"]
    with progress_bar("export", n, "latents") as bar:
        for index in range(n):
            yield analysis.latent(index)
            bar.update(1)


# ---------------------------------------------------------------------------------------------------------- our own


def to_parquet(analysis: Analysis, folder: Path) -> None:
    with written_beside(folder / "latents.parquet") as partial:
        with_texts(analysis).to_parquet(partial, index=False)
    with written_beside(folder / "examples.parquet") as partial, pq.ParquetWriter(partial, EXAMPLES) as writer:
        rows: list[dict[str, Any]] = []
        for latent in each(analysis):
            rows += [example_row(example) for example in all_examples(latent)]
            if len(rows) >= 50 * SLICE:
                writer.write_table(pa.Table.from_pylist(rows, EXAMPLES))
                rows = []
        writer.write_table(pa.Table.from_pylist(rows, EXAMPLES))


EXAMPLES = pa.schema(
    {
        "latent": pa.int32(),
        "kind": pa.string(),
        "context": pa.int64(),
        "position": pa.int32(),
        "activation": pa.float32(),
        "ids": pa.list_(pa.int32()),
        "tokens": pa.list_(pa.string()),
        "activations": pa.list_(pa.float32()),
    }
)


def with_texts(analysis: Analysis) -> pd.DataFrame:
    """Return the table of latents, with top tokens as text beside their numbers."""
    table = analysis.latents.copy()
    for name in ("top_token", "top_bigram_first", "top_bigram_second"):
        table[f"{name}_text"] = [analysis.token_text(int(id_)) if id_ >= 0 else None for id_ in table[name]]
    return table


def example_row(example: Example) -> dict[str, Any]:
    return {name: getattr(example, name) for name in EXAMPLES.names}


def all_examples(latent: Latent) -> list[Example]:
    return [example for kind in ("top", "quantile", "random", "silent") for example in latent.examples(kind)]


def to_jsonl(analysis: Analysis, folder: Path) -> None:
    with written_beside(folder / "latents.jsonl") as partial, partial.open("w", encoding="utf-8") as file:
        for latent in each(analysis):
            file.write(json_line(document(latent)))


def document(latent: Latent) -> dict[str, Any]:
    """Return all that is known of a latent, in JSON types."""
    counts, edges = latent.histogram
    return {
        "_id": f"{latent.analysis.about['name']}/{latent.index}",
        **latent.figures,
        "top_tokens": latent.top_tokens,
        "quantiles": {f"p{100 * q:g}": value for q, value in latent.quantiles.items()},  # names without dots
        "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
        "logits": latent.logits,
        "neighbours": latent.neighbours,
        "examples": [example_row(example) for example in all_examples(latent)],
    }


ENDS_OF_LINES = re.compile("[\x85\u2028\u2029\ud800-\udfff]")
"""At which some readers end a line though JSON does not escape them; and halves of characters, which no UTF-8 has."""


def json_line(content: dict[str, Any]) -> str:
    """Return one line of strict JSON; a number that is not finite is null."""
    try:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(finite(content), ensure_ascii=False, allow_nan=False)
    return ENDS_OF_LINES.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


def finite(value: Any) -> Any:
    """Return the same value of JSON types, with None for each number that is not finite."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {name: finite(one) for name, one in value.items()}
        case list() | tuple():
            return [finite(one) for one in value]
        case _:
            return value


# ------------------------------------------------------------------------------------------------------ Neuronpedia


def to_neuronpedia(analysis: Analysis, folder: Path) -> None:
    about = analysis.about
    model, source = str(about["model"]).split("/")[-1], f"{layer_of(about['hook_point'])}-{about['name']}"
    heads = {
        "release": {"name": about["name"], "description": f"{about['architecture']}, {about['d_sae']} latents"},
        "model": {"id": model, "displayName": model},
        "sourceset": {"modelId": model, "name": about["name"], "releaseName": about["name"]},
        "source": {"modelId": model, "id": source, "setName": about["name"], "hfRepoId": None, "hfFolderId": None},
    }
    for name, content in heads.items():
        write_whole(folder / f"{name}.jsonl", json_line(content).encode())
    batches: dict[str, list[str]] = {"features": [], "activations": []}
    for latent in each(analysis):
        batches["features"].append(json_line(feature(latent, model, source)))
        batches["activations"] += [json_line(activation(e, model, source)) for e in firing_examples(latent)]
        if latent.index % PER_BATCH == PER_BATCH - 1 or latent.index == about["d_sae"] - 1:
            for name, lines in batches.items():
                path = folder / name / f"batch-{latent.index // PER_BATCH}.jsonl.gz"
                write_whole(path, gzip.compress("".join(lines).encode(), mtime=0))
            batches = {name: [] for name in batches}


def layer_of(hook_point: str) -> str:
    parts = hook_point.split(".")
    return parts[1] if parts[0] == "blocks" else hook_point


def feature(latent: Latent, model: str, source: str) -> dict[str, Any]:
    """Return a latent as Neuronpedia's `feature`; its index is a text there."""
    counts, edges = latent.histogram
    found: dict[str, Any] = {
        "modelId": model,
        "layer": source,
        "index": str(latent.index),
        "hookName": latent.analysis.about["hook_point"],
        "maxActApprox": latent.max if math.isfinite(latent.max) else 0,
        "frac_nonzero": latent.density,
        "freq_hist_data_bar_heights": counts.tolist(),
        "freq_hist_data_bar_values": ((edges[:-1] + edges[1:]) / 2).tolist(),
        "topkCosSimIndices": [i for i, _ in latent.neighbours["similar"]],
        "topkCosSimValues": [v for _, v in latent.neighbours["similar"]],
        "correlated_features_indices": [i for i, _ in latent.neighbours["correlated"]],
        "correlated_features_pearson": [v for _, v in latent.neighbours["correlated"]],
        "neuron_alignment_indices": [i for i, _ in latent.neighbours.get("neurons", [])],
        "neuron_alignment_values": [v for _, v in latent.neighbours.get("neurons", [])],
    }
    if latent.logits:
        heights, values = latent.logit_histogram
        for side, name in (("top", "pos"), ("bottom", "neg")):
            found[f"{name}_str"] = [text for text, _ in latent.logits[side]]
            found[f"{name}_values"] = [value for _, value in latent.logits[side]]
        found["logits_hist_data_bar_heights"] = heights.tolist()
        found["logits_hist_data_bar_values"] = ((values[:-1] + values[1:]) / 2).tolist()
    return found


def firing_examples(latent: Latent) -> list[Example]:
    """Return the examples with a firing, each place once."""
    found = {(e.context, e.position): e for e in reversed(all_examples(latent)) if e.activation > 0}
    return list(reversed(found.values()))


def activation(example: Example, model: str, source: str) -> dict[str, Any]:
    """Return an example as Neuronpedia's `activation`. Bins are the quantiles' fifths; -1 for the top examples."""
    fifth = int(example.kind[-1]) if example.kind.startswith("quantile") else -1
    values = example.activations
    return {
        "modelId": model,
        "layer": source,
        "index": str(example.latent),
        "tokens": example.tokens,
        "values": values,
        "maxValue": max(values),
        "maxValueTokenIndex": values.index(max(values)),
        "minValue": min(values),
        "qualifyingTokenIndex": example.position,
        "binMin": fifth / 5 if fifth >= 0 else -1,
        "binMax": (fifth + 1) / 5 if fifth >= 0 else -1,
        "binContains": 0.2 if fifth >= 0 else -1,
    }


def write_whole(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as partial:
        partial.write_bytes(content)


FORMS: dict[str, Callable[[Analysis, Path], None]] = {
    "parquet": to_parquet,
    "jsonl": to_jsonl,
    "neuronpedia": to_neuronpedia,
}
