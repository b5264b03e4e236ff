from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import datasets
import psutil
import pytest
import torch
from test_stream import make_tokenizer, story
from transformers import PreTrainedTokenizerFast

import sae_training.text.stream
from sae_training.text.documents import Documents
from sae_training.text.open import open_documents, open_mixture
from sae_training.text.stream import TokenStream

ROOT = Path(__file__).parents[3]
# Batches of about a document each, of which there are 60: all but the first two are for processes.
BATCH_CHARACTERS = 200


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sae_training.text.stream, "_BATCH_CHARACTERS", BATCH_CHARACTERS)


@pytest.fixture(scope="module", autouse=True)
def sent_by_value() -> Iterator[None]:
    """The classes below go to processes as those of a script do; by name, they would load this file and torch there."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(bos_token="<s>")


@pytest.fixture(scope="module")
def documents() -> Documents:
    return open_documents(datasets.Dataset.from_dict({"text": [story(60, i) for i in range(60)]}))


def workers_of(pid: int | None = None) -> list[psutil.Process]:
    """The tokenising processes of a process."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if "loky.backend.popen_loky_posix" in process.cmdline():
                found.append(process)
        except psutil.Error:  # it has ended
            continue
    return found


def other_tokenizer(word: str) -> PreTrainedTokenizerFast:
    """One that no other test has, so with a pool of its own."""
    tokenizer = make_tokenizer(bos_token="<s>")
    tokenizer.add_tokens([word])
    return tokenizer


@pytest.mark.parametrize("n", [1, 2])
def test_processes_give_the_same_contexts_and_states(tokenizer: Any, documents: Documents, n: int) -> None:
    alone = TokenStream(documents, tokenizer, 16, n_held_out=2, held_out_every=5)
    stream = TokenStream(documents, tokenizer, 16, n_held_out=2, held_out_every=5, n_processes=n)
    states, rows = [], []
    while stream.epoch < 2:
        states.append(stream.state_dict())
        expected = alone.state_dict()
        assert torch.equal(states[-1].pop("pending"), expected.pop("pending"))
        assert states[-1] == expected
        rows.append(stream.next_contexts(16))
        assert torch.equal(rows[-1], alone.next_contexts(16))
    assert len(workers_of()) >= n
    assert torch.equal(stream.held_out_contexts(), alone.held_out_contexts())


def test_resume_with_processes_goes_on_exactly(tokenizer: Any, documents: Documents) -> None:
    stream = TokenStream(documents, tokenizer, 16, n_processes=1)
    states, rows = [], []
    for _ in range(40):
        states.append(stream.state_dict())
        rows.append(stream.next_contexts(8))
    for at in (0, 1, 7, 18, 30):
        stream.load_state_dict(states[at])
        assert torch.equal(stream.next_contexts(8 * (40 - at)), torch.cat(rows[at:]))


def test_streams_share_their_processes(documents: Documents) -> None:
    tokenizer = other_tokenizer("shared")
    before = {process.pid for process in workers_of()}
    streams = [TokenStream(documents, tokenizer, 16, n_processes=2) for _ in range(3)]
    for stream in streams:
        stream.next_contexts(60)
    assert len({process.pid for process in workers_of()} - before) == 2


def test_short_texts_and_token_ids_start_no_process() -> None:
    tokenizer = other_tokenizer("short")
    before = workers_of()
    two_batches = open_documents(datasets.Dataset.from_dict({"text": [story(60, 0), story(60, 1)]}))
    TokenStream(two_batches, tokenizer, 16, n_processes=1).next_contexts(40)
    ids = open_documents(datasets.Dataset.from_dict({"tokens": [[1, 2, 3] * 50] * 60}))
    TokenStream(ids, tokenizer, 16, n_processes=1).next_contexts(300)
    assert workers_of() == before


def test_a_process_that_is_killed_loses_nothing(documents: Documents) -> None:
    tokenizer = other_tokenizer("killed")
    before = {process.pid for process in workers_of()}
    said: list[str] = []
    stream = TokenStream(documents, tokenizer, 16, n_processes=2, notify=said.append)
    other = TokenStream(documents, tokenizer, 16, n_processes=2, notify=said.append)
    first = stream.next_contexts(60), other.next_contexts(60)
    for process in workers_of():
        if process.pid not in before:
            process.kill()
            break
    expected = TokenStream(documents, tokenizer, 16).next_contexts(260)
    assert torch.equal(torch.cat([first[0], stream.next_contexts(200)]), expected)
    assert torch.equal(torch.cat([first[1], other.next_contexts(200)]), expected)
    assert said[0].startswith("tokenizer_processes: no more text goes to them (one has died); nothing is lost")
    assert sum("tokenizer_processes" in line for line in said) == 1


def test_ctrl_c_is_for_the_run_to_handle(documents: Documents) -> None:
    tokenizer = other_tokenizer("interrupted")
    before = {process.pid for process in workers_of()}
    said: list[str] = []
    stream = TokenStream(documents, tokenizer, 16, n_processes=1, notify=said.append)
    stream.next_contexts(60)
    (process,) = (process for process in workers_of() if process.pid not in before)
    process.send_signal(signal.SIGINT)
    stream.next_contexts(100)
    assert process.is_running() and said == []


