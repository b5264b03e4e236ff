from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pytest
from small import text_of

from sae_training.demo_data import DEMO_TEXT
from sae_training.text.documents import Documents
from sae_training.text.mixture import open_mixture
from sae_training.text.open import open_documents

TEXTS = ["first document", "the second\n\none", "third"]


@pytest.fixture
def without_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_HUB_OFFLINE=1, which both libraries read when they are imported."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def contents(documents: Documents) -> list[Any]:
    return [chunk.content for chunk in documents.read()]


def write_jsonl(path: Path, texts: list[str], **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, **more}) + "\n" for text in texts))
    return path


def rows(**columns: Any) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


# Where the data comes from ----------------------------------------------------------------------


def jsonl_file(folder: Path) -> Any:
    return write_jsonl(folder / "some.jsonl", TEXTS, title="t")


def json_array_file(folder: Path) -> Any:
    (folder / "some.json").write_text(json.dumps([{"text": text, "title": "t"} for text in TEXTS]))
    return folder / "some.json"


def jsonl_gz_file(folder: Path) -> Any:
    plain = write_jsonl(folder / "some.jsonl", TEXTS)
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    return folder / "packed.jsonl.gz"


def parquet_file(folder: Path) -> Any:
    rows(title=["t"] * 3, text=TEXTS).to_parquet(folder / "some.parquet")
    return str(folder / "some.parquet")


def folder_of_txt(folder: Path) -> Any:
    for number, text in enumerate(TEXTS):
        (folder / "texts" / str(number)).mkdir(parents=True)
        (folder / "texts" / str(number) / f"{9 - number}.txt").write_text(text)
    (folder / "texts" / "README.md").write_text("not a document")
    (folder / "texts" / ".hidden.txt").write_text("not a document")
    return folder / "texts"


def folder_of_gzipped_txt(folder: Path) -> Any:
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def folder_of_jsonl_with_odd_name(folder: Path) -> Any:
    write_jsonl(folder / "a [1] * b" / "0.jsonl", TEXTS[:1])
    write_jsonl(folder / "a [1] * b" / "deeper" / "1.jsonl", TEXTS[1:])
    return folder / "a [1] * b"


def saved_to_disk(folder: Path) -> Any:
    rows(text=TEXTS).save_to_disk(folder / "saved")
    return folder / "saved"


def saved_dict(folder: Path) -> Any:
    splits = {"test": rows(text=["no"]), "train": rows(text=TEXTS)}
    datasets.DatasetDict(splits).save_to_disk(folder / "saved")
    return folder / "saved"


def copy_of_a_hub_folder(folder: Path) -> Any:
    (folder / "dataset_infos.json").write_text("{}")
    (folder / "data").mkdir()
    rows(text=["no"]).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    rows(text=TEXTS[:2]).to_parquet(folder / "data" / "train-00000-of-00002.parquet")
    rows(text=TEXTS[2:]).to_parquet(folder / "data" / "train-00001-of-00002.parquet")
    return folder


LOCAL = [
    jsonl_file,
    json_array_file,
    jsonl_gz_file,
    parquet_file,
    folder_of_txt,
    folder_of_gzipped_txt,
    folder_of_jsonl_with_odd_name,
    saved_to_disk,
    saved_dict,
    copy_of_a_hub_folder,
]


@pytest.mark.parametrize("streaming", [None, True], ids=["arrow", "streaming"])
@pytest.mark.parametrize("make", LOCAL, ids=lambda make: make.__name__)
def test_local_data_gives_all_documents_in_order(tmp_path: Path, make: Callable[[Path], Any], streaming: bool | None):
    documents = open_documents(make(tmp_path), streaming=streaming)
    assert contents(documents) == TEXTS
    assert (documents.n_rows is None) == bool(streaming)


