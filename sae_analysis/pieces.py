"""Tokens as text: the bytes that each token id stands for, and the text of several in a row.

A byte-level tokenizer may split a character over tokens, so ids are kept as bytes and only their sequence is decoded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any


def pieces_of(tokenizer: Any, d_vocab: int) -> list[bytes]:
    """Return the bytes of each token id below `d_vocab`; without a tokenizer, the number and a space."""
    if tokenizer is None:
        return [f"{id_} ".encode() for id_ in range(d_vocab)]
    n = min(d_vocab, len(tokenizer))
    names = tokenizer.convert_ids_to_tokens(list(range(n)))
    added = {int(id_) for id_ in getattr(tokenizer, "added_tokens_decoder", {})}
    is_byte_level = has_byte_level_decoder(tokenizer)
    found = []
    for id_, name in enumerate(names):
        if name is None:
            found.append(b"")
        elif id_ in added:
            found.append(name.encode())
        elif is_byte_level and set(name) <= byte_of_letter().keys():
            found.append(bytes(byte_of_letter()[letter] for letter in name))
        elif match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", name):
            found.append(bytes([int(match[1], 16)]))
        elif "▁" in name:  # SentencePiece's space
            found.append(name.replace("▁", " ").encode())
        elif name.startswith("##"):  # WordPiece's sign of a word that goes on
            found.append(name[2:].encode())
        else:
            found.append(name.encode() if is_byte_level else tokenizer.decode([id_]).encode())
    return found + [f"<{id_}>".encode() for id_ in range(n, d_vocab)]


def has_byte_level_decoder(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a slow tokenizer of the GPT-2 kind
        return hasattr(tokenizer, "byte_decoder")
    return "ByteLevel(" in repr(backend.decoder)  # its JSON would be that of the whole tokenizer: 0.4 s


@cache
def byte_of_letter() -> dict[str, int]:
    """Return the byte that each letter of a byte-level vocabulary stands for: printable ones for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class Texts:
    """The texts of token ids, whose bytes are `pieces`. Those of tokens that are text by themselves are kept ready.

    shown: what is done with the text of such a token first; a page shortens it.
    """

    def __init__(self, pieces: Sequence[bytes], shown: Callable[[str], str] = str) -> None:
        self.pieces = pieces
        self.alone = [None if (text := decoded(piece)) is None else shown(text) for piece in pieces]
        """The text of each token by itself; None if it holds a part of a character."""

    def of(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token of a sequence; "" for padding, which is no id of a token.

        Parts of characters stand together, or have tokens without bytes between them, because a token that is text by
        itself neither ends nor begins inside a character.
        """
        n, alone = len(self.pieces), self.alone
        found = [alone[id_] if 0 <= id_ < n else "" for id_ in ids]
        while None in found:
            start = found.index(None)
            stop = next((i for i in range(start, len(found)) if found[i]), len(found))
            found[start:stop] = as_texts([self.pieces[id_] if 0 <= id_ < n else b"" for id_ in ids[start:stop]])
        return [text for text in found if text is not None]


def decoded(piece: bytes) -> str | None:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


def as_texts(pieces: Sequence[bytes]) -> list[str]:
    """Return the text of each piece of a sequence.

    A character that is split over pieces belongs to the first of them, and the others have "" of it. A byte that
    belongs to no character becomes U+FFFD.
    """
    letters: list[list[str]] = [[] for _ in pieces]
    owner = [i for i, piece in enumerate(pieces) for _ in piece]
    at = 0
    for letter in b"".join(pieces).decode(errors="surrogateescape"):
        is_broken = "\ud800" <= letter <= "\udfff"  # which no valid UTF-8 gives
        letters[owner[at]].append("\ufffd" if is_broken else letter)
        at += 1 if is_broken else len(letter.encode())
    return ["".join(some) for some in letters]