def test_errors_of_reading_come_after_what_was_read_before(tokenizer: Any) -> None:
    def rows() -> Iterator[dict[str, str]]:
        for number in range(60):
            if number == 40:
                raise ConnectionError("the cable is out")
            yield {"text": story(60, number)}

    broken = open_documents(datasets.IterableDataset.from_generator(rows))
    numbers = []
    for n in (0, 1):
        stream = TokenStream(broken, tokenizer, 16, n_processes=n)
        with pytest.raises(ConnectionError, match="the cable is out"):
            for _ in range(10_000):
                stream.next_contexts(1)
        numbers.append((stream.context_index, stream.state_dict()["source"]["row"]))
    assert numbers[0] == numbers[1] and numbers[0][0] > 100


class Letters:
    """A tokenizer that is all Python; it knows capitals only to fail on them."""

    bos_token_id = 0

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        if any(text != text.lower() for text in texts):
            raise OverflowError("a capital")
        return {"input_ids": [[1 + ord(letter) % 50 for letter in text] for text in texts]}


class Unsendable(Letters):
    def __init__(self) -> None:
        self.lock = threading.Lock()


def test_tokenizers_without_rust_are_sent(documents: Documents) -> None:
    before = workers_of()
    said: list[str] = []
    letters: Any = Letters()
    stream = TokenStream(documents, letters, 16, n_processes=1, notify=said.append)
    assert torch.equal(stream.next_contexts(400), TokenStream(documents, letters, 16).next_contexts(400))
    assert len(workers_of()) == len(before) + 1 and said == []


def test_tokenizers_that_cannot_be_sent_work_here(documents: Documents) -> None:
    before = workers_of()
    said: list[str] = []
    letters: Any = Unsendable()
    stream = TokenStream(documents, letters, 16, n_processes=1, notify=said.append)
    assert torch.equal(stream.next_contexts(400), TokenStream(documents, letters, 16).next_contexts(400))
    assert workers_of() == before
    assert len(said) == 1 and "TypeError: cannot pickle '_thread.lock' object" in said[0]


def test_errors_of_encoding_are_those_of_the_tokenizer() -> None:
    texts = [story(60, i) for i in range(60)]
    texts[30] = "Capital"
    letters: Any = Letters()
    stream = TokenStream(open_documents(datasets.Dataset.from_dict({"text": texts})), letters, 16, n_processes=1)
    with pytest.raises(OverflowError, match="a capital") as caught:
        stream.next_contexts(2000)
    assert caught.value.__cause__ is None


def test_a_process_imports_neither_torch_nor_transformers() -> None:
    program = "import sys, loky, tokenizers, sae_training.encoders; print({'torch', 'transformers'} & {*sys.modules})"
    assert run(program).stdout == "set()\n"


# The end ----------------------------------------------------------------------------------------

# Without `if __name__ == "__main__"`, as users write it.
PROGRAM = """
import os, sys, time
import datasets
from transformers import PreTrainedTokenizerFast
import sae_training.text.stream
from sae_training.text_data import open_documents, open_mixture
sae_training.text.stream._BATCH_CHARACTERS = 200_000
tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
rows = datasets.Dataset.from_dict({"text": ["the cat sat on the mat " * 1000] * 300})
stream = sae_training.text.stream.TokenStream(open_documents(rows), tokenizer, 64, n_processes=2)
print(tuple(stream.next_contexts(5000).shape), flush=True)
"""


def run(program: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", program, *words]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"} | {
        "PYTHONPATH": str(ROOT)
    }


def test_a_program_ends_at_once_and_silently_with_its_processes(tmp_path: Path) -> None:
    make_tokenizer(bos_token="<s>").save_pretrained(tmp_path)
    ended = run(PROGRAM + "print(time.time(), flush=True)", str(tmp_path))
    shape, at = ended.stdout.splitlines()
    assert (ended.returncode, shape, ended.stderr) == (0, "(5000, 64)", "")
    assert time.time() - float(at) < 20


def test_no_process_outlives_a_program_that_is_killed(tmp_path: Path) -> None:
    make_tokenizer(bos_token="<s>").save_pretrained(tmp_path)
    command = [sys.executable, "-c", PROGRAM + "time.sleep(300)", str(tmp_path)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "(5000, 64)\n"
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(workers_of(process.pid)) == 2
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []


@pytest.mark.parametrize("fails", [False, True])
def test_a_reader_that_nobody_uses_is_closed_without_the_garbage_collector(tmp_path: Path, fails: bool) -> None:
    """Which may run in a thread of the data set that this reader waits for: the program would never end."""
    for name in "ab":
        texts = ["Capital" if fails and i == 9 else story(60, i) for i in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    documents = open_mixture([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], streaming=True)

    def use() -> None:
        letters: Any = Letters()
        stream = TokenStream(documents, letters, 16)
        if fails:
            with pytest.raises(OverflowError, match="a capital"):
                stream.next_contexts(1000)
        else:
            stream.first_contexts(4)
            stream.next_contexts(3)
            stream.load_state_dict(stream.state_dict())
            stream.next_contexts(3)

    def of_datasets() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if "ThreadPoolExecutor" in thread.name}

    gc.collect()
    before = of_datasets()  # what other tests have left
    gc.disable()
    try:
        use()
        deadline = time.monotonic() + 20
        while of_datasets() - before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert of_datasets() - before == set()
    finally:
        gc.enable()
