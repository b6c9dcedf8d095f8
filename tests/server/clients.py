"""Clients of a server with the fake engine, and how they read what it answers."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fastapi import FastAPI

from server.app import create_app
from server.settings import Settings
from tests.server.fake_engine import FakeEngine

JSON = {"content-type": "application/json"}


@asynccontextmanager
async def running(app: FastAPI) -> AsyncIterator[FastAPI]:
    """The application from when it is ready to its end."""
    async with app.router.lifespan_context(app):
        await wait_until(lambda: app.state.life.ready)
        yield app


@asynccontextmanager
async def serving(engine: FakeEngine, **settings: object) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        running(create_app(lambda report: engine, Settings(**settings))) as app,
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
    ):
        yield client


async def wait_until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)


def check(response: httpx.Response, status: int, param: str | None = None, code: str | None = None) -> str:
    """The response is an error as described; returns its message."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert (error["param"], error["code"]) == (param, code)
    assert isinstance(error["message"], str)
    assert error["message"]
    return error["message"]


def read_events(response: httpx.Response) -> list[dict]:
    """The events of a stream that ends as it should; the wire form is checked on the way."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-request-id"]
    *parts, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(part.startswith("data: {") and "\n" not in part for part in parts)
    return [json.loads(part.removeprefix("data: ")) for part in parts]
