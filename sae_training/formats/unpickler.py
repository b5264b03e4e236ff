"""An unpickler that builds tensors, plain data and empty stand-ins for the classes of known programs, and nothing else.

A pickle is a program of a stranger. Every name that it asks for is one of a few here, and each of these does nothing
but hold data. What a short program could make large or slow is counted: steps, bytes that are copied, keys that hash.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

STAND_INS = ("sae_training.", "sae_lens.", "transformer_lens.", "torch.nn.modules.")
"""Modules whose classes are configs or modules, of which the attributes are wanted and nothing else."""

MOST_STEPS = 500_000  # of a program; those of weights take a few hundred, an optimizer's state some thousand
MOST_AXES = 8
LARGEST_KEY = 2**60  # above, whole numbers share hashes, and a dict of them takes the square of their number
SPARE_COPIED = 16 * 2**20
LARGE = 2**20  # bytes in a pickle that are left in the file
HEAD = 2**16  # of these are read: a storage in torch's form begins with some 500 bytes that describe it

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class StandIn:
    """Stands in for whatever class the file names: holds its attributes and does nothing."""


@dataclass(frozen=True)
class StorageType:
    """What a program's name of a kind of storage stands for."""

    dtype: torch.dtype


@dataclass(frozen=True)
class Left:
    """Bytes that a pickle holds in itself and that were left in the file, which may be packed."""

    path: Path
    start: int
    """In what the file unpacks to."""
    n_bytes: int
    head: bytes
    """The first of them."""

    def __len__(self) -> int:
        return self.n_bytes

    def part(self, first: int, n_bytes: int) -> Left:
        return Left(self.path, self.start + first, n_bytes, b"")


@dataclass(frozen=True)
class Storage:
    """Values (n,) of tensors; `release` gives back the memory of a map of the file that was read so far.

    Of those that were left in the file, `values` are on the device meta.
    """

    values: Tensor
    release: Callable[[], None] | None = None
    left: Left | None = None


