"""The static site of an analysis: its files, what is in them, and that texts stay texts."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_analysis import CONTEXT, DEAD, HOSTILE, PIECES, make_analysis

from sae_analysis.analysis import Analysis
from sae_analysis.pieces import as_texts
from sae_analysis.site import contexts, export_site, search_index
from sae_analysis.site.export import ROWS_PER_FILE
from sae_analysis.site.one_page import ONE_LATENT, SCRIPTS, latent_page
from sae_analysis.site.order import clarity, default_order
from sae_analysis.site.overview import COLUMNS
from sae_analysis.site.records import Records
from sae_analysis.site.scripts import as_json, short
from sae_analysis.site.search_index import token_key, words_of
from sae_analysis.site.texts import shortened
from sae_analysis.store.example_blob import KINDS

STATIC = Path(__file__).parents[3] / "sae_analysis" / "site" / "static"
NODE = shutil.which("node")


@pytest.fixture(scope="module")
def analysis(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    return make_analysis(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def site(analysis: Analysis, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_site(analysis, tmp_path_factory.mktemp("sites") / "site").parent


def data(site: Path, name: str) -> Any:
    """Read a data file as the page does: a call with two values of JSON."""
    text = (site / "data" / f"{name}.js").read_text(encoding="utf-8")
    found = re.fullmatch(r"site\.put\((\"[^\"]*\"),(.*)\);", text, re.DOTALL)
    assert found is not None
    assert json.loads(found[1]) == name
    return json.loads(found[2])


def latents(site: Path) -> list[dict[str, Any]]:
    n = len(data(site, "about")["latent_files"])
    return [record for number in range(n) for record in data(site, f"latents/{number}")]


def shown(text: str) -> str:
    return shortened(text.replace("\x7f", "\u2421"))


# ---------------------------------------------------------------------------------------------------------------- files


def test_every_latent_has_a_record_with_every_part(site: Path, analysis: Analysis) -> None:
    records = latents(site)
    assert [record["latent"] for record in records] == list(range(len(analysis.latents)))
    parts = {"figures", "tokens", "examples", "bigram", "histogram", "quantiles", "neighbours", "logits"}
    assert parts <= records[5].keys()
    latent = analysis.latent(5)
    assert records[5]["figures"]["density"] == pytest.approx(latent.density)
    assert records[5]["logits"]["top"][0] == [latent.logits["top"][0][0], short(latent.logits["top"][0][1], 3)]
    assert records[5]["effects"] == []
    assert records[7]["effects"][3] == [0.3, [[shown(PIECES[7].decode()), 0.5]], [[HOSTILE[0].decode(), -0.25]]]
    assert [pair[:2] for pair in records[5]["neighbours"]["similar"]] == [[6, 0.9], [7, 0.45], [8, 0.3]]


def test_examples_are_those_of_the_analysis(site: Path, analysis: Analysis) -> None:
    for record in latents(site)[:6]:
        latent = analysis.latent(record["latent"])
        expected = [e for kind in KINDS for e in latent.examples(kind)]
        assert len(record["examples"]) == len(expected)
        for found, example in zip(record["examples"], expected, strict=True):
            kind, context, position, has_context, start, texts, firings = found
            assert (KINDS[kind], context, position) == (example.kind, example.context, example.position)
            assert has_context == 1
            window = example.window()
            assert start == window.start
            assert texts.split("\x7f") == [shown(example.tokens[i]) for i in window]
            activations = dict(zip(firings[::2], firings[1::2], strict=True))
            assert activations == {i: short(v, 3) for i, v in enumerate(example.activations) if v}


def test_whole_contexts_are_there(site: Path, analysis: Analysis) -> None:
    about = data(site, "about")
    found = {n: text for file in range(len(about["context_files"])) for n, text in data(site, f"contexts/{file}")}
    used = {example[1] for record in latents(site) for example in record["examples"]}
    assert found.keys() == used
    for number, text in found.items():
        texts = as_texts([PIECES[i] for i in analysis.reader.context(number)])
        assert text.split("\x7f") == [shown(t) for t in texts]
        assert len(texts) == CONTEXT


def test_contexts_that_do_not_fit_are_left_out_and_those_of_the_strongest_come_first(analysis: Analysis) -> None:
    files = contexts.ContextFiles(analysis.reader, most_bytes=20_000)
    of_top, of_others = files.used()
    everything = of_top | of_others
    assert 0 < len(files.numbers) < len(everything)
    assert files.are_held <= of_top


def test_figures_are_columns_of_all_latents(site: Path, analysis: Analysis) -> None:
    order = np.frombuffer(base64.b64decode(data(site, "columns/order")), dtype="<u2")
    assert sorted(order) == list(range(len(analysis.latents)))
    assert order[-1] == DEAD
    for name in COLUMNS:
        found = np.frombuffer(base64.b64decode(data(site, f"columns/{name}")), dtype="<f4")
        np.testing.assert_allclose(found, analysis.latents[name].astype(float).iloc[order], rtol=1e-6)
    rows = [row for number in range(len(order) // ROWS_PER_FILE) for row in data(site, f"rows/{number}")]
    assert [row[0] for row in rows] == order.tolist()
    assert [row[0] for row in data(site, "about")["first"]] == order[:50].tolist()


def test_histograms_count_every_latent_that_fires(site: Path, analysis: Analysis) -> None:
    found = data(site, "about")
    assert sum(found["histograms"]["density"]["counts"]) == len(analysis.latents) - 1
    assert sum(found["histograms"]["cosine"]["counts"]) == len(analysis.latents)
    assert found["n_dead"] == 1


def test_first_page_is_small(site: Path) -> None:
    page = [site / name for name in ("index.html", "site.js", "style.css", "data/about.js")]
    largest = max(path.stat().st_size for path in (site / "data").rglob("*.js"))
    assert sum(path.stat().st_size for path in page) + largest < 300_000


def test_nothing_comes_from_elsewhere(site: Path) -> None:
    for path in (site / "index.html", site / "style.css"):
        assert not re.search(r"https?:|//[a-z]", path.read_text(encoding="utf-8"))
    addresses = re.findall(r"https?://[^\"']+", (site / "site.js").read_text(encoding="utf-8"))
    assert addresses == ["http://www.w3.org/2000/svg"]


def test_a_site_is_replaced_and_other_folders_are_left_alone(analysis: Analysis, tmp_path: Path) -> None:
    index = export_site(analysis, tmp_path / "site")
    stale = index.parent / "data" / "latents" / "99.js"
    stale.write_text("")
    export_site(analysis, tmp_path / "site")
    assert not stale.exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="other files"):
        export_site(analysis, other)
    assert (other / "thesis.tex").read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "site"]


# ---------------------------------------------------------------------------------------------------------------- texts


def test_no_file_of_data_can_end_a_script_or_hold_half_a_character(site: Path) -> None:
    for path in (site / "data").rglob("*.js"):
        text = path.read_bytes().decode("utf-8")
        assert "<" not in text
        assert not re.search("[\u2028\u2029\x00-\x1f]", text)


def test_json_for_scripts_is_the_same_value() -> None:
    value = ["</script><!--", "\u2028\u2029", "\ud800 half", "😀", "\x00\x1f\x7f", {"__proto__": None}]
    text = as_json(value)
    assert json.loads(text) == value
    text.encode()
    assert "<" not in text


def test_pages_hold_no_tag_of_the_corpus(site: Path, analysis: Analysis) -> None:
    tags = set(re.findall(r"<(\w+)", (site / "index.html").read_text(encoding="utf-8")))
    one = latent_page(analysis.reader, 11)
    head, script = one.split("<script>", 1)
    tags |= set(re.findall(r"<(\w+)", head))
    assert tags == set(
        ["html", "head", "meta", "title", "link", "style", "script", "body", "main", "header", "a", "noscript", "p"]
    )
    assert script.count("</script>") == 1
    assert "window.broken" in script


def test_one_page_and_notebook_output(analysis: Analysis, tmp_path: Path) -> None:
    path = analysis.latent(0).save_html(tmp_path / "deep" / "latent")
    assert path == tmp_path / "deep" / "latent.html"
    text = path.read_text(encoding="utf-8")
    assert "src=" not in re.sub(r"site\.put\(.*", "", text).split("<script>")[0]
    output = analysis.latent(0)._repr_html_()
    assert output.startswith("<iframe ")
    assert output.count('"') == len(re.findall(r'\w+="[^"]*"', output)) * 2


def test_scripts_never_make_elements_of_strings() -> None:
    for path in STATIC.glob("*.js"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
        assert len(text.splitlines()) <= 400
    assert {*SCRIPTS, *ONE_LATENT} == {path.name for path in STATIC.glob("*.js")}


@pytest.mark.skipif(NODE is None, reason="no node on this machine")
def test_scripts_and_data_are_valid(site: Path) -> None:
    assert NODE is not None
    paths = [str(site / "site.js"), *map(str, (site / "data").rglob("*.js"))]
    check = (
        "for (const path of process.argv.slice(1)) new vm.Script(fs.readFileSync(path, 'utf8'), { filename: path });"
    )
    subprocess.run([NODE, "-e", check, *paths], check=True)


# --------------------------------------------------------------------------------------------------------------- search


# As much of a browser as base.js and search.js need; data files are run where a browser would load them.
NODE_PAGE = """
const [site_folder, static_folder, queries] = process.argv.slice(1);
const run = (path) => vm.runInThisContext(fs.readFileSync(path, "utf8"));
const element = () => ({ setAttribute(name, value) { this[name] = value; }, addEventListener() {} });
globalThis.document = {
  createElement: () => Object.assign(element(), { append() {} }),
  head: { append: (script) => run(`${site_folder}/${script.src}`) },
};
for (const name of ["base.js", "search.js"]) run(`${static_folder}/${name}`);
vm.runInThisContext("globalThis.site = site");
(async () => {
  const found = [];
  for (const [name, query] of JSON.parse(queries)) found.push([...(await site[name](query))]);
  console.log(JSON.stringify(found));
})();
"""


def searched(site: Path, queries: list[tuple[str, str]]) -> list[dict[int, float]]:
    """What search.js finds on a site."""
    assert NODE is not None
    words = [NODE, "-e", NODE_PAGE, str(site), str(STATIC), json.dumps(queries)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return [dict(found) for found in json.loads(done.stdout)]


@pytest.mark.skipif(NODE is None, reason="no node on this machine")
@pytest.mark.parametrize("file_bytes", [search_index.FILE_BYTES, 300])
def test_search_finds_what_the_analysis_finds(
    analysis: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_bytes: int
) -> None:
    monkeypatch.setattr(search_index, "FILE_BYTES", file_bytes)
    site = export_site(analysis, tmp_path / "site").parent
    assert (len(list((site / "data" / "search").glob("*.js"))) > 30) == (file_bytes == 300)
    queries = [("findToken", query) for query in ("Ocean", "__proto__", "constructor")]
    queries += [("findText", query) for query in ("river the", "<b>")]
    for (kind, query), found in zip(queries, searched(site, queries), strict=True):
        if kind == "findToken":
            expected = analysis.search(tokens=query)["share"].round(3).to_dict()
        else:
            expected = {}
            for record in latents(site):
                texts = [words_of(e[5].replace("\x7f", "")) for e in record["examples"] if e[0] == 0]
                n = sum(set(words_of(query)) <= set(words) for words in texts)
                if n:
                    expected[record["latent"]] = n
        assert expected
        assert found == expected, query


@pytest.mark.skipif(NODE is None, reason="no node on this machine")
@pytest.mark.parametrize("file_bytes", [40, 10_000])
def test_words_of_any_script_are_found_and_beginnings_of_words_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_bytes: int
) -> None:
    """Python and JavaScript sort 𝐀 and ﬁ the other way round."""
    monkeypatch.setattr(search_index, "FILE_BYTES", file_bytes)
    words = ["𝐀", "\ufb01", "鲸", "a", "ab", "abc", "abd", "b", "zz", "!", "\ud800"]
    index = search_index.Index()
    for latent, word in enumerate(words):
        index.add(word, latent, 500)
    index.write(tmp_path, "search/tokens")
    found = searched(tmp_path, [("findToken", word) for word in [*words[:-1], "abc", "z", "zzz", " "]])
    assert found[: len(words) - 1] == [{latent: 0.5} for latent in range(len(words) - 1)]
    assert found[len(words) - 1 :] == [{5: 0.5}, {8: 0.5}, {}, {}]
    index.words.pop("ab")
    index.words.pop("a")
    index.write(tmp_path / "fewer", "search/tokens")
    assert searched(tmp_path / "fewer", [("findToken", "a"), ("findToken", "ab")]) == [{5: 0.5, 6: 0.5}] * 2


@pytest.mark.parametrize(
    ("text", "key"),
    [(" The", "the"), ("\n", "\\n"), ("  ", "__"), ("", ""), ("x" * 5000, "x" * 40), ("\ud800", "\ud800")],
)
def test_token_is_searched_by_what_one_types(text: str, key: str) -> None:
    assert token_key(text) == key


# ---------------------------------------------------------------------------------------------------------------- order


def record(latent: int, words: dict[str, float], tops: list[str] | None = None, **figures: float) -> dict[str, Any]:
    """A record whose strongest tokens are `tops`, between spaces; each 0.2 weaker than the one before."""
    tops = tops or [text for text in words for _ in range(3)][:5]
    found = [[0, 0, 1, 0, 0, f" a\x7f{text}\x7f b", [1, 5 - number / 5]] for number, text in enumerate(tops)]
    return {
        "latent": latent,
        "figures": {"count": 100, "density": 1e-3} | figures,
        "tokens": list(words.items()),
        "examples": found,
    }


def test_clear_latents_come_first() -> None:
    have, they = {" have": 0.5, " had": 0.3}, {" they": 0.4, " their": 0.2}
    judged = [
        record(0, have, count=0),  # dead
        record(1, {"ing": 0.5, "ed": 0.4}),  # pieces of words
        record(2, have, density=0.2),  # fires nearly everywhere
        record(3, they),
        record(4, have),
        record(5, {" which": 0.99, " that": 0.01}),  # one word only
        record(6, {" have": 0.4, " has": 0.3}),  # its commonest word is that of 4
        record(7, have, tops=[" have"] * 5),  # strongest on one word only
        record(8, {" made": 0.9, " make": 0.09}, tops=["make"] * 3 + ["making"] * 2),  # goes on from a word
    ]
    order = default_order([clarity(one) for one in judged])
    assert order[:3] == [3, 4, 6]
    assert order[3] == 2
    assert order[-1] == 0


def test_a_latent_with_few_examples_is_not_clear() -> None:
    assert clarity(record(0, {" have": 0.5, " had": 0.3}, tops=[" have", " had"])).tier == 2


def test_records_of_one_latent_are_those_of_all(analysis: Analysis) -> None:
    records = Records(analysis.reader)
    assert records.one(7) == list(records.all())[7]
    assert HOSTILE
