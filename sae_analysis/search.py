"""Find latents by the tokens they fire on, or by a text in their strongest examples."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import select

from sae_analysis.store import schema
from sae_analysis.store.example_blob import KINDS, from_bytes
from sae_analysis.store.read import Reader

TOP = KINDS.index("top")


def window(position: int, n_positions: int, width: int = 32) -> range:
    """Return the positions of `width` tokens around one of a context, two thirds of them before it."""
    start = max(0, min(position - 2 * width // 3, n_positions - width))
    return range(start, min(start + width, n_positions))


def shares_of_tokens(reader: Reader, tokens: Collection[str]) -> dict[int, float]:
    """Return the latents that have one of some tokens among their first ten, and the share of their activation there.

    Spaces around a token and its case do not count.
    """
    wanted = {token.strip().lower() for token in tokens}
    ids = [i for i in range(len(reader.pieces)) if reader.texts([i])[0].strip().lower() in wanted]
    table = schema.tokens
    query = select(table.c.latent, table.c.share).where(table.c.analysis == reader.analysis, table.c.token.in_(ids))
    shares: dict[int, float] = {}
    for row in reader.rows(query):
        shares[row.latent] = shares.get(row.latent, 0.0) + row.share
    return shares


def examples_with_text(reader: Reader, text: str) -> dict[int, int]:
    """Return the latents with a text in the windows of their top examples, and in how many; case does not count."""
    wanted = text.lower()
    contexts = ((number, reader.texts(ids)) for number, ids in reader.all_contexts())
    holding = {number: tokens for number, tokens in contexts if wanted in "".join(tokens).lower()}
    counts: dict[int, int] = {}
    table = schema.examples
    query = select(table.c.latent, table.c.content).where(table.c.analysis == reader.analysis)
    for row in reader.rows(query.order_by(table.c.latent)) if holding else ():
        stored = from_bytes(row.content)
        for kind, number, position in zip(stored.kinds, stored.contexts.tolist(), stored.positions, strict=True):
            if kind == TOP and (tokens := holding.get(number)) is not None:
                shown = "".join(tokens[i] for i in window(int(position), len(tokens)))
                counts[row.latent] = counts.get(row.latent, 0) + (wanted in shown.lower())
    return {latent: n for latent, n in counts.items() if n}
