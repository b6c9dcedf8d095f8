"""The HTTP server: uvicorn, with signals that drain and with clients that are slow on purpose cut off."""

import asyncio
import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.lifecycle import Lifecycle

logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Connection(H11Protocol):
    """Cut off when a request, or the reading of what was sent, takes longer than ``client_timeout`` seconds.

    What a client does not read fills its socket's buffer and then 64 KiB here; then the sender waits, and the time runs.
    """

    client_timeout: float

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._request_due: asyncio.TimerHandle | None = None
        self._reading_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._request_due = self._cut_off_later("its request did not come")

    def data_received(self, data: bytes) -> None:
        if self._request_due is None and self.conn.their_state is h11.IDLE:  # the first bytes of a further request
            self._request_due = self._cut_off_later("its request did not come")
        super().data_received(data)
        if self._request_due is not None and self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._request_due.cancel()
            self._request_due = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading_due = self._cut_off_later("it did not read")

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading_due is not None:
            self._reading_due.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._request_due, self._reading_due):
            if timer is not None:
                timer.cancel()

    def _cut_off_later(self, reason: str) -> asyncio.TimerHandle:
        return self.loop.call_later(self.client_timeout, self._cut_off, reason)

    def _cut_off(self, reason: str) -> None:
        logger.warning("a client was cut off: %s for %g seconds", reason, self.client_timeout)
        self.transport.abort()


class Listener(uvicorn.Server):
    """Serves until ``life`` is over. The first signal drains, a second one ends the process at once."""

    def __init__(self, config: uvicorn.Config, life: Lifecycle) -> None:
        super().__init__(config)
        self._life = life

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        self._loop = asyncio.get_running_loop()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        self._loop.call_soon_threadsafe(self._life.drain)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listening in sockets or ():
            host, port = listening.getsockname()[:2]
            scheme = "https" if self.config.is_ssl else "http"
            logger.info("running on %s://%s:%d", scheme, f"[{host}]" if ":" in host else host, port)

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._life.over()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._life.end()  # first, so that open streams end with an event
        await super().shutdown(sockets)


def bind(host: str, port: int) -> socket.socket:
    """A socket that takes connections from now on; OSError when it cannot."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address[:2], family=family, backlog=2048)
