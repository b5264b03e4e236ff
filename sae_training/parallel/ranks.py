"""The processes of a job, as torchrun numbers them, and what they tell each other.

Without torchrun there is one process, of rank 0, and everything here is the identity. Every rank must call the same
functions in the same order: a rank that leaves the order makes the others wait.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sae_training.machine.device import count
from sae_training.machine.interrupt import HEEDED, TrainingInterrupted, stop_point
from sae_training.parallel.meeting import meet

T = TypeVar("T")


def is_launched() -> bool:
    """Return whether torchrun (or another launcher with its environment) has started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


CONTROL: list[Any] = []
"""The group for what is no tensor: always gloo's, so that no message between processes waits for a GPU."""


@contextlib.contextmanager
def joined(cfg: Any) -> Iterator[None]:
    """Meet the other ranks of the job, if there are any and nobody has met them yet; leave them at the end.

    On CUDA the ranks exchange tensors by NCCL, elsewhere by gloo. Only the first one's stdout and bars are seen.
    """
    if not is_launched() or CONTROL:
        yield
        return
    patience = datetime.timedelta(minutes=cfg.parallel_timeout_minutes)
    is_users = dist.is_initialized()  # by a program that calls us, whose group serves
    try:
        if not is_users:
            begin_group(torch.device(cfg.device), patience)
        CONTROL.append(dist.new_group(backend="gloo", timeout=patience))
        with contextlib.nullcontext() if is_first() else quiet():
            yield
    except TrainingInterrupted as stop:
        stop.is_told = not is_first()
        raise
    except OSError as error:  # a full disk, for instance, which may be that of one machine
        if not is_everyones(error):
            error.add_note(f"This was rank {rank()}, on {socket.gethostname()}; the others end with it.")
        raise
    except RuntimeError as error:
        if is_lost_connection(error):
            raise ConnectionError(
                f"rank {rank()}: another process of the job has ended, whose own message says why. The same command "
                "goes on from the last checkpoint."
            ) from error
        if any(word in str(error).lower() for word in ("timed out", "timeout")):
            raise TimeoutError(
                f"rank {rank()}: waited {cfg.parallel_timeout_minutes:g} minutes for the others. A process that says "
                "nothing of the kind is the one that hangs, or is slow: then raise parallel_timeout_minutes."
            ) from error
        raise
    finally:
        CONTROL.clear()
        if not is_users and dist.is_initialized():
            dist.destroy_process_group()


def begin_group(device: torch.device, patience: datetime.timedelta) -> None:
    on_gpu = device.type == "cuda"
    if on_gpu:
        use_own_gpu(device)
    store, number, n = meet(patience)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=patience, store=store, rank=number, world_size=n)


def use_own_gpu(device: torch.device) -> None:
    """Let "cuda" mean the first GPU of this process."""
    if device.index is not None:
        raise ValueError(f"device: found {device} for several processes, expected cuda, of which each takes its own.")
    own = own_gpus()
    if not own:
        number = int(os.environ.get("LOCAL_RANK", "0"))
        raise ValueError(
            f"device: found process {number + 1} on a machine with {count('cuda')} GPUs, expected one for each; start "
            "fewer processes (--nproc_per_node), or set device to cpu."
        )
    torch.cuda.set_device(own[0])


def own_device(device: str) -> str:
    """Return the device with the number of this process's GPU, for what takes "cuda" for the first of the machine."""
    return f"cuda:{torch.cuda.current_device()}" if device == "cuda" and is_launched() else device


