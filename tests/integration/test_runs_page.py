"""The page of all runs in a browser: boxes, the filter, what the address keeps, and new data while it is open."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import CHROMIUM, Browser, browser

from sae_training.machine.holder import this_process, write_holder
from sae_training.report import runs_page
from sae_training.report.all_runs import RunsRead
from sae_training.report.runs_page import data_of, in_script, write_page

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
LINES = "document.querySelectorAll('[id=\"plot metrics/l0\"] .scatterlayer .trace').length"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as one:
        one.size(1280, 900)
        yield one


def make_run(folder: Path, k: int, n_rows: int = 3, **status: object) -> None:
    folder.mkdir(exist_ok=True)
    config = {"k": k, "lr": k / 1e5, "architecture": "topk", "hook_point": "blocks.1.hook_resid_post"}
    (folder / "config.json").write_text(json.dumps({"config": config, "versions": {}}))
    content = {"state": "training", "started": "then", "step": n_rows, **status}
    (folder / "status.json").write_text(json.dumps(content))
    write_holder(folder, this_process("then"))
    rows = [{"step": step, "metrics/l0": k, "details/n_training_tokens": 64 * step} for step in range(1, n_rows + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def names(tab: Browser) -> list[str]:
    return tab.texts("tbody th label")


def test_boxes_filter_and_new_data(tab: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for k in (8, 16, 32):
        make_run(tmp_path / f"run {k} <b>", k)
    runs = RunsRead(tmp_path)
    page = write_page(runs, data_of(runs, 0.2)).as_uri()
    (tmp_path / "runs-data.js").write_text(in_script(data_of(runs, 0.2)))
    tab.open(page)
    tab.until(f"{LINES} === 3")
    assert names(tab) == ["run 8 <b>", "run 16 <b>", "run 32 <b>"]
    tab.click("tbody input", 1)  # that of k = 16
    tab.until(f"{LINES} === 2")

    def colour(run: str) -> str:
        return tab.js(f"[...document.querySelectorAll('tbody tr')].find((r) => r.textContent.includes({run!r}))"
                      ".querySelector('path').getAttribute('stroke')")  # fmt: skip

    before = colour("run 32")
    for words, kept in {
        "k>=16 architecture=topk": ["run 16 <b>", "run 32 <b>"],
        "lr<1e-4": ["run 8 <b>"],
        "k!=16": ["run 8 <b>", "run 32 <b>"],
        'hook_point~RESID "32 <b"': ["run 32 <b>"],
        "L0=8,32": ["run 8 <b>", "run 32 <b>"],
    }.items():
        tab.js(f"document.getElementById('filter').value = {json.dumps(words)}")
        tab.js("document.getElementById('filter').dispatchEvent(new Event('input'))")
        assert names(tab) == kept, words
    tab.js("document.getElementById('filter').value = 'no_such=1'")
    tab.js("document.getElementById('filter').dispatchEvent(new Event('input'))")
    assert "No run has no_such" in tab.texts("#said")[0]
    tab.js("document.getElementById('filter').value = 'k!=8'")
    tab.js("document.getElementById('filter').dispatchEvent(new Event('input'))")
    tab.until(f"{LINES} === 1")
    tab.click("thead th:nth-child(3) button")  # sorts by step
    focused = "document.activeElement.getAttribute('data-key')"
    assert tab.js(focused) == "sort step"

    alert = {"step": 4, "kind": "loss", "message": "the loss has risen <i>"}
    make_run(tmp_path / "run 64", 64)
    make_run(tmp_path / "run 32 <b>", 32, n_rows=5, state="failed", alerts=[alert])
    (tmp_path / "runs-data.js").write_text(in_script(data_of(runs, 0.2)))
    tab.until("document.querySelectorAll('tbody tr').length === 3")
    assert names(tab) == ["run 16 <b>", "run 64", "run 32 <b>"]  # by step
    assert tab.texts("#told li") == ["run 32 <b>: after step 4, the loss has risen <i>"]
    assert tab.texts("tbody td.bad") == ["failed, 1 alert"]
    assert tab.js(focused) == "sort step"
    tab.until("document.querySelector('[id=\"plot metrics/l0\"]').data[0].x.length === 5")

    address = tab.js("location.href")
    tab.open("about:blank")
    tab.open(address)
    tab.until(f"{LINES} === 1")
    assert names(tab) == ["run 16 <b>", "run 64", "run 32 <b>"]
    assert [tab.js(f"document.querySelectorAll('tbody input')[{i}].checked") for i in range(3)] == [False, False, True]
    assert colour("run 32") == before
    (tmp_path / "runs-data.js").write_text(in_script(data_of(runs)))
    tab.until("document.getElementById('fresh').textContent.includes('report')")
    assert tab.errors == []
    assert all(address.startswith(("file:", "about:", "data:", "blob:")) for address in tab.loaded)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(tab: Browser, scheme: str, tmp_path: Path) -> None:
    axe = (importlib.resources.files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8")
    make_run(tmp_path / "a", 8, alerts=[{"step": 4, "kind": "loss", "message": "the loss has risen"}])
    make_run(tmp_path / "b", 16, state="failed")
    tab.colours(scheme)
    tab.open(runs_page.write_runs_page(tmp_path).as_uri())
    tab.until(f"{LINES} === 2")
    tab.js(f"document.querySelector('details').open = true; {axe}; undefined")
    found = json.loads(tab.js("axe.run(document, {resultTypes: ['violations']}).then((f) => JSON.stringify(f))"))
    assert "color-contrast" in {rule["id"] for rule in found["passes"]}
    assert {rule["id"]: [node["html"] for node in rule["nodes"]] for rule in found["violations"]} == {}
