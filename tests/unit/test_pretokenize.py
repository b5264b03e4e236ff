"""A tokenised copy of a data set gives the same contexts, is made once, and is checked against the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from sae_training import cli
from sae_training.activations_store import ActivationsStore
from sae_training.machine.phases import counted_phases
from sae_training.pretokenize import pretokenize
from sae_training.text.documents import MAX_CHUNK_LENGTH
from sae_training.text.open import open_documents, save_tokenized
from sae_training.text.stream import TokenStream


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of documents of all sizes: empty, short, and one that is read in chunks."""
    path = tmp_path / "text.jsonl"
    long = "the whale and the ship " * (MAX_CHUNK_LENGTH // 20)
    documents = ["call me", "", long, *(f"chapter {i} of the book" for i in range(300))]
    path.write_text("\n".join(json.dumps({"text": document}) for document in documents) + "\n")
    return path


def contexts(path: Path, tokenizer: Any, n: int = 200) -> torch.Tensor:
    return TokenStream(open_documents(path), tokenizer, 33, notify=lambda _: None).next_contexts(n)


@pytest.mark.parametrize("n_processes", [1, 2])
@pytest.mark.parametrize("streaming", [False, True])
def test_copy_gives_the_same_contexts_as_the_text(
    streaming: bool, n_processes: int, text: Path, tmp_path: Path, demo_model: Any
) -> None:
    with counted_phases() as phases:
        folder = pretokenize("demo", str(text), tmp_path / "ids", streaming=streaming, n_processes=n_processes)
    assert list(phases.seconds) == ["other", "loading the tokenizer", "reading the text", "tokenizing", "saving"]
    assert torch.equal(contexts(folder, demo_model.tokenizer, 9000), contexts(text, demo_model.tokenizer, 9000))


@pytest.mark.parametrize("streaming", [False, True])
def test_skipped_rows_are_said_and_noted(streaming: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "the cat"}\n{"text": 5}\n{"txt": "a dog"}\n' * 4)
    for name in ("ids", "again"):  # the second time the Arrow cache knows the rows
        words = ["pretokenize", "demo", str(path), str(tmp_path / name)]
        assert cli.main([*words, "--on_bad_rows=skip", f"--streaming={streaming}", "--n_processes=1"]) == 0
        assert f"on_bad_rows: 8 bad rows of '{path}' were skipped." in "".join(capsys.readouterr())
        assert json.loads((tmp_path / name / "pretokenized.json").read_text())["n_skipped"] == 8


@pytest.mark.parametrize(("streaming", "n_processes"), [(False, 1), (False, 2), (True, 1)])
def test_rows_that_other_processes_skip_are_counted(streaming: bool, n_processes: int, tmp_path: Path) -> None:
    texts = ["the cat", None, "a dog", "a mat", None] * 50
    chats = [[{"role": "user", "content": text}] for text in texts]
    documents = open_documents(
        datasets.Dataset.from_dict({"messages": chats}),
        streaming=streaming,
        on_bad_rows="skip",
        render=lambda conversation: conversation[0]["content"],
        notify=lambda line: None,
    )
    counts = save_tokenized(documents, lambda found: [[len(text)] for text in found], tmp_path / "ids", n_processes)
    assert counts == (250, 100)
    copy = datasets.load_from_disk(str(tmp_path / "ids"))
    assert copy.column_names == ["tokens"]
    assert copy["tokens"][:] == [[] if text is None else [len(text)] for text in texts]


def test_copy_is_made_once(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pretokenize", "demo", str(text), str(tmp_path / "ids")]
    assert cli.main(words) == 0
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "ids").iterdir()}
    assert cli.main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "ids").iterdir()} == times
    assert cli.main([*words, "--dataset_text_column", "text"]) == 1
    assert "was made with None, but this asks for 'text'" in capsys.readouterr().err


def test_token_ids_foreign_folders_and_unknown_models_are_refused(text: Path, tmp_path: Path) -> None:
    folder = pretokenize("demo", str(text), tmp_path / "ids")
    with pytest.raises(ValueError, match="holds token ids already"):
        pretokenize("demo", str(folder), tmp_path / "again")
    with pytest.raises(ValueError, match="holds no tokenized data set"):
        pretokenize("demo", str(text), tmp_path)
    with pytest.raises(FileNotFoundError, match="model_name: 'no/such' has no tokenizer"):
        pretokenize("no/such", str(text), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_copy_of_a_text_that_has_changed_is_refused(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pretokenize("demo", str(text), tmp_path / "ids")
    assert pretokenize("demo", str(text), tmp_path / "ids") == folder
    assert "holds them already" in "".join(capsys.readouterr())
    lines = text.read_text().splitlines()
    text.write_text("\n".join(reversed(lines)) + "\n")
    with pytest.raises(ValueError, match="content: .* was made with '.*', but this asks for '.*'; give another output"):
        pretokenize("demo", str(text), tmp_path / "ids")
    text.unlink()
    assert pretokenize("demo", str(text), tmp_path / "ids") == folder


def test_ids_of_another_tokenizer_are_refused(
    text: Path, tmp_path: Path, demo_model: Any, small_config: Callable
) -> None:
    folder = pretokenize("demo", str(text), tmp_path / "ids")
    cfg = small_config(dataset_path=str(folder), n_eval_batches=0)
    assert ActivationsStore(cfg, demo_model).get_batch_tokens().shape == (4, 16)
    info = json.loads((folder / "pretokenized.json").read_text())
    (folder / "pretokenized.json").write_text(json.dumps(info | {"tokenizer": "gpt2", "probe": "0" * 16}))
    with pytest.raises(ValueError, match=f"dataset_path: {folder} holds ids of the tokenizer of 'gpt2'"):
        ActivationsStore(cfg, demo_model)
    earlier = {name: value for name, value in info.items() if name not in ("probe", "content")}
    (folder / "pretokenized.json").write_text(json.dumps(earlier))  # as it was written before they were noted
    ActivationsStore(cfg, demo_model)
    assert pretokenize("demo", str(text), folder) == folder
