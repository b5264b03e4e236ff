"""Pickled files, read without running anything in them.

A pickle is a program. The unpicklers here build tensors, plain data and empty stand-ins for the config classes of known
programs, and refuse every other name, so that a stranger's file cannot run code. Nor can it fill the memory: archives
are not unpacked beyond what weights are, and tensors are not larger than what is stored for them.
"""

from __future__ import annotations

import collections
import gzip
import io
import pickle
import types
import zipfile
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor, _utils

from sae_training.machine.precision import at_least_float32

STAND_INS = ("sae_training.", "sae_lens.")
"""Modules whose classes are configs, of which the attributes are wanted and nothing else."""


OF_OTHER_PROGRAMS = {
    "sparse_autoencoder.autoencoder.": (
        "a state of ai-safety-foundation's sparse_autoencoder: objects of its own classes and of pydantic's, whose "
        "tensors may have an axis of components (several hooks), and of which no stand-ins are made; in that program, "
        "save the tensors of one component as plain ones, torch.save({'encoder.weight': ..., 'encoder.bias': ..., "
        "'decoder.weight': ..., 'bias': tied_bias}, 'ae.pt'), which is the same function in dictionary_learning's names"
    ),
}
"""Modules that files of known programs name, and why these files are not read."""


class StandIn:
    """Stands in for whatever config class the file names: holds its attributes and does nothing."""


MOST_UNPACKED = 16
"""Bytes from one packed byte, beyond SPARE_BYTES. Weights give 1.1; a bomb of zeros gives 1000."""
SPARE_BYTES = 64 * 2**20
MOST_PICKLED_BYTES = 64 * 2**20  # of a zip archive's program, which is apart from its weights


def read(path: Path) -> Any:
    """What a .pt, .pth, .pkl or .pkl.gz holds. ValueError for a damaged file, and for one that asks for more."""
    try:
        content = read_torch_file(path) if path.suffix in (".pt", ".pth") else read_pickle(path)
        check_tensors(content)
    except Exception as error:  # whatever the bytes of a stranger make an unpickler raise
        why = " ".join(str(error).split()) or type(error).__name__
        known = next((reason for module, reason in OF_OTHER_PROGRAMS.items() if module in why), None)
        told = known or f"not a readable autoencoder file: {why[:500]}; use another copy"
        raise ValueError(f"{path}: {told}.") from error
    return content


def read_torch_file(path: Path) -> Any:
    """Tensors of the zip format, which torch has written since 1.6, are read from the disk when they are used."""
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        check_archive(path)
    named = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
    stand_ins = [(StandIn, name) for name in named if name.startswith(STAND_INS)]
    with torch.serialization.safe_globals([*stand_ins, types.SimpleNamespace]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def check_archive(file: Path | IO[bytes]) -> None:
    """UnpicklingError unless a zip archive is as torch writes it: nothing packed, plain names, a small program."""
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
    names = [part.filename for part in parts]
    for part in parts:
        name = part.filename
        if part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size:
            raise pickle.UnpicklingError(f"{name!r} in the archive is packed, which torch never does")
        if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or "\0" in name:
            raise pickle.UnpicklingError(f"{name!r} in the archive points out of it")
        if name.endswith("data.pkl") and part.file_size > MOST_PICKLED_BYTES:
            raise pickle.UnpicklingError(f"{name!r} in the archive has {part.file_size:,} bytes beside the weights")
    if len(set(names)) < len(names):
        raise pickle.UnpicklingError("the archive holds several files of one name")


def read_pickle(path: Path) -> Any:
    size = path.stat().st_size
    if path.suffix != ".gz":
        with path.open("rb") as file:
            return TensorUnpickler(LimitedReader(file, size)).load()
    with gzip.open(path) as unpacked:
        return TensorUnpickler(LimitedReader(cast(IO[bytes], unpacked), SPARE_BYTES + MOST_UNPACKED * size)).load()


class LimitedReader:
    """The part of a file's face that an unpickler uses; EOFError beyond a number of bytes."""

    def __init__(self, file: IO[bytes], most_bytes: int) -> None:
        self.file, self.left = file, most_bytes

    def counted(self, data: bytes) -> bytes:
        self.left -= len(data)
        if self.left < 0:
            raise EOFError("unpacks to far more than weights do")
        return data

    def read(self, n_bytes: int) -> bytes:
        if n_bytes > self.left:
            raise EOFError(f"asks for {n_bytes:,} bytes at once, more than its size allows")
        return self.counted(self.file.read(n_bytes))

    def readline(self) -> bytes:
        return self.counted(self.file.readline(self.left + 1))


def check_tensors(content: Any) -> None:
    """UnpicklingError for tensors that are no plain ones, or that claim to be larger than what is stored for them."""
    seen: set[int] = set()
    todo = [content]
    while todo:
        part = todo.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, torch.Tensor):
            check_tensor(part)
        elif isinstance(part, dict):
            todo += part.values()
        elif isinstance(part, (list, tuple)):
            todo += part
        elif isinstance(part, (StandIn, types.SimpleNamespace)):
            todo += vars(part).values()


