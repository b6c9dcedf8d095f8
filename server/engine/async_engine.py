"""One engine thread, one asyncio stream per client: requests go in through an inbox, the outputs of a step come back together."""

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

import torch

from server.engine.config import EngineError
from server.engine.types import FinishReason, RequestOutput, RequestTimes, SamplingParams, StepStats

if TYPE_CHECKING:
    from server.engine.engine import Engine

logger = logging.getLogger(__name__)
STOP_TIMEOUT = 10  # seconds that a step in progress gets when the server ends


class QueueFullError(Exception):
    """As many requests run and wait, or as many prompt tokens wait, as the server takes."""


class EngineRequest(NamedTuple):
    """What the engine needs of one request."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams


class OutputStream:
    """Outputs of one client's requests, in lists: everything that came since the last look, so a slow reader falls behind by one list."""

    def __init__(self, request_ids: Iterable[str]) -> None:
        self.unfinished = set(request_ids)
        self._outputs: list[RequestOutput] = []
        self._ready = asyncio.Event()

    def put(self, output: RequestOutput) -> None:
        if output.finish_reason is not None:
            self.unfinished.discard(output.request_id)
        self._outputs.append(output)
        self._ready.set()

    def __aiter__(self) -> "OutputStream":
        return self

    async def __anext__(self) -> list[RequestOutput]:
        if not self._outputs and not self.unfinished:
            raise StopAsyncIteration
        await self._ready.wait()
        self._ready.clear()
        outputs, self._outputs = self._outputs, []
        return outputs


class AsyncEngine:
    """Runs ``engine`` in a thread of its own; every other method belongs to the event loop that called ``start``.

    ``capacity``: most requests that run and wait together. ``max_queued_tokens``: most prompt tokens of requests that have made no
    token yet; a client that finds none waiting is taken with whatever it brings. ``observe`` gets what every step did, on the event
    loop; statistics with ``seconds`` 0 tell that nothing runs any more. A step that takes longer than ``step_timeout`` seconds hangs.
    """

    def __init__(
        self,
        engine: "Engine",
        capacity: int,
        observe: Callable[[StepStats], None],
        max_queued_tokens: int | None = None,
        step_timeout: float = math.inf,
    ) -> None:
        self.engine, self.capacity, self.max_queued_tokens, self.step_timeout = engine, capacity, max_queued_tokens, step_timeout
        self._observe = observe
        self._streams: dict[str, OutputStream] = {}
        self._queued_tokens: dict[str, int] = {}  # prompt tokens of the requests that have no output yet
        self._admitting: set[asyncio.Future[None]] = set()
        self._worker: _Worker | None = None

    def start(self) -> None:
        self._worker = _Worker(self.engine, asyncio.get_running_loop(), self._deliver, self._died)
        self._worker.start()

    async def stop(self) -> None:
        """End the thread after the step in progress, unless that hangs; requests that are still open fail."""
        if self._worker is not None:
            self._worker.inbox.put(self._worker.stop)
            await asyncio.to_thread(self._worker.join, STOP_TIMEOUT if self.healthy else 0)
        self._end_open("abort", "The server is shutting down.")

    @property
    def alive(self) -> bool:
        return self._worker is not None and self._worker.is_alive()

    @property
    def healthy(self) -> bool:
        """The thread runs, and its step does not hang."""
        worker = self._worker
        return worker is not None and worker.is_alive() and time.monotonic() - worker.step_began < self.step_timeout

    def _died(self) -> None:
        self._end_open("error", "The engine stopped.")

    def _end_open(self, reason: FinishReason, message: str) -> None:
        self._deliver([RequestOutput(i, finish_reason=reason, error=message) for i in self._streams], StepStats())
        for admitted in self._admitting:
            _settle(admitted, RuntimeError(message))

    @asynccontextmanager
    async def generate(self, requests: Sequence[EngineRequest]) -> AsyncIterator[OutputStream]:
        """Admit all ``requests`` or none; leaving the context aborts what has not finished.

        Raises QueueFullError, and EngineError for requests that can never run.
        """
        worker = self._worker
        if worker is None or not self.healthy:
            raise RuntimeError("the engine thread does not run, or its step hangs")
        self._check_queue(requests)
        stream = OutputStream(request.request_id for request in requests)
        admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._streams.update(dict.fromkeys(stream.unfinished, stream))
        self._queued_tokens.update({request.request_id: len(request.prompt_token_ids) for request in requests})
        try:
            self._admitting.add(admitted)
            worker.inbox.put(lambda: worker.add(requests, admitted))
            await admitted
            yield stream
        finally:
            self._admitting.discard(admitted)
            if gone := list(stream.unfinished):
                for request_id in gone:
                    del self._streams[request_id]
                    self._queued_tokens.pop(request_id, None)
                worker.inbox.put(lambda: worker.abort(gone))

    def _check_queue(self, requests: Sequence[EngineRequest]) -> None:
        if len(requests) > self.capacity:
            raise EngineError(f"{len(requests)} choices were asked for at once; this server holds at most {self.capacity}")
        queued = sum(self._queued_tokens.values())
        asked = queued + sum(len(request.prompt_token_ids) for request in requests)
        too_many = self.max_queued_tokens is not None and queued > 0 and asked > self.max_queued_tokens
        if too_many or len(self._streams) + len(requests) > self.capacity:
            raise QueueFullError

    def _deliver(self, outputs: list[RequestOutput], stats: StepStats) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)  # None: the client went away during the step
            if stream is not None:
                stream.put(output)
                self._queued_tokens.pop(output.request_id, None)
                if output.finish_reason is not None:
                    del self._streams[output.request_id]
        self._observe(stats)


