"""On which tokens a latent fires: its activations added up by the token, and by the token with the one before it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sae_analysis.events import Firings, Ints, arrays_of, first_with, ranks

BUFFERED = 2**22  # firings that are added to the table at once, because a table is sorted anew each time
MAX_PAIRS = 2**25  # 0.5 GiB


class Shares(NamedTuple):
    """Of each latent (d_sae,): how its activations are spread over tokens. NaN and -1 where it never fires."""

    entropy: np.ndarray
    """Of the distribution of its mass over the vocabulary, in bits."""
    top_token: Ints
    top_token_share: np.ndarray
    top_bigram: Ints
    """(d_sae, 2): the token before (-1: none) and the token."""
    top_bigram_share: np.ndarray


class TokenMass:
    """The table (latent, token, token before) -> sum of activations, in this order.

    Above MAX_PAIRS entries, those with the smallest shares of their latents are dropped; what is dropped still counts
    in the total, so that shares are never too high, and `n_dropped` says how many they were.

    float64 holds a sum of float32 numbers exactly, unless it is 2^29 times the smallest of them: then the last digit
    depends on the order of the sum.
    """

    def __init__(self, d_sae: int, d_vocab: int) -> None:
        self.d_sae, self.base = d_sae, d_vocab + 1
        self.keys = np.zeros(0, dtype=np.int64)
        self.mass = np.zeros(0)
        self.dropped = np.zeros(d_sae)
        """The mass of the entries of each latent that were dropped."""
        self.n_dropped = np.zeros((), dtype=np.int64)
        self.waiting: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, firings: Firings) -> None:
        values = firings.values.astype(np.float64)
        keys = (firings.latents * self.base + firings.ids) * self.base + firings.ids_before + 1
        self.waiting.append((keys, values))
        if sum(len(keys) for keys, _ in self.waiting) > BUFFERED:
            self.settle()

    def settle(self) -> None:
        """Put what waits into the table; nothing to do if nothing does, because sorting the table takes seconds."""
        if not any(len(keys) for keys, _ in self.waiting):
            return
        waiting = [(self.keys, self.mass), *self.waiting]
        self.waiting = []
        self.keys, self.mass = added_up(*map(np.concatenate, zip(*waiting, strict=True)))
        if len(self.keys) > MAX_PAIRS:
            latents = self.keys // self.base**2
            shares = self.mass / self.total()[latents]
            limit = np.partition(shares, -MAX_PAIRS // 2)[-MAX_PAIRS // 2]
            kept = shares >= limit
            self.n_dropped += len(kept) - np.count_nonzero(kept)
            self.dropped += np.bincount(latents[~kept], self.mass[~kept], self.d_sae)
            self.keys, self.mass = self.keys[kept], self.mass[kept]

    def merge(self, arrays: dict[str, np.ndarray]) -> None:
        """Take up the table of another, over other contexts."""
        self.n_dropped += arrays["n_dropped"]
        self.dropped += arrays["dropped"]
        self.waiting += [(arrays["keys"], arrays["mass"]), (arrays["waiting_keys"], arrays["waiting_mass"])]
        self.settle()

    def total(self) -> np.ndarray:
        """Return the mass of each latent (d_sae,) in the table, and of what was dropped from it."""
        return np.bincount(self.keys // self.base**2, self.mass, self.d_sae) + self.dropped

    def by_token(self) -> tuple[Ints, Ints, np.ndarray]:
        """Return (latents, tokens, shares), in this order: the parts of each latent's mass."""
        self.settle()
        begins = begins_of(self.keys // self.base)
        latents, tokens = np.divmod(self.keys[begins] // self.base, self.base)
        return latents, tokens, sums(self.mass, begins) / self.total()[latents]

    def shares(self) -> Shares:
        latents, tokens, share = self.by_token()
        entropy = np.bincount(latents, -share * np.log2(share), minlength=self.d_sae)
        unigrams = best_of(latents, share, self.d_sae)
        bigrams = best_of(self.keys // self.base**2, self.mass, self.d_sae)
        total = self.total()
        with np.errstate(divide="ignore", invalid="ignore"):
            return Shares(
                np.where(total > 0, entropy, np.nan),
                at(tokens, unigrams),
                at(share, unigrams, np.nan),
                np.stack([at(self.keys % self.base - 1, bigrams), at(self.keys // self.base % self.base, bigrams)], 1),
                at(self.mass, bigrams, np.nan) / total,
            )

    def top_tokens(self, n: int) -> tuple[Ints, Ints, np.ndarray]:
        """Return (latents, tokens, shares): for each latent the `n` tokens with the largest shares, largest first."""
        latents, tokens, share = self.by_token()
        order = np.lexsort([-share, latents])
        order = order[ranks(latents) < n]
        return latents[order], tokens[order], share[order]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return its state. What waits stays so: sums are the same to the last bit, whenever the state is saved."""
        waiting = self.waiting or [(self.keys[:0], self.mass[:0])]
        self.waiting = [(np.concatenate([keys for keys, _ in waiting]), np.concatenate([mass for _, mass in waiting]))]
        ((waiting_keys, waiting_mass),) = self.waiting
        return arrays_of(self) | {"waiting_keys": waiting_keys, "waiting_mass": waiting_mass}

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        for name in ("keys", "mass", "dropped", "n_dropped"):
            setattr(self, name, arrays[name])
        self.waiting = [(arrays["waiting_keys"], arrays["waiting_mass"])]


def added_up(keys: np.ndarray, mass: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the ascending unique keys, and the sum of the mass of each."""
    order = np.argsort(keys)  # by vectors, three times as fast as the stable kind
    keys = keys[order]
    begins = begins_of(keys)
    return keys[begins], sums(mass[order], begins)


def begins_of(keys: np.ndarray) -> Ints:
    """Return where each run of equal `keys` begins."""
    return np.flatnonzero(np.append(True, keys[1:] != keys[:-1])) if len(keys) else np.zeros(0, dtype=np.int64)


def sums(values: np.ndarray, begins: Ints) -> np.ndarray:
    """Return the sum of each run of `values`."""
    return np.add.reduceat(values, begins) if len(begins) else values[:0]


def best_of(latents: np.ndarray, mass: np.ndarray, d_sae: int) -> Ints:
    """Return for each of the ascending `latents` the place of its largest mass, the first of equals; -1 if none."""
    found = np.full(d_sae, -1, dtype=np.int64)
    begins = begins_of(latents)
    if len(begins):
        found[latents[begins]] = first_with(mass, np.maximum.reduceat(mass, begins), np.append(begins, len(latents)))
    return found


def at(values: np.ndarray, places: Ints, missing: float = -1) -> np.ndarray:
    """Return the values at some places, and `missing` where the place is -1."""
    if len(values) == 0:
        return np.full(len(places), missing)
    return np.where(places < 0, missing, values[places])