def storage_of(
    data: Tensor, dtype: torch.dtype, release: Callable[[], None] | None = None, left: Left | None = None
) -> Storage:
    """Bytes (n,) as values. They are copied where the processor's rules for addresses ask for it."""
    if left is not None:
        return Storage(torch.empty(len(data) // dtype.itemsize, dtype=dtype, device="meta"), None, left)
    if data.data_ptr() % dtype.itemsize or data.storage_offset() % dtype.itemsize:
        return Storage(data.clone().view(dtype))
    return Storage(data.view(dtype), release)


def refuse(why: str) -> NoReturn:
    raise pickle.UnpicklingError(why)


class Steps(dict[int, Any]):
    """What to do for each code of a program, for a limited number of steps."""

    left = MOST_STEPS

    def __getitem__(self, code: int) -> Any:
        self.left -= 1
        if self.left < 0:
            refuse(f"a program of more than {MOST_STEPS:,} steps, which no weights need")
        return self.get(code) or refuse(f"unknown code {code}")


class Unpickler(pickle._Unpickler):  # type: ignore[name-defined] # pyright: ignore
    """Reads one pickle. UnpicklingError for every name that is not known, and for a program that goes on and on.

    It is the unpickler in Python, because the one in C makes room for as many values as a file says it will number.
    `persistent` gives the storage that a program names; `is_dry` builds no tensors. Bytes of LARGE and more are left in
    the file if `left_in` is its path.
    """

    def __init__(
        self,
        file: Any,
        n_bytes: int,
        persistent: Callable[[Any], Any] | None = None,
        from_bytes: Callable[[bytes | Left], Storage] | None = None,
        is_dry: bool = False,
        left_in: Path | None = None,
    ) -> None:
        super().__init__(file)
        self.file, self.left_in = file, left_in
        self.persistent, self.from_bytes, self.is_dry = persistent, from_bytes, is_dry
        self.copies_left = n_bytes + SPARE_COPIED
        vars(self)["dispatch"] = Steps(CODES)
        self.known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): self.ordered,
            ("builtins", "set"): self.a_set,
            ("_codecs", "encode"): self.encoded,
            ("types", "SimpleNamespace"): StandIn,
            ("torch", "device"): self.device,
            ("torch", "Size"): self.size,
            ("torch._utils", "_rebuild_tensor_v2"): self.tensor,
            ("torch._utils", "_rebuild_parameter"): self.parameter,
            ("torch.storage", "_load_from_bytes"): self.loaded_bytes,
        }

    def load(self) -> Any:
        try:
            return super().load()
        finally:
            cast(Any, self).memo.clear()  # which may hold the bytes of all storages, in a circle of references
            self.known.clear()

    def persistent_load(self, pid: Any) -> Any:
        return self.persistent(pid) if self.persistent else refuse("names something that is not in the file")

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module
        if (module, name) in self.known:
            return self.known[module, name]
        if module == "torch" and name in STORAGES:
            return StorageType(STORAGES[name])
        if module == "torch" and name.isidentifier() and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if f"{module}.".startswith(STAND_INS):
            return StandIn
        return refuse(f"the file asks for {module}.{name}, which no autoencoder needs; it was not loaded.")

    # ------------------------------------------------------------------------------------------- what names stand for

    def copying(self, n_bytes: int) -> None:
        """Count what a step copies: a short program can have the same large value copied again and again."""
        self.copies_left -= n_bytes
        if self.copies_left < 0:
            refuse("copies more than the file holds")

    def ordered(self, pairs: Any = ()) -> dict[Any, Any]:
        self.copying(64 * len(pairs))
        made: dict[Any, Any] = {}
        for key, value in pairs:
            made[as_key(key)] = value
        return made

    def a_set(self, values: Any = ()) -> set[Any]:
        self.copying(64 * len(values))
        return {as_key(value) for value in values}

    def encoded(self, text: str, encoding: str = "latin1") -> bytes:
        self.copying(len(text))
        return text.encode("latin1") if encoding == "latin1" else refuse(f"bytes as {encoding}")

    def device(self, name: str, index: int | None = None) -> torch.device:
        if not isinstance(name, str) or len(name) > 20:
            refuse("a device without a name")
        return torch.device(name) if index is None else torch.device(name, index)

    def size(self, axes: Any = ()) -> torch.Size:
        return torch.Size(whole_numbers(axes))

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor | None:
        """A view of stored values, none of which is beyond them, and which is no larger than they are."""
        if self.is_dry:
            return None
        if not isinstance(storage, Storage):
            refuse("a tensor of something that is no storage")
        axes, steps, (first,) = whole_numbers(size), whole_numbers(stride), whole_numbers((offset,))
        stored, values = len(storage.values), math.prod(axes)
        last = first + sum((n - 1) * step for n, step in zip(axes, steps, strict=True)) if values else 0
        if values > stored or last >= max(1, stored):
            bytes_ = stored * storage.values.element_size()
            refuse(f"declares a tensor {axes} from {first}, for which {bytes_:,} bytes are stored")
        made = storage.values.as_strided(axes, steps, storage.values.storage_offset() + (first if values else 0))
        made.release = storage.release  # type: ignore[attr-defined] # pyright: ignore
        if storage.left is not None:
            size, first = storage.values.element_size(), first if values else 0
            made.left = storage.left.part(first * size, (last + 1 - first) * size)  # type: ignore[attr-defined] # pyright: ignore
        return made

    def parameter(self, data: Any, *_: Any) -> Tensor | None:
        return data if isinstance(data, Tensor) or self.is_dry else refuse("a parameter that is no tensor")

    def loaded_bytes(self, data: Any) -> Storage:
        if not isinstance(data, (bytes, Left)) or self.from_bytes is None:
            refuse("a file in a file in a file")
        self.copying(len(data))
        return self.from_bytes(data)

    # --------------------------------------------------------------------------------------------------- single codes

    def load_binbytes(self) -> None:
        cast(Any, self).append(self.bytes_or_left(int.from_bytes(cast(Any, self).read(4), "little")))

    def load_binbytes8(self) -> None:
        cast(Any, self).append(self.bytes_or_left(int.from_bytes(cast(Any, self).read(8), "little")))

    def bytes_or_left(self, n_bytes: int) -> bytes | Left:
        """The next bytes of the file. Large ones are passed over, as they lie outside of frames."""
        unframed = cast(Any, self)
        if self.left_in is None or n_bytes < LARGE or unframed._unframer.current_frame is not None:
            return unframed.read(n_bytes)
        start, head = self.file.at, b""
        for first in range(0, n_bytes, HEAD):
            part = self.file.read(min(HEAD, n_bytes - first))
            if len(part) < min(HEAD, n_bytes - first):
                raise EOFError(f"ends within {n_bytes:,} bytes")
            head = head or part
        return Left(self.left_in, start, n_bytes, head)

    def load_build(self) -> None:
        """Set attributes of stand-ins, and of nothing that other readers share. Those of ordered dicts are left."""
        stack: list[Any] = cast(Any, self).stack
        state, owner = stack.pop(), stack[-1]
        if not isinstance(owner, (StandIn, dict)) or not isinstance(state, dict):
            refuse(f"the file sets attributes of a {type(owner).__name__}; it was not loaded.")
        if isinstance(owner, StandIn):
            self.copying(64 * len(state))
            vars(owner).update(state)

    def load_setitem(self) -> None:
        stack: list[Any] = cast(Any, self).stack
        value, key = stack.pop(), stack.pop()
        owner_of(stack, dict)[as_key(key)] = value

    def load_setitems(self) -> None:
        items: list[Any] = cast(Any, self).pop_mark()
        owner_of(cast(Any, self).stack, dict).update(pairs(items))

    def load_dict(self) -> None:
        items: list[Any] = cast(Any, self).pop_mark()
        cast(Any, self).append(pairs(items))

    def load_append(self) -> None:
        stack: list[Any] = cast(Any, self).stack
        value = stack.pop()
        owner_of(stack, list).append(value)

    def load_appends(self) -> None:
        items: list[Any] = cast(Any, self).pop_mark()
        owner_of(cast(Any, self).stack, list).extend(items)

    def load_additems(self) -> None:
        items: list[Any] = cast(Any, self).pop_mark()
        owner_of(cast(Any, self).stack, set).update(map(as_key, items))

    def load_frozenset(self) -> None:
        items: list[Any] = cast(Any, self).pop_mark()
        cast(Any, self).append(frozenset(map(as_key, items)))


