"""What lies in a folder and in the folders below it: autoencoders, files that cannot be read, folders too deep."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sae_training.formats.doubts import printable
from sae_training.formats.families import is_file_of_one, is_one, is_one_or_damaged
from sae_training.formats.found import ENDINGS, Found

MOST_FOLDERS, MOST_FILES = 20_000, 20_000
MOST_LOOKED_AT = 200  # of the folders below one that is no autoencoder, for an error's message
MOST_NAMED = 3
DEEPEST = 6


@dataclass
class Below:
    """What lies below a folder, nearest first, and in the order of the numbers in names."""

    ones: list[Path] = field(default_factory=list)
    """Folders and files that are autoencoders. A damaged folder may be one."""
    unreadable: dict[Path, str] = field(default_factory=dict)
    """Files by whose endings they may hold weights, and why they cannot be opened."""
    too_deep: list[Path] = field(default_factory=list)
    """Folders that were not looked into, and what is below them neither."""

    def why_not_into(self, path: Path) -> str:
        """Say what was not looked into; "" if all was."""
        if not self.too_deep:
            return ""
        names = [folder.relative_to(path).as_posix() for folder in self.too_deep[:MOST_NAMED]]
        more = len(self.too_deep) - len(names)
        return printable(
            f"{path}: not looked into: {', '.join(names)}{f' and {more:,} more' if more else ''}, more than {DEEPEST} "
            "folders deep; give a folder further down."
        )

    def why_unreadable(self, path: Path) -> str:
        """Name the files that cannot be opened, with the reason of the first; "" if there are none."""
        if not self.unreadable:
            return ""
        names = [file.relative_to(path).as_posix() for file in itertools.islice(self.unreadable, MOST_NAMED)]
        more = len(self.unreadable) - len(names)
        first = next(iter(self.unreadable.values()))
        return printable(f"{path}: not read: {', '.join(names)}{f' and {more:,} more' if more else ''} ({first})")

    def nothing(self, path: Path) -> Exception:
        """The error where no autoencoder was found."""
        why = self.why_unreadable(path) or f"{path}: nothing in it is an autoencoder that is read; check the path."
        return (ValueError if self.unreadable else FileNotFoundError)(
            "\n".join(filter(None, [why, self.why_not_into(path)]))
        )


def look_below(path: Path) -> Below:
    """All of it. ValueError where there are more folders or files than any collection of autoencoders has.

    What lies below a folder that is one autoencoder is a part of that. Links to folders are not followed; files may be
    links, as in the cache of the hub.
    """
    found = Below()
    whole: set[Path] = set()
    n_files = 0
    for depth, level in enumerate(itertools.chain([[path]], levels(path))):
        folders = [folder for folder in level if not whole & {*folder.parents}]
        if depth > DEEPEST:
            found.too_deep = folders
            break
        for folder in folders:
            if folder != path and is_one_or_damaged(folder):
                whole.add(folder)
                found.ones.append(folder)
                continue
            files = sorted((f for f in folder.iterdir() if f.name.endswith(ENDINGS) and f.is_file()), key=natural_order)
            n_files += len(files)
            if n_files > MOST_FILES:
                raise ValueError(f"{path}: holds more than {MOST_FILES:,} files of weights; give one further down.")
            for file in files:
                try:
                    found.ones += [file] * is_file_of_one(Found(file))
                except (ValueError, OSError) as error:
                    found.unreadable[file] = str(error)
    return found


def names_below(path: Path) -> list[str]:
    """The nearest autoencoders below a folder, for an error's message: not of more than MOST_LOOKED_AT folders."""
    there: list[str] = []
    with contextlib.suppress(ValueError, OSError):
        folders = itertools.chain.from_iterable(itertools.islice(levels(path), DEEPEST))
        nearest = itertools.islice(folders, MOST_LOOKED_AT)
        there += [folder.relative_to(path).as_posix() for folder in nearest if is_one(Found(folder))]
        for file in sorted(path.iterdir(), key=natural_order):
            with contextlib.suppress(ValueError, OSError):
                is_file = file.name.endswith(ENDINGS) and file.is_file()
                there += [file.name] * (is_file and is_file_of_one(Found(file)))
    return there


def levels(path: Path) -> Iterator[list[Path]]:
    """The folders below `path`, those of a depth together, in the order of their names' numbers, to DEEPEST + 1."""
    level, seen = [path], 0
    for depth in range(1, DEEPEST + 2):
        below = [child for folder in level for child in folder.iterdir() if child.is_dir() and not child.is_symlink()]
        level = sorted(below, key=natural_order)
        seen += len(level)
        if seen > MOST_FOLDERS and depth <= DEEPEST:
            raise ValueError(f"{path}: holds more than {MOST_FOLDERS:,} folders; give one further down.")
        yield level


def natural_order(path: Path) -> list[tuple[int, str]]:
    """A key that puts layers.9 before layers.10."""
    digits = "".join(c if c.isdecimal() else " " for c in str(path)).split()
    return [(int(number), "") for number in digits] + [(0, str(path))]
