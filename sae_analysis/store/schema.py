"""The tables of a store of analyses. SQLAlchemy Core, so that SQLite and PostgreSQL are one code.

    analyses    one row for each: what was analysed, on which text, in JSON
    latents     one row for each latent: the figures that people sort and filter by
    details     one row for each latent: histograms, logits, neighbours; JSON, compressed
    examples    one row for each latent: where it fires (`examples_blob`), compressed
    effects     one row for some latents: what ablating them does at their top examples; JSON, compressed
    tokens      the tokens that make up most of a latent's activation, for search
    contexts    the token ids of each context that an example is in
    pieces      the bytes of each token id

A store is complete once the row of `analyses` says so. A figure that is not a number is NULL.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
)

SCHEMA_VERSION = 1

metadata = MetaData()

analyses = Table(
    "analyses",
    metadata,
    Column("analysis", Integer, primary_key=True),
    Column("schema_version", Integer, nullable=False),
    Column("complete", Boolean, nullable=False),
    Column("about", Text, nullable=False),
)

FIGURES = {
    "count": BigInteger,
    "density": Double,
    "max": Double,
    "mean": Double,
    "mean_all": Double,
    "variance": Double,
    "skew": Double,
    "kurtosis": Double,
    "first": BigInteger,
    "last": BigInteger,
    "mean_position": Double,
    "decoder_norm": Double,
    "encoder_norm": Double,
    "encoder_bias": Double,
    "encoder_decoder_cosine": Double,
    "decoder_x": Double,
    "decoder_y": Double,
    "logit_skew": Double,
    "logit_kurtosis": Double,
    "token_entropy": Double,
    "top_token": Integer,
    "top_token_share": Double,
    "top_bigram_first": Integer,
    "top_bigram_second": Integer,
    "top_bigram_share": Double,
}
"""The figures of a latent, and their types."""

latents = Table(
    "latents",
    metadata,
    Column("analysis", Integer, primary_key=True),
    Column("latent", Integer, primary_key=True),
    *(Column(name, kind) for name, kind in FIGURES.items()),
)


def blobs(name: str, key: str) -> Table:
    """A table of a value for each key."""
    return Table(
        name,
        metadata,
        Column("analysis", Integer, primary_key=True),
        Column(key, Integer, primary_key=True),
        Column("content", LargeBinary, nullable=False),
    )


details = blobs("details", "latent")
examples = blobs("examples", "latent")
effects = blobs("effects", "latent")
contexts = blobs("contexts", "context")
pieces = blobs("pieces", "token")

tokens = Table(
    "tokens",
    metadata,
    Column("analysis", Integer, primary_key=True),
    Column("latent", Integer, primary_key=True),
    Column("rank", Integer, primary_key=True),
    Column("token", Integer, nullable=False),
    Column("share", Double, nullable=False),
    Index("tokens_by_token", "analysis", "token"),
)