def test_txt_file_is_one_document(tmp_path: Path):
    (tmp_path / "book.txt").write_text("one line\n\nand another\n" * 50)
    assert contents(open_documents(tmp_path / "book.txt")) == ["one line\n\nand another\n" * 50]


@pytest.mark.parametrize(
    "make",
    [
        lambda dataset: dataset,
        lambda dataset: dataset.with_format("torch"),
        lambda dataset: dataset.to_iterable_dataset(),
        lambda dataset: dataset.to_iterable_dataset().with_format("numpy"),
        lambda dataset: datasets.DatasetDict(test=rows(text=["no"]), train=dataset),
        lambda dataset: datasets.IterableDatasetDict(train=dataset.to_iterable_dataset()),
        lambda dataset: dataset.to_iterable_dataset().map(lambda row: row),
    ],
    ids=["map", "formatted", "stream", "formatted_stream", "dict", "stream_dict", "mapped_stream"],
)
@pytest.mark.parametrize("tokenized", [False, True], ids=["text", "tokens"])
def test_objects_give_all_documents_in_order(make: Callable[[Any], Any], tokenized: bool):
    ids = [[1, 2, 3], [4], [5, 6]]
    documents = open_documents(make(rows(tokens=ids) if tokenized else rows(text=TEXTS)))
    assert documents.is_tokenized == tokenized
    found = contents(documents)
    assert ([list(chunk) for chunk in found] if tokenized else found) == (ids if tokenized else TEXTS)


def test_rows_made_by_a_transform_are_read_through_it():
    dataset = rows(number=[1, 2, 3])
    dataset.set_transform(lambda batch: {"text": [TEXTS[n - 1] for n in batch["number"]]})
    assert contents(open_documents(dataset)) == TEXTS


def test_split_chooses_from_the_splits(tmp_path: Path):
    assert contents(open_documents(copy_of_a_hub_folder(tmp_path), split="test")) == ["no"]
    assert contents(open_documents(tmp_path, split="train[1:]")) == TEXTS[1:]


@pytest.mark.skipif(not DEMO_TEXT.exists(), reason="the bundled text is not there")
def test_demo_is_the_bundled_text():
    first = json.loads(text_of(DEMO_TEXT).splitlines()[0])["text"]
    assert "".join(contents(open_documents("demo"))).startswith(first)


def test_opening_local_data_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    contents(open_documents(jsonl_file(tmp_path)))
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()


# Several data sets ------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [None, True], ids=["arrow", "streaming"])
def test_mixture_has_the_shares_asked_for_and_no_document_twice(tmp_path: Path, streaming: bool | None):
    long = [f"a{i}" for i in range(900)]
    short = [f"b{i}" for i in range(300)]
    paths = [write_jsonl(tmp_path / "a.jsonl", long), write_jsonl(tmp_path / "b.jsonl", short)]
    found = contents(open_mixture(paths, (1, 2), streaming=streaming))
    # All of b, and half as many of a, of each the first ones in order: 150 with a standard deviation of 15.
    assert [text for text in found if text[0] == "b"] == short
    of_a = [text for text in found if text[0] == "a"]
    assert of_a == long[: len(of_a)] and 90 < len(of_a) < 210
    assert found[-1] == "b299"
    assert 60 < sum(text[0] == "b" for text in found[:120]) < 100  # 80 and 5


def test_mixture_without_weights_takes_equally_many(tmp_path: Path):
    files = (("a", 500), ("b", 500), ("c", 500))
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", [f"{name}{i}" for i in range(n)]) for name, n in files]
    found = [text[0] for text in contents(open_mixture(paths))]
    assert max(map(found.count, "abc")) == 500
    assert min(map(found.count, "abc")) > 400


