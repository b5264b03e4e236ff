"""How the processes of a job find each other, through the store that torchrun keeps for them."""

from __future__ import annotations

import datetime
import hashlib
import os
import time
import uuid
from collections.abc import Iterator

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous


def meet(patience: datetime.timedelta) -> tuple[Store, int, int]:
    """Wait until all ranks are there; return the store through which they met, this one's rank, and their number.

    ConnectionError if there is no store at torchrun's address, TimeoutError with the ranks that did not come.
    """
    address = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
    late = (
        f"did not come within {patience.total_seconds() / 60:g} minutes; look at what they say, or raise "
        "parallel_timeout_minutes."
    )
    try:
        store, number, n = next(rendezvous("env://", timeout=patience))
    except (RuntimeError, ValueError) as error:
        if os.environ["RANK"] == "0":
            raise TimeoutError(f"rank 0: some of the {os.environ['WORLD_SIZE']} ranks {late}") from error
        raise ConnectionError(
            f"MASTER_ADDR, MASTER_PORT: found {address}, where no process of the job answers ({error}); expected the "
            "machine of rank 0 and a port that is open to all; torchrun sets both, with --rdzv_endpoint HOST:PORT."
        ) from error
    store = PrefixStore("meeting", store)
    deadline, missing = time.monotonic() + patience.total_seconds(), list(range(n))
    for roll in rolls(store, number, n):
        if isinstance(roll, str):
            return PrefixStore(roll, store), number, n
        missing = roll
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    raise TimeoutError(f"rank {number}: ranks {missing} of {n} {late}")


def rolls(store: Store, number: int, n: int) -> Iterator[str | list[int]]:
    """Call the roll until all ranks have answered, then yield its name; until then those that are missing.

    The store may remember ranks that have died: torchrun keeps it when it starts a job again (--max-restarts), and of
    several machines each counts its restarts for itself. So each process has a name of its own, the first one calls the
    names that it finds, again if any changes, and the job begins once all have answered to one roll.
    """
    own, called = uuid.uuid4().hex, ""
    store.set(f"rank {number}", own)
    while True:
        there = [rank for rank in range(n) if store.check([f"rank {rank}"])]
        missing = [rank for rank in range(n) if rank not in there] or [0] * (number > 0)
        if number == 0 and len(there) == n:
            names = " ".join(store.get(f"rank {rank}").decode() for rank in range(n))
            if names != called:
                store.set("roll", names)
                called = names
        elif number > 0 and store.check(["roll"]):
            called = store.get("roll").decode()
        names = called.split()
        if len(names) == n and names[number] == own:
            roll = hashlib.sha256(called.encode()).hexdigest()
            store.set(f"{roll} {number}", "here")
            missing = [rank for rank in range(n) if not store.check([f"{roll} {rank}"])]
            if number == 0 and not missing:
                store.set(f"{roll} begins", "")
            if store.check([f"{roll} begins"]):
                yield roll
        yield missing
