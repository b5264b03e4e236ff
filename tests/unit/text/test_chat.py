from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from texts import BOS, make_tokenizer

from sae_training.text.chat import renderer
from sae_training.text.mixture import open_mixture
from sae_training.text.open import open_documents
from sae_training.text.stream import TokenStream

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}{% if m.tool_calls is defined %} CALLS{% endif %}{{ '\\n' }}{% endfor %}"
)
CHATS = [
    [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}],
    [{"role": "user", "content": "a dog"}],
]
TEXTS = ["<s>user: the cat\nassistant: sat\n", "<s>user: a dog\n"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = make_tokenizer(bos_token="<s>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def json_lines(folder: Path) -> Any:
    (folder / "a.jsonl").write_text("".join(json.dumps({"id": "x", "messages": chat}) + "\n" for chat in CHATS))
    return folder / "a.jsonl"


def parquet(folder: Path) -> Any:
    datasets.Dataset.from_dict({"id": ["x", "y"], "messages": CHATS}).to_parquet(folder / "a.parquet")
    return folder / "a.parquet"


def as_json(folder: Path) -> Any:
    rows = datasets.Dataset.from_dict({"messages": [json.dumps(chat) for chat in CHATS]})
    return datasets.Dataset.from_list([{"messages": json.loads(row["messages"])} for row in rows])


def sharegpt(folder: Path) -> Any:
    roles = {"user": "human", "assistant": "gpt"}
    rows = [[{"from": roles[m["role"]], "value": m["content"]} for m in chat] for chat in CHATS]
    return datasets.Dataset.from_dict({"conversations": rows, "source": ["s", "s"]})


@pytest.mark.parametrize("streaming", [None, True], ids=["whole", "streaming"])
@pytest.mark.parametrize("make", [json_lines, parquet, as_json, sharegpt], ids=lambda make: make.__name__)
def test_conversations_are_read_through_the_template(
    tmp_path: Path, tokenizer: Any, make: Any, streaming: bool | None
) -> None:
    documents = open_documents(make(tmp_path), streaming=streaming, render=renderer(tokenizer))
    chunks = list(documents.read())
    assert [chunk.content for chunk in chunks] == TEXTS
    assert [chunk.content for chunk in documents.read(chunks[0].next_position)] == TEXTS[1:]


def test_bos_of_a_template_is_not_doubled(tokenizer: Any) -> None:
    dataset = datasets.Dataset.from_dict({"messages": CHATS * 5})
    stream = TokenStream(open_documents(dataset, render=renderer(tokenizer)), tokenizer, 8)
    ids = stream.next_contexts(6)
    assert (ids[:, 0] == BOS).all() and not ((ids[:, 1:] == BOS) & (ids[:, :-1] == BOS)).any()


def test_tokenizer_without_a_template_is_an_error_that_names_the_column() -> None:
    dataset = datasets.Dataset.from_dict({"prompt": ["a", "b"], "messages": CHATS})
    with pytest.raises(ValueError, match=r"holds conversations \(column 'messages'\), but the tokenizer has no chat"):
        open_documents(dataset, render=renderer(make_tokenizer(bos_token="<s>")))
    assert [c.content for c in open_documents(dataset, text_column="prompt").read()] == ["a", "b"]


@pytest.mark.parametrize("streaming", [None, True], ids=["whole", "streaming"])
def test_conversation_that_the_template_refuses_is_named_by_its_line(
    tmp_path: Path, tokenizer: Any, streaming: bool | None
) -> None:
    chats = [CHATS[0], [{"role": "system", "content": "be good"}], CHATS[1]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    how: dict[str, Any] = {"streaming": streaming, "render": renderer(tokenizer)}
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: .* the chat template refuses \(no system here\)"):
        list(open_documents(tmp_path / "a.jsonl", **how).read())
    skipping = open_documents(tmp_path / "a.jsonl", on_bad_rows="skip", **how)
    assert [chunk.content for chunk in skipping.read()] == TEXTS
    assert skipping.bad_rows.n_skipped == 1


@pytest.mark.parametrize("streaming", [None, True], ids=["whole", "streaming"])
def test_chats_lists_and_texts_may_be_mixed(tmp_path: Path, tokenizer: Any, streaming: bool | None) -> None:
    chats = datasets.Dataset.from_dict({"messages": CHATS * 20})
    lists = datasets.Dataset.from_dict({"text": [["a", "b"], ["c"]] * 20})
    texts = datasets.Dataset.from_dict({"content": ["plain"] * 40})
    documents = open_mixture([chats, lists, texts], streaming=streaming, render=renderer(tokenizer))
    chunks = list(documents.read())
    assert {chunk.content for chunk in chunks} == {*TEXTS, "a", "b", "c", "plain"}
    again = documents.read(chunks[10].next_position)
    assert [chunk.content for chunk in again] == [chunk.content for chunk in chunks[11:]]
