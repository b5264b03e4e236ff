"""Turn texts, and pieces of longer texts, into token ids, without special tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

Tokenize = Callable[[list[Any]], Sequence[Sequence[int]]]


# Of a slow tokenizer: how much of the text on each side of a cut is looked at, and how far the cut may move.
_CHARACTERS_AT_CUT, _LONGEST_TOKEN = 500, 50


class Piece(str):
    """A piece of a longer text. Its ids depend on what stands before and after it there.

    Many tokenizers put a mark before the first word of whatever they are given, for example. The ids of all pieces, one
    after the other, are to be those of the whole text.
    """

    before: str
    """The end of what stands before it; "" at the beginning of the text."""
    after: str
    """The beginning of what stands after it; "" at the end of the text."""

    def __new__(cls, text: str, before: str, after: str) -> Piece:
        piece = super().__new__(cls, text)
        piece.before, piece.after = before, after
        return piece


def tokenizer_function(tokenizer: Any) -> Tokenize:
    """A function from texts, or `Piece`s, to the ids of each, by the Rust part of a tokenizer if it has one.

    The function works on a copy of the Rust part, because a tokenizer refuses changes (of padding or truncation) while
    a thread uses it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:

        def ids_of(texts: list[str]) -> list[list[int]]:
            return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []

        return lambda texts: _with_pieces(texts, ids_of, lambda piece: _ids_by_prefix(piece, ids_of))
    backend = copy.deepcopy(backend)
    backend.no_truncation()
    backend.no_padding()

    def fast_ids_of(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    return lambda texts: _with_pieces(texts, fast_ids_of, lambda piece: _ids_by_offsets(piece, backend))


def _with_pieces(
    texts: list[str], ids_of: Callable[[list[str]], list[list[int]]], ids_of_piece: Callable[[Piece], list[int]]
) -> list[list[int]]:
    """The ids of each text, `ids_of` those that are whole."""
    of_whole = iter(ids_of([text for text in texts if not isinstance(text, Piece)]))
    return [ids_of_piece(text) if isinstance(text, Piece) else next(of_whole) for text in texts]


def _ids_by_offsets(piece: Piece, backend: Any) -> list[int]:
    """The ids of the tokens that begin within the piece, of the piece tokenised with what stands around it."""
    encoding = backend.encode(piece.before + piece + piece.after, add_special_tokens=False)
    begin = len(piece.before)
    end = begin + len(piece) if piece.after else len(piece.before + piece) + 1
    return [i for i, (start, _) in zip(encoding.ids, encoding.offsets, strict=True) if begin <= start < end]


def _ids_by_prefix(piece: Piece, ids_of: Callable[[list[str]], list[list[int]]]) -> list[int]:
    """The ids that the piece adds to those of what stands before it, because slow tokenizers tell no offsets.

    The piece begins and ends between two tokens, a few characters before its cuts if need be.
    """
    whole = piece.before + piece + piece.after
    begin, end = (_between_tokens(whole, cut, ids_of) for cut in (len(piece.before), len(piece.before + piece)))
    before, both = ids_of([whole[:begin], whole[:end]])
    # Where no such place was found, the piece is tokenised by itself.
    return both[len(before) :] if both[: len(before)] == before else ids_of([whole[begin:end]])[0]


def _between_tokens(whole: str, cut: int, ids_of: Callable[[list[str]], list[list[int]]]) -> int:
    """The last place up to `cut` that tokens do not cross. Two pieces find the same for the cut between them."""
    if cut in (0, len(whole)):
        return cut
    start = max(0, cut - _CHARACTERS_AT_CUT)
    places = range(cut, max(start, cut - _LONGEST_TOKEN), -1)
    ids, *ids_to = ids_of([whole[start : cut + _CHARACTERS_AT_CUT], *(whole[start:place] for place in places)])
    return next((place for place, found in zip(places, ids_to, strict=True) if ids[: len(found)] == found), cut)
