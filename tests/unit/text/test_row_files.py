from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from sae_training.text.open import open_documents
from sae_training.text.row_values import BadData

STREAMING = pytest.mark.parametrize("streaming", [None, True], ids=["whole", "streaming"])


def contents(path: Path, **options: Any) -> list[Any]:
    return [chunk.content for chunk in open_documents(path, **options).read()]


def lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


FILES = {
    "a.jsonl": lines({"text": "one"}, {"text": "two", "more": {"x": 1}}, {"other": 5, "text": "three"}),
    "b.jsonl": b"\xef\xbb\xbf\n" + lines({"text": "one"}, {"text": "two"}, {"text": "three"}),
    "c.json": json.dumps([{"text": "one"}, {"text": "two"}, {"text": "three"}], indent=2).encode(),
    "d.json": json.dumps(["one", "two", "three"]).encode(),
    "e.json": json.dumps({"text": ["one", "two", "three"], "n": [1, 2, 3]}, indent=2).encode(),
    "f.json": json.dumps({"text": {"0": "one", "1": "two", "2": "three"}, "n": {"0": 1, "1": 2, "2": 3}}).encode(),
    "g.csv": b'n,text\n1,one\n2,"two"\n3,three\n',
    "h.tsv": b"text\tn\none\t1\ntwo\t2\nthree\t3\n",
    "i.csv.gz": gzip.compress(b"text\r\none\r\ntwo\r\nthree\r\n"),
    "k.csv": b"n;text\n1;one\n2;two\n3;three\n",
    "j.json": json.dumps({"text": ["one", "two", "three"]}).encode(),
}


@STREAMING
@pytest.mark.parametrize("name", FILES)
def test_files_people_have_are_read(tmp_path: Path, name: str, streaming: bool | None) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    assert contents(tmp_path / name, streaming=streaming) == ["one", "two", "three"]


@STREAMING
@pytest.mark.parametrize("text", ["2024", "null", "1.50", "true", '"quoted"', "[1, 2]", "{}"])
@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_text_that_looks_like_another_type_stays_as_it_is(
    tmp_path: Path, suffix: str, text: str, streaming: bool | None
) -> None:
    path = tmp_path / f"a.{suffix}"
    if suffix == "csv":
        quoted = text.replace('"', '""')
        path.write_text(f'text\n"{quoted}"\n"{quoted}"\nwords\n')
    else:
        path.write_bytes(lines(*({"text": one} for one in (text, text, "words"))))
    assert contents(path, streaming=streaming) == [text, text, "words"]


@STREAMING
@pytest.mark.parametrize("bad", [{"x": 1}, 5, True, [[1]], ["alpha", 5]], ids=str)
def test_bad_row_far_into_a_file_changes_no_other_and_is_named_by_its_line(
    tmp_path: Path, bad: Any, streaming: bool | None
) -> None:
    # The reader of `datasets` takes 10 MB at a time. It wrote the words after the bad row in quotes.
    good = [{"text": "word " * 400}] * 5500
    (tmp_path / "a.jsonl").write_bytes(lines(*good) + b"\n" + lines({"text": bad}, {"text": "the end"}))
    documents = open_documents(tmp_path / "a.jsonl", streaming=streaming, on_bad_rows="skip", notify=lambda _: None)
    found = [chunk.content for chunk in documents.read()]
    assert len(found) == 5501 and found[-2:] == ["word " * 400, "the end"]
    assert documents.bad_rows.n_skipped == 1
    with pytest.raises(BadData, match=r"a\.jsonl, line 5502: column 'text' holds "):
        contents(tmp_path / "a.jsonl", streaming=streaming)


