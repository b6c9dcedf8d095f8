"""/openapi.json declares what the server answers: every status with its form, streams, the key."""

import json
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator, ValidationError

from server.description import EXAMPLES
from tests.server.clients import read_events, serving
from tests.server.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio
KEY = {"authorization": "Bearer Secret"}
PROBES = ("/livez", "/readyz", "/health")
GENERATING = ("/v1/completions", "/v1/chat/completions")
ALWAYS = (*PROBES, "/version", "/metrics")


async def describe(client: httpx.AsyncClient) -> dict[str, Any]:
    return (await client.get("/openapi.json", headers=KEY)).json()


def operation(document: dict[str, Any], path: str) -> tuple[str, dict[str, Any]]:
    ((method, described),) = document["paths"][path].items()
    return method, described


def check_declared(document: dict[str, Any], path: str, response: httpx.Response, status: int) -> None:
    """``response`` has ``status``, which the operation at ``path`` declares, with this type and form of body."""
    assert response.status_code == status, response.text
    declared = operation(document, path)[1]["responses"][str(status)]
    content = declared["content"][response.headers["content-type"].split(";")[0]]
    assert all(name.lower() in response.headers for name in declared.get("headers", {}))
    if "json" in response.headers["content-type"]:
        check_form(document, content["schema"], response.json())


def check_form(document: dict[str, Any], schema: dict[str, Any], value: Any) -> None:
    Draft202012Validator({**schema, "components": document["components"]}).validate(value)


async def send(client: httpx.AsyncClient, document: dict[str, Any], path: str, **options: Any) -> httpx.Response:
    method, _ = operation(document, path)
    body = {"json": next(iter(EXAMPLES[path].values()))} if path in EXAMPLES else {}
    return await client.request(method, path.replace("{model_id}", "vsd-demo"), **{"headers": KEY, **body, **options})


async def test_statuses_of_every_route(engine: FakeEngine) -> None:
    async with serving(engine, api_key="Secret") as client:
        document = await describe(client)
        for path in document["paths"]:
            check_declared(document, path, await send(client, document, path), 200)
            check_declared(document, path, await send(client, document, path, headers={**KEY, "x": "y" * 70_000}), 431)
            check_declared(document, path, await send(client, document, path, headers={**KEY, "content-length": "99999999"}), 413)
            answer = await send(client, document, path, headers={})
            check_declared(document, path, answer, 200 if path in PROBES else 401)
            assert ("security" in operation(document, path)[1]) == (path not in PROBES)
            if path in EXAMPLES:
                check_declared(document, path, await send(client, document, path, json=[]), 400)


async def test_unknown_models(client: httpx.AsyncClient) -> None:
    document = await describe(client)
    for path, examples in EXAMPLES.items():
        for body in examples.values():
            check_declared(document, path, await client.post(path, json={**body, "model": "other"}), 404)
    check_declared(document, "/v1/models/{model_id}", await client.get("/v1/models/other"), 404)


async def test_statuses_while_the_server_drains_and_once_it_failed(engine: FakeEngine) -> None:
    async with serving(engine) as client:
        life = client._transport.app.state.life
        document = await describe(client)
        life.drain()
        for path in document["paths"]:
            status = 200 if path in ALWAYS and path not in ("/readyz", "/health") else 503
            check_declared(document, path, await send(client, document, path), status)
        life.error = "broken"
        for path in document["paths"]:
            status = 503 if path in PROBES else 200 if path in ALWAYS else 500
            check_declared(document, path, await send(client, document, path), status)


@pytest.mark.parametrize("path", GENERATING)
async def test_a_request_that_fails_and_one_that_never_fits(client: httpx.AsyncClient, engine: FakeEngine, path: str) -> None:
    document = await describe(client)
    engine.broken = True
    check_declared(document, path, await send(client, document, path), 500)
    check_declared(document, path, await send(client, document, path, json={**EXAMPLES[path]["whole"], "n": 9}), 400)


@pytest.mark.parametrize("path", GENERATING)
async def test_events_of_streams(client: httpx.AsyncClient, engine: FakeEngine, path: str) -> None:
    document = await describe(client)
    assert document["openapi"] == "3.2.0"
    schema = operation(document, path)[1]["responses"]["200"]["content"]["text/event-stream"]["itemSchema"]
    end, part = schema["properties"]["data"]["anyOf"]
    assert end == {"const": "[DONE]"}
    answer = await client.post(path, json=EXAMPLES[path]["stream"])
    for event in read_events(answer):
        check_form(document, part["contentSchema"], event)
        check_form(document, schema, {"data": json.dumps(event)})
    engine.broken = True
    (*_, error) = read_events(await client.post(path, json=EXAMPLES[path]["stream"]))
    assert "error" in error
    check_form(document, part["contentSchema"], error)
    with pytest.raises(ValidationError):
        check_form(document, part["contentSchema"], {"text": "x"})


async def test_no_key_is_declared_where_none_is_needed(client: httpx.AsyncClient) -> None:
    document = await describe(client)
    assert "securitySchemes" not in document["components"]
    for path in document["paths"]:
        _, described = operation(document, path)
        assert "security" not in described
        assert not {"401", "422"} & set(described["responses"])


async def test_fields_that_may_be_null(client: httpx.AsyncClient) -> None:
    """As the server takes them: null is the default, and what is not supported may say so in any way."""
    document = await describe(client)
    for path, examples in EXAMPLES.items():
        schema = operation(document, path)[1]["requestBody"]["content"]["application/json"]["schema"]
        fields = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
        for body in examples.values():
            nulls = dict.fromkeys(fields["properties"].keys() - body.keys())
            check_form(document, schema, {**body, **nulls})
            assert (await client.post(path, json={**body, **nulls})).status_code == 200
        for name in fields.get("required", ()):
            with pytest.raises(ValidationError):
                check_form(document, schema, {**body, name: None})
    for nothing in (None, False, 0, "", [], {}):
        body = {**EXAMPLES["/v1/completions"]["whole"], "suffix": nothing}
        check_form(document, {"$ref": "#/components/schemas/CompletionRequest"}, body)
        assert (await client.post("/v1/completions", json=body)).status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ""}, {"prompt": []}, {"prompt": [""]}, {"prompt": [[]]}, {"prompt": [-1]}, {"prompt": ["x"] * 129},
        {"prompt": [[1]] * 129},
        {"stop": ""}, {"stop": ["x", ""]}, {"stop": "x" * 257}, {"stop": ["x"] * 17},
        {"temperature": 2.1}, {"n": 129}, {"stream": 1},
    ],
)  # fmt: skip
async def test_bounds_are_those_of_the_server(client: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    document, schema = await describe(client), {"$ref": "#/components/schemas/CompletionRequest"}
    body = EXAMPLES["/v1/completions"]["whole"]
    check_form(document, schema, body)
    with pytest.raises(ValidationError):
        check_form(document, schema, {**body, **fields})
    assert (await client.post("/v1/completions", json={**body, **fields})).status_code == 400
