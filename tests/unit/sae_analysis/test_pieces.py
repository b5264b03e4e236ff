"""Token ids as bytes and as text, for tokenizers of each kind."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sae_analysis.pieces import Texts, as_texts, pieces_of
from sae_training.demo_data import DEMO_MODEL

TEXT = "naïve  λόγος\t鲸 🐋 (x) 'tis\n\n  end"


def byte_level() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


def sentence_piece() -> PreTrainedTokenizerFast:
    """Of the kind of Llama 2: a bar for a space, and bytes for what it does not know."""
    vocabulary = {"<unk>": 0, "<s>": 1, **{f"<0x{i:02X}>": i + 2 for i in range(256)}}
    for piece in ("▁", "▁the", "n", "e", "d", "▁e"):
        vocabulary[piece] = len(vocabulary)
    merges = [("▁", "e")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


def word_piece() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(["unbelievable things"] * 9, trainers.WordPieceTrainer(special_tokens=["[UNK]"]))
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_pieces_of_a_text_are_its_bytes(make) -> None:
    tokenizer = make()
    pieces = pieces_of(tokenizer, len(tokenizer))
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert b"".join(pieces[i] for i in ids).decode().strip() == TEXT
    texts = as_texts([pieces[i] for i in ids])
    assert len(texts) == len(ids) and "".join(texts).strip() == TEXT
    assert "" in texts  # the whale is split


def test_pieces_of_words_have_no_signs_of_the_tokenizer() -> None:
    tokenizer = word_piece()
    pieces = pieces_of(tokenizer, len(tokenizer))
    ids = tokenizer("unbelievable", add_special_tokens=False)["input_ids"]
    assert b"".join(pieces[i] for i in ids) == b"unbelievable"


def test_special_tokens_are_shown_by_name_and_padded_vocabularies_by_number() -> None:
    tokenizer = byte_level()
    pieces = pieces_of(tokenizer, len(tokenizer) + 3)
    assert pieces[int(tokenizer.bos_token_id)] == b"<|endoftext|>"  # pyright: ignore
    assert pieces[-1] == f"<{len(tokenizer) + 2}>".encode()
    assert pieces_of(None, 3) == [b"0 ", b"1 ", b"2 "]


def test_a_split_character_belongs_to_its_first_piece_and_broken_bytes_are_marked() -> None:
    whale = "🐋".encode()
    assert as_texts([b"a", whale[:1], whale[1:3], whale[3:] + b"b"]) == ["a", "🐋", "", "b"]
    assert as_texts([b"a", whale[:2], b"b"]) == ["a", "��", "b"]
    assert as_texts([b"\xff", "é".encode()]) == ["�", "é"]
    assert as_texts([]) == []


def test_texts_of_ids_are_those_of_their_bytes() -> None:
    whale = "🐋".encode()
    pieces = [
        b"a",
        whale[:1],
        whale[1:3],
        whale[3:] + b"b",
        b"",
        " é".encode(),
        b"\xff",
        "\ud800".encode(errors="surrogatepass"),
    ]
    texts, draw = Texts(pieces), random.Random(0)
    for ids in (
        [0, 1, 2, 3],
        [1, 4, -1, 2, 3],
        [1, 2, 4, 0],
        [4, 1, 4],
        *(draw.choices(range(-1, 8), k=30) for _ in range(300)),
    ):
        expected = as_texts([b"" if id_ < 0 else pieces[id_] for id_ in ids])
        assert texts.of(ids) == expected
    assert Texts(pieces, str.upper).of([0, 1, 2, 3]) == ["A", "🐋", "", "b"]