@STREAMING
def test_files_of_a_folder_are_named_by_their_place_in_it(tmp_path: Path, streaming: bool | None) -> None:
    for folder, last in (("x", "fine"), ("y", 7)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.jsonl").write_bytes(lines({"text": "a"}, {"text": last}))
    with pytest.raises(BadData, match=r"y/0\.jsonl, line 2: column 'text' holds a number \(7\)"):
        contents(tmp_path, streaming=streaming)


@STREAMING
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', r"line 2: found broken JSON \(.*\), expected a row with a col"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n{"text": null}\n', r"line 2: has no column 'text'; it has: txt"),
        ("a.jsonl", b'{"text": "a"}\n{}\n', r"line 2: has no column 'text'; it has: none at all"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', r"line 2: found a list of strings in place of a row"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"line 2: found bytes that are not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b \\ud800"}\n', r"line 2: column 'text' holds half a surrogate pair"),
        ("a.csv", b"text,n\na,1\n\nb\n", r"line 4: found 1 field\(s\) \['b'\] under 2 column name"),
        ("a.csv", b"text\na\nb\xff\n", r"line 3: column 'text' holds half a surrogate pair"),
        ("a.csv", b'text,n\n"a\nb",1\nc,2,3\n', r"line 4: found 3 field\(s\)"),
    ],
)
def test_row_that_is_none_is_named_or_skipped(
    tmp_path: Path, name: str, content: bytes, message: str, streaming: bool | None
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadData, match=rf"a\.\w+, {message}"):
        contents(tmp_path / name, streaming=streaming)
    said: list[str] = []
    found = contents(tmp_path / name, streaming=streaming, on_bad_rows="skip", notify=said.append)
    assert found in (["a"], ["a\nb"]) and len(said) == 1


@STREAMING
def test_file_with_nothing_but_bad_rows_says_so(tmp_path: Path, streaming: bool | None) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({"text": {"x": 1}}, {"text": 5}))
    with pytest.raises(ValueError, match="has no text column"):
        contents(tmp_path / "a.jsonl", on_bad_rows="skip", streaming=streaming)


@STREAMING
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"[1, 2]\n[3]\n", "line 1: found a list of integers in place of a row"),
        ("a.json", b'{\n "text": "a"\n', "line 1: found broken JSON"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), "line 1: found bytes that are not UTF-8"),
        ("a.jsonl.gz", b"plain", "is no whole gzip file"),
        ("a.jsonl.gz", gzip.compress(lines(*({"text": f"word {n}"} for n in range(999))))[:-40], "is no whole gzip"),
    ],
)
def test_file_without_rows_says_what_it_holds(
    tmp_path: Path, name: str, content: bytes, message: str, streaming: bool | None
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadData, match=rf"{name}.*{message}"):
        contents(tmp_path / name, streaming=streaming)


def test_skipped_rows_are_counted_again_where_the_arrow_cache_holds_the_rest(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "a"}, {"text": 1}, {"text": "b"}, {"text": 2}))
    for _ in range(2):
        documents = open_documents(tmp_path / "a.jsonl", on_bad_rows="skip", notify=lambda _: None)
        assert (documents.bad_rows.n_skipped, documents.n_rows) == (2, 2)
        assert [chunk.content for chunk in documents.read()] == ["a", "b"]


def test_changed_file_is_read_anew(tmp_path: Path) -> None:
    for text in ("old", "new"):
        (tmp_path / "a.jsonl").write_bytes(lines({"text": text}))
        assert contents(tmp_path / "a.jsonl") == [text]


def test_stream_goes_on_from_a_position_of_the_reader_of_datasets(tmp_path: Path) -> None:
    # As runs saved it that were begun before files were read row by row.
    texts = [f"document {number}" for number in range(9)]
    (tmp_path / "a.jsonl").write_bytes(lines(*({"text": text} for text in texts)))
    documents = open_documents(tmp_path / "a.jsonl", streaming=True)
    old = {"examples_iterable": {"shard_idx": 0, "shard_example_idx": 4, "type": "ArrowExamplesIterable"}, "epoch": 0}
    position = documents.start() | {"row": 4, "stream": old}
    documents.check_position(position)
    found = list(documents.read(position))
    assert [chunk.content for chunk in found] == texts[4:]
    assert [chunk.content for chunk in documents.read(found[1].next_position)] == texts[6:]
