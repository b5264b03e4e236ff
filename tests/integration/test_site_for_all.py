"""The pages of the static site, looked at by axe-core: what keeps people who see or move otherwise from using them."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Iterator
from typing import Any

import pytest
from chromium import CHROMIUM, Browser, browser
from made_analysis import make_analysis

from sae_analysis.site import export_site

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
PAGES = {"overview": "", "list": "#/latents", "latent": "#/latent/7"}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("made")
    return export_site(make_analysis(folder), folder / "site").as_uri()


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as one:
        one.size(1280, 900)
        yield one


@pytest.fixture(scope="module")
def axe() -> str:
    return (importlib.resources.files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8")


def findings(tab: Browser, axe: str) -> dict[str, list[str]]:
    """Return what axe-core objects to in the page that is shown, minor things too: the elements by the rule."""
    tab.js(f"{axe}; undefined")
    found: dict[str, Any] = json.loads(
        tab.js("axe.run(document, {resultTypes: ['violations']}).then((found) => JSON.stringify(found))")
    )
    # Versions of before 2023 cannot read the colours of the page, and pass it.
    assert "color-contrast" in {rule["id"] for rule in found["passes"] + found["violations"]}
    return {
        f"{rule['impact']}, {rule['id']}: {rule['help']}": [node["html"] for node in rule["nodes"]]
        for rule in found["violations"]
    }


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("page", PAGES)
def test_nothing_is_found(tab: Browser, index: str, axe: str, page: str, scheme: str) -> None:
    tab.colours(scheme)
    tab.open("about:blank")
    tab.open(index + PAGES[page])
    tab.until("document.querySelector('main h1')")
    # Plots are drawn once they are scrolled to.
    tab.js("document.querySelectorAll('main section, main h2').forEach((e) => e.scrollIntoView())")
    assert findings(tab, axe) == {}
