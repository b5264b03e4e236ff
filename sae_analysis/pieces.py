"""Tokens as text: the bytes that each token id stands for, and the text of several in a row.

A byte-level tokenizer may split a character over tokens, so ids are kept as bytes and only their sequence is decoded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
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
    return '"ByteLevel"' in json.dumps(json.loads(backend.to_str()).get("decoder"))


@cache
def byte_of_letter() -> dict[str, int]:
    """Return the byte that each letter of a byte-level vocabulary stands for: printable ones for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def as_texts(pieces: Sequence[bytes]) -> list[str]:
    """Return the text of each piece of a sequence.

    A character that is split over pieces belongs to the first of them, and the others have "" of it. Bytes that are no
    UTF-8 become U+FFFD.
    """
    try:
        return [piece.decode() for piece in pieces]
    except UnicodeDecodeError:
        pass
    texts = [""] * len(pieces)
    whole = b"".join(pieces)
    owner = [i for i, piece in enumerate(pieces) for _ in piece]
    at = 0
    while at < len(whole):
        length = character_length(whole, at)
        texts[owner[at]] += whole[at : at + length].decode(errors="replace")
        at += length
    return texts


def character_length(text: bytes, at: int) -> int:
    """Return how many bytes the character at `at` has; 1 if it is no whole character."""
    for length in range(1, 5):
        try:
            text[at : at + length].decode()
        except UnicodeDecodeError:
            continue
        return length
    return 1
