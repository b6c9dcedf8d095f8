"""Server-sent events, and clients that leave."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.sse import EventSourceResponse, format_sse_event
from pydantic import BaseModel

from server.openai.errors import APIError, answer_to

logger = logging.getLogger(__name__)
T = TypeVar("T")
DONE = format_sse_event(data_str="[DONE]")
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # proxies must not hold events back


def event_stream(events: AsyncIterator[BaseModel]) -> EventSourceResponse:
    """One data event per model, without the fields that were not given; an error becomes an event, and [DONE] always closes."""
    return EventSourceResponse(_encode(events), headers=HEADERS)


async def _encode(events: AsyncIterator[BaseModel]) -> AsyncIterator[bytes]:
    try:
        async for event in events:
            yield format_sse_event(data_str=event.model_dump_json(exclude_unset=True))
    except Exception as error:
        if not isinstance(error, APIError):
            logger.exception("a stream failed")
        yield format_sse_event(data_str=answer_to(error).body.model_dump_json())
    yield DONE


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of ``work``, or None as soon as the client is gone."""
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        watch.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
