"""Checkpoints that are written while steps go on: from a copy of the state, by a thread, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Background:
    """A thread at a time that writes a checkpoint, and the memory that holds a copy of what it writes.

    Training stands still for the copy alone. The memory is kept from one checkpoint to the next, because the system
    takes twice as long for the first copy, whose pages it has to find.
    """

    def __init__(self) -> None:
        self.copies: dict[str, Tensor] = {}
        self.writing: Future[Path] | None = None

    def copied(self, content: dict[str, Any], before: str = "") -> dict[str, Any]:
        """Return a copy of the nested dict, with its tensors on the CPU as they lie in memory."""
        found: dict[str, Any] = {}
        for name, value in content.items():
            if isinstance(value, dict):
                found[name] = self.copied(value, f"{before}{name}/")
            else:
                found[name] = self.copy(value, before + name) if isinstance(value, Tensor) else deepcopy(value)
        return found

    def copy(self, tensor: Tensor, name: str) -> Tensor:
        tensor, kept = tensor.detach(), self.copies.get(name)
        if kept is None or (kept.dtype, kept.shape, kept.stride()) != (tensor.dtype, tensor.shape, tensor.stride()):
            kept = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self.copies[name] = kept
        return kept.copy_(tensor)

    def begin(self, write: Callable[[], Path]) -> None:
        """Let a thread write a checkpoint. The one before must have been taken.

        The thread ends with it: while it lives, its own threads of OpenMP keep those of the steps from spinning, which
        made every step a seventh slower (`machine.threads`).
        """
        assert self.writing is None
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.writing = thread.submit(write)
        thread.shutdown(wait=False)

    def is_done(self) -> bool:
        """Return whether a checkpoint has been written, or could not be, and was not taken yet."""
        return self.writing is not None and self.writing.done()

    def take(self) -> Path | None:
        """Wait for what is being written, and return it; None if there is nothing. Raises what kept it from it."""
        if self.writing is None:
            return None
        wait([self.writing])  # where Ctrl-C may end the waiting, but not the writing
        writing, self.writing = self.writing, None
        return writing.result()
