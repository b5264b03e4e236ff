"""A store of an analysis with known content and hostile texts, written straight into its tables."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import Table, insert

from sae_analysis.analysis import Analysis, open_analysis
from sae_analysis.places import ANALYSIS_FOLDER, STORE_FILE
from sae_analysis.store import schema
from sae_analysis.store.example_blob import KINDS, Stored, to_bytes
from sae_analysis.store.read import engine_of, url_of

CONTEXT = 64
N_CONTEXTS = 30
WORDS = b" ocean| river| harbor| vessel| treaty| nation| Congress| labor| money| silver".split(b"|")
HOSTILE = [
    b"<script>window.broken = true</script>",
    b"</script><img src=x onerror='window.broken = true'>",
    b"<b>&amp;</b>",
    b"\x00\x07\x1b",
    b"\n",
    "\u202egnp.exe".encode(),
    " שלום".encode(),
    "\u2028".encode(),
    "\ud800".encode(errors="surrogatepass"),
    "é".encode()[:1],
    "é".encode()[1:],
    "😀".encode()[:2],
    "😀".encode()[2:],
    b"\x7f",
    b"__proto__",
    b"constructor",
    b"x" * 5000,
    b"",
]
PIECES = [*WORDS, *HOSTILE, b" the", b" of", b" and", b" was", b".", b"ing"]
DEAD = 3


def make_analysis(folder: Path, n_latents: int = 40) -> Analysis:
    """Write an analysis; latent i fires most on word i, and latent DEAD never. Each hostile text is a token."""
    path = folder / ANALYSIS_FOLDER / STORE_FILE
    path.parent.mkdir(parents=True)
    draw = np.random.default_rng(0)
    contexts = draw.integers(0, len(PIECES), size=(N_CONTEXTS, CONTEXT)).astype("<i4")
    about = {
        "name": "run <i>of</i> tests", "model": "<u>model</u>", "text": "'text'", "hook_point": "blocks.1.hook",
        "target_hook_point": "blocks.1.hook", "architecture": "topk", "d_in": 8, "d_sae": n_latents,
        "context_size": CONTEXT, "n_contexts": N_CONTEXTS, "n_counted": CONTEXT * N_CONTEXTS, "n_rows_together": 100,
        "settings": {},
    }  # fmt: skip
    engine = engine_of(url_of(path))
    schema.metadata.create_all(engine)
    rows: dict[Table, list[dict[str, Any]]] = {
        schema.analyses: [{"schema_version": schema.SCHEMA_VERSION, "complete": True, "about": json.dumps(about)}],
        schema.latents: [latent_row(i, draw) for i in range(n_latents)],
        schema.details: [{"latent": i, "content": details(i, n_latents)} for i in range(n_latents)],
        schema.examples: [{"latent": i, "content": to_bytes(examples(i, contexts, draw))} for i in range(n_latents)],
        schema.effects: [{"latent": i, "content": effects(i)} for i in (7, 11)],
        schema.tokens: [
            {"latent": i, "rank": rank, "token": (i + rank) % len(PIECES), "share": 0.4 / 2**rank}
            for i in range(n_latents)
            if i != DEAD
            for rank in range(5)
        ],
        schema.contexts: [{"context": i, "content": ids.tobytes()} for i, ids in enumerate(contexts)],
        schema.pieces: [{"token": i, "content": piece} for i, piece in enumerate(PIECES)],
    }
    with engine.begin() as connection:
        for table, of_table in rows.items():
            connection.execute(insert(table), [{"analysis": 1, **row} for row in of_table])
    engine.dispose()
    return open_analysis(folder)


def latent_row(latent: int, draw: np.random.Generator) -> dict[str, Any]:
    found: dict[str, Any] = {name: float(draw.uniform(0.5, 2)) for name in schema.FIGURES}
    found |= {"latent": latent, "count": 30 + latent, "density": 1e-3 * (1 + latent), "max": 20.0 - latent / 10}
    found |= {"first": 3, "last": 900, "top_token": latent % len(PIECES), "top_token_share": 0.4}
    found |= {"top_bigram_first": 1, "top_bigram_second": latent % len(PIECES), "top_bigram_share": 0.1}
    if latent == DEAD:
        never = {"max": None, "mean": None, "skew": None, "top_token_share": None, "top_bigram_share": None}
        found |= never | {"count": 0, "density": 0.0, "first": -1, "last": -1, "top_token": -1}
        found |= {"top_bigram_first": -1, "top_bigram_second": -1}
    return found


def details(latent: int, n_latents: int) -> bytes:
    others = [[(latent + step) % n_latents, 0.9 / step] for step in (1, 2, 3)]
    tokens = [[(latent + step) % len(PIECES), 1.0 / (1 + step)] for step in range(10)]
    is_dead = latent == DEAD
    found = {
        "histogram": {"counts": [] if is_dead else [1, 5, 2], "edges": [] if is_dead else [0.5, 1.0, 2.0, 4.0]},
        "quantiles": {"0.5": None if is_dead else 1.5, "0.9": None if is_dead else 3.0},
        "neighbours": {"similar": others, "correlated": others, "coactive": others, "neurons": others},
        "logits": {"top": tokens, "bottom": [[i, -v] for i, v in tokens], "counts": [1, 8, 3], "edges": [-1.0, 1.0]},
    }
    return zlib.compress(json.dumps(found).encode())


def effects(latent: int) -> bytes:
    found = [{"loss": number / 10, "raised": [[latent, 0.5]], "lowered": [[10, -0.25]]} for number in range(19)]
    return zlib.compress(json.dumps([*found, {"loss": None, "raised": [], "lowered": []}]).encode())


def examples(latent: int, contexts: np.ndarray, draw: np.random.Generator) -> Stored:
    """20 top, 4 of each fifth, 5 random and 5 silent ones, as a build keeps; activations fall with their number."""
    counts = {kind: 20 if kind == "top" else 4 if kind.startswith("quantile") else 5 for kind in KINDS}
    if latent == DEAD:
        counts = {"silent": 5}
    kinds, places, firings, values, lengths = [], [], [], [], []
    for kind, n in counts.items():
        for number in range(n):
            kinds.append(KINDS.index(kind))
            context = int(draw.integers(N_CONTEXTS))
            (with_word,) = np.nonzero(contexts[context] == latent % len(PIECES))
            position = int(with_word[0]) if len(with_word) else int(draw.integers(CONTEXT))
            places.append((context, position))
            is_silent = kind == "silent"
            lengths.append(0 if is_silent else 2 if position + 1 < CONTEXT else 1)
            firings += [] if is_silent else [position, position + 1][: lengths[-1]]
            values += [] if is_silent else [20.0 - latent / 10 - number / 5, 1.0][: lengths[-1]]
    return Stored(
        np.array(kinds),
        np.array([context for context, _ in places]),
        np.array([position for _, position in places]),
        np.array(lengths),
        np.array(firings, dtype=np.int32),
        np.array(values, dtype=np.float32),
    )
