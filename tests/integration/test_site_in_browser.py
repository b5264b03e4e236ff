"""The static site in a real browser: every panel, pointer, keys, search, selection, and hostile texts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import CHROMIUM, Browser, browser
from made_analysis import DEAD, make_analysis

from sae_analysis.analysis import Analysis
from sae_analysis.site import export_site

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

N = 40
PANELS = {"Examples", "Activations", "Tokens", "Logits", "Quantiles", "Neighbours", "More figures"}


@pytest.fixture(scope="module")
def analysis(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    return make_analysis(tmp_path_factory.mktemp("made"), N)


@pytest.fixture(scope="module")
def index(analysis: Analysis, tmp_path_factory: pytest.TempPathFactory) -> str:
    return export_site(analysis, tmp_path_factory.mktemp("sites") / "a site").as_uri()


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as one:
        one.size(1280, 900)
        yield one


@pytest.fixture(autouse=True)
def nothing_goes_wrong(tab: Browser) -> Iterator[None]:
    """After each test: no error on the console, no script of the corpus has run, nothing is loaded from elsewhere."""
    yield
    assert tab.errors == []
    assert not tab.js("window.broken")
    assert not [address for address in tab.loaded if not re.match("file:|data:|about:|blob:", address)]


def show(tab: Browser, index: str, address: str = "") -> None:
    tab.open("about:blank")
    tab.open(index + address)
    tab.until("document.querySelector('main h1')")


def shown_latents(tab: Browser) -> list[int]:
    return [int(text) for text in tab.texts("main .rows tbody th")]


def test_overview_shows_what_was_analysed_and_all_latents(tab: Browser, index: str) -> None:
    show(tab, index)
    assert tab.texts("h1") == ["run <i>of</i> tests"]
    assert "<u>model</u>" in tab.texts("dd")
    assert len(shown_latents(tab)) == 10
    assert len(tab.texts("svg.bars")) == 2
    assert not any("columns" in address for address in tab.loaded)  # until plots are scrolled to
    tab.js("document.querySelector('#directions-title').scrollIntoView()")
    tab.until("document.querySelectorAll('.scatter').length === 2")


def test_a_bar_leads_to_its_latents(tab: Browser, index: str) -> None:
    show(tab, index)
    tab.click("svg.bars a .reach", 2)
    tab.until("location.hash.startsWith('#/latents?density=')")
    tab.until("document.querySelector('main h1').textContent.includes(' of ')")
    assert 0 < len(shown_latents(tab)) < N


def test_dragging_over_a_plot_lists_latents(tab: Browser, index: str) -> None:
    show(tab, index)
    tab.js("document.querySelector('#figures-title').scrollIntoView()")
    tab.until("document.querySelector('.scatter')")
    x, y = tab.place(".scatter")
    tab.drag(x - 150, y - 120, x + 150, y + 120)
    tab.until("document.querySelector('.selection h3')")
    (title,) = tab.texts(".selection h3")
    n = int(title.split()[0])
    assert 0 < n < N
    tab.click(".selection p a")
    tab.until("location.hash === '#/latents?selection=1' && document.querySelector('main h1')")
    tab.until(f"document.querySelector('main h1').textContent.startsWith('{n} of')")
    assert len(shown_latents(tab)) == n


def test_a_point_of_a_plot_is_its_latent(tab: Browser, index: str) -> None:
    show(tab, index)
    tab.js("document.querySelector('#figures-title').scrollIntoView()")
    tab.until("document.querySelector('.scatter')")
    tab.place(".scatter")
    found = tab.js(
        "(() => { const plot = document.querySelector('.scatter'), box = plot.getBoundingClientRect();"
        "for (let x = box.left + 60; x < box.right; x += 9) for (let y = box.top; y < box.bottom; y += 9) {"
        "plot.dispatchEvent(new PointerEvent('pointermove', {clientX: x, clientY: y}));"
        "const hover = plot.querySelector('.hover');"
        "if (!hover.hidden) return [x, y, hover.textContent]; } })()"
    )
    x, y, text = found
    said = re.fullmatch(r"latent (\d+) · density ([\d.]+) · maximum ([\d.]+)", text)
    assert said is not None, text
    latent = int(said[1])
    assert float(said[2]) == pytest.approx(1e-3 * (1 + latent), rel=1e-2)
    assert float(said[3]) == pytest.approx(20 - latent / 10, rel=1e-2)
    tab.drag(x, y, x, y)
    tab.until(f"location.hash === '#/latent/{latent}'")


def test_keys_move_the_rectangle_of_a_plot(tab: Browser, index: str) -> None:
    show(tab, index)
    tab.js("document.querySelector('#figures-title').scrollIntoView()")
    tab.until("document.querySelector('.scatter')")
    tab.js("document.querySelector('.scatter').focus()")
    for _ in range(8):
        tab.press("ArrowRight", shift=True)
        tab.press("ArrowDown", shift=True)
    tab.until("document.querySelector('.selection h3')")
    assert tab.js("location.hash") == ""
    tab.press("Escape")
    tab.until("!document.querySelector('.selection h3')")


def test_list_sorts_both_ways(tab: Browser, index: str) -> None:
    show(tab, index, "#/latents")
    assert len(shown_latents(tab)) == N
    tab.click("th .sort", 1)  # density
    tab.until("document.querySelector('th[aria-sort=descending]')")
    assert shown_latents(tab)[0] == N - 1
    tab.click("th .sort", 1)
    tab.until("document.querySelector('th[aria-sort=ascending]')")
    assert shown_latents(tab)[:2] == [DEAD, 0]


def test_list_filters_and_its_address_keeps_them(tab: Browser, index: str) -> None:
    show(tab, index, "#/latents?density=0.0105..0.0205&sort=index")
    assert shown_latents(tab) == list(range(10, 20))
    tab.js(
        "(() => { const box = document.querySelector('[aria-label=\"density in %, to\"]');"
        "box.value = '1.55'; box.dispatchEvent(new Event('change')); })()"
    )
    tab.until("document.querySelectorAll('main .rows tbody th').length === 5")
    assert "density=0.0105..0.0155" in tab.js("decodeURIComponent(location.hash)")
    show(tab, index, "#/latents?dead=only")
    assert shown_latents(tab) == [DEAD]


def test_search_by_token_and_by_text(tab: Browser, index: str, analysis: Analysis) -> None:
    show(tab, index, "#/latents")
    tab.press("/")
    tab.type("Ocean")
    tab.press("Enter")
    tab.until("location.hash.includes('token=Ocean')")
    tab.until("document.querySelector('main h1').textContent.includes(' of ')")
    assert set(shown_latents(tab)) == set(analysis.search(tokens="ocean").index)
    assert shown_latents(tab)[0] in (0, 34)
    show(tab, index, "#/latents?text=treaty%20%3Cb%3E")
    found = tab.texts("main .rows td.figure:last-child")
    assert found == sorted(found, key=int, reverse=True)
    show(tab, index, "#/latents?token=nosuchword")
    assert tab.texts("main h1") == [f"0 of {N} latents"]


def test_latent_has_every_panel(tab: Browser, index: str) -> None:
    show(tab, index, "#/latent/7")
    assert tab.texts("h1") == ["Latent 7"]
    assert {title.strip() for title in tab.texts("h2")} >= PANELS
    assert len(tab.texts("svg.bars")) == 2
    assert len(tab.texts(".one")) == 20
    assert len(tab.texts(".tok.example")) == 20
    assert tab.js("document.querySelector('.tok.fires').style.getPropertyValue('--heat')") == "100%"


def test_hover_shows_activation_and_logit_lens(tab: Browser, index: str) -> None:
    show(tab, index, "#/latent/7")
    tab.hover(".tok.example")
    tab.until("document.querySelector('#tip')")
    (tip,) = tab.texts("#tip")
    assert "activation 19.3" in tip
    assert "raises" in tip
    assert "lowers" in tip
    assert "without it: next token's loss 0" in tip
    assert "likelier without it" in tip
    assert tab.texts(".loss")[1] == "+0.1 loss"
    tab.mouse("mouseMoved", 2, 2)
    tab.until("!document.querySelector('#tip')")


def test_tabs_by_pointer_and_keys(tab: Browser, index: str) -> None:
    show(tab, index, "#/latent/7")
    tab.click("[role=tab]", 1)
    assert len(tab.texts(".one")) == 20
    assert len(tab.texts("#examples-panel h3")) == 5
    assert tab.js("location.hash") == "#/latent/7?tab=quantile"
    tab.press("ArrowRight")
    assert tab.texts("[role=tab][aria-selected=true]") == ["Random5"]
    assert len(tab.texts(".one")) == 5
    tab.js("document.activeElement.blur()")
    tab.press("4")
    assert tab.texts("[role=tab][aria-selected=true]") == ["Not firing5"]
    assert not tab.texts(".tok.fires")
    show(tab, index, "#/latent/7?tab=random")
    assert tab.texts("[role=tab][aria-selected=true]") == ["Random5"]


def test_windows_grow_to_the_whole_context(tab: Browser, index: str) -> None:
    show(tab, index, "#/latent/7")
    window = "document.querySelectorAll('.one')[0].querySelectorAll('.tok').length"
    assert tab.js(window) == 32
    tab.click(".more")
    tab.until(f"{window} === 64")
    tab.click(".more")
    tab.until(f"{window} === 32")
    tab.press("e")
    tab.until("[...document.querySelectorAll('.one')].every((e) => e.querySelectorAll('.tok').length === 64)")


def test_keys_walk_over_tokens_and_latents(tab: Browser, index: str) -> None:
    show(tab, index, "#/latent/7")
    tab.js("document.querySelector('.one .text').focus()")
    tab.press("ArrowRight")
    tab.until("document.querySelector('#tip') && document.querySelector('.tok.cursor')")
    assert tab.js("location.hash") == "#/latent/7"
    assert "activation" in tab.texts("#said")[0]
    tab.js("document.activeElement.blur()")
    tab.press("ArrowRight")
    tab.until("document.querySelector('h1').textContent === 'Latent 8'")
    assert tab.js("document.activeElement.tagName") == "H1"
    tab.press("p")
    tab.until("document.querySelector('h1').textContent === 'Latent 7'")
    tab.press("g")
    tab.type("12")
    tab.press("Enter")
    tab.until("document.querySelector('h1').textContent === 'Latent 12'")
    tab.press("?")
    tab.until("document.querySelector('dialog').open")
    tab.press("Escape")
    tab.until("!document.querySelector('dialog').open")


def test_next_follows_the_list_one_came_from(tab: Browser, index: str) -> None:
    show(tab, index, "#/latents?sort=-density")
    tab.click("main .rows tbody a", 1)
    tab.until(f"document.querySelector('h1').textContent === 'Latent {N - 2}'")
    tab.press("n")
    tab.until(f"document.querySelector('h1').textContent === 'Latent {N - 3}'")
    assert "3 of 40 in the list" in tab.texts(".title .pager")[0]
    show(tab, index, "#/latent/0")
    assert tab.js("document.querySelector('[rel=prev]')") is None


def test_dead_latent_has_a_page(tab: Browser, index: str) -> None:
    show(tab, index, f"#/latent/{DEAD}")
    assert tab.texts("main b") == ["Dead: "]
    assert "None: it never fires." in tab.texts("#examples-panel p")


def test_an_address_of_no_latent_says_so(tab: Browser, index: str) -> None:
    tab.open("about:blank")
    tab.open(f"{index}#/latent/{N}")
    tab.until("document.querySelector('.failure')")
    assert tab.texts(".failure") == [f"Latent: found {N}, expected 0 to {N - 1}."]


@pytest.mark.parametrize("latent", range(10, 28))
def test_hostile_texts_are_text(tab: Browser, index: str, latent: int) -> None:
    show(tab, index, f"#/latent/{latent}")
    tab.press("e")
    for address in (f"#/latent/{latent}?tab=quantile", "#/latents"):
        tab.js(f"location.hash = {address!r}")
    tab.until("document.querySelector('main .rows')")
    assert tab.js("document.querySelectorAll('main script, main img, main b img, main mark b').length") == 0
    assert not [address for address in tab.loaded if address.endswith("/x")]
    assert tab.js("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_control_and_direction_signs_are_shown(tab: Browser, index: str) -> None:
    show(tab, index, "#/latent/10")
    texts = " ".join(tab.texts(".panels"))
    for sign in ("␀", "↵", "U+202E", "U+2028"):
        assert sign in texts
    assert "\u202e" not in tab.js("document.body.textContent")


def test_pages_fit_a_phone(tab: Browser, index: str) -> None:
    tab.size(390, 844, phone=True)
    try:
        for address in ("", "#/latents", "#/latent/7", "#/latent/16"):
            show(tab, index, address)
            assert tab.js("document.documentElement.scrollWidth") <= 390, address
    finally:
        tab.size(1280, 900)


def test_light_and_dark(tab: Browser, index: str) -> None:
    back = "getComputedStyle(document.documentElement).backgroundColor"
    try:
        tab.colours("dark")
        show(tab, index)
        dark = tab.js(back)
        tab.colours("light")
        light = tab.js(back)
        assert dark != light
        tab.press("t")
        tab.press("t")
        assert tab.js(back) == dark
        show(tab, index, "#/latents")
        assert tab.js(back) == dark  # the switch is remembered
        tab.press("t")
        assert tab.js(back) == light
    finally:
        tab.colours("light")


def test_page_prints(tab: Browser, index: str) -> None:
    show(tab, index, "#/latent/7")
    tab.send("Emulation.setEmulatedMedia", media="print")
    try:
        assert tab.js("getComputedStyle(document.querySelector('#top')).display") == "none"
        assert tab.js("getComputedStyle(document.querySelector('.one')).display") != "none"
        assert tab.pdf().startswith(b"%PDF")
    finally:
        tab.send("Emulation.setEmulatedMedia", media="")


def test_one_page_needs_no_other_file(tab: Browser, analysis: Analysis, tmp_path: Path) -> None:
    tab.loaded.clear()
    path = analysis.latent(11).save_html(tmp_path / "latent.html")
    show(tab, path.as_uri())
    assert tab.texts("h1") == ["Latent 11"]
    assert {title.strip() for title in tab.texts("h2")} >= PANELS
    tab.press("e")
    tab.until("document.querySelector('.one').querySelectorAll('.tok').length === 64")
    assert [address for address in tab.loaded if address.startswith("file:")] == [path.as_uri()]


def test_notebook_output_draws_itself(tab: Browser, analysis: Analysis, tmp_path: Path) -> None:
    path = tmp_path / "notebook.html"
    path.write_text(f"<!doctype html><html><body>{analysis.latent(11)._repr_html_()}</body></html>", encoding="utf-8")
    tab.open(path.as_uri())
    with tab.inner_frame():
        tab.until("document.querySelector('main h1')")
        assert tab.texts("h1") == ["Latent 11"]
        assert len(tab.texts(".one")) == 20