class _Worker(threading.Thread):
    """The thread that owns the engine. ``inbox`` holds calls of its own methods, made between two steps."""

    def __init__(
        self,
        engine: "Engine",
        loop: asyncio.AbstractEventLoop,
        deliver: Callable[[list[RequestOutput], StepStats], None],
        died: Callable[[], None],
    ) -> None:
        super().__init__(name="engine", daemon=True)
        self.inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.step_began = math.inf  # time.monotonic() of the step in progress; inf: there is none
        self._engine, self._loop, self._deliver, self._died = engine, loop, deliver, died
        self._arrived: dict[str, float] = {}
        self._dropped: list[tuple[FinishReason, RequestTimes]] = []
        self._running = True

    def run(self) -> None:
        try:
            self._serve()
        except BaseException:  # nobody else would see it: this is the top of the thread
            logger.critical("the engine's thread ends: the server has to be started anew", exc_info=True)
            self._call(self._died)

    def _serve(self) -> None:
        while self._running:
            self._handle_inbox(wait=not self._engine.has_work())
            if self._engine.has_work():
                self._step()
            elif self._dropped:
                self._send([], StepStats())

    def stop(self) -> None:
        self._running = False

    def add(self, requests: Sequence[EngineRequest], admitted: asyncio.Future[None]) -> None:
        error: Exception | None = None
        try:
            for request in requests:
                self._engine.add_request(*request)
                self._arrived[request.request_id] = time.monotonic()
        except EngineError as refusal:
            error = refusal
        except Exception as failure:
            logger.exception("adding a request failed")
            error = failure
        self._call(_settle, admitted, error)

    def abort(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._engine.abort(request_id)
            if (arrived := self._arrived.pop(request_id, None)) is not None:
                self._dropped.append(("abort", RequestTimes(arrived, None, None, time.monotonic())))

    def _handle_inbox(self, wait: bool) -> None:
        with suppress(queue.Empty):
            self.inbox.get(block=wait)()
            while True:
                self.inbox.get_nowait()()

    def _step(self) -> None:
        self.step_began = time.monotonic()
        try:
            outputs, stats = self._engine.step()
        except torch.AcceleratorError:  # the device is lost to this process
            raise
        except Exception as error:
            logger.exception("the engine's step failed")
            outputs, stats = self._fail_all(error)
        finally:
            self.step_began = math.inf
        for output in outputs:
            if output.finish_reason is not None:
                self._arrived.pop(output.request_id, None)
        self._send(outputs, stats)

    def _fail_all(self, error: Exception) -> tuple[list[RequestOutput], StepStats]:
        """End every request, since any may be the cause, and go on with the next ones."""
        now = time.monotonic()
        stats = StepStats(failed_steps=1, finished=[("error", RequestTimes(t, None, None, now)) for t in self._arrived.values()])
        outputs = [RequestOutput.failed(i, error) for i in self._arrived]
        for output in outputs:
            with suppress(Exception):
                self._engine.abort(output.request_id)
        return outputs, stats

    def _send(self, outputs: list[RequestOutput], stats: StepStats) -> None:
        stats.finished += self._dropped
        self._dropped = []
        self._call(self._deliver, outputs, stats)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(function, *arguments)


def _settle(future: asyncio.Future[None], error: Exception | None) -> None:
    if future.done():  # the client went away first
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
