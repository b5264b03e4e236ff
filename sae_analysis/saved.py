"""What an unfinished build has saved: a file of each process, which counts once the file of the first one names it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae_training.machine.files import write_safetensors
from sae_training.parallel.ranks import is_first, n_ranks, of_first, raised_together, rank

OF_OTHERS = "part-*.safetensors"


class Saved:
    """The files in `folder`, which need not be there. All processes call `begin` and `write` together."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "state.safetensors"
        self.number = 0
        """How many times it was saved. The number is part of names, so that no file is replaced that still counts."""
        self.parts: list[Path] = []
        """The files of all processes but the first."""

    def begin(self) -> dict[str, str] | None:
        """Take up what was saved, and return what was saved beside the tensors; None if nothing was saved."""
        found = of_first(self.metadata)
        if found is not None:
            self.number, self.parts = int(found["number"]), self.paths(json.loads(found["parts"]))
        return found

    def paths(self, names: list[str]) -> list[Path]:
        return [self.folder / name for name in names]

    def metadata(self) -> dict[str, str] | None:
        if not self.file.is_file():
            return None
        try:
            with safe_open(self.file, framework="pt") as file:
                found = file.metadata()
        except SafetensorError as error:
            raise ValueError(
                f"{self.file}: damaged or truncated ({error}); give anew (--anew) to delete it and begin again."
            ) from error
        if "parts" not in found:
            raise ValueError(
                f"{self.folder} holds an unfinished build of an earlier version; give anew (--anew) to delete it and "
                "begin again, or another output."
            )
        return found

    def write(self, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        """Save the tensors of all processes, all of them or none."""
        self.number += 1
        names = [OF_OTHERS.replace("*", f"{self.number}-{other}") for other in range(1, n_ranks())]
        self.parts = self.paths(names)
        with raised_together():
            if not is_first():
                write_safetensors(self.parts[rank() - 1], tensors)
        with raised_together():
            if is_first():
                counted = {"number": str(self.number), "parts": json.dumps(names)}
                write_safetensors(self.file, tensors, metadata | counted)
                for path in self.folder.glob(OF_OTHERS):
                    if path not in self.parts:
                        path.unlink()


class Tensors(Mapping[str, Tensor]):
    """The tensors of a file whose names begin with `prefix`, if they are wanted; each is read when it is asked for."""

    def __init__(self, path: Path, prefix: str, is_wanted: Callable[[str], bool] = lambda _: True) -> None:
        self.path, self.prefix = path, prefix
        with safe_open(path, framework="pt") as file:
            names = [key.removeprefix(prefix) for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118
        self.names = [name for name in names if is_wanted(name)]

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(self.prefix + name).clone()  # because the file may be deleted, on a shared disk too

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