def own_gpus() -> range:
    """Return the GPUs of this machine that are this process's, of which torchrun's processes have as many each.

    A process uses the first of them, and spreads a language model over all of them (`device_map`).
    """
    number, there = int(os.environ.get("LOCAL_RANK", "0")), count("cuda")
    of_each = max(1, there // int(os.environ.get("LOCAL_WORLD_SIZE", there or 1)))
    return range(number * of_each, (number + 1) * of_each) if number < there else range(0)


def is_lost_connection(error: RuntimeError) -> bool:
    """Return whether an error of torch.distributed says that another rank is gone, which gloo and NCCL put in words."""
    words = ("closed by peer", "reset by peer", "connection refused", "broken pipe", "remote process exited")
    return any(word in str(error).lower() for word in words)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Show nothing of what goes to stdout, and no bars. Errors and warnings are seen."""
    before = os.environ.get("TQDM_DISABLE", "")
    os.environ["TQDM_DISABLE"] = "1"
    try:
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            yield
    finally:
        os.environ["TQDM_DISABLE"] = before


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def n_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Return whether this is the rank that prints, and that does what one process has to do alone."""
    return rank() == 0


def of_first(make: Callable[[], T]) -> T:
    """Return on every rank what `make` returns on the first, where alone it is called. Pickle must take it.

    An error there is raised on all.
    """
    if n_ranks() == 1:
        return make()
    holder: list[Any] = [None]
    with raised_together():
        if is_first():
            holder[0] = make()
    dist.broadcast_object_list(holder, src=0, group=CONTROL[0])
    return holder[0]


def of_all(value: T) -> list[T]:
    """Return the values of all ranks, in their order."""
    if n_ranks() == 1:
        return [value]
    found: list[Any] = [None] * n_ranks()
    dist.all_gather_object(found, value, group=CONTROL[0])
    return found


EVERYONES = "is_everyones"  # marks an error that all ranks have


def raise_together(error: BaseException | None) -> None:
    """Raise this rank's error if it has one, or that of another rank, so that none waits for one that has failed."""
    messages = of_all(None if error is None else str(error))
    if not any(message is not None for message in messages):
        return
    failed = next(number for number, message in enumerate(messages) if message is not None)
    shared = OSError(f"rank {failed}: {messages[failed]}") if error is None else error
    shared.__dict__[EVERYONES] = True
    raise shared


@contextlib.contextmanager
def raised_together() -> Iterator[None]:
    """Raise an error of the block on all ranks, where each comes to the end of the block. It waits for all."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    raise_together(error)


def is_everyones(error: BaseException) -> bool:
    """Return whether all ranks have the error, so that they may still do something together."""
    return EVERYONES in error.__dict__


def check_all_see(folder: Path, field: str) -> None:
    """Raise FileNotFoundError on a rank that does not see the folder, which the first one has made."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{field}: rank {rank()} on {socket.gethostname()} does not see {folder}, which the first rank has made; "
            "give a folder that all machines share."
        )


def together(own: dict[str, T]) -> dict[str, T]:
    """Return the entries of all ranks' dicts, the first rank's first."""
    return {name: value for of_rank in of_all(own) for name, value in of_rank.items()}


def wait_for_all() -> None:
    if n_ranks() > 1:
        dist.barrier(CONTROL[0])


def agree_on_stops(wish: bool = False) -> bool:
    """Let a stop that any rank was asked for begin on all of them, here: alone, it would leave the others waiting.

    Return whether any rank has a `wish`: what its own clock says, for instance, which is not that of the others.
    """
    if n_ranks() == 1:
        return wish
    told = torch.tensor([int(wish), *(request.asked or 0 for request in HEEDED)], dtype=torch.int64)
    dist.all_reduce(told, dist.ReduceOp.MAX, group=CONTROL[0])
    for request, number in zip(HEEDED, told[1:].tolist(), strict=True):
        if number and request.asked is None:  # of another rank, just now
            request.asked_at = time.monotonic()
        request.signal = signal.Signals(number) if number else None
    return bool(told[0])


class Rounds:
    """Agreements on a stop during work that all ranks do, each in steps of its own: as many as the slowest has."""

    def __init__(self, n_own: int) -> None:
        self.left = max(of_all(n_own))

    def next(self) -> None:
        """Come before a step. Raise StopAsked, on all ranks alike, if the job was asked to stop."""
        self.left -= 1
        agree_on_stops()
        stop_point()

    def finish(self) -> None:
        """Come as often as the others still do."""
        while self.left > 0:
            self.next()


# -------------------------------------------------------------------------------------------------------------- tensors


def exchanged(to_each: list[list[Tensor]], from_each: list[list[Tensor]]) -> None:
    """Send `to_each[r]` to rank r, and fill `from_each[r]` with what it sends here: as many, of the same sizes.

    What a rank sends to itself is not copied, and what has no rows is not sent.
    """
    operations = []
    for other in range(n_ranks()):
        if other != rank():
            operations += [dist.P2POp(dist.isend, raw(tensor), other) for tensor in to_each[other] if len(tensor)]
            operations += [dist.P2POp(dist.irecv, raw(tensor), other) for tensor in from_each[other] if len(tensor)]
    for operation in dist.batch_isend_irecv(operations) if operations else ():
        operation.wait()


def raw(tensor: Tensor) -> Tensor:
    """Return the tensor's memory as bytes, because gloo knows no bfloat16. It must be contiguous."""
    return tensor.view(-1).view(torch.uint8)
