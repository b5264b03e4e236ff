"""A function on several processes that exchange tensors by gloo, as torchrun would start them."""

from __future__ import annotations

import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from processes import FORKS


def on_ranks(n: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what `function(*arguments)` returns on each of `n` processes; a failure's traceback is an AssertionError.

    The function stands in a module, and what goes in and out can be pickled.
    """
    port = free_port()
    pipes = [FORKS.Pipe(duplex=False) for _ in range(n)]
    processes = [
        FORKS.Process(target=run, args=(rank, n, port, pipe[1], function, arguments)) for rank, pipe in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    for _, sender in pipes:
        sender.close()
    try:
        outcomes = [pickle.loads(receiver.recv_bytes()) for receiver, _ in pipes]
    finally:
        for process in processes:
            process.kill()
    failures = [trace for trace, _ in outcomes if trace]
    assert not failures, "\n".join(failures)
    return [value for _, value in outcomes]


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def run(rank: int, n: int, port: int, sender: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=n)
        outcome = (None, function(*arguments))
    except BaseException:
        outcome = (traceback.format_exc(), None)
    sender.send_bytes(pickle.dumps(outcome))  # not `send`, which would lend tensors' memory, and wait
