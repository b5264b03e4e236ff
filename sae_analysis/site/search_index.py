"""An index of words that a page can search without a server: a word leads to the one file that has it."""

from __future__ import annotations

import re
from array import array
from pathlib import Path
from typing import Any

from sae_analysis.site.records import tokens_of_windows
from sae_analysis.site.scripts import write_data

FILE_BYTES = 40_000
LONGEST = 40  # letters of a word that count
N_EXAMPLES = 30  # so that a number of 30 bits says which
WORDS = re.compile(r"\w+|[^\w\s]")
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


class Index:
    """For each word the latents that have it, each with a number: a share in thousandths, or bits that say where."""

    def __init__(self) -> None:
        self.words: dict[str, array[int]] = {}

    def add(self, word: str, latent: int, number: int) -> None:
        """Add a posting. Latents come in ascending order."""
        self.words.setdefault(word, array("Q")).append(latent << 32 | number)

    def write(self, folder: Path, name: str) -> None:
        """Write the postings in files <name>-<i>, and in <name> the word that each of them begins with.

        A file holds [word, "latent.number,..."], numbers to the base 36, latents as the distance from the one before.
        """
        files: list[list[tuple[str, str]]] = []
        size = FILE_BYTES
        for word in sorted(self.words, key=as_scripts_sort):
            postings = text_of(self.words[word])
            size += len(postings) + 4 * len(word) + 6
            if size > FILE_BYTES:
                files.append([])
                size = len(postings)
            files[-1].append((word, postings))
        write_data(folder, name, [content[0][0] for content in files])
        for number, content in enumerate(files):
            write_data(folder, f"{name}-{number}", content)


def as_scripts_sort(word: str) -> bytes:
    """Return a key that sorts words as JavaScript compares them: by units of UTF-16."""
    return word.encode("utf-16-be", errors="surrogatepass")


class SearchIndexes:
    """By top token, and by the words of the windows of top examples."""

    def __init__(self) -> None:
        self.by_token, self.by_text = Index(), Index()

    def add(self, record: dict[str, Any]) -> None:
        """Take up a latent. Latents come in ascending order."""
        latent = record["latent"]
        shares: dict[str, float] = {}
        for text, share in record["tokens"]:
            shares[token_key(text)] = shares.get(token_key(text), 0.0) + share
        for key, share in shares.items():
            self.by_token.add(key, latent, max(1, round(1000 * share)))
        masks: dict[str, int] = {}
        for number, (texts, _) in enumerate(tokens_of_windows(record)):
            if number == N_EXAMPLES:
                break
            for word in set(words_of("".join(texts))):
                masks[word] = masks.get(word, 0) | 1 << number
        for word, mask in masks.items():
            self.by_text.add(word, latent, mask)

    def write(self, folder: Path) -> None:
        self.by_token.write(folder, "search/tokens")
        self.by_text.write(folder, "search/text")


def words_of(text: str) -> list[str]:
    """Return the words of a text and its other signs, in lower case; search.js does the same with what is asked for."""
    return [word[:LONGEST] for word in WORDS.findall(text.lower())]


def token_key(text: str) -> str:
    """Return what a token is searched by: no space around it, no capitals; of white space alone, how it is written."""
    bare = text.strip().lower()[:LONGEST]
    return bare or text.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r").replace(" ", "_")[:LONGEST]


def text_of(postings: array[int]) -> str:
    before, parts = 0, []
    for posting in postings:
        latent, number = posting >> 32, posting & 0xFFFFFFFF
        parts.append(f"{base_36(latent - before)}.{base_36(number)}")
        before = latent
    return ",".join(parts)


def base_36(number: int) -> str:
    text = ""
    while number >= 36:
        number, digit = divmod(number, 36)
        text = DIGITS[digit] + text
    return DIGITS[number] + text
