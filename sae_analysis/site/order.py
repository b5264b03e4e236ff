"""The order in which the site lists latents: first those that a reader understands in a few seconds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from sae_analysis.site.records import Records, tokens_of_windows
from sae_analysis.store.read import Reader

RAREST, COMMONEST = 2e-4, 1e-2  # densities
FEWEST = 20  # firings, below which shares of tokens are chance
STEADY = 0.5  # of the strongest activation, on the last of N_TOP examples
N_TOP = 5
LARGEST_SHARE = 0.8  # of one word, beyond which a latent says little more than that word


class Clarity(NamedTuple):
    """What the order of a latent comes from."""

    latent: int
    tier: int
    """0: a reader can tell what it stands for. 1: the same, but its density is unusual. 2: the rest. 3: dead."""
    score: float
    """The mean of its strongest activations, which are small on small words."""
    word: str
    """The commonest of them."""


def clarity(record: dict[str, Any]) -> Clarity:
    """Judge one latent by its record.

    Clear is one whose strongest tokens are whole words, not all the same one, and among those that it fires on most; it
    fires steadily on them. A piece of a word says little to a reader, and a latent of one word only says little
    more than that word.
    """
    latent, figures = record["latent"], record["figures"]
    if not figures["count"]:
        return Clarity(latent, 3, 0.0, "")
    words: dict[str, float] = {}
    for text, share in record["tokens"]:
        if is_word(text):
            words[text.strip().lower()] = words.get(text.strip().lower(), 0.0) + share
    shares = sorted(words.values(), reverse=True)
    word = max(words, key=words.__getitem__, default="")
    tops = list(tokens_of_windows(record))[:N_TOP]
    activations = [activation_of(example) for example in record["examples"][: len(tops)]]
    score = sum(activations) / max(len(activations), 1)
    names = {texts[at].strip().lower() for texts, at in tops}
    is_clear = (
        len(tops) == N_TOP
        and all(is_whole_word(texts, at) for texts, at in tops)
        and len(names) > 1
        and names <= words.keys()
        and activations[-1] > STEADY * activations[0]
        and len(shares) > 1
        and shares[0] < LARGEST_SHARE
    )
    is_usual = figures["count"] >= FEWEST and RAREST <= figures["density"] <= COMMONEST
    return Clarity(latent, 2 if not is_clear else 1 - is_usual, score, word)


def clearest(reader: Reader, n: int) -> list[int]:
    """Return the first `n` latents of the default order."""
    return default_order(map(clarity, Records(reader).all()))[:n]


def default_order(found: Iterable[Clarity]) -> list[int]:
    """Return the latents, clear ones first; of those with the same commonest word, all but the first come later."""
    seen: set[str] = set()
    keys = []
    for one in sorted(found, key=lambda one: (one.tier, -one.score, one.latent)):
        is_another = one.word not in seen
        seen.add(one.word)
        keys.append(((one.tier, not is_another) if one.tier < 2 else (one.tier, False), one.latent))
    return [latent for _, latent in sorted(keys, key=lambda pair: pair[0])]


def activation_of(example: list[Any]) -> float:
    firings = example[6]
    return next((firings[i + 1] for i in range(0, len(firings), 2) if firings[i] == example[2]), 0.0)


def is_word(text: str) -> bool:
    """Return whether a token is a word by itself: a space or a capital, then letters, three of them or more."""
    bare = text.strip()
    return bare.isalpha() and len(bare) > 2 and (text[:1].isspace() or bare[0].isupper())


def is_whole_word(texts: list[str], at: int) -> bool:
    """Return whether the token at a place of a window is a word, no piece of a longer one."""
    before, after = texts[at - 1] if at else "", texts[at + 1] if at + 1 < len(texts) else ""
    text = texts[at]
    goes_on = text[-1:].isalpha() and after[:1].isalpha()
    has_begun = text[:1].isalpha() and before[-1:].isalpha()
    return sum(map(str.isalpha, text)) > 2 and text.strip().isalpha() and not goes_on and not has_begun