def check_tensor(tensor: torch.Tensor) -> None:
    is_plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not is_plain or tensor.dtype.is_complex:
        raise pickle.UnpicklingError(f"holds a tensor of an unusual kind ({tensor.dtype}, {tensor.device})")
    stored = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > stored:
        raise pickle.UnpicklingError(f"declares a tensor {tuple(tensor.shape)}, for which {stored:,} bytes are stored")


def load_bytes(data: bytes) -> Any:
    """A storage that a plain pickle holds as a file of torch's own."""
    if zipfile.is_zipfile(io.BytesIO(data)):
        check_archive(io.BytesIO(data))
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


class TensorUnpickler(pickle._Unpickler):  # type: ignore[name-defined] # pyright: ignore
    """Builds tensors, plain containers and stand-ins for configs, and raises UnpicklingError for every other name.

    The unpickler in Python, because the one in C makes room for as many values as a file says it will number.
    """

    allowed = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("types", "SimpleNamespace"): types.SimpleNamespace,
        ("torch", "device"): torch.device,
        ("torch", "Size"): torch.Size,
        ("torch._utils", "_rebuild_tensor_v2"): _utils._rebuild_tensor_v2,
        ("torch._utils", "_rebuild_parameter"): _utils._rebuild_parameter,
        ("torch.storage", "_load_from_bytes"): load_bytes,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.allowed:
            return self.allowed[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if f"{module}.".startswith(STAND_INS):
            return StandIn
        raise pickle.UnpicklingError(
            f"the file asks for {module}.{name}, which no autoencoder needs; it was not loaded."
        )

    dispatch = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined] # pyright: ignore

    def load_build(self) -> None:
        """Set attributes of stand-ins, and of nothing that other readers share."""
        stack: list[Any] = cast(Any, self).stack
        owner, state = stack[-2], stack[-1]
        if not isinstance(owner, (StandIn, types.SimpleNamespace, collections.OrderedDict)) or not isinstance(
            state, dict
        ):
            raise pickle.UnpicklingError(f"the file sets attributes of a {type(owner).__name__}; it was not loaded.")
        stack.pop()
        vars(owner).update(state)

    dispatch[pickle.BUILD[0]] = load_build  # pyright: ignore


def tensors_by_name(content: Any, prefix: str = "", depth: int = 3) -> dict[str, torch.Tensor]:
    """The tensors in dicts of dicts, by their keys with dots between them."""
    found: dict[str, torch.Tensor] = {}
    for key, part in content.items() if isinstance(content, dict) and depth else ():
        if isinstance(part, torch.Tensor):
            found[f"{prefix}{key}"] = part
        elif isinstance(key, str):
            found |= tensors_by_name(part, f"{prefix}{key}.", depth - 1)
    return found


def copied(tensor: Tensor) -> Tensor:
    """The tensor in memory of its own, in float32 at least, because what is read may be a map of the file."""
    return tensor.detach().to(at_least_float32(tensor.dtype), copy=True)