def test_mixture_is_streamed_if_a_part_is(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert open_mixture([path, rows(text=TEXTS)]).n_rows is not None
    mixed = open_mixture([path, rows(text=TEXTS).to_iterable_dataset()])
    assert mixed.n_rows is None and set(contents(mixed)) <= set(TEXTS)


@pytest.mark.parametrize("streaming", [None, True], ids=["arrow", "streaming"])
@pytest.mark.parametrize(
    ("one", "other", "column"),
    [
        ({"text": ["a"] * 9}, {"body": ["b"] * 9, "year": [1] * 9}, "text"),
        ({"tokens": [[1]] * 9}, {"input_ids": [[2, 3]] * 9}, "tokens"),
    ],
    ids=["text", "tokens"],
)
def test_parts_of_a_mixture_may_differ_in_columns_and_types(one: Any, other: Any, column: str, streaming: bool | None):
    wide, narrow = rows(**one), rows(**other)
    (name,) = one
    kind = datasets.Value("large_string") if name == "text" else datasets.List(datasets.Value("int32"))
    mixed = open_mixture([wide.cast_column(name, kind), narrow], streaming=streaming)
    assert mixed.column == column
    found = {str(content) for content in contents(mixed)}
    assert found == {str(value[0]) for value in (one[name], other["body" if name == "text" else "input_ids"])}


def test_mixture_of_one_data_set_is_that_data_set(tmp_path: Path):
    assert contents(open_mixture([write_jsonl(tmp_path / "a.jsonl", TEXTS)], (2.0,))) == TEXTS


def test_mixture_of_text_and_tokens_is_an_error_with_both_names(tmp_path: Path):
    rows(tokens=[[1]]).to_parquet(tmp_path / "ids.parquet")
    paths = [write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "ids.parquet"]
    with pytest.raises(ValueError, match=r"ids\.parquet' holds token ids \(column 'tokens'\), but .*a\.jsonl' text"):
        open_mixture(paths)


@pytest.mark.parametrize("text_column", [None, "text"])
def test_error_in_a_part_of_a_mixture_names_the_part(tmp_path: Path, text_column: str | None):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    rows(number=[1]).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet' has no (text column|column 'text')"):
        open_mixture([path, tmp_path / "b.parquet"], text_column=text_column)


def test_streamed_mixture_goes_on_after_many_documents():
    # Which part comes next is drawn a thousand at a time; the second draw is to be resumed too.
    parts = [rows(text=[f"{name}{i}" for i in range(2000)]).to_iterable_dataset() for name in "ab"]
    documents = open_mixture(parts)
    chunks = list(documents.read())
    for at in (998, 999, 1000, 2500):
        resumed = documents.read(chunks[at].next_position)
        assert [next(resumed).content for _ in range(9)] == [chunk.content for chunk in chunks[at + 1 : at + 10]]


# Bad input --------------------------------------------------------------------------------------


def test_missing_file_names_its_neighbours(tmp_path: Path):
    write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    with pytest.raises(FileNotFoundError, match=r"neither a local path.*did you mean.*corpus\.jsonl"):
        open_documents(str(tmp_path / "corpsu.jsonl"))


def test_missing_parent_folder_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"folder .*nowhere' does not exist"):
        open_documents(str(tmp_path / "nowhere" / "corpus.jsonl"))


@pytest.mark.usefixtures("without_hub")
def test_unreachable_hub_is_an_error_with_its_cause():
    with pytest.raises(FileNotFoundError, match="neither a local path.*nor reachable.*'demo'") as e:
        open_documents("some-owner/some-corpus")
    assert isinstance(e.value.__cause__, OSError)


@pytest.mark.usefixtures("without_hub")
def test_name_with_a_config_is_a_hub_name():
    with pytest.raises(FileNotFoundError, match="'some-owner/some-corpus:small' is neither"):
        open_documents("some-owner/some-corpus:small")


@pytest.mark.parametrize("name", ["", "./corpus", "../owner/corpus", "/corpus", "a/b/c", "corpus.txt"])
def test_path_that_cannot_be_a_hub_name_is_not_looked_up_on_the_hub(name: str):
    with pytest.raises(FileNotFoundError, match=f"{name!r} is neither a local path .* nor a name"):
        open_documents(name)


