"""How a server of ours takes connections: none may idle for ever, and too many of them cost one line in the log, not a flood."""

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger("flowtilt")
BACKLOG = 4096
"""Connections that the kernel keeps for us; Linux allows at most net.core.somaxconn."""
AT_ONCE = 64
"""Connections that are accepted in one turn. asyncio tries as often where the process has no descriptor left."""
IDLE = 30.0
"""Seconds for the headers of a request to arrive."""
PAUSE = 60.0
"""Seconds between two lines that say that there are too many connections."""


class Connection(H11Protocol):
    """uvicorn's own, which waits for ever for the first request, and for the rest of one that has begun."""

    _closing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._await_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle and not self.cycle.response_complete:  # the headers are here; `service` has a deadline for the body
            self._forget()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def _await_headers(self) -> None:
        self._forget()
        self._closing = self.loop.call_later(IDLE, self.transport.close)

    def _forget(self) -> None:
        if self._closing:
            self._closing.cancel()
            self._closing = None


class Server(uvicorn.Server):
    """Says when it listens.

    Args:
        listening: called once, when connections are accepted.
    """

    def __init__(self, application: Any, listening: Callable[[], None] = lambda: None, log_level: str = "warning"):
        super().__init__(
            uvicorn.Config(
                application,
                http=Connection,
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_level=log_level,
                access_log=False,
                backlog=AT_ONCE,
            )
        )
        self._listening = listening
        self._complained = -PAUSE

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(self._complain)
        await super().startup(sockets)
        for one in sockets or ():
            one.listen(BACKLOG)
        self._listening()

    def _complain(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if "socket.accept()" not in context.get("message", ""):
            loop.default_exception_handler(context)
        elif time.monotonic() - self._complained >= PAUSE:
            self._complained = time.monotonic()
            log.warning("no more connections can be taken (%s); others wait until some have ended", context.get("exception"))
