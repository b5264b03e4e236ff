from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from page_parser import Page

from sae_training.report.comparison import by_layer, of_layer, write_comparison


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layer4", ("", 4)),
        ("layer12-k32-seed1", ("k32-seed1", 12)),
        ("blocks.3.hook_mlp_out-k8", ("hook_mlp_out-k8", 3)),
        ("k32", None),
        ("layernorm", None),
    ],
)
def test_layer_in_a_name(name: str, expected: tuple[str, int] | None) -> None:
    assert of_layer(name) == expected


def evaluations(*names: str) -> dict[str, dict[str, float]]:
    keys = ("metrics/eval_explained_variance", "metrics/CE_loss_score", "metrics/eval_l0")
    return {name: dict.fromkeys(keys, 0.1 * i) for i, name in enumerate(names)}


def test_lines_by_layer_are_in_the_order_of_the_layers() -> None:
    figure = by_layer(evaluations("layer10-k8", "layer2-k8", "layer2-k4"), "metrics/CE_loss_score", "")
    found = {line.name: (list(line.x), list(line.y)) for line in cast(Any, figure.data)}
    assert found == {"k8": ([2, 10], [0.1, 0.0]), "k4": ([2], [0.2])}


@pytest.mark.parametrize(
    ("names", "by_layer"),
    [(("layer1", "layer2"), True), (("k4", "k8"), False), (("layer1-k4", "layer1-k8"), False)],
    ids=["two layers", "no layers", "one layer"],
)
def test_page_has_lines_by_layer_where_there_are_several(
    names: tuple[str, ...], by_layer: bool, tmp_path: Path
) -> None:
    page = Page(write_comparison(tmp_path, evaluations(*names)))
    by_l0 = ["Explained variance by L0", "CE score by L0"]
    assert list(page.figures) == (["Explained variance by layer", "CE score by layer"] if by_layer else []) + by_l0
    assert page.table == {
        name: ["0.0000", "0.0", "0.0000"] if i == 0 else ["0.1000", "0.1", "0.1000"] for i, name in enumerate(names)
    }


def test_names_are_text_and_never_markup(tmp_path: Path) -> None:
    folder = tmp_path / "<b>run"
    folder.mkdir()
    page = Page(write_comparison(folder, evaluations("k4 <script>", "k8 & co")))
    assert page.open == []
    assert page.texts["h1"] == ["<b>run"]
    assert list(page.table) == ["k4 <script>", "k8 & co"]
