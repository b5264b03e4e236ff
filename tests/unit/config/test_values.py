from __future__ import annotations

import json
import shlex
import typing
from types import NoneType
from typing import Any, Literal

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from sae_training.cli import VERBS, parse, parse_train
from sae_training.config.checks import field_types, list_types, options, reads_as_number, single_types
from sae_training.config.fields import Origin
from sae_training.config.values import SWITCH, in_one_word, is_number, is_readable, read_value, written

MODES = settings(derandomize=True, deadline=None, max_examples=300)
BARE = st.from_regex(r"[A-Za-z./_~][A-Za-z0-9./_:-]*", fullmatch=True).filter(
    lambda text: not reads_as_number(text) and text.lower() not in {*SWITCH, "none", "null"}
)
TEXT = BARE | st.text(st.characters(exclude_categories=["Cs"]))
FLAGS = [(verb, name, hint) for verb in VERBS for name, hint in field_types(VERBS[verb]).items() if is_readable(hint)]
# Words of their own (MODEL and DATASET), and --config, which is a file that must be there.
FLAGS = [flag for flag in FLAGS if flag[1] not in ("model", "dataset", "config")]
HIDING = ("train", "plan")
FLAGS = [flag for flag in FLAGS if flag[0] not in HIDING or flag[1] not in field_types(Origin)]  # which these hide
HINTS = list(dict.fromkeys(hint for _, _, hint in FLAGS))
SWITCHES = [(verb, name) for verb, name, hint in FLAGS if bool in options(hint)]


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of an annotation, of the right types; their ranges are checked elsewhere."""
    return st.one_of([_values(option) for option in options(hint)])


def _values(option: Any) -> st.SearchStrategy[Any]:
    simple: dict[Any, st.SearchStrategy[Any]] = {
        int: st.integers(-(10**12), 10**12),
        float: st.floats(allow_nan=False, allow_infinity=False),
        bool: st.booleans(),
        str: TEXT,
        NoneType: st.none(),
    }
    if option in simple:
        return simple[option]
    if typing.get_origin(option) is Literal:
        return st.sampled_from(typing.get_args(option))
    if typing.get_origin(option) is dict:
        return st.dictionaries(TEXT, values(typing.get_args(option)[1]), min_size=1, max_size=3)
    return st.lists(values(typing.get_args(option)[0]), min_size=1, max_size=4)


def spellings(value: Any, hint: Any) -> st.SearchStrategy[str]:
    """What people, shells and wandb write for a value."""
    if isinstance(value, bool):
        words = [word for word, meant in SWITCH.items() if meant is value]
        words = [word for word in words if word not in "01" or not {int, float} & {*options(hint)}]
        return st.sampled_from([case(word) for word in words for case in (str.lower, str.upper, str.title)])
    if value is None:
        return st.sampled_from(["None", "none", "null", "NULL"])
    if isinstance(value, int):
        return st.sampled_from([str(value), f"{value:_}", repr(float(value)), f" {value} ", f'"{value}"'])
    if isinstance(value, float):
        return st.sampled_from([repr(value), f"{value:.17e}", json.dumps(value)])
    if isinstance(value, dict):
        return st.just(json.dumps(value))
    if isinstance(value, list):
        parts = [written(part) for part in value]
        joined = [",".join(parts), ", ".join(parts)] if len(value) > 1 or list_types(hint) == [*options(hint)] else []
        return st.sampled_from(
            [repr(value), json.dumps(value), f"[{', '.join(parts)}]", f"({','.join(parts)},)", *joined]
        )
    quoted = [repr(value), json.dumps(value)] * (str in single_types(hint))
    return st.sampled_from([written(value), *quoted])


def same(found: Any, expected: Any) -> bool:
    """Whether two values are equal, with 1 and 1.0 the same, but not 1 and True."""
    if isinstance(expected, list):
        return isinstance(found, list) and len(found) == len(expected) and all(map(same, found, expected))
    return found == expected and isinstance(found, bool) is isinstance(expected, bool)


@MODES
@given(data=st.data(), hint=st.sampled_from(HINTS))
def test_every_spelling_of_a_value_is_read_as_the_value(data: st.DataObject, hint: Any) -> None:
    value = data.draw(values(hint))
    assume(not (isinstance(value, str) and NoneType in options(hint) and value.lower() in ("none", "null")))
    assert same(read_value(data.draw(spellings(value, hint)), hint), value)


@MODES
@given(data=st.data(), flag=st.sampled_from(FLAGS), joined=st.booleans(), dash=st.sampled_from("-_"))
def test_no_value_becomes_a_word_of_its_own(
    data: st.DataObject, flag: tuple[str, str, Any], joined: bool, dash: str
) -> None:
    verb, name, hint = flag
    value = data.draw(values(hint))
    spelt = data.draw(spellings(value, hint))
    assume(joined or not spelt.startswith("--"))
    written_flag = f"--{name.replace('_', dash)}"
    words = [f"{written_flag}={spelt}"] if joined else [written_flag, spelt]
    made = in_one_word(["demo", *words, "text.jsonl"], field_types(VERBS[verb]))
    assert [made[0], made[2:]] == ["demo", ["text.jsonl"]]
    assert same(read_value(made[1].partition("=")[2], hint), read_value(spelt, hint))


@settings(MODES, max_examples=40)
@given(flag=st.sampled_from(SWITCHES), word=st.sampled_from([*SWITCH]), upper=st.booleans(), joined=st.booleans())
@example(("train", "prepend_bos"), "0", False, True)
@example(("train", "multi_topk"), "off", False, False)
def test_switches_of_every_verb(flag: tuple[str, str], word: str, upper: bool, joined: bool) -> None:
    verb, name = flag
    spelt = word.upper() if upper else word
    words = [f"--{name}={spelt}"] if joined else [f"--{name}", spelt]
    two = dict.fromkeys(("train", "cache", "plan"), ["m", "d"])
    own = {"toy": [], "pretokenize": ["m", "d", "o"], **two}.get(verb, ["runs/a"])
    found = parse([verb, *words, *own])
    assert getattr(found, name) is SWITCH[word]
    given_words = [getattr(found, name) for name in ("model", "dataset") if hasattr(found, name)]
    assert given_words == own[:2] if len(own) > 1 else not given_words


@MODES
@given(
    flag=st.sampled_from([flag for flag in FLAGS if str not in single_types(flag[2])]),
    stray=st.sampled_from(["0.5", "2", "-1", "1e3", "7.25", "nan", "[1,", "[a, b]", "(", '"2"']),
    before=st.sampled_from([[], ["1"], ["[1, 2]"], ["None"]]),
)
def test_number_or_list_after_a_flag_is_never_a_name(flag: tuple[str, str, Any], stray: str, before: list[str]) -> None:
    verb, name, hint = flag
    words = [f"--{name}", *before, stray, *(["2]"] if stray.endswith(",") else []), "--debug"]
    made = in_one_word(words, field_types(VERBS[verb]))
    if is_number(stray) or list_types(hint) or not before:  # a number alone is what goes on after one value
        assert [word.partition("=")[0] for word in made] == [f"--{name}", "--debug"]


@pytest.mark.parametrize(
    "words",
    [
        "--multi_topk ture demo",
        "--multi_topk 2 demo",
        "--prepend_bos Flase demo",
        "--prepend_bos None demo",
        "--prepend_bos '' demo",
        "--prepend_bos=maybe demo",
        "--prepend_bos= demo",
        "--k 16 3.5 demo",
        "--k [16 32 demo",
        "--k '[[16, 32]]' demo",
        "--d_in 64 128 demo",
        "--d_in [64, 128] demo",
        "--architecture topk jumprelo demo",
        "--lr 1e-3 atuo demo",
    ],
)
def test_wrong_value_is_refused_with_its_flag(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    given_words = shlex.split(words)
    with pytest.raises(SystemExit) as stopped:
        parse_train(given_words)
    assert stopped.value.code == 2
    name = given_words[0].partition("=")[0].replace("_", "-")
    assert f"Error parsing {name}: found" in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize("words", ["--no-prepend-bos true demo", "--no-prepend_bos=1 demo", "--no_prepend_bos off"])
def test_a_switch_that_says_no_takes_no_value(words: str) -> None:
    with pytest.raises(ValueError, match=r"expected no value; write --prepend_bos False"):
        parse_train(words.split())


@pytest.mark.parametrize("words", ["5 demo", "--run_name x 5 demo", "demo 128", "['k',16] demo", '{"k":16}'])
def test_number_is_no_name_of_a_model_or_a_text(words: str) -> None:
    with pytest.raises(ValueError, match=r"(MODEL|DATASET): found .*, expected the name or path of a (model|dataset);"):
        parse_train(words.split())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--multi_topk on demo", {"multi_topk": True, "model_name": "demo"}),
        ("--multi_topk=1.0", {"multi_topk": True}),
        ("k=16 lr=0.001 prepend_bos=False demo", {"k": 16, "lr": 1e-3, "prepend_bos": False, "model_name": "demo"}),
        ("--dataset_path [a.txt, b.txt] demo", {"dataset_path": ["a.txt", "b.txt"], "model_name": "demo"}),
        ("""--dataset_path="['a, b', \\"it's\\"]" demo""", {"dataset_path": ["a, b", "it's"], "model_name": "demo"}),
        ("""--dataset_path='"a, b"'""", {"dataset_path": "a, b"}),
        ("--dataset_path data[1] demo", {"dataset_path": "data[1]", "model_name": "demo"}),
        ("--dataset_path '(a).txt,b[1]'", {"dataset_path": ["(a).txt", "b[1]"]}),
        ("--dataset_path [ab]c.txt demo", {"dataset_path": "[ab]c.txt", "model_name": "demo"}),
        ("""--k='["16", "32"]' --lr="['auto', 0.001]" """, {"k": [16, 32], "lr": ["auto", 1e-3]}),
        ("--d_in=null --lr_end=None --streaming='null'", {"d_in": None, "lr_end": None, "streaming": None}),
        ("--normalize_activations=None --sequence_separator_token=null", {"normalize_activations": "none"}),
        ("""--run_name='"null"' --wandb_entity null""", {"run_name": "null", "wandb_entity": None}),
        ("--use_ghost_grads --auxk_coefficient 0 tower", {"use_ghost_grads": True, "model_name": "tower"}),
    ],
)
def test_words_of_a_command(words: str, expected: dict[str, Any]) -> None:
    cfg = parse_train(shlex.split(words))
    assert {name: getattr(cfg, name) for name in expected} == expected
