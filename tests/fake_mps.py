"""An "mps" device on a machine without one, for tests: the tensors live on the CPU, and what Apple's GPU lacks raises.

Inside `fake_mps()`, tensors made on or moved to "mps" say that they are there, and the package goes the way it would go
on a Mac. As on a Mac, these raise: float64 on the device, operations without an MPS kernel (by torch's own table,
native_functions.yaml), tensors of two devices in one operation, generators of another device, and numpy's view of a
tensor. What it cannot show are wrong results, limits and speed of Apple's kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torchgen
import yaml
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("mps:0")
STAND_IN = torch.device("meta", 5)
"""What torch itself takes the device for, because "meta" needs no driver. The number tells it from others' "meta"."""
NOT_ON_MPS = (torch.float64, torch.complex128)
ATEN = torch.ops.aten
TAKES_CPU_TENSORS = {"copy_", "_to_copy", "index", "index_put_", "_index_put_impl_"}
"""Operations that accept tensors, or indices, of the CPU beside those of a device."""


class OnMps(Tensor):
    """A tensor that says it is on "mps"; `inner` on the CPU holds its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnMps:
        if inner.dtype in NOT_ON_MPS:
            raise TypeError(f"an mps tensor of {inner.dtype}, which the MPS framework does not support")
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=STAND_IN,
        )  # fmt: skip
        made.inner = inner
        return made

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride] - an attribute in torch
        return DEVICE

    is_mps, is_meta = True, False  # pyright: ignore

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("numpy: found a tensor on mps:0, expected one on the CPU")

    def untyped_storage(self) -> Any:  # which says what shares memory
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __repr__(self, **_: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride] - of the subclass alone
        return f"OnMps({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class MpsGenerator(torch.Generator):
    """A generator of the CPU that is taken for one of the device."""

    device = DEVICE  # pyright: ignore[reportAssignmentType, reportIncompatibleVariableOverride]


def make_generator(device: Any = "cpu") -> torch.Generator:
    return MpsGenerator() if torch.device(device).type == "mps" else RealGenerator(device)


RealGenerator = torch.Generator


# ----------------------------------------------------------------------------------------------------- one operation


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on the numbers behind its tensors, and return what a Mac would return, or raise."""
    with Dispatch():  # operations made of others come here whole in inference mode
        if (out := func.decompose(*args, **kwargs)) is not NotImplemented:
            return out
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    wrappers = {id(x.inner): x for x in given if isinstance(x, OnMps)}
    target = kwargs.get("device")
    on_mps = bool(wrappers) if target is None else target == STAND_IN
    if not (on_mps or wrappers):
        return func(*args, **kwargs)
    check(func, given, kwargs, on_mps)
    if func is ATEN._fused_adam_.default:  # whose kernel for mps does not read it
        kwargs = kwargs | {"found_inf": None}
    args, kwargs = tree_map(lambda x: x.inner if isinstance(x, OnMps) else x, (args, kwargs))
    out = func(*args, **(kwargs if target is None else kwargs | {"device": "cpu"}))
    if func is ATEN._local_scalar_dense.default:
        return out
    ours = {id(x) for x in given}

    def wrapped(x: Any) -> Any:
        if not isinstance(x, Tensor) or id(x) in ours:
            return x
        return wrappers.get(id(x)) if id(x) in wrappers else OnMps(x) if on_mps else x

    return tree_map(wrapped, out)


def check(func: Any, given: list[Tensor], kwargs: Any, on_mps: bool) -> None:
    name = func._schema.name.removeprefix("aten::")
    if on_mps and not has_kernel(str(func._schema.name), func._overloadname):
        raise NotImplementedError(f"aten::{name}.{func._overloadname} has no kernel for mps")
    elsewhere = [x for x in given if not isinstance(x, OnMps) and x.ndim]
    if elsewhere and len(elsewhere) < len(given) and name not in TAKES_CPU_TENSORS:
        raise RuntimeError(f"{name}: found tensors of mps:0 and cpu, expected all on one device")


@cache
def table() -> dict[str, Any]:
    """torch's own table of its operations, by name and overload."""
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    entries = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return {entry["func"].split("(")[0]: entry for entry in entries}


@cache
def has_kernel(name: str, overload: str) -> bool:
    """Whether torch's table has a kernel of the operation for mps, of its own or composed of others."""
    name = name.removeprefix("aten::")
    entry = table().get(name if overload in ("", "default") else f"{name}.{overload}")
    if entry is None:  # made from the entry of its variant that writes in place
        return True
    if delegate := entry.get("structured_delegate"):
        entry = table()[delegate]
    kernels = ", ".join(entry.get("dispatch", {"CompositeImplicitAutograd": ""}))
    return "MPS" in kernels or "Composite" in kernels


# ------------------------------------------------------------------------------------------------------ a whole block


class Dispatch(TorchDispatchMode):
    """Catches the operations that make tensors on the device, which have none to be caught by."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Function(TorchFunctionMode):
    """Puts the stand-in where "mps" is named, and asks for its generators."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        args = tuple(map(stood_in, args))
        kwargs = {name: stood_in(value) for name, value in (kwargs or {}).items()}
        generator = kwargs.get("generator")
        is_ours = kwargs.get("device") == STAND_IN or any(isinstance(x, OnMps) for x in args)
        if generator is not None and is_ours != isinstance(generator, MpsGenerator):
            raise RuntimeError(f"{func.__name__}: found a generator of another device")
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == STAND_IN:  # "meta" would leave out data
            return func(*args, **kwargs | {"device": "cpu"}).to(STAND_IN)
        return func(*args, **kwargs)


def stood_in(value: Any) -> Any:
    is_ours = isinstance(value, (str, torch.device)) and str(value) in ("mps", "mps:0")
    return STAND_IN if is_ours else value


@contextmanager
def fake_mps() -> Iterator[None]:
    """In here "mps" is a device."""
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # because a parameter's class changes with its device
    try:
        with (
            mock.patch("torch.backends.mps.is_available", return_value=True),
            mock.patch("torch.Generator", make_generator),
            Function(),
            Dispatch(),
        ):
            yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
