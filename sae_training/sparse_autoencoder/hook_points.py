"""Hook points with the face of TransformerLens' own, for which torch is enough.

A hook is a function `hook(tensor, hook=point)`. It looks at the tensor that passes `point`, or returns another one to
take its place. Autoencoders have hook points of their own, because importing TransformerLens takes several times as
long as importing torch. An autoencoder inside a TransformerLens model still appears in that model's hooks and caches.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence, ValuesView
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

from torch import Tensor, device, nn
from torch.utils.hooks import RemovableHandle

Hook = Callable[..., Any]
Direction = Literal["fwd", "bwd", "both"]
Level = int | None  # how many `hooks` contexts are open
Name = str | Callable[[str], bool]  # of one hook point, or a function that accepts the names of those meant
NamesFilter = Callable[[str], bool] | Sequence[str] | str | None
Hooks = Sequence[tuple[Name, Hook]]


class Handle(NamedTuple):
    """One hook at one point."""

    hook: RemovableHandle
    is_permanent: bool
    context_level: Level
    user_hook: Hook


class HookPoint(nn.Module):
    """The identity function, as a place for hooks. The `setup` of the module that holds the point sets its `name`."""

    def __init__(self) -> None:
        super().__init__()
        self.fwd_hooks: list[Handle] = []
        self.bwd_hooks: list[Handle] = []
        self.ctx: dict[Any, Any] = {}
        self.name: str | None = None

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        """TransformerLens' HookPoint wherever that is loaded, because its models find their points by isinstance."""
        theirs = sys.modules.get("transformer_lens.hook_points")
        return type(self) if theirs is None else theirs.HookPoint

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (), self.__dict__  # pickle's own way refuses an object whose __class__ is not its type

    def forward(self, x: Tensor) -> Tensor:
        return x

    def add_hook(
        self, hook: Hook, dir: Direction = "fwd", is_permanent: bool = False, level: Level = None, prepend: bool = False
    ) -> None:
        """Call `hook` with what passes in the forward pass ("fwd"), or with its gradient ("bwd")."""

        def on_output(module: nn.Module, inputs: Any, output: Any) -> Any:
            return hook(output, hook=self)

        def on_gradient(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
            changed = hook(grad_output[0], hook=self)
            return changed if changed is None or isinstance(changed, tuple) else (changed,)

        match dir:
            case "fwd":
                added, handles = self.register_forward_hook(on_output, prepend=prepend), self.fwd_hooks
            case "bwd":
                added, handles = self.register_full_backward_hook(on_gradient, prepend=prepend), self.bwd_hooks
            case other:
                raise ValueError(f"dir: found {other!r}, expected 'fwd' or 'bwd'.")
        handles.insert(0 if prepend else len(handles), Handle(added, is_permanent, level, hook))

    def add_perma_hook(self, hook: Hook, dir: Direction = "fwd") -> None:
        self.add_hook(hook, dir, is_permanent=True)

    def remove_hooks(self, dir: Direction = "fwd", including_permanent: bool = False, level: Level = None) -> None:
        """Remove the hooks of one level (None: of all), and permanent ones only if `including_permanent`."""
        for handles in (self.fwd_hooks,) * (dir != "bwd") + (self.bwd_hooks,) * (dir != "fwd"):
            for handle in handles[:]:
                if including_permanent or (not handle.is_permanent and level in (None, handle.context_level)):
                    handle.hook.remove()
                    handles.remove(handle)

    def clear_context(self) -> None:
        self.ctx = {}


class HookedRootModule(nn.Module):
    """A module whose hook points can be reached by name, once its `__init__` has ended with `setup()`."""

    def __init__(self) -> None:
        super().__init__()
        self.is_caching = False
        self.context_level = 0

    def setup(self) -> None:
        """Name the modules inside this one, and collect them in `mod_dict`, the hook points in `hook_dict`."""
        self.mod_dict = {name: module for name, module in self.named_modules() if name}
        self.hook_dict = {name: module for name, module in self.mod_dict.items() if type(module) is HookPoint}
        for name, point in self.hook_dict.items():
            point.name = name

    def hook_points(self) -> ValuesView[HookPoint]:
        return self.hook_dict.values()

    def add_hook(
        self,
        name: Name,
        hook: Hook,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: Level = None,
        prepend: bool = False,
    ) -> None:
        for meant in [name] if isinstance(name, str) else filter(name, self.hook_dict):
            self.hook_dict[meant].add_hook(hook, dir, is_permanent, level, prepend)

    def add_perma_hook(self, name: Name, hook: Hook, dir: Direction = "fwd") -> None:
        self.add_hook(name, hook, dir, is_permanent=True)

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: Direction = "both",
        including_permanent: bool = False,
        level: Level = None,
    ) -> None:
        """Call `remove_hooks` of every point."""
        for point in self.hook_points():
            if clear_contexts:
                point.clear_context()
            point.remove_hooks(direction, including_permanent, level)
        self.is_caching = False

    @contextmanager
    def hooks(
        self, fwd_hooks: Hooks = (), bwd_hooks: Hooks = (), reset_hooks_end: bool = True, clear_contexts: bool = False
    ) -> Iterator[HookedRootModule]:
        """Add hooks for as long as the context lasts; with `reset_hooks_end=False` they stay."""
        self.context_level += 1
        try:
            for name, hook in fwd_hooks:
                self.add_hook(name, hook, "fwd", level=self.context_level)
            for name, hook in bwd_hooks:
                self.add_hook(name, hook, "bwd", level=self.context_level)
            yield self
        finally:
            if reset_hooks_end:
                self.reset_hooks(clear_contexts, level=self.context_level)
            self.context_level -= 1

    def run_with_hooks(
        self,
        *model_args: Any,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """The output with these hooks; those that a later backward pass is to call need `reset_hooks_end=False`."""
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self.forward(*model_args, **model_kwargs)

    def run_with_cache(
        self,
        *model_args: Any,
        names_filter: NamesFilter = None,
        device: device | str | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> tuple[Any, dict[str, Tensor]]:
        """The output, and what passed the hook points; with `incl_bwd` gradients of the output, a scalar, as well."""
        with self.hooks(reset_hooks_end=reset_hooks_end, clear_contexts=clear_contexts):
            cache = self.add_caching_hooks(names_filter, incl_bwd, device, remove_batch_dim, level=self.context_level)
            out = self(*model_args, **model_kwargs)
            if incl_bwd:
                out.backward()
        return out, cache

    def add_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        level: Level = None,
    ) -> dict[str, Tensor]:
        """A dict that hooks will fill with what passes, by name of the point; gradients get "_grad" after the name."""
        kept: dict[str, Tensor] = {} if cache is None else cache

        def keep(tensor: Tensor, hook: HookPoint, suffix: str) -> None:
            tensor = tensor.detach().to(device)
            kept[f"{hook.name}{suffix}"] = tensor[0] if remove_batch_dim else tensor

        names = [names_filter] if isinstance(names_filter, str) else names_filter
        wanted = names if callable(names) else (self.hook_dict if names is None else names).__contains__
        for name in filter(wanted, self.hook_dict):
            self.add_hook(name, partial(keep, suffix=""), level=level)
            if incl_bwd:
                self.add_hook(name, partial(keep, suffix="_grad"), "bwd", level=level)
        self.is_caching = True
        return kept
