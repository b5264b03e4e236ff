"""A finished analysis, as people read it: a table of latents, and a latent with its figures and examples."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sqlalchemy import select

from sae_analysis.places import ANALYSIS_FOLDER, STORE_FILE, store_of
from sae_analysis.search import examples_with_text, shares_of_tokens, window
from sae_analysis.site.one_page import inline_page, save_page
from sae_analysis.site.order import clearest
from sae_analysis.store import schema
from sae_analysis.store.example_blob import KINDS
from sae_analysis.store.read import Reader, url_of


def open_analysis(path: str | Path) -> Analysis:
    """Open the analysis of a run folder, a checkpoint or a file of an autoencoder, of a folder that `build` wrote to, a
    store file, or a database URL.
    """
    if "://" in str(path):
        return Analysis(Reader(str(path)))
    given = Path(path).expanduser()
    store = store_of(given)
    if store is None:
        inside = sorted(p.parent.parent for p in given.glob(f"*/{ANALYSIS_FOLDER}/{STORE_FILE}"))
        if inside:
            raise FileNotFoundError(
                f"{given}: holds the analyses of {len(inside)} autoencoders; open one of {', '.join(map(str, inside))}."
            )
        raise FileNotFoundError(f"{given}: holds no analysis; build it with `sae-analysis build {given}`.")
    return Analysis(Reader(url_of(store)))


@dataclass(frozen=True)
class Example:
    """A place in the corpus, with the text around it."""

    latent: int
    kind: str
    """top, random, silent, or quantile 4 (the strongest fifth of the latent's firings) to quantile 0."""
    context: int
    """The number of the context in the corpus."""
    position: int
    """Of the example's token in the context; `tokens[position]` is its text."""
    activation: float
    """Of the latent there; 0 where it does not fire."""
    ids: list[int]
    """The token ids of the whole context."""
    tokens: list[str]
    """Their texts. Of a character that is split over tokens, all but the first are ""."""
    activations: list[float]
    """Of the latent at each token; 0 beyond 128 tokens from the example, where they are not kept."""

    @property
    def token(self) -> str:
        return self.tokens[self.position]

    def window(self, width: int = 32) -> range:
        """Return the positions of `width` tokens around the example, two thirds of them before it."""
        return window(self.position, len(self.tokens), width)

    def __str__(self) -> str:
        text = "".join(f"[{self.tokens[i]}]" if i == self.position else self.tokens[i] for i in self.window())
        return f"{self.activation:8.3f}  {text!r}"


@dataclass(frozen=True)
class Effect:
    """What ablating a latent at one token does to the prediction of the next (`effects.py`), in nats."""

    loss: float | None
    """Change of the loss of the token that follows; None at the end of a context."""
    raised: list[tuple[str, float]]
    """The tokens whose log-probability grows most without the latent, and by how much."""
    lowered: list[tuple[str, float]]


class Latent:
    """One latent of an analysis; its figures are attributes: `density`, `max`, `mean`, ... (`Analysis.latents`)."""

    def __init__(self, analysis: Analysis, index: int) -> None:
        self.analysis, self.index = analysis, int(index)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("analysis", "index"):  # which are not there yet in a copy
            raise AttributeError(name)
        if name in self.figures:
            return self.figures[name]
        raise AttributeError(f"latent has no figure {name!r}; it has: {', '.join(self.figures)}")

    @cached_property
    def figures(self) -> dict[str, Any]:
        """Its row of the table, as Python's numbers."""
        (row,) = self.analysis.latents.loc[[self.index]].to_dict("records")
        return {str(name): value for name, value in row.items()}

    @cached_property
    def details(self) -> dict[str, Any]:
        return self.analysis.reader.details(self.index)

    @property
    def histogram(self) -> tuple[np.ndarray, np.ndarray]:
        """(counts, edges): of its activations where it fires; edges grow by a constant factor."""
        found = self.details["histogram"]
        return np.array(found["counts"]), np.array(found["edges"])

    @property
    def quantiles(self) -> dict[float, float]:
        """Of its activations where it fires, rounded down to an edge of the histogram's finest bins (9% apart)."""
        return {float(q): v for q, v in self.details["quantiles"].items()}

    @property
    def logits(self) -> dict[str, list[tuple[str, float]]]:
        """The tokens whose logits its direction raises ("top") and lowers ("bottom") most; {} where there are none."""
        found = self.details.get("logits", {})
        text = self.analysis.token_text
        return {side: [(text(id_), value) for id_, value in found[side]] for side in ("top", "bottom") if side in found}

    @property
    def logit_histogram(self) -> tuple[np.ndarray, np.ndarray]:
        """(counts, edges) of the logits over the vocabulary; both empty where there are none."""
        if (found := self.details.get("logits")) is None:
            return np.zeros(0, dtype=np.int64), np.zeros(0)
        return np.array(found["counts"]), np.linspace(found["edges"][0], found["edges"][1], len(found["counts"]) + 1)

    @property
    def neighbours(self) -> dict[str, list[tuple[int, float]]]:
        """Latents: similar (cosine of decoders), correlated (Pearson), coactive (Jaccard); and neurons (cosine)."""
        return {name: [(int(i), v) for i, v in pairs] for name, pairs in self.details["neighbours"].items()}

    @property
    def top_tokens(self) -> list[tuple[str, float]]:
        """The tokens that make up most of its activation, and the share of each."""
        table = schema.tokens
        query = select(table.c.token, table.c.share).where(
            table.c.analysis == self.analysis.reader.analysis, table.c.latent == self.index
        )
        found = self.analysis.reader.rows(query.order_by(table.c.rank))
        return [(self.analysis.token_text(row.token), row.share) for row in found]

    @property
    def effects(self) -> list[Effect]:
        """What ablating it does at each of its top examples; [] if that was not measured (`build --effects`)."""
        text = self.analysis.token_text
        return [
            Effect(found["loss"], *([(text(i), v) for i, v in found[side]] for side in ("raised", "lowered")))
            for found in self.analysis.reader.effects(self.index)
        ]

    def examples(self, kind: str = "top") -> list[Example]:
        """Return examples of a kind: top, quantile (of all fifths, strongest first) or one fifth of it ("quantile 4"),
        random, or silent."""
        kinds = {*KINDS, "quantile"}
        if kind not in kinds:
            raise ValueError(f"kind: found {kind!r}, expected one of {', '.join(sorted(kinds))}.")
        reader, stored = self.analysis.reader, self.analysis.reader.examples(self.index)
        ends = np.cumsum(stored.lengths)
        is_wanted = [name == kind or name.startswith(f"{kind} ") for name in KINDS]
        places = [i for i, of_kind in enumerate(stored.kinds) if is_wanted[of_kind]]
        contexts = reader.contexts(stored.contexts[places].tolist())
        found = []
        for i in places:
            ids = contexts[int(stored.contexts[i])]
            activations = np.zeros(len(ids), dtype=np.float32)
            own = slice(ends[i] - stored.lengths[i], ends[i])
            activations[stored.firing_positions[own]] = stored.firing_values[own]
            position = int(stored.positions[i])
            found.append(
                Example(
                    self.index,
                    KINDS[stored.kinds[i]],
                    int(stored.contexts[i]),
                    position,
                    float(activations[position]),
                    ids.tolist(),
                    reader.texts(ids),
                    activations.tolist(),
                )  # fmt: skip
            )
        return found

    def save_html(self, path: str | Path) -> Path:
        """Write its page as one file, which needs no other, and return the path."""
        return save_page(self.analysis.reader, self.index, path)

    def _repr_html_(self) -> str:
        """Its page, in a notebook."""
        return inline_page(self.analysis.reader, self.index)

    def __repr__(self) -> str:
        lines = [f"latent {self.index}: fires on {self.density:.3%} of tokens, at most {self.max:.3g}"]
        return "\n".join([*lines, *map(str, self.examples("top")[:5])])


class Analysis:
    """A finished analysis."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    @property
    def about(self) -> dict[str, Any]:
        """What was analysed, and on what."""
        return self.reader.about

    @cached_property
    def latents(self) -> pd.DataFrame:
        """A row for each latent: `latent_statistics` and `store.schema.FIGURES` say what the columns are."""
        return self.reader.latents()

    @cached_property
    def sae(self) -> Any:
        """The autoencoder, read when it is first asked for from where the analysis was built, in inference mode.

        FileNotFoundError if there is none, and ValueError if it has other weights than the analysis is of.
        """
        from sae_analysis.active_on import autoencoder_of  # not above: TransformerLens takes seconds to import

        return autoencoder_of(self.reader.url, self.about)

    @cached_property
    def model(self) -> Any:
        """The language model, loaded when it is first asked for, as the autoencoder's run loads it."""
        from sae_training.language_model.load import model_of  # not above, for the same reason

        return model_of(self.sae.cfg)

    def latent(self, index: int) -> Latent:
        """Return a latent. IndexError if there is none of this number, TypeError for what is no whole number."""
        index = operator.index(index)
        if not 0 <= index < self.about["d_sae"]:
            raise IndexError(f"latent: found {index}, expected 0 to {self.about['d_sae'] - 1}.")
        return Latent(self, index)

    def clearest(self, n: int = 10) -> list[int]:
        """Return the numbers of the latents that a reader understands soonest, which the site lists first."""
        return clearest(self.reader, n)

    def token_text(self, id_: int) -> str:
        return self.reader.texts([id_])[0]

    def search(self, tokens: str | list[str] | None = None, text: str | None = None) -> pd.DataFrame:
        """Return the latents that fire on some tokens, or whose top examples hold a text, best first.

        tokens: words or pieces; a latent is found if one is among the ten that make up most of its activation. Spaces
            around a token and its case do not count. Ordered by their share in it (column `share`).
        text: ordered by the number of top examples whose windows hold it (column `n_examples`); case does not count.
        """
        if (tokens is None) == (text is None):
            raise ValueError("search: give tokens or text.")
        words = [text] if tokens is None else tokens if isinstance(tokens, list) else [tokens]
        if not words or not all(isinstance(word, str) and word for word in words):
            raise ValueError(f"search: found {tokens if text is None else text!r}, expected words that are not empty.")
        if tokens is None:
            return self.ranked("n_examples", examples_with_text(self.reader, text or ""))
        return self.ranked("share", shares_of_tokens(self.reader, [str(word) for word in words]))

    def active_on(self, text: str, model: Any = None, sae: Any = None, positions: Any = "trained") -> pd.DataFrame:
        """Return which latents are active on a text, token by token: a row for each, the strongest of a token first.

        Columns: `context` and `position` (BOS, where the run has it, is at 0; a text longer than the run's context
        goes on in the next one), `token`, `latent`, `activation`, `of_max` (over the latent's maximum in the analysis,
        so above 1 where the text gets more out of it), `density`, `max`, `top_tokens`.

        model, sae: those of the analysis, in place of `Analysis.model` and `Analysis.sae`, and then kept as these.
        positions: "trained" leaves out the positions that do not count in the run, such as BOS where it excludes
            special tokens; "all", and others, as for `interventions.splice`.

        An empty text has no rows. Raise ValueError if the text, the model and the autoencoder do not fit.
        """
        from sae_analysis import active_on  # not above: TransformerLens takes seconds to import

        if sae is not None and sae is not vars(self).get("sae"):
            active_on.check_given(sae, self.about)
            self.sae = sae
        if model is not None:
            self.model = model
        if positions == "trained":
            positions = active_on.trained_positions(self.model, self.sae)
        return active_on.as_table(active_on.active_on(text, self.model, self.sae, positions), self.reader, self.latents)

    def ranked(self, name: str, values: dict[int, Any]) -> pd.DataFrame:
        """Return the rows of some latents with a column more, its highest values first."""
        table = self.latents.loc[sorted(values)].copy()
        table[name] = [values[index] for index in sorted(values)]
        return table.sort_values(name, ascending=False, kind="stable")

    def summary(self) -> str:
        """Return what was found in a few lines, and where it is."""
        table, about = self.latents, self.about
        density = table["density"].to_numpy()
        quantiles = np.quantile(density[density > 0], [0.1, 0.5, 0.9]) if (density > 0).any() else np.zeros(3)
        silent = np.count_nonzero(density == 0)
        return "\n".join(
            [
                f"{self!r}",
                f"  {about['n_counted']:,} tokens counted, {about['n_contexts']:,} contexts of {about['context_size']}",
                f"  {silent:,} latents never fire; a tenth of the others fires on less than {quantiles[0]:.2g} of "
                f"the tokens, half on less than {quantiles[1]:.2g}, a tenth on more than {quantiles[2]:.2g}",
                f"  {self.reader.name}",
            ]
        )

    def __repr__(self) -> str:
        about = self.about
        return f"Analysis of {about['name']}: {about['d_sae']:,} latents of {about['hook_point']} on {about['text']}"
