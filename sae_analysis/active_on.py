"""Which latents are active on a text that a reader types, token by token.

A store of an analysis holds neither the language model nor the weights. Both are loaded by where the analysis lies, or
given.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from sqlalchemy import select
from torch import Tensor

from sae_analysis.corpus import PASS_TOKENS
from sae_analysis.interventions import sites_in
from sae_analysis.positions import Positions, mask_of, where_of
from sae_analysis.store import schema
from sae_analysis.store.read import Reader, path_of
from sae_analysis.subjects import hash_of
from sae_training.activations_store import ActivationsStore
from sae_training.activations_store.store import without_cache
from sae_training.language_model.harvest import harvest
from sae_training.language_model.load import LanguageModel
from sae_training.language_model.tokenizer import tokenizer_of
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.text.packing import PADDING, bos_id_of, one_by_one
from sae_training.text.tokenize import tokenizer_function

CODE_ELEMENTS = 1 << 25  # of a dense code, (rows, d_sae), that is held at a time: 128 MB
N_TOP_TOKENS = 5
LATENTS_OF_A_QUERY = 10_000
HOW_TO_GIVE = (
    "give the autoencoder: active_on(text, sae=sae), or active_on(text, model, sae) with those that "
    "LMSparseAutoencoderSessionloader.load_session_from_pretrained returns."
)


class Active(NamedTuple):
    """The contexts of a text as token ids, and in columns each latent that is active at a position of one."""

    ids: list[list[int]]
    contexts: np.ndarray
    positions: np.ndarray
    latents: np.ndarray
    activations: np.ndarray


def active_on(text: str, model: LanguageModel, sae: SparseAutoencoder, positions: Positions = "trained") -> Active:
    """Return what `sae.encode` gives above 0 on `text`: by position, and the strongest of a position first.

    The text becomes contexts as a document of the autoencoder's run does: each begins with BOS (`prepend_bos`), and
    after `context_size` tokens the next begins. `positions` as for `interventions.splice`.
    """
    sites = sites_in(model, sae)
    where = where_of(positions, model, sae)
    sae = copy.copy(sae)
    sae.training = False
    contexts: list[list[int]] = []
    parts: list[tuple[Tensor, ...]] = []
    for tokens in passes_of(text, model, sae):
        (x,) = harvest(model, tokens, [sites.input])
        mask = mask_of(where, tokens, x)
        keep = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        for prompt, ids in enumerate(tokens.tolist()):
            for found in active_rows(sae, x[prompt], keep[prompt].cpu()):
                parts.append((torch.full_like(found[0], len(contexts)), *found))
            contexts.append(ids)
    if not parts:
        nowhere = np.empty(0, dtype=np.int64)
        return Active([], nowhere, nowhere, nowhere, np.empty(0, dtype=np.float32))
    rows, places, latents, activations = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    order = np.lexsort((latents, -activations, places, rows))
    return Active(contexts, rows[order], places[order], latents[order], activations[order])


def active_rows(sae: SparseAutoencoder, x: Tensor, keep: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return (positions, latents, activations) of one context, in parts, at the positions that `keep` has."""
    found, at_a_time = [], max(1, CODE_ELEMENTS // sae.d_sae)
    for start in range(0, len(x), at_a_time):
        with torch.no_grad():
            acts = sae.encode(x[start : start + at_a_time].to(sae.device, sae.dtype)).cpu()
        rows, latents = ((acts > 0) & keep[start : start + at_a_time, None]).nonzero(as_tuple=True)
        found.append((rows + start, latents, acts[rows, latents]))
    return found


def passes_of(text: str, model: LanguageModel, sae: SparseAutoencoder) -> list[Tensor]:
    """Return the contexts of a text as ids (prompts, positions): full ones by the pass, then the rest of the text."""
    ids = ids_of(text, model)
    if not ids:
        return []
    bos_id = bos_id_of(tokenizer_of(model)) if sae.full_cfg.prepend_bos else None
    size = min(sae.full_cfg.context_size, model.cfg.n_ctx)
    n_most = -(-len(ids) // (size - (bos_id is not None)))
    document = np.array([PADDING, *ids], dtype=np.int64)
    rows = torch.from_numpy(one_by_one(document, size, bos_id, n_most, is_end=True)[0])
    rows = rows.to(next(model.parameters()).device)
    is_full = rows[:, -1] != PADDING
    full = rows[is_full].split(max(1, PASS_TOKENS // size)) if is_full.any() else ()
    return [*full, *(row[row != PADDING].unsqueeze(0) for row in rows[~is_full])]


def ids_of(text: str, model: LanguageModel) -> list[int]:
    """Return the ids of a text, without BOS. ValueError for what is no text, or a model that cannot read it."""
    if not isinstance(text, str):
        raise ValueError(f"text: found a {type(text).__name__}, expected a string.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text: found half a surrogate pair (character {error.start}), which is no text; leave it out."
        ) from None
    tokenizer = tokenizer_of(model)
    if tokenizer is None:
        raise ValueError("model: found a language model without a tokenizer, which reads no text.")
    ids = list(tokenizer_function(tokenizer)([text])[0])
    if max(ids, default=0) >= model.cfg.d_vocab:
        raise ValueError(
            f"text: holds the token id {max(ids)}, but the model has {model.cfg.d_vocab:,} tokens; leave out the "
            "special token that the tokenizer alone knows."
        )
    return ids


def as_table(active: Active, reader: Reader, latents: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each active latent at each position, with what the analysis knows of the latent."""
    texts = [reader.texts(ids) for ids in active.ids]
    figures = latents.loc[active.latents]
    top_tokens = top_tokens_of(reader, np.unique(active.latents).tolist())
    columns = {
        "context": active.contexts,
        "position": active.positions,
        "token": [texts[context][at] for context, at in zip(active.contexts, active.positions, strict=True)],
        "latent": active.latents,
        "activation": active.activations,
        "of_max": active.activations / figures["max"].to_numpy(dtype=float),
        "density": figures["density"].to_numpy(),
        "max": figures["max"].to_numpy(dtype=float),
        "top_tokens": [top_tokens.get(latent, "") for latent in active.latents.tolist()],
    }
    return pd.DataFrame(columns)


def top_tokens_of(reader: Reader, latents: list[int]) -> dict[int, str]:
    """Return the few tokens that make up most of the activation of some latents, in one line for each."""
    table = schema.tokens
    query = select(table.c.latent, table.c.token).where(
        table.c.analysis == reader.analysis, table.c.rank < N_TOP_TOKENS
    )
    words: dict[int, list[str]] = {}
    for start in range(0, len(latents), LATENTS_OF_A_QUERY):
        some = latents[start : start + LATENTS_OF_A_QUERY]
        for row in reader.rows(query.where(table.c.latent.in_(some)).order_by(table.c.latent, table.c.rank)):
            text = reader.texts([row.token])[0]
            is_plain = text.strip() and text.strip().isprintable()
            words.setdefault(row.latent, []).append(text.strip() if is_plain else repr(text))
    return {latent: " ".join(dict.fromkeys(of_latent)) for latent, of_latent in words.items()}


# ------------------------------------------------------------------------------------------------ where they come from


def autoencoder_of(url: str, about: dict[str, Any]) -> SparseAutoencoder:
    """Return the autoencoder that the analysis at `url` was built with, from where the build found it.

    FileNotFoundError if there is none any more, and ValueError if it has other weights.
    """
    others, places = [], places_of(url, about)
    for place in places:
        try:
            sae = SparseAutoencoder.load_from_pretrained(place)
        except FileNotFoundError:
            continue
        if hash_of(sae) == about["settings"].get("sae"):
            return sae
        others.append(place)
    if others:
        raise ValueError(
            f"{others[0]}: holds other weights than this analysis was built with, so it was trained further or "
            f"replaced; build the analysis anew, or {HOW_TO_GIVE}"
        )
    looked = f"; looked in {' and '.join(map(str, places))}" if places else ""
    raise FileNotFoundError(f"{about['name']}: found no autoencoder of this analysis{looked}; {HOW_TO_GIVE}")


def places_of(url: str, about: dict[str, Any]) -> list[Path]:
    """Return where the autoencoder may be: where the build found it, or in the run that the analysis lies in."""
    path = path_of(url)
    if path is None:
        return []
    folder = path.resolve().parent.parent  # of RUN/analysis/analysis.sqlite
    places = [folder / about["source"]] if about.get("source") else []
    return list(dict.fromkeys(place.resolve() for place in [*places, folder]))


def check_given(sae: SparseAutoencoder, about: dict[str, Any]) -> None:
    """Raise ValueError if the analysis cannot be that of `sae`; warn if it is that of other weights."""
    if sae.d_sae != about["d_sae"]:
        raise ValueError(
            f"sae: found {sae.d_sae:,} latents, but this analysis is of {about['d_sae']:,}; give the autoencoder that "
            f"it was built with ({about['name']})."
        )
    if hash_of(sae) != about["settings"].get("sae"):
        warnings.warn(
            f"sae: found other weights than those that this analysis was built with ({about['name']}), so what it says "
            "of latents (density, max, top_tokens) may be of others",
            stacklevel=3,
        )


def trained_positions(model: LanguageModel, sae: SparseAutoencoder) -> Positions:
    """Return what "trained" means, which takes some of the run's text if the run leaves out large norms."""
    if sae.full_cfg.max_activation_norm_multiple is None:
        return "trained"
    return ActivationsStore(without_cache(sae.full_cfg), model).rule
