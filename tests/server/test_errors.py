"""Every refusal has the right status and the shape of the OpenAI API."""

import asyncio
import json
import re

import httpx
import pytest
from fastapi import FastAPI

from server.engine.async_engine import EngineRequest
from server.engine.types import SamplingParams
from server.openai.protocol import MAX_CHOICES, MAX_LOGIT_BIAS, MAX_STOP_TOKENS, GenerationRequest
from tests.server.clients import JSON, check, serving, wait_until
from tests.server.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio
POST_ROUTES = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]


def body_for(path: str) -> dict:
    """A request that the route answers."""
    if "chat" in path:
        return {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    return {"tokens": [1]} if path == "/detokenize" else {"prompt": "x"}


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"prompt": "x"', b"\xff\xfe", b"[" * 10_000, b'"text"', b"[]", b"null", b'{"prompt": "x", "max_tokens": 1e}']
)
@pytest.mark.parametrize("path", POST_ROUTES)
async def test_broken_body(client: httpx.AsyncClient, content: bytes, path: str) -> None:
    check(await client.post(path, content=content, headers=JSON), 400)


@pytest.mark.parametrize("path", POST_ROUTES)
async def test_wrong_content_type(client: httpx.AsyncClient, path: str) -> None:
    body = body_for(path)
    check(await client.post(path, content=json.dumps(body), headers={"content-type": "text/plain"}), 400)
    assert (await client.post(path, json=body)).status_code == 200


@pytest.mark.parametrize("path", [*POST_ROUTES, "/nothing"])
async def test_body_over_the_limit(client: httpx.AsyncClient, path: str) -> None:
    check(await client.post(path, content=b" " * (2**24 + 1), headers=JSON), 413)


async def test_body_over_the_limit_without_length(client: httpx.AsyncClient) -> None:
    async def chunks():
        for _ in range(33):
            yield b" " * 2**20

    check(await client.post("/v1/completions", content=chunks(), headers=JSON), 413)


@pytest.mark.parametrize(
    "prompt",
    [
        "", [], [[]], [""], ["x", ""], [[1], []], [-1], [257], [2**63], [True], [1.5], ["x", 1], [1, "x"], [["x"]], [[[1]]], 1, True, {},
        "\ud800", ["x"] * (MAX_CHOICES + 1), [[1]] * 100_000,
    ],
)  # fmt: skip
async def test_prompt(client: httpx.AsyncClient, prompt: object) -> None:
    body = json.dumps({"prompt": prompt})
    check(await client.post("/v1/completions", content=body, headers=JSON), 400, param="prompt")


async def test_prompt_missing_or_null(client: httpx.AsyncClient) -> None:
    check(await client.post("/v1/completions", json={}), 400, param="prompt")
    check(await client.post("/v1/completions", json={"prompt": None}), 400, param="prompt")


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("temperature", -1), ("temperature", 2.1), ("temperature", float("nan")), ("temperature", float("inf")), ("temperature", "1"),
        ("temperature", True), ("top_p", 0), ("top_p", 1.1), ("top_k", -7), ("top_k", 1.5), ("min_p", 2), ("presence_penalty", 3),
        ("frequency_penalty", -3), ("repetition_penalty", 0), ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 2**63),
        ("max_tokens", "5"), ("max_tokens", True), ("min_tokens", 17), ("min_tokens", -1), ("seed", 2**63), ("seed", 1.5),
        ("stop", ""), ("stop", [""]), ("stop", ["x"] * 17), ("stop", "x" * 257), ("stop", 5), ("stop", [5]), ("stop", "\ud800"),
        ("stop_token_ids", [-1]), ("stop_token_ids", [257]), ("stop_token_ids", ["x"]), ("logit_bias", {"x": 1}), ("logit_bias", {"-1": 1}),
        ("logit_bias", {"257": 1}), ("logit_bias", {"1": 101}), ("logit_bias", {"1": -1e9}), ("logit_bias", [1]), ("n", 0), ("n", 129),
        ("n", 10**9), ("best_of", 2), ("logprobs", -1), ("logprobs", 21), ("logprobs", True), ("suffix", "end"), ("echo", "yes"),
        ("stream", 1), ("stream_options", {"include_usage": True}), ("stream_options", 3), ("user", 3),
        ("logit_bias", {str(i): 1 for i in range(MAX_LOGIT_BIAS + 1)}), ("stop_token_ids", [1] * (MAX_STOP_TOKENS + 1)),
        ("priority", 1.5), ("priority", 2**63), ("metadata", []), ("metadata", {"a": 1}), ("store", "yes"),
        ("response_format", "text"), ("allowed_token_ids", [1]), ("bad_words", ["x"]),
        ("use_beam_search", True), ("speculation", 3),
        ("speculation", {"enabled": 1}), ("speculation", {"max_nodes": -1}), ("speculation", {"max_nodes": "2"}),
    ],
)  # fmt: skip
async def test_option(client: httpx.AsyncClient, param: str, value: object) -> None:
    body = json.dumps({"prompt": "x", param: value})
    check(await client.post("/v1/completions", content=body, headers=JSON), 400, param=param)
    if param in GenerationRequest.model_fields and (param, value) != ("min_tokens", 17):
        body = json.dumps({"messages": [{"role": "user", "content": "x"}], param: value})
        check(await client.post("/v1/chat/completions", content=body, headers=JSON), 400, param=param)


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({"logprobs": 21}, "20"), ({"n": 129}, "128"), ({"stop": ["x"] * 17}, "16"), ({"stop": "x" * 257}, "256"),
        ({"stop_token_ids": [1] * 129}, "128"), ({"logit_bias": {str(i): 1 for i in range(1025)}}, "1024"),
        ({"prompt": ["x"] * 129}, "128"), ({"prompt": ["x"] * 65, "n": 2}, "128"), ({"prompt": ["x"] * 9}, "8"),
    ],
)  # fmt: skip
async def test_refusals_name_the_limit(client: httpx.AsyncClient, options: dict, limit: str) -> None:
    response = await client.post("/v1/completions", json={"prompt": "x", **options})
    assert response.status_code == 400
    assert limit in re.findall(r"\d+", response.json()["error"]["message"])