def test_slice_of_a_streamed_split_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match=r"dataset_split: found 'train\[:1\]'.*set streaming=False"):
        open_documents(jsonl_file(tmp_path), split="train[:1]", streaming=True)


@pytest.mark.parametrize("make", [jsonl_file, saved_dict, copy_of_a_hub_folder])
def test_unknown_split_lists_the_splits(tmp_path: Path, make: Callable[[Path], Any]):
    with pytest.raises(ValueError, match=r"no split 'validation'; it has: .*train"):
        open_documents(make(tmp_path), split="validation")


@pytest.mark.parametrize("streaming", [None, True], ids=["arrow", "streaming"])
@pytest.mark.parametrize("content", ["", "\n"], ids=["no_bytes", "no_rows"])
def test_empty_file_is_an_error(tmp_path: Path, content: str, streaming: bool | None):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"a\.jsonl' is empty \(0 (bytes|rows)\)"):
        open_documents(tmp_path / "a.jsonl", streaming=streaming)


@pytest.mark.parametrize("streaming", [None, True], ids=["map", "streaming"])
def test_empty_dataset_is_an_error(streaming: bool | None):
    with pytest.raises(ValueError, match=r"is empty \(0 rows\)"):
        open_documents(rows(text=[]), streaming=streaming)


def test_empty_folder_is_an_error(tmp_path: Path):
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(ValueError, match=r"holds no .*\.jsonl.* file; found: notes\.md"):
        open_documents(tmp_path)


def test_folder_of_mixed_kinds_is_an_error(tmp_path: Path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "b.txt").write_text("x")
    with pytest.raises(ValueError, match=r"mixes kinds of files \(1 json, 1 text\)"):
        open_documents(tmp_path)


def test_file_of_unknown_kind_is_an_error(tmp_path: Path):
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(ValueError, match=r"is a \.xlsx file, expected \.txt/\.jsonl/"):
        open_documents(tmp_path / "a.xlsx")


@pytest.mark.parametrize("streaming", [None, True], ids=["arrow", "streaming"])
def test_broken_line_is_an_error_with_its_number(tmp_path: Path, streaming: bool | None):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n\n{"text": ')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3: found broken JSON \(.*on_bad_rows=skip"):
        open_documents(tmp_path / "a.jsonl", streaming=streaming)


@pytest.mark.parametrize("streaming", [None, True], ids=["arrow", "streaming"])
def test_broken_file_is_an_error_with_its_cause(tmp_path: Path, streaming: bool | None):
    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"a\.parquet' could not be read at a\.parquet \(\w+: .*pass the obj") as e:
        open_documents(tmp_path / "a.parquet", streaming=streaming)
    assert e.value.__cause__ is not None


def test_object_of_another_kind_is_an_error():
    with pytest.raises(ValueError, match="dataset: found list, expected a name, a path or a Dataset"):
        open_documents(["a", "b"])


def test_errors_name_the_field_that_holds_the_data_set(tmp_path: Path):
    with pytest.raises(ValueError, match="^eval_dataset_path: the Dataset passed in is empty"):
        open_documents(rows(text=[]), field="eval_dataset_path")
    with pytest.raises(FileNotFoundError, match="^eval_dataset_path: .* is neither a local path"):
        open_documents(str(tmp_path / "corpus.jsonl"), field="eval_dataset_path")
    with pytest.raises(ValueError, match="^eval_dataset_path: .* has no text column"):
        open_mixture([rows(number=[1]), rows(text=["a"])], field="eval_dataset_path")


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_text_in_another_encoding_is_refused_with_the_one_to_save_it_in(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("café " * 50, encoding=encoding)
    with pytest.raises(ValueError, match="could not be read.*UnicodeDecodeError.*save the text as UTF-8"):
        list(open_documents(path).read())
