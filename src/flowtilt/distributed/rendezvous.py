"""Where the ranks of one start of a job meet, apart from what its earlier starts have left there.

torchrun keeps one store through all restarts of a job, with the addresses of ranks that are gone; a new rank that reads
one of them fails or waits for good. Nor can torchrun's count of restarts tell starts apart, since it differs between machines.
So the first rank invents a name for this start, and all meet under it:

    rank r:  call/r   = a token of this process          rank 0:  answer/r = that token, the name
    rank r:  heard/r  = the name, once the answer is to its own token
    rank r:  left/r   = its token, when it is interrupted before that

What an earlier start has left has another token or another name, and is passed over.
"""

import os
import secrets
import time
from datetime import timedelta

import torch.distributed as dist

from flowtilt.errors import UserError

WAIT = timedelta(minutes=10)
"""How long ranks wait for each other at the start: imports from a slow file system take minutes."""


def meet(rank: int, size: int, wait: timedelta = WAIT) -> dist.Store:
    """The store of this start, where torchrun's environment says.

    Raises:
        UserError: not all ranks came.
    """
    try:
        store, _, _ = next(iter(dist.rendezvous("env://", rank, size, timeout=wait)))
    except (dist.DistError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}, port {os.environ['MASTER_PORT']}"
        raise UserError(f"rank {rank}: can't meet the other ranks at {where} ({str(error).splitlines()[0]})") from error
    own, end = secrets.token_hex(8), time.monotonic() + wait.total_seconds()
    try:
        name = _lead(store, own, size, end) if rank == 0 else _follow(store, own, rank, end)
    except KeyboardInterrupt:
        store.set(f"left/{rank}", own)
        raise
    except dist.DistError as error:
        raise UserError(f"rank {rank}: the first rank is gone; look at its output") from error
    return dist.PrefixStore(name, store)


def _lead(store: dist.Store, name: str, size: int, end: float) -> str:
    missing = list(range(1, size))
    while missing:
        for rank in missing:
            if call := _read(store, f"call/{rank}"):
                store.set(f"answer/{rank}", f"{call} {name}")
                if _read(store, f"left/{rank}") == call:
                    raise KeyboardInterrupt(f" together with rank {rank}")
        missing = [rank for rank in missing if _read(store, f"heard/{rank}") != name]
        if missing:
            _pause(end, f"{len(missing)} of {size} ranks did not come, rank {missing[0]} first")
    return name


def _follow(store: dist.Store, own: str, rank: int, end: float) -> str:
    store.set(f"call/{rank}", own)
    while not (answer := _read(store, f"answer/{rank}")).startswith(own):
        _pause(end, f"rank {rank}: the first rank did not answer")
    name = answer.removeprefix(own).strip()
    store.set(f"heard/{rank}", name)
    return name


def _read(store: dist.Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _pause(end: float, complaint: str) -> None:
    if time.monotonic() > end:
        raise UserError(f"{complaint}; look at the other machines' output")
    time.sleep(0.02)