REPLACED = {
    pickle.BINBYTES: Unpickler.load_binbytes,
    pickle.BINBYTES8: Unpickler.load_binbytes8,
    pickle.BUILD: Unpickler.load_build,
    pickle.SETITEM: Unpickler.load_setitem,
    pickle.SETITEMS: Unpickler.load_setitems,
    pickle.DICT: Unpickler.load_dict,
    pickle.APPEND: Unpickler.load_append,
    pickle.APPENDS: Unpickler.load_appends,
    pickle.ADDITEMS: Unpickler.load_additems,
    pickle.FROZENSET: Unpickler.load_frozenset,
}
LEFT_OUT = (pickle.BYTEARRAY8, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER)
"""BYTEARRAY8 makes room for what a file says that it will hold; the others are of other processes."""

CODES: dict[int, Any] = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined] # pyright: ignore
CODES |= {code[0]: function for code, function in REPLACED.items()}
for left_out in LEFT_OUT:
    del CODES[left_out[0]]


def owner_of(stack: list[Any], kind: type) -> Any:
    """What is on top of the stack, if it is of a kind: otherwise its methods are whatever a stranger gave it."""
    return stack[-1] if type(stack[-1]) is kind else refuse(f"adds values to a {type(stack[-1]).__name__}")


def pairs(items: list[Any]) -> dict[Any, Any]:
    return {as_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)}


def as_key(key: Any) -> Any:
    """A key of a dict. Tuples of tuples may take years to hash, and numbers may be chosen to have one hash."""
    is_plain = isinstance(key, (str, bool)) or key is None or (type(key) is int and abs(key) < LARGEST_KEY)
    return key if is_plain else refuse(f"a key that is a {type(key).__name__}")


def whole_numbers(values: Any) -> tuple[int, ...]:
    """A tensor's sizes, strides or offset."""
    is_short = isinstance(values, (list, tuple)) and len(values) <= MOST_AXES
    if not is_short or not all(type(value) is int and 0 <= value < 2**62 for value in values):
        refuse("a shape that is none")
    return tuple(values)
