"""Loading, ready, draining, broken: what probes and clients are told, and when the process may end."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import httpx
import pytest
from fastapi import FastAPI

from server.app import create_app
from server.engine.config import EngineError
from server.engine.loading import Report
from server.lifecycle import Lifecycle
from server.settings import Settings
from tests.server.clients import check, read_events, running, wait_until
from tests.server.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio
PROBES = ("/livez", "/readyz", "/health")
POST = {"prompt": "x", "max_tokens": 2}


@dataclass
class Loader:
    """Loads once ``go`` is set; ``error`` is raised instead if it is there."""

    engine: FakeEngine
    go: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None

    def __call__(self, report: Report) -> FakeEngine:
        report("reading stones", 40)
        assert self.go.wait(5)
        if self.error is not None:
            raise self.error
        return self.engine


@pytest.fixture
def loader(engine: FakeEngine) -> Loader:
    return Loader(engine)


@pytest.fixture
async def loading(loader: Loader, anyio_backend: str) -> AsyncIterator[FastAPI]:
    app = create_app(loader, Settings(drain_timeout=5))
    async with app.router.lifespan_context(app):
        yield app
        loader.go.set()


def client_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


async def statuses(client: httpx.AsyncClient) -> list[int]:
    return [(await client.get(path)).status_code for path in PROBES]


async def test_while_loading(loading: FastAPI, loader: Loader) -> None:
    async with client_of(loading) as client:
        await wait_until(lambda: loading.state.life.percent)
        assert await statuses(client) == [200, 503, 503]
        assert (await client.get("/readyz")).json() == {"status": "loading", "phase": "reading stones", "percent": 40}
        for method, path in (("POST", "/v1/completions"), ("POST", "/tokenize"), ("GET", "/v1/models"), ("GET", "/nothing")):
            response = await client.request(method, path, json=POST)
            assert "reading stones" in check(response, 503, code="model_loading")
            assert int(response.headers["retry-after"]) > 0
        assert (await client.get("/metrics")).status_code == (await client.get("/version")).status_code == 200
        loader.go.set()
        await wait_until(lambda: loading.state.life.ready)
        assert await statuses(client) == [200, 200, 200]
        assert (await client.post("/v1/completions", json=POST)).status_code == 200
        assert not loading.state.life.over()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (EngineError("no such model"), "no such model"),
        (MemoryError("secret"), "loading failed during 'reading stones': MemoryError"),
    ],
)
async def test_that_loading_fails(loading: FastAPI, loader: Loader, error: Exception, message: str) -> None:
    life: Lifecycle = loading.state.life
    loader.error = error
    loader.go.set()
    await wait_until(life.over)
    assert life.error == message
    async with client_of(loading) as client:
        assert await statuses(client) == [503] * 3
        check(await client.post("/v1/completions", json=POST), 500)


async def test_end_while_loading(loading: FastAPI, loader: Loader) -> None:
    life: Lifecycle = loading.state.life
    life.drain()
    assert life.over()
    await life.end()
    assert life.error is None
    assert life.busy
    loader.go.set()
    await wait_until(lambda: not life.busy)
    assert life.service is None


async def test_draining(app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine) -> None:
    life: Lifecycle = app.state.life
    engine.gate.clear()
    stream = asyncio.ensure_future(client.post("/v1/completions", json={**POST, "stream": True}))
    await wait_until(lambda: engine.requests)
    life.drain()
    assert await statuses(client) == [200, 503, 503]
    assert (await client.get("/readyz")).json() == {"status": "draining", "open_requests": 1}
    response = await client.post("/v1/completions", json=POST)
    check(response, 503, code="server_shutting_down")
    assert int(response.headers["retry-after"]) > 0
    assert not life.over()
    engine.gate.set()
    assert read_events(await stream)[-1]["choices"][0]["finish_reason"] == "length"
    assert life.over()


async def test_drain_timeout(app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """What runs longer ends with an error, streams with an event."""
    now = [100.0]
    life: Lifecycle = app.state.life
    life._clock = lambda: now[0]
    engine.gate.clear()
    posts = [asyncio.ensure_future(client.post("/v1/completions", json={**POST, "stream": stream})) for stream in (False, True)]
    await wait_until(lambda: len(engine.requests) == 2)
    life.drain()
    now[0] += 29
    life.drain()
    assert not life.over()
    now[0] += 1
    assert life.over()
    await life.end()
    whole, stream = [await post for post in posts]
    assert check(whole, 500) == read_events(stream)[-1]["error"]["message"] == "The server is shutting down."
    assert life.error is None


def die(engine: FakeEngine) -> None:
    def step() -> None:
        raise SystemExit

    engine.step = step


async def broken(app: FastAPI, client: httpx.AsyncClient) -> None:
    """Only a new process can help, and everybody is told."""
    life: Lifecycle = app.state.life
    assert await statuses(client) == [503] * 3
    check(await client.post("/v1/completions", json=POST), 500)
    life.drain()
    assert life.over()


async def test_engine_thread_that_ends(app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.gate.clear()
    posts = [asyncio.ensure_future(client.post("/v1/completions", json={**POST, "stream": stream})) for stream in (False, True)]
    await wait_until(lambda: len(engine.requests) == 2)
    assert not app.state.life.over()
    die(engine)
    whole, stream = [await post for post in posts]
    check(whole, 500)
    assert read_events(stream)[-1]["error"]["type"] == "server_error"
    await wait_until(lambda: not app.state.life.live)
    await broken(app, client)
    await app.state.life.end()
    assert app.state.life.error


async def test_engine_thread_that_ends_before_a_request_is_admitted(
    app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add_request(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "add_request", add_request)
    async with asyncio.timeout(5):
        check(await client.post("/v1/completions", json=POST), 500)


def hang(engine: FakeEngine) -> Callable[[], None]:
    """The next step lasts until the function that is returned is called."""
    go, step = threading.Event(), engine.step

    def hanging() -> object:
        go.wait(5)
        return step()

    engine.step = hanging
    return go.set


async def test_step_that_hangs(engine: FakeEngine, anyio_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.async_engine.STOP_TIMEOUT", 0.05)
    go = hang(engine)
    async with running(create_app(lambda report: engine, Settings(step_timeout=0.2))) as app, client_of(app) as client:
        post = asyncio.ensure_future(client.post("/v1/completions", json={**POST, "stream": True}))
        assert await statuses(client) == [200] * 3
        await wait_until(lambda: not app.state.life.live)
        await broken(app, client)
        await app.state.life.end()
        assert app.state.life.error
        assert app.state.life.busy
        assert read_events(await post)[-1]["error"]
        go()
        await wait_until(lambda: not app.state.life.busy)
