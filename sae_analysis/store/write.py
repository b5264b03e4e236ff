"""Writing an analysis: what was gathered becomes rows of the tables, a slice of latents in each transaction."""

from __future__ import annotations

import json
import math
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from sqlalchemy import Connection, Table, func, insert, select, update
from torch import Tensor

from sae_analysis.events import ranks
from sae_analysis.gathered import Gathered, Sizes
from sae_analysis.latent_statistics import QUANTILES, shown_histogram
from sae_analysis.logit_lens import Lens, logit_lens
from sae_analysis.neighbours import Nearest, coactive, correlated, most_similar
from sae_analysis.of_model import OfModel
from sae_analysis.store import schema
from sae_analysis.store.example_blob import to_bytes
from sae_analysis.store.examples_of import Examples
from sae_analysis.store.read import Reader, engine_of
from sae_training.machine.phases import progress_bar

SLICE = 512  # latents
N_NEIGHBOURS = 10
N_TOKENS = 10


class Writer:
    """Writes the analysis number `analysis`. What is there already, of an earlier process, stays.

    `between` is called before each slice of latents, and may raise.
    """

    def __init__(
        self, url: str, analysis: int, about: dict[str, Any], between: Callable[[], object] = lambda: None
    ) -> None:
        self.engine, self.analysis, self.about, self.between = engine_of(url), analysis, about, between
        schema.metadata.create_all(self.engine)

    def write(self, gathered: Gathered, of_model: OfModel, context_ids: np.ndarray, sizes: Sizes) -> None:
        """Write all tables. `context_ids` (contexts, positions): the token ids of the corpus."""
        with self.engine.begin() as connection:
            self.begin(connection)
            first = self.n_written(connection)
        found = Findings(gathered, of_model)
        examples = Examples(gathered, sizes)
        d_sae = gathered.sae.d_sae
        slices = [range(start, min(start + SLICE, d_sae)) for start in range(first, d_sae, SLICE)]
        bar = progress_bar("writing the analysis", d_sae, "latents", initial=first)
        with bar, ThreadPoolExecutor(1) as beside:
            # The next slice is compressed while the database takes this one. Two in hand, because they are large.
            waiting = deque(beside.submit(rows_of, found, examples, some) for some in slices[:2])
            for number, some in enumerate(slices):
                self.between()
                rows = waiting.popleft().result()
                waiting.extend(beside.submit(rows_of, found, examples, later) for later in slices[number + 2 :][:1])
                with self.engine.begin() as connection:
                    for table, of_table in rows:
                        self.insert(connection, table, of_table)
                bar.update(len(some))
        with self.engine.begin() as connection:
            self.insert(connection, schema.contexts, context_rows(context_ids, np.unique(examples.contexts)))
            self.insert(connection, schema.pieces, [{"token": i, "content": p} for i, p in enumerate(of_model.pieces)])
            row = {"complete": True, "about": json.dumps(self.about | found.about())}
            connection.execute(update(schema.analyses).values(row).where(schema.analyses.c.analysis == self.analysis))

    def begin(self, connection: Connection) -> None:
        is_this = schema.analyses.c.analysis == self.analysis
        if connection.execute(select(schema.analyses).where(is_this)).first() is None:
            row = {"schema_version": schema.SCHEMA_VERSION, "complete": False, "about": json.dumps(self.about)}
            self.insert(connection, schema.analyses, [row])

    def n_written(self, connection: Connection) -> int:
        """Return how many latents are there: slices are whole, so they are the first ones."""
        counted = select(func.count()).select_from(schema.latents).where(schema.latents.c.analysis == self.analysis)
        return connection.execute(counted).scalar_one()

    def insert(self, connection: Connection, table: Table, rows: Sequence[dict[str, Any]]) -> None:
        """Insert rows that all have the same columns."""
        if not rows:
            return
        # The driver takes them as they are. SQLAlchemy would look at each value, in as much time as the database takes.
        statement = insert(table).compile(connection, column_keys=["analysis", *rows[0]])
        values: list[Any] = [{"analysis": self.analysis, **row} for row in rows]
        if (names := statement.positiontup) is not None:
            values = [tuple(row[name] for name in names) for row in values]
        connection.exec_driver_sql(str(statement), values)


