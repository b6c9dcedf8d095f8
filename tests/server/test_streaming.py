"""/v1/completions as server-sent events, and clients that leave."""

import asyncio
import json
import time
from collections.abc import Awaitable

import httpx
import pytest
from fastapi import FastAPI

from tests.server.clients import read_events, wait_until
from tests.server.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio


async def events(client: httpx.AsyncClient, **body: object) -> list[dict]:
    return read_events(await client.post("/v1/completions", json={"prompt": "hey", "stream": True, **body}))


def text(parts: list[dict], index: int = 0) -> str:
    return "".join(choice["text"] for part in parts for choice in part.get("choices", []) if choice["index"] == index)


async def test_shape(client: httpx.AsyncClient) -> None:
    parts = await events(client, max_tokens=5)
    assert text(parts) == "abcde"
    assert len({part["id"] for part in parts}) == 1
    for part in parts:
        assert set(part) == {"id", "object", "created", "model", "choices"}
        assert part["object"] == "text_completion"
        assert set(part["choices"][0]) == {"index", "text", "logprobs", "finish_reason", "stop_reason"}
    assert [part["choices"][0]["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]


async def test_usage_in_the_closing_event(client: httpx.AsyncClient) -> None:
    *parts, last = await events(client, max_tokens=5, stream_options={"include_usage": True})
    assert all(part["usage"] is None and "metrics" not in part for part in parts)
    assert last["choices"] == []
    cached = {"cached_tokens": 2}
    assert last["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8, "prompt_tokens_details": cached}
    assert last["metrics"]["speculative_decoding"]["num_spec_steps"] == 3


async def test_continuous_usage(client: httpx.AsyncClient) -> None:
    parts = await events(client, max_tokens=5, stream_options={"continuous_usage_stats": True})
    counts = [part["usage"]["completion_tokens"] for part in parts]
    assert counts == sorted(counts)
    assert counts[-1] == 5


async def test_several_choices(client: httpx.AsyncClient) -> None:
    parts = await events(client, prompt=["x", "y"], n=2, seed=0, max_tokens=4, stream_options={"include_usage": True})
    assert [text(parts, index) for index in range(4)] == ["abcd", "bcde"] * 2
    assert parts[-1]["metrics"] == {"speculative_decoding": None}
    assert parts[-1]["usage"]["completion_tokens"] == 16


async def test_echo_and_logprobs_continue_over_events(client: httpx.AsyncClient) -> None:
    parts = await events(client, echo=True, logprobs=1, max_tokens=4)
    assert text(parts) == "heyabcd"
    reports = [part["choices"][0]["logprobs"] for part in parts]
    assert [token for report in reports for token in report["tokens"]] == list("heyabcd")
    assert [offset for report in reports for offset in report["text_offset"]] == list(range(7))
    assert reports[0]["token_logprobs"][0] is None


async def test_stop_string_never_shows(client: httpx.AsyncClient) -> None:
    parts = await events(client, stop="def")
    assert text(parts) == "abc"
    assert parts[-1]["choices"][0]["stop_reason"] == "def"


async def test_failure_is_an_event_and_done_closes(client: httpx.AsyncClient) -> None:
    parts = await events(client, prompt="fail!")
    assert text(parts) == "ab"
    error = parts[-1]["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "server_error"


async def test_refused_before_the_stream_begins(client: httpx.AsyncClient) -> None:
    assert (await client.post("/v1/completions", json={"prompt": "x", "stream": True, "max_tokens": 666})).status_code == 400


async def test_slow_reader_gets_fewer_longer_events(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    async def keep_the_loop_busy() -> None:
        await wait_until(lambda: engine.requests)
        start = engine.num_steps
        while engine.num_steps < start + 50:
            time.sleep(0.001)

    parts, _ = await asyncio.gather(events(client, max_tokens=200, seed=0), keep_the_loop_busy())
    assert text(parts) == ("abcdefghijklmnopqrstuvwxyz" * 8)[:200]
    assert len(parts) <= 60


def connection(app: FastAPI, body: dict, gone: asyncio.Event) -> tuple[Awaitable[None], list[dict]]:
    """A client at the ASGI level, which disconnects when ``gone`` is set; returns the call and what was sent to it."""
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"", "root_path": "", "scheme": "http",
        "headers": [(b"content-type", b"application/json")], "client": ("test", 1), "server": ("test", 80),
    }  # fmt: skip
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    sent: list[dict] = []

    async def receive() -> dict:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        sent.append(message)

    return app(scope, receive, send), sent


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("generating", [False, True])
async def test_client_that_leaves_frees_its_slot(app: FastAPI, engine: FakeEngine, stream: bool, generating: bool) -> None:
    if not generating:
        engine.gate.clear()
    gone = asyncio.Event()
    call, _ = connection(app, {"prompt": ["x", "y"], "stream": stream, "max_tokens": 850}, gone)
    task = asyncio.ensure_future(call)
    await wait_until(lambda: len(engine.requests) == 2)
    gone.set()
    steps = engine.num_steps
    await wait_until(lambda: not engine.requests)
    assert engine.num_steps <= steps + 2 + 2 * generating  # the fake's steps are 1 ms: the loop itself may need some
    assert len(engine.aborted) == 2
    await task
    await wait_until(lambda: 'vsd_num_requests_running{model_name="vsd-demo"} 0.0' in app.state.metrics.render().decode())
    assert 'outcome="abort"} 2.0' in app.state.metrics.render().decode()


async def test_neighbours_of_a_client_that_leaves_go_on(app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine) -> None:
    gone = asyncio.Event()
    call, _ = connection(app, {"prompt": "x", "stream": True, "max_tokens": 850}, gone)
    task = asyncio.ensure_future(call)
    await wait_until(lambda: engine.requests)
    asyncio.get_running_loop().call_later(0.02, gone.set)
    parts = await events(client, seed=0, max_tokens=104)
    assert text(parts) == "abcdefghijklmnopqrstuvwxyz" * 4
    await task
