from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from sae_training.text.open import open_documents
from sae_training.text.row_values import BadData

STREAMING = pytest.mark.parametrize("streaming", [None, True], ids=["whole", "streaming"])


def write(path: Path, **columns: Any) -> None:
    datasets.Dataset.from_dict(columns).to_parquet(path)


@STREAMING
@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"text": [1, 2]}, "holds int64 values in column 'text', expected string"),
        ({"text": [True]}, "holds bool values"),
        ({"text": [["a"]]}, r"holds list<\w+: string> values"),
        ({"txt": ["a"]}, "has no column 'text'; it has: txt"),
    ],
    ids=["numbers", "bools", "lists", "no_column"],
)
def test_parquet_file_of_another_type_is_named(
    tmp_path: Path, columns: dict[str, Any], found: str, streaming: bool | None
) -> None:
    write(tmp_path / "0.parquet", text=["a", "b"])
    write(tmp_path / "1.parquet", **columns)
    with pytest.raises(BadData, match=rf"1\.parquet {found}"):
        list(open_documents(tmp_path, streaming=streaming).read())


@STREAMING
def test_bad_row_of_parquet_files_is_named_by_file_and_row(tmp_path: Path, streaming: bool | None) -> None:
    write(tmp_path / "0.parquet", tokens=[[1], [2, 3]])
    write(tmp_path / "1.parquet", tokens=[[4], [5, None, 6]])
    with pytest.raises(BadData, match=r"1\.parquet, row 2: column 'tokens' holds a list of integers and nulls"):
        list(open_documents(tmp_path, streaming=streaming).read())
    skipping = open_documents(tmp_path, streaming=streaming, on_bad_rows="skip", notify=lambda _: None)
    assert [chunk.content for chunk in skipping.read()] == [[1], [2, 3], [4]]


@STREAMING
def test_arrow_file_is_read(tmp_path: Path, streaming: bool | None) -> None:
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    file.rename(tmp_path / "a.arrow")
    found = open_documents(tmp_path / "a.arrow", streaming=streaming).read()
    assert [chunk.content for chunk in found] == ["a", "b"]
