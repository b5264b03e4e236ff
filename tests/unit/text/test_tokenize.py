"""The ids of a text that is cut into pieces are those of the whole, for each kind of tokenizer."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers
from texts import documents_of, epoch_of
from tokenizers import AddedToken, Regex, Tokenizer, models, processors, trainers
from tokenizers import normalizers as norm
from tokenizers import pre_tokenizers as pre
from transformers import PreTrainedTokenizerFast

from sae_training.text.documents import pieces_of
from sae_training.text.stream import TokenStream
from sae_training.text.tokenize import tokenizer_function

CORPUS = [
    "The quick brown fox jumps over the lazy dog, isn't it?  Yes: 12,345.67 km, naïve cafés.\n\ndef f(x):\n\tx\n",
    "你好，世界。今天天气很好！ 再见",
    "emoji 😀 and family 👨‍👩‍👧 done ",
    "of the and the in the of the ",
] * 6
WORDS = [
    "the",
    "fox",
    "isn't",
    "naïve",
    "cafés",
    "12,345.67",
    "of",
    "你好世界",
    "😀",
    "A.B.C",
    "re-do",
    "Straße",
    "ﬁne",
    "é",
]
BETWEEN = {
    "words": [" "] * 8 + ["  ", "\n", "\n\n", "\t", " \n "],
    "no_blanks": [""],
    "many_blanks": [" " * 7, "\n" * 5, " \n" * 4, "\t\t"],
}
BYTES = [f"<0x{i:02X}>" for i in range(256)]
LLAMA_3 = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def a_text(between: str, n: int = 4000) -> str:
    draw = random.Random(0)
    parts = [draw.choice(WORDS) + draw.choice(BETWEEN[between]) for _ in range(n)]
    return "".join(parts)[:n]


def trained(model: Any, trainer: Any, normalizer: Any = None, pre_tokenizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_level(pre_tokenizer: Any) -> Tokenizer:
    alphabet = pre.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    return trained(models.BPE(), trainer, None, pre_tokenizer)


def with_marks(normalizer: Any, pre_tokenizer: Any) -> Tokenizer:
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", *BYTES], show_progress=False)
    return trained(models.BPE(byte_fallback=True, unk_token="<unk>"), trainer, normalizer, pre_tokenizer)


def unigram(normalizer: Any, pre_tokenizer: Any) -> Tokenizer:
    trainer = trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    return trained(models.Unigram(), trainer, normalizer, pre_tokenizer)


def word_piece() -> Tokenizer:
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"], show_progress=False)
    return trained(models.WordPiece(unk_token="[UNK]"), trainer, norm.BertNormalizer(), pre.BertPreTokenizer())


def word_level(pre_tokenizer: Any) -> Tokenizer:
    trainer = trainers.WordLevelTrainer(vocab_size=200, special_tokens=["<unk>"], show_progress=False)
    return trained(models.WordLevel(unk_token="<unk>"), trainer, None, pre_tokenizer)


def roberta() -> Tokenizer:
    tokenizer = byte_level(pre.ByteLevel(add_prefix_space=True))
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)  # pyright: ignore
    return tokenizer


def with_added_tokens(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_tokens([AddedToken("the fox", lstrip=True, rstrip=True), AddedToken("é")])
    return tokenizer


def llama_2() -> Tokenizer:
    return with_marks(norm.Sequence([norm.Prepend("▁"), norm.Replace(" ", "▁")]), None)


FAST: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": lambda: byte_level(pre.ByteLevel(add_prefix_space=False)),
    "roberta": roberta,
    "llama_3": lambda: byte_level(
        pre.Sequence([pre.Split(LLAMA_3, "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    ),
    "llama_2": llama_2,
    "llama_2_added": lambda: with_added_tokens(llama_2()),
    "metaspace_first": lambda: with_marks(None, pre.Metaspace(prepend_scheme="first", split=False)),
    "metaspace_always": lambda: with_marks(None, pre.Metaspace(prepend_scheme="always", split=True)),
    "metaspace_never": lambda: with_marks(None, pre.Metaspace(prepend_scheme="never", split=False)),
    "gemma": lambda: with_marks(norm.Replace(" ", "▁"), pre.Split(" ", "merged_with_previous")),
    "t5": lambda: unigram(norm.Sequence([norm.Nmt(), norm.NFKC(), norm.Replace(Regex(" {2,}"), " ")]), pre.Metaspace()),
    "xlm_roberta": lambda: unigram(
        norm.Sequence([norm.NFKC(), norm.Strip(left=False, right=True), norm.Replace(Regex(" {2,}"), "▁")]),
        pre.Metaspace(),
    ),
    "bert": word_piece,
    "word_level": lambda: word_level(pre.Whitespace()),
    "word_level_added": lambda: with_added_tokens(word_level(pre.WhitespaceSplit())),
}


def check_pieces(tokenizer: Any, text: str) -> None:
    ids_of = tokenizer_function(tokenizer)
    (whole,) = ids_of([text])
    pieces = list(pieces_of(text, 997))
    assert "".join(pieces) == text and len(pieces) > 3
    found = ids_of([*pieces, text])  # pieces and whole texts stand side by side in a batch
    assert [i for ids in found[:-1] for i in ids] == list(whole) == list(found[-1])


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("name", FAST)
def test_pieces_have_the_ids_of_the_whole_text(name: str, between: str) -> None:
    check_pieces(PreTrainedTokenizerFast(tokenizer_object=FAST[name]()), a_text(between))


@pytest.mark.parametrize("run", ["=", "1234567", " ", "\n", "xthe", "😀"], ids=repr)
@pytest.mark.parametrize("name", ["llama_3", "llama_2", "xlm_roberta", "bert"])
def test_cuts_within_a_long_run_of_the_same_change_no_id(name: str, run: str) -> None:
    # The run is longer than what is tokenised on both sides of a cut otherwise.
    text = "one " + run * (30_000 // len(run)) + " two three"
    ids_of = tokenizer_function(PreTrainedTokenizerFast(tokenizer_object=FAST[name]()))
    pieces = list(pieces_of(text, 14_001))
    assert len(pieces) == 3
    assert [i for ids in ids_of(pieces) for i in ids] == list(ids_of([text])[0])


def slow(name: str, folder: Path) -> Any:
    if name == "esm":
        (folder / "vocab.txt").write_text("\n".join(["<cls>", "<pad>", "<eos>", "<unk>", "the", "fox", "of"]))
        return transformers.EsmTokenizer(str(folder / "vocab.txt"))
    if name == "byt5":
        return transformers.ByT5Tokenizer()
    if name == "canine":
        return transformers.CanineTokenizer()
    kind = name.removeprefix("sentencepiece_")
    (folder / "corpus.txt").write_text("\n".join(CORPUS * 8), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.Train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "model"),
        vocab_size=130,
        model_type=kind,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return transformers.BertGenerationTokenizer(str(folder / "model.model"))


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("name", ["byt5", "canine", "esm", "sentencepiece_unigram", "sentencepiece_bpe"])
def test_pieces_have_the_ids_of_the_whole_text_under_slow_tokenizers(tmp_path: Path, name: str, between: str) -> None:
    tokenizer = slow(name, tmp_path)
    assert getattr(tokenizer, "backend_tokenizer", None) is None
    check_pieces(tokenizer, a_text(between))


def test_contexts_of_a_long_document_do_not_depend_on_where_it_is_cut() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=llama_2(), bos_token="<unk>")
    documents = documents_of([a_text("words"), "short", a_text("many_blanks")])
    whole = epoch_of(TokenStream(documents, tokenizer, 16))
    documents.max_chunk_length = 300
    assert epoch_of(TokenStream(documents, tokenizer, 16)) == whole
    stream = TokenStream(documents, tokenizer, 16, batch_characters=200)
    stream.next_contexts(20)
    resumed = TokenStream(documents, tokenizer, 16)
    resumed.load_state_dict(stream.state_dict())
    assert resumed.next_contexts(30).tolist() == whole[20:50]
