"""response_format and structured_outputs on both routes: what reaches the engine, and what is refused."""

import asyncio
import json
import time

import httpx
import pytest

from server.engine.types import Grammar
from server.openai import structured
from tests.server.clients import JSON, check
from tests.server.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
PATHS = ("/v1/completions", "/v1/chat/completions")


def body_for(path: str, **options: object) -> dict:
    prompt = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
    return {**prompt, "max_tokens": 1, **options}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("options", "grammar"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": None, "structured_outputs": None}, None),
        ({"response_format": {"type": "json_object"}}, Grammar("json_object")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}},
            Grammar("json_schema", json.dumps(SCHEMA)),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, Grammar("json_schema", json.dumps(SCHEMA))),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, Grammar("json_schema", json.dumps(SCHEMA))),
        ({"structured_outputs": {"json_object": True}}, Grammar("json_object")),
        ({"structured_outputs": {"regex": "[a-z]+", "choice": None}}, Grammar("regex", "[a-z]+")),
        ({"structured_outputs": {"choice": ["a", "ä"]}, "response_format": {"type": "text"}}, Grammar("choice", json.dumps(["a", "ä"]))),
        ({"structured_outputs": {"grammar": 'start: "a"+'}}, Grammar("grammar", 'start: "a"+')),
    ],
)
async def test_grammars_reach_the_engine(client: httpx.AsyncClient, engine: FakeEngine, path: str, options: dict, grammar: Grammar) -> None:
    response = await client.post(path, json=body_for(path, **options))
    assert response.status_code == 200, response.text
    assert [params.grammar for params in engine.params] == [grammar]


def schema_format(schema: object) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("response_format", {"type": "yaml"}, ""), ("response_format", {"type": "json_schema"}, "json_schema"),
        ("response_format", {"type": "json_object", "json_schema": {"name": "x", "schema": SCHEMA}}, "json_schema"),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}, ""),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": SCHEMA}}, ""),
        ("response_format", schema_format({"type": "wood"}), "wood"), ("response_format", schema_format([1]), ""),
        ("response_format", schema_format({"not": {}}), "not"), ("response_format", schema_format({"$ref": "file:///etc/passwd"}), "etc"),
        ("response_format", schema_format({"type": "string", "pattern": "(a"}), "(a"),
        ("response_format", schema_format({"enum": ["x" * 2**18]}), "262144"),
        ("structured_outputs", {}, "exactly one"), ("structured_outputs", {"regex": "a", "choice": ["a"]}, "exactly one"),
        ("structured_outputs", {"json_object": False}, "exactly one"), ("structured_outputs", {"regex": "(a"}, "unclosed"),
        ("structured_outputs", {"regex": "a(?=b)"}, "look"), ("structured_outputs", {"choice": []}, ""),
        ("structured_outputs", {"choice": [1]}, ""), ("structured_outputs", {"choice": ["a"] * 4097}, "4096"),
        ("structured_outputs", {"grammar": "start: nothing"}, "nothing"), ("structured_outputs", {"json": "{"}, ""),
        ("structured_outputs", {"regex": "\ud800"}, ""), ("structured_outputs", {"choice": ["\ud800"]}, ""),
        ("structured_outputs", "a*", ""),
    ],
)  # fmt: skip
async def test_refused(client: httpx.AsyncClient, engine: FakeEngine, path: str, field: str, value: object, words: str) -> None:
    content = json.dumps(body_for(path, **{field: value}))
    assert words in check(await client.post(path, content=content, headers=JSON), 400, param=field)
    assert not engine.params


@pytest.mark.parametrize("path", PATHS)
async def test_what_cannot_be_combined(client: httpx.AsyncClient, path: str) -> None:
    one = {"response_format": {"type": "json_object"}}
    check(await client.post(path, json=body_for(path, **one, structured_outputs={"regex": "a"})), 400, param="structured_outputs")
    check(await client.post(path, json=body_for(path, **one, min_tokens=1)), 400, param="min_tokens")
    check(await client.post(path, json=body_for(path, **one, ignore_eos=True)), 400, param="ignore_eos")


async def test_deep_schema(client: httpx.AsyncClient) -> None:
    schema = '{"items": ' * 800 + "{}" + "}" * 800
    body = json.dumps(body_for(PATHS[0], response_format=schema_format("SCHEMA"))).replace('"SCHEMA"', schema)
    check(await client.post(PATHS[0], content=body, headers=JSON), 400, param="response_format")


async def test_slow_compilation_is_given_up(client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other requests go on meanwhile."""
    monkeypatch.setattr(structured, "COMPILE_SECONDS", 0.3)
    monkeypatch.setattr(engine.grammars, "_compile", lambda _: time.sleep(0.6))
    slow = asyncio.ensure_future(client.post(PATHS[0], json=body_for(PATHS[0], structured_outputs={"regex": "a"})))
    await asyncio.sleep(0.05)
    assert (await client.post(PATHS[0], json=body_for(PATHS[0]))).status_code == 200
    assert not slow.done()
    assert "longer than 0.3 seconds" in check(await slow, 400, param="structured_outputs")
