"""How the ranks of a job learn at once that one of them has failed, and end instead of waiting for it.

A collective waits for every rank, and the one that raised or was killed never comes: its peers would wait for the
group's timeout, or until torchrun ends them, and then complain of lost connections. So each rank holds one TCP
connection to a hub, a thread of the first rank. A rank that fails says so there; when it is killed, the system closes its connection.
The hub names the first that failed to all, that one says why, and the others end without a word.

A rank that hangs may come back, so nobody ends. Each rank reports to the hub every few seconds; `attention` says which one to name.
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

from flowtilt.distributed import attention, signals, torchrun
from flowtilt.distributed import world as distributed
from flowtilt.distributed.attention import BUSY, IN_MESSAGE, REPORTS, STUCK
from flowtilt.distributed.world import World
from flowtilt.errors import UserError

FAILED, REFUSED, INTERRUPTED, WELL = b"f", b"r", b"i", b"w"
"""What a rank says in the end; the hub passes on all but the last, with the rank. REFUSED is an error of the user's."""
HERE = b"."
"""What the hub says now and then."""
POLL_SECONDS = 2.0
"""Seconds within which a rank hears why a collective of its own broke."""
GRACE = 3.0
"""Seconds that the rank that failed has to say why and to exit first, so that torchrun takes it for the cause."""


@contextmanager
def fail_together() -> Iterator[None]:
    """Joins the processes that torchrun started; where one of them fails inside the block, all end within seconds.

    Raises:
        UserError: this rank's, if it was the first to fail; its message then names the rank.
    """
    ending, store = signals.current(), distributed.meet()
    with ending.deferred() as asked:  # a rank that went now could tell nobody
        world = distributed.start(store)
        line = Lifeline(world)
        ending.last_words = line.say_interrupted
    try:
        if asked.interrupted:
            raise KeyboardInterrupt
        yield
        world.barrier()
    except BaseException as error:
        if not line.first_to_fail(error):
            _end(2 if isinstance(error, UserError) else line.status)
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
        self._rank, self._patience = world.rank, attention.PATIENCE
        self._culprit: int | None = None
        self.status = 1
        """With which this rank ends where another one was the first to."""
        self._news, self._left = threading.Event(), False
        self._hub: threading.Thread | None = None
        port, token = world.on_rank0(lambda: self._open_hub(world.size))
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
        self._hub = threading.Thread(target=_serve, args=(server, token.encode(), size, self._patience), daemon=True)
        self._hub.start()
        return server.getsockname()[1], token

    def first_to_fail(self, error: BaseException) -> bool:
        """Tells the others; false where another rank had failed before, of which `error` may be a mere consequence."""
        if not isinstance(error, UserError | KeyboardInterrupt):
            self._news.wait(POLL_SECONDS)
        if not self._news.is_set():
            with suppress(OSError):
                self._connection.sendall(_why(error))
            self._news.wait(POLL_SECONDS)
        return self._culprit in (None, self._rank)

    def say_interrupted(self) -> None:
        """Tells the others that this process ends because it was asked to."""
        with suppress(OSError):
            self._connection.sendall(INTERRUPTED)

    def leave(self) -> None:
        """All is well, on all ranks."""
        self._left = True
        self._connection.sendall(WELL)
        if self._hub:
            self._hub.join()

    def _report(self) -> None:
        since = World.in_message_since
        state = BUSY if since is None else STUCK if time.monotonic() - since > self._patience else IN_MESSAGE
        with suppress(OSError):
            self._connection.sendall(state)

    def _listen(self) -> None:
        hub, said = attention.Attention(self._patience), HERE
        hub.heard(0, BUSY, time.monotonic())  # it has let this rank in
        selector = selectors.DefaultSelector()
        selector.register(self._connection, selectors.EVENT_READ)
        while said == HERE:
            if self._speaks_for_hub():
                for line in hub.unusual(time.monotonic()):
                    _say(line)
            self._report()
            if selector.select(self._patience / REPORTS):
                said = _read(self._connection, 1)
                hub.heard(0, BUSY, time.monotonic())
        if self._left:
            return
        culprit = _read(self._connection, 4)
        self._culprit = int.from_bytes(culprit) if culprit else 0
        self.status = {INTERRUPTED: torchrun.interrupted_status(), REFUSED: 2}.get(said, 1)
        self._news.set()
        if self._culprit == self._rank:
            return
        if not culprit and self._speaks_for_hub():
            _say(_gone(0))
        time.sleep(GRACE)
        _end(self.status)

    def _speaks_for_hub(self) -> bool:
        """Whether this rank says what happened to the hub's; few do, since ranks hear of each other through the hub alone."""
        return self._rank == 1 or (self._rank > 0 and os.environ.get("LOCAL_RANK") == "0")


def _serve(server: socket.socket, token: bytes, size: int, patience: float) -> None:
    """The hub: takes the connections of `size` ranks, and tells all of them which was the first to fail."""
    ranks: dict[socket.socket, int] = {}
    well, watch, beat = 0, attention.Attention(patience), time.monotonic()
    with selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        while well < size:
            for key, _ in selector.select(patience / REPORTS):
                if key.fileobj is server:
                    connection, _ = server.accept()
                    if (rank := _hello(connection, token)) is not None:
                        ranks[connection] = rank
                        watch.heard(rank, BUSY, time.monotonic())
                        selector.register(connection, selectors.EVENT_READ)
                    continue
                connection = next(one for one in ranks if one is key.fileobj)
                said = _read(connection, 1)
                if said in (BUSY, IN_MESSAGE, STUCK):
                    watch.heard(ranks[connection], said, time.monotonic())
                    continue
                selector.unregister(connection)
                watch.forget(ranks[connection])
                if said == WELL:
                    well += 1
                    continue
                known = said in (FAILED, REFUSED, INTERRUPTED)
                if not known:
                    _say(_gone(ranks[connection]))
                news = (said if known else FAILED) + ranks[connection].to_bytes(4)
                # the first rank comes last: it may end at the news, and the hub with it
                for one in sorted(ranks, key=lambda one: -ranks[one]):
                    one.settimeout(POLL_SECONDS)  # one that hangs may have read nothing for hours
                    with suppress(OSError):
                        one.sendall(news)
                return
            now = time.monotonic()
            for line in watch.unusual(now):
                _say(line)
            if now - beat > patience / REPORTS:
                beat = now
                for one in ranks:
                    with suppress(OSError):
                        one.send(HERE, getattr(socket, "MSG_DONTWAIT", 0))


def _why(error: BaseException) -> bytes:
    """What a rank says that ends with this error."""
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else REFUSED if isinstance(error, UserError) else FAILED


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
    signals.write(f"flowtilt: {' '.join(line.split())}\n")


def _end(status: int) -> None:
    """At once: nothing at an orderly exit may wait for a rank that is no more, and any instant is good for a run to be killed at."""
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
