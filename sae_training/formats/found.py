"""What lies at a path: names of files, headers and configs, each read when it is asked for, and kept.

Families of formats decide by this alone whether something is of their kind. No weight is read, and nothing is executed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_training.formats import json_files, npz_files, pickles, safetensors_files, yaml_files
from sae_training.formats.safetensors_files import Header

PICKLES = (".pt", ".pth", ".pkl", ".pkl.gz")
ENDINGS = (*PICKLES, ".safetensors", ".npz")  # of files with weights


class Found:
    """A file or folder, and what is beside or in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_folder = path.is_dir()
        self.folder = path if self.is_folder else path.parent
        self._kept: dict[tuple[str, str], Any] = {}

    @property
    def names(self) -> frozenset[str]:
        """Names of the files in the folder; of a single file those beside it, itself included."""
        return self._keep("names", "", lambda: frozenset(p.name for p in self.folder.iterdir() if p.is_file()))

    def has(self, *names: str) -> bool:
        """Whether all these files are there. Of a single file they must be beside it, and it must be one of them."""
        return self.names.issuperset(names) and (self.is_folder or self.path.name in names)

    def json(self, name: str) -> dict[str, Any]:
        """The object that a JSON file of the folder holds. ValueError if it holds something else."""
        return self._keep("json", name, lambda: json_files.read_object(self.folder / name))

    def yaml(self, name: str) -> dict[str, Any]:
        """What a YAML file of the folder says by name. ValueError if it is not plain."""
        return self._keep("yaml", name, lambda: yaml_files.read_object(self.folder / name))

    def header(self, name: str) -> Header:
        """Names, precisions and shapes of the tensors of a .safetensors or .npz file of the folder."""
        return self._keep("header", name, lambda: reader_of(name).header(self.folder / name))

    @property
    def is_pickle(self) -> bool:
        return not self.is_folder and self.path.name.endswith(PICKLES)

    def pickle(self, name: str | None = None) -> Any:
        """What a pickled file holds, in tensors and plain data: the one at the path, or one of the folder by name.

        Tensors stay on the disk until they are used, where the file's form allows it.
        """
        name = self.path.name if name is None else name
        return self._keep("pickle", name, lambda: pickles.read(self.folder / name))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a .safetensors or .npz file of the folder."""
        return reader_of(name).tensors(self.folder / name)

    def slices(self, file: str, name: str) -> Iterator[tuple[int, Tensor]]:
        """The rows of a tensor of a file of the folder, a few megabytes at a time, each with the index of its first."""
        if file.endswith(".safetensors"):
            yield from safetensors_files.slices(self.folder / file, self.header(file), name)
            return
        if file.endswith(".npz"):
            yield from npz_files.slices(self.folder / file, name)
        else:
            yield from pickles.slices(pickles.tensors_by_name(self.pickle(file))[name])

    def _keep(self, kind: str, name: str, read: Any) -> Any:
        if (kind, name) not in self._kept:
            self._kept[kind, name] = read()
        return self._kept[kind, name]


def without_ending(file: Path) -> str:
    """The file's name without the ending of its format: a.b-0.01.pkl.gz is a.b-0.01."""
    return next((file.name.removesuffix(ending) for ending in ENDINGS if file.name.endswith(ending)), file.name)


def reader_of(name: str) -> Any:
    """The module that reads a file of named tensors."""
    return npz_files if name.endswith(".npz") else safetensors_files
