"""How the ranks of a job learn at once that one of them has failed, and end instead of waiting for it.

A collective waits for every rank, and the one that raised or was killed never comes: its peers would wait for the
group's timeout, or until torchrun ends them, and then complain of lost connections. So each rank holds one TCP
connection to a hub, a thread of the first rank. A rank that fails says so there; when it is killed, the system closes its connection.
The hub names the first that failed to all, that one says why, and the others end without a word.
"""

import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from flowtilt import distributed
from flowtilt.distributed import World
from flowtilt.errors import UserError

FAILED, WELL = b"f", b"w"
"""What a rank says in the end."""
MOMENT = 2.0
"""Seconds within which a rank hears why a collective of its own broke."""
GRACE = 3.0
"""Seconds that the rank that failed has to say why and to exit first, so that torchrun takes it for the cause."""


@contextmanager
def together() -> Iterator[None]:
    """Joins the processes that torchrun started; where one of them fails inside the block, all end within seconds.

    Raises:
        UserError: this rank's, if it was the first to fail; its message then names the rank.
    """
    world = distributed.start()
    line = Lifeline(world)
    try:
        yield
        world.barrier()
    except BaseException as error:
        if not line.first_to_fail(error):
            _end(2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1)
        if isinstance(error, UserError):
            raise UserError(f"rank {world.rank}: {error}") from error
        if isinstance(error, Exception):
            _say(f"rank {world.rank}: {type(error).__name__}: {error}; all ranks end")
        raise
    line.leave()
    distributed.stop()


class Lifeline:
    """This rank's connection to the hub, and on the first rank the hub."""

    def __init__(self, world: World):
        self._rank = world.rank
        self._culprit: int | None = None
        self._news, self._left = threading.Event(), False
        self._hub: threading.Thread | None = None
        port, token = world.first(lambda: self._open_hub(world.size))
        address = os.environ["MASTER_ADDR"], port
        try:
            self._connection = socket.create_connection(address, timeout=60)
            self._connection.settimeout(None)
            self._connection.sendall(token.encode() + world.rank.to_bytes(4))
        except OSError as error:
            raise UserError(
                f"rank {world.rank}: can't reach the first rank at {address[0]}, port {port}: {error.strerror or error}"
            ) from error
        threading.Thread(target=self._listen, daemon=True).start()

    def _open_hub(self, size: int) -> tuple[int, str]:
        """Its port, and what a rank says to it first."""
        both = socket.has_dualstack_ipv6()
        server = socket.create_server(("", 0), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)
        token = secrets.token_hex(8)
        self._hub = threading.Thread(target=_serve, args=(server, token.encode(), size), daemon=True)
        self._hub.start()
        return server.getsockname()[1], token

    def first_to_fail(self, error: BaseException) -> bool:
        """Tells the others; false where another rank had failed before, of which `error` may be a mere consequence."""
        if not isinstance(error, UserError | KeyboardInterrupt):
            self._news.wait(MOMENT)
        if not self._news.is_set():
            with suppress(OSError):
                self._connection.sendall(FAILED)
            self._news.wait(MOMENT)
        return self._culprit in (None, self._rank)

    def leave(self) -> None:
        """All is well, on all ranks."""
        self._left = True
        self._connection.sendall(WELL)
        if self._hub:
            self._hub.join()

    def _listen(self) -> None:
        said = _read(self._connection, 4)
        if self._left:
            return
        self._culprit = int.from_bytes(said) if said else 0
        self._news.set()
        if self._culprit == self._rank:
            return
        if not said and (self._rank == 1 or os.environ.get("LOCAL_RANK") == "0"):
            _say(_gone(0))  # with the hub, so that nobody else says it
        time.sleep(GRACE)
        _end(1)


def _serve(server: socket.socket, token: bytes, size: int) -> None:
    """The hub: takes the connections of `size` ranks, and tells all of them which was the first to fail."""
    ranks: dict[socket.socket, int] = {}
    well = 0
    with selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        while well < size:
            for key, _ in selector.select():
                if key.fileobj is server:
                    connection, _ = server.accept()
                    if (rank := _hello(connection, token)) is not None:
                        ranks[connection] = rank
                        selector.register(connection, selectors.EVENT_READ)
                    continue
                connection = next(one for one in ranks if one is key.fileobj)
                said = _read(connection, 1)
                selector.unregister(connection)
                if said == WELL:
                    well += 1
                    continue
                if said != FAILED:
                    _say(_gone(ranks[connection]))
                # the first rank comes last: it may end at the news, and the hub with it
                for one in sorted(ranks, key=lambda one: -ranks[one]):
                    with suppress(OSError):
                        one.sendall(ranks[connection].to_bytes(4))
                return


def _hello(connection: socket.socket, token: bytes) -> int | None:
    """The rank that connects; none for a stranger."""
    connection.settimeout(5)
    said = _read(connection, len(token) + 4)
    connection.settimeout(None)
    return int.from_bytes(said[len(token) :]) if said.startswith(token) else None


def _read(connection: socket.socket, number: int) -> bytes:
    with suppress(OSError):
        return connection.recv(number, socket.MSG_WAITALL)
    return b""


def _gone(rank: int) -> str:
    return f"rank {rank} is gone without a word: killed, perhaps for want of memory; all ranks end"


def _say(line: str) -> None:
    print(f"flowtilt: {' '.join(line.split())}", file=sys.stderr, flush=True)


def _end(status: int) -> None:
    """At once: nothing at an orderly exit may wait for a rank that is no more, and any instant is good for a run to be killed at."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
