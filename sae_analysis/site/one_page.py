"""The HTML of the site, and of one latent as a page that holds all it needs."""

from __future__ import annotations

import html
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sae_analysis.site.contexts import context_text
from sae_analysis.site.records import Records
from sae_analysis.site.scripts import as_script
from sae_analysis.store.example_blob import KINDS
from sae_analysis.store.read import Reader
from sae_training.machine.files import write_text

HERE = Path(__file__).parent
SCRIPTS = (
    "base.js", "text.js", "bars.js", "tokens.js", "examples.js", "latent.js", "search.js", "list.js", "scatter.js",
    "overview.js", "app.js",
)  # fmt: skip
"""In the order in which they need one another."""
ONE_LATENT = ("base.js", "text.js", "bars.js", "tokens.js", "examples.js", "latent.js", "one_latent.js")
TEMPLATES = Environment(
    loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)
NOTEBOOK_HEIGHT = 720  # pixels


def site_page(name: str) -> str:
    """Return the index.html of a site."""
    return TEMPLATES.get_template("index.html.j2").render(name=name)


def inline_page(reader: Reader, latent: int) -> str:
    """Return the page of a latent as an element of a notebook, in a frame of its own."""
    page = html.escape(latent_page(reader, latent))
    return (
        f'<iframe title="latent {latent}" sandbox="allow-scripts allow-popups" srcdoc="{page}" '
        f'style="width: 100%; height: {NOTEBOOK_HEIGHT}px; border: 0;"></iframe>'
    )


def save_page(reader: Reader, latent: int, path: str | Path) -> Path:
    """Write the page of a latent as one file, which needs no other. A path without a suffix gets .html."""
    path = Path(path).expanduser()
    path = path if path.suffix else path.with_suffix(".html")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, latent_page(reader, latent))
    return path


def latent_page(reader: Reader, latent: int) -> str:
    records = Records(reader, lambda context: True)
    record = records.one(latent)
    contexts = sorted({example[1] for example in record["examples"]})
    about = {
        "about": reader.about,
        "kinds": KINDS,
        "n_latents": len(records.values),
        "context_files": contexts[:1],
    }
    data = {
        "about": about,
        "latent": record,
        "contexts/0": [[number, context_text(records.texts, number)] for number in contexts],
    }
    return TEMPLATES.get_template("latent.html.j2").render(
        name=f"latent {latent} of {reader.about['name']}",
        style=Markup(style()),
        script=Markup(script(ONE_LATENT)),
        data=Markup("\n".join(as_script(name, value) for name, value in data.items())),
    )


@cache
def script(names: tuple[str, ...] = SCRIPTS) -> str:
    return "\n".join(read(f"static/{name}") for name in names)


@cache
def style() -> str:
    return read("static/style.css")


def read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