def rows_of(found: Findings, examples: Examples, some: range) -> list[tuple[Table, list[dict[str, Any]]]]:
    """Return the rows of some latents, table by table."""
    return [
        (schema.latents, found.latent_rows(some)),
        (schema.details, found.detail_rows(some)),
        (schema.tokens, found.token_rows(some)),
        (schema.examples, example_rows(examples, some)),
    ]


class Findings:
    """The figures of all latents, from what was gathered and from the weights."""

    def __init__(self, gathered: Gathered, of_model: OfModel) -> None:
        sae = gathered.sae
        self.gathered = gathered
        self.shares = gathered.mass.shares()
        self.top_tokens = gathered.mass.top_tokens(N_TOKENS)
        self.quantiles = rounded(gathered.statistics.quantiles())
        matrix = gathered.rows.matrix()
        self.n_rows_together = len(matrix.indptr) - 1
        W_dec = sae.W_dec.detach().float()
        self.near: dict[str, Nearest] = {
            "similar": most_similar(W_dec, N_NEIGHBOURS),
            "correlated": correlated(matrix, N_NEIGHBOURS),
            "coactive": coactive(matrix, N_NEIGHBOURS),
        }
        if of_model.neurons is not None:
            self.near["neurons"] = most_similar(W_dec, N_NEIGHBOURS, of_model.neurons.to(W_dec))
        self.near = {name: Nearest(near.others, rounded(near.values)) for name, near in self.near.items()}
        table = of_model.unembedding
        self.lens: Lens | None = None
        if table is not None:
            lens = logit_lens(W_dec, table.to(W_dec), N_TOKENS)
            for_json = ("top_values", "bottom_values", "edges")
            self.lens = lens._replace(**{name: rounded(getattr(lens, name)) for name in for_json})
        self.figures = gathered.statistics.figures(gathered.moments)
        self.figures |= weight_figures(sae.W_enc.detach(), W_dec, sae.b_enc.detach())
        if self.lens is not None:
            self.figures |= {"logit_skew": self.lens.skew, "logit_kurtosis": self.lens.kurtosis}
        self.figures |= {
            "token_entropy": self.shares.entropy,
            "top_token": self.shares.top_token,
            "top_token_share": self.shares.top_token_share,
            "top_bigram_first": self.shares.top_bigram[:, 0],
            "top_bigram_second": self.shares.top_bigram[:, 1],
            "top_bigram_share": self.shares.top_bigram_share,
        }

    def about(self) -> dict[str, Any]:
        """Return what all latents have in common."""
        return {
            "n_counted": int(self.gathered.statistics.n_counted),
            "n_rows_together": self.n_rows_together,
            "n_dropped_token_pairs": int(self.gathered.mass.n_dropped),
        }

    def latent_rows(self, some: range) -> list[dict[str, Any]]:
        columns = {name: plain(values[some.start : some.stop]) for name, values in self.figures.items()}
        return [{"latent": latent} | {k: v[i] for k, v in columns.items()} for i, latent in enumerate(some)]

    def detail_rows(self, some: range) -> list[dict[str, Any]]:
        return [{"latent": latent, "content": packed(self.details(latent))} for latent in some]

    def details(self, latent: int) -> dict[str, Any]:
        counts, edges = shown_histogram(self.gathered.statistics.histogram[latent])
        quantiles = dict(zip(map(str, QUANTILES), plain(self.quantiles[:, latent]), strict=True))
        found: dict[str, Any] = {
            "histogram": {"counts": counts.tolist(), "edges": rounded(edges).tolist()},
            "quantiles": quantiles,
            "neighbours": {name: pairs(near.others[latent], near.values[latent]) for name, near in self.near.items()},
        }
        if (lens := self.lens) is not None:
            found["logits"] = {
                "top": pairs(lens.top[latent], lens.top_values[latent]),
                "bottom": pairs(lens.bottom[latent], lens.bottom_values[latent]),
                "counts": lens.counts[latent].tolist(),
                "edges": lens.edges[latent].tolist(),
            }
        return found

    def token_rows(self, some: range) -> list[dict[str, Any]]:
        latents, ids, shares = self.top_tokens
        begin, end = np.searchsorted(latents, [some.start, some.stop])
        names = ("latent", "rank", "token", "share")
        columns = (plain(part[begin:end]) for part in (latents, ranks(latents), ids, shares))
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def add_effect(reader: Reader, latent: int, effects: list[dict[str, Any]]) -> None:
    """Add to a finished analysis what ablating a latent does at its top examples."""
    row = {"analysis": reader.analysis, "latent": latent, "content": packed(effects)}
    engine = engine_of(reader.url)
    with engine.begin() as connection:
        connection.execute(insert(schema.effects), [row])
    engine.dispose()