async def test_prompts_times_n(client: httpx.AsyncClient) -> None:
    check(await client.post("/v1/completions", json={"prompt": ["x"] * 65, "n": 2}), 400, param="n")


async def test_unknown_model(client: httpx.AsyncClient) -> None:
    message = check(await client.post("/v1/completions", json={"prompt": "x", "model": "gpt"}), 404, param="model", code="model_not_found")
    assert "gpt" in message
    check(await client.get("/v1/models/some/other"), 404, param="model", code="model_not_found")


@pytest.mark.parametrize(
    "body", [{"prompt": "x" * 900}, {"prompt": "x", "max_tokens": 900}, {"prompt": [1] * 901}, {"prompt": "x" * 10**6}]
)
async def test_too_long(client: httpx.AsyncClient, body: dict) -> None:
    message = check(await client.post("/v1/completions", json=body), 400, code="context_length_exceeded")
    assert message.startswith("This model's maximum context length is 900 tokens.")


async def test_longest_request_runs(client: httpx.AsyncClient) -> None:
    assert (await client.post("/v1/completions", json={"prompt": "x" * 899, "max_tokens": 1})).status_code == 200


async def test_engine_refuses(client: httpx.AsyncClient) -> None:
    assert "666" in check(await client.post("/v1/completions", json={"prompt": ["x", "y"], "max_tokens": 666}), 400)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "prompt"), [("/v1/completions", "prompt"), ("/v1/chat/completions", "messages")])
async def test_queue_full(app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine, stream: bool, path: str, prompt: str) -> None:
    engine.gate.clear()
    async with app.state.life.service.engine.generate([EngineRequest(str(i), [1], SamplingParams()) for i in range(8)]):
        body = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "stream": stream}
        response = await client.post(path, json=body)
        check(response, 503, code="server_overloaded")
        assert int(response.headers["retry-after"]) > 0
    assert len(engine.params) == 8
    assert 'vsd_requests_total{model_name="vsd-demo",outcome="rejected"} 1.0' in (await client.get("/metrics")).text


async def test_more_than_the_server_ever_holds(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """No retry would help, so it is no 503."""
    assert "at most 8" in check(await client.post("/v1/completions", json={"prompt": ["x"] * 9}), 400)
    assert not engine.params


async def test_too_many_tokens_wait(engine: FakeEngine) -> None:
    async with serving(engine, max_queued_tokens=10) as client:
        engine.gate.clear()
        waiting = asyncio.ensure_future(client.post("/v1/completions", json={"prompt": "123456"}))
        await wait_until(lambda: engine.requests)
        response = await client.post("/v1/completions", json={"prompt": "12345", "stream": True})
        check(response, 503, code="server_overloaded")
        assert int(response.headers["retry-after"]) > 0
        engine.gate.set()
        assert (await waiting).status_code == 200
        assert (await client.post("/v1/completions", json={"prompt": "x" * 50})).status_code == 200, "nothing waits any more"


@pytest.mark.parametrize("path", POST_ROUTES)
async def test_unknown_model_on_every_route(client: httpx.AsyncClient, path: str) -> None:
    check(await client.post(path, json={**body_for(path), "model": "gpt"}), 404, param="model", code="model_not_found")


async def test_wrong_method_on_every_route(client: httpx.AsyncClient) -> None:
    for path, operations in (await client.get("/openapi.json")).json()["paths"].items():
        for method in {"get", "post", "put", "delete", "patch"} - set(operations):
            response = await client.request(method.upper(), path)
            check(response, 405)
            assert response.headers["allow"].lower() in operations


async def test_unknown_path(client: httpx.AsyncClient) -> None:
    assert "/v1/nothing" in check(await client.get("/v1/nothing"), 404)
    check(await client.get("//v1/models"), 404)


async def test_request_that_fails_in_the_engine(client: httpx.AsyncClient) -> None:
    assert check(await client.post("/v1/completions", json={"prompt": ["ok", "fail!"]}), 500) == "the engine failed on this request"
    assert (await client.post("/v1/completions", json={"prompt": "ok"})).status_code == 200


async def test_step_that_raises(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.broken = True
    assert "secret" not in check(await client.post("/v1/completions", json={"prompt": "x"}), 500)
    assert (await client.post("/v1/completions", json={"prompt": "ok"})).status_code == 200


async def test_bug_in_a_route_tells_no_internals(app: FastAPI, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug() -> bytes:
        raise RuntimeError("secret")

    monkeypatch.setattr(app.state.metrics, "render", bug)
    assert "secret" not in check(await client.get("/metrics"), 500)
