"""Sum gradients over the processes that share the rows of a batch, while the rest of the backward pass goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from sae_training.parallel.shard import BY_LATENT, Shard
from sae_training.parallel.share import Share

FIRST = "W_dec"  # in the backward pass: its exchange goes on while the encoder's gradient is computed


class GradientExchange:
    """Begins the exchange of a gradient as soon as it is there, in the same order on all processes.

    A message of each gradient goes around the ring of processes: 2 (n - 1) / n times its bytes leave each of them. Of a
    mesh, the processes that hold the same latents do so; what all hold (b_dec, W_skip) then has the same bits on all.
    """

    def __init__(self, parameters: Mapping[str, Parameter], share: Share, shard: Shard) -> None:
        self.share, self.shard = share, shard
        self.parameters = [parameters[name] for name in sorted(parameters, key=lambda name: (name != FIRST, name))]
        self.held_by_all = [parameter for name, parameter in sorted(parameters.items()) if name not in BY_LATENT]
        self.waiting: list[Parameter] = []
        """Those whose exchange has not begun, in order; empty outside `exchanged`."""
        self.ready: set[Parameter] = set()
        self.begun: list[Any] = []
        for parameter in self.parameters if not share.is_all else ():
            parameter.register_post_accumulate_grad_hook(self.note)

    @contextlib.contextmanager
    def exchanged(self, is_last: bool) -> Iterator[None]:
        """Around the backward pass of a part of the batch: after the last one, gradients are those of all rows."""
        if self.share.is_all or not is_last:
            yield
            return
        self.waiting = list(self.parameters)
        yield
        self.waiting = [parameter for parameter in self.waiting if parameter.grad is not None]
        self.ready.update(self.waiting)
        self.begin_ready()
        for work in self.begun:
            work.wait()
        for parameter in self.held_by_all:
            if parameter.grad is not None and not self.shard.is_all:
                parameter.grad.copy_(self.shard.of_first(parameter.grad))
        self.begun.clear()
        self.ready.clear()

    def note(self, parameter: Parameter) -> None:
        if self.waiting:
            self.ready.add(parameter)
            self.begin_ready()

    def begin_ready(self) -> None:
        while self.waiting and self.waiting[0] in self.ready:
            gradient = self.waiting.pop(0).grad
            assert gradient is not None
            self.begun.append(dist.all_reduce(in_memory_order(gradient), group=self.share.group, async_op=True))


def in_memory_order(gradient: Tensor) -> Tensor:
    """Return the gradient, or over the same memory its transpose, so that it is contiguous."""
    return gradient if gradient.is_contiguous() else gradient.T