def weight_figures(W_enc: Tensor, W_dec: Tensor, b_enc: Tensor) -> dict[str, np.ndarray]:
    """Return what the weights alone say of each latent; decoder_x and decoder_y are the first two principal directions.

    The cosine of encoder and decoder is NaN for a transcoder between places of different widths.
    """
    W_enc = W_enc.float()
    cosine = torch.full_like(b_enc, math.nan, dtype=torch.float32)
    if W_enc.shape[0] == W_dec.shape[1]:
        cosine = torch.cosine_similarity(W_enc.T, W_dec, dim=1)
    centred = (W_dec - W_dec.mean(dim=0)).double().cpu()
    _, axes = torch.linalg.eigh(centred.T @ centred)
    plane = axes[:, -2:].flip(1)
    plane = plane * plane.gather(0, plane.abs().argmax(dim=0, keepdim=True)).sign()  # one of two opposite signs
    x_y = centred @ plane
    found = {
        "decoder_norm": W_dec.norm(dim=1),
        "encoder_norm": W_enc.norm(dim=0),
        "encoder_bias": b_enc.float(),
        "encoder_decoder_cosine": cosine,
        "decoder_x": x_y[:, 0],
        "decoder_y": x_y[:, -1],
    }
    return {name: value.cpu().numpy() for name, value in found.items()}


def example_rows(examples: Examples, some: range) -> list[dict[str, Any]]:
    return [{"latent": latent, "content": to_bytes(of)} for latent, of in zip(some, examples.of(some), strict=True)]


def context_rows(context_ids: np.ndarray, used: np.ndarray) -> list[dict[str, Any]]:
    return [{"context": number, "content": context_ids[number].astype("<i4").tobytes()} for number in used.tolist()]


def pairs(numbers: np.ndarray, values: np.ndarray) -> list[tuple[int, float]]:
    """Return (number, value) for those that there are."""
    return [(int(n), float(v)) for n, v in zip(numbers, values, strict=True) if n >= 0 and math.isfinite(v)]


def rounded(values: np.ndarray, digits: int = 7) -> np.ndarray:
    """Return float64 numbers of so few `digits` that JSON is short: as many as a float32 has."""
    values = np.asarray(values, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = 10.0 ** (digits - 1 - np.floor(np.log10(np.abs(values))))
        return np.where(
            (values == 0) | ~np.isfinite(values) | ~np.isfinite(scale), values, np.round(values * scale) / scale
        )


def plain(values: np.ndarray) -> list[Any]:
    """Return Python's numbers; None for what is not finite."""
    return [None if isinstance(v, float) and not math.isfinite(v) else v for v in values.tolist()]


def packed(content: Any) -> bytes:
    return zlib.compress(json.dumps(content, separators=(",", ":")).encode(), 6)
