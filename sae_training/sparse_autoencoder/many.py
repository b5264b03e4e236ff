"""Several autoencoders by name, each of which is loaded when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

T = TypeVar("T")


class Lazily(Mapping[str, T]):
    """A mapping whose values are made when they are asked for, and not kept: a hundred autoencoders need no memory."""

    def __init__(self, makers: Mapping[str, Callable[[], T]]) -> None:
        self.makers = dict(makers)

    def __getitem__(self, name: str) -> T:
        if name not in self.makers:
            raise KeyError(f"{name}: not one of {', '.join(list(self.makers)[:20])}")
        return self.makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)
