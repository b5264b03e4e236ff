from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from texts import documents_of

from sae_training.text.open import open_documents


def test_readers_of_one_stream_are_independent():
    texts = [f"document {i}" for i in range(20)]
    documents = open_documents(datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset(num_shards=3))
    one = documents.read()
    begun = [next(one) for _ in range(5)]
    other = list(documents.read())
    resumed = list(documents.read(begun[-1].next_position))
    assert [chunk.content for chunk in [*begun, *one]] == texts
    assert [chunk.content for chunk in other] == texts
    assert [chunk.content for chunk in resumed] == texts[5:]


def test_long_document_is_cut_between_words():
    documents = documents_of(["one two three four", "five"])
    documents.max_chunk_length = 10
    chunks = list(documents.read())
    assert [chunk.content for chunk in chunks] == ["one two", " three", " four", "five"]
    assert [chunk.starts_document for chunk in chunks] == [True, False, False, True]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x" * 25, ["x" * 10, "x" * 10, "x" * 5]),
        ("aaaaaaa\nbbbbb", ["aaaaaaa\n", "bbbbb"]),
        ("x" * 10, ["x" * 10]),
    ],
    ids=["no_blank", "newline", "just_fits"],
)
def test_long_document_without_blanks_is_cut_anyway(text: str, expected: list[str]):
    documents = documents_of([text])
    documents.max_chunk_length = 10
    assert [chunk.content for chunk in documents.read()] == expected


def test_fingerprint_tells_a_text_from_another_version_of_it(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    words = [f"word{i}" for i in range(9000)]
    found = set()
    for changed in (
        words,
        [*words[:4000], *["new"] * 3000, *words[4000:]],
        [*words[:-1], "end"],
        ["Word0", *words[1:]],
    ):
        path.write_text(" ".join(changed))
        found.add(open_documents(path).fingerprint)
    assert len(found) == 4
    assert open_documents(path).fingerprint in found
    assert open_documents(path, streaming=True).fingerprint is None
    position = open_documents(path).start()
    assert position["content"] in found
    open_documents(path).check_position({name: value for name, value in position.items() if name != "content"})
    with pytest.raises(ValueError, match="the text itself has changed since"):
        open_documents(path).check_position(position | {"content": "0" * 16})
