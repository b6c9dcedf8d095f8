"""From start to end: the engine is loaded in a thread while the port is open already, serves, and is drained."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from server.engine.config import EngineError
from server.engine.loading import Report
from server.openai.errors import APIError, internal_error, unavailable
from server.openai.service import Service

logger = logging.getLogger(__name__)


class Lifecycle:
    """What the server is doing, for probes and for those that ask for more.

    ``load`` runs in a thread of its own; all else belongs to the event loop. ``drain_timeout``: seconds that running requests get once
    the server has been told to end. ``clock`` returns seconds.
    """

    def __init__(self, load: Callable[[Report], Service], drain_timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.service: Service | None = None
        self.error: str | None = None  # why nothing can be served, in one sentence
        self.open_requests = 0  # that were let in and have no whole answer yet
        self.phase, self.percent = "starting", 0
        self._load, self._drain_timeout, self._clock = load, drain_timeout, clock
        self._loader: threading.Thread | None = None
        self._drain_until: float | None = None
        self._ended = False

    def start(self) -> None:
        """Begin to load. The thread is a daemon: a process that is told to end while it loads does not wait for it."""
        self._loader = threading.Thread(target=self._run_load, args=(asyncio.get_running_loop(),), name="loader", daemon=True)
        self._loader.start()

    @property
    def live(self) -> bool:
        """False when only a new process can help."""
        return self.error is None and (self.service is None or self._ended or self.service.engine.healthy)

    @property
    def draining(self) -> bool:
        return self._drain_until is not None

    @property
    def ready(self) -> bool:
        return self.service is not None and self.live and not self.draining

    @property
    def busy(self) -> bool:
        """A thread computes that cannot be ended."""
        worker = self.service is not None and self.service.engine.alive
        return worker or (self._loader is not None and self._loader.is_alive())

    def status(self) -> dict[str, str | int]:
        """What /readyz tells."""
        if not self.live:
            return {"status": "failed"}
        if self.draining:
            return {"status": "draining", "open_requests": self.open_requests}
        return {"status": "ok"} if self.ready else {"status": "loading", "phase": self.phase, "percent": self.percent}

    def refusal(self) -> APIError | None:
        """Why nobody is let in now."""
        if self.ready:
            return None
        if not self.live:
            return internal_error()
        if self.draining:
            return unavailable("The server is shutting down. Retry later.", "server_shutting_down")
        return unavailable(f"The server is loading its model ({self.phase}, {self.percent} %). Retry later.", "model_loading")

    def drain(self) -> None:
        """Let nobody in any more."""
        if not self.draining:
            logger.info("draining: %d requests have %g seconds to finish", self.open_requests, self._drain_timeout)
            self._drain_until = self._clock() + self._drain_timeout

    def over(self) -> bool:
        """Nothing is left to wait for."""
        if self._drain_until is None:
            return self.error is not None
        return not self.open_requests or not self.live or self._clock() >= self._drain_until

    async def end(self) -> None:
        """Stop the engine; requests that are still open end with an error."""
        if self.service is not None and not self._ended:
            if not self.live:
                self.error = "the engine stopped or hung; the log says why"
            self._ended = True
            await self.service.engine.stop()
        self._ended = True

    def _run_load(self, loop: asyncio.AbstractEventLoop) -> None:
        service, error = None, None
        try:
            service = self._load(self._report)
        except EngineError as failure:
            error = str(failure)
        except Exception as failure:
            logger.exception("loading failed")
            error = f"loading failed during {self.phase!r}: {type(failure).__name__}"
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(self._loaded, service, error)

    def _report(self, phase: str, percent: int) -> None:
        self.phase, self.percent = phase, percent
        logger.info("%s (%d %%)", phase, percent)

    def _loaded(self, service: Service | None, error: str | None) -> None:
        self.error = error
        if service is not None and not self._ended:
            service.engine.start()
            self.service = service
            logger.info("ready; a request holds at most %d tokens", service.max_tokens)
