"""What holds for every route: request ids, the key, probes, metrics, the description of the API."""

from collections.abc import AsyncIterator

import httpx
import pytest

from tests.server.clients import check, serving
from tests.server.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio


@pytest.fixture
async def locked(engine: FakeEngine, anyio_backend: str) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(engine, api_key="Secret") as client:
        yield client


@pytest.mark.parametrize("path", ["/health", "/livez", "/readyz"])
async def test_probes(locked: httpx.AsyncClient, path: str) -> None:
    assert (await locked.get(path)).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models",
        "/v1/completions",
        "/v1/chat/completions",
        "/tokenize",
        "/tokenizer_info",
        "/metrics",
        "/openapi.json",
        "/version",
        "/nothing",
        "//v1/models",
        "/health/",
    ],
)
@pytest.mark.parametrize("key", [None, "", "Bearer", "Bearer secret", "Secret", "bearer Secret", "Bearer Secrets", "Bearer Sécret"])
async def test_key_is_needed_everywhere_else(locked: httpx.AsyncClient, path: str, key: str | None) -> None:
    response = await locked.get(path, headers={} if key is None else {"authorization": key.encode()})
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["x-request-id"]


async def test_key(locked: httpx.AsyncClient) -> None:
    headers = {"authorization": "Bearer Secret"}
    assert (await locked.get("/v1/models", headers=headers)).status_code == 200
    assert (await locked.post("/v1/completions", headers=headers, json={"prompt": "x"})).status_code == 200


@pytest.mark.parametrize("sent", ["abc-1.2:3_4", "x" * 128])
async def test_request_id_is_returned(client: httpx.AsyncClient, sent: str) -> None:
    headers = {"x-request-id": sent}
    for path in ("/health", "/nothing"):
        assert (await client.get(path, headers=headers)).headers["x-request-id"] == sent
    for stream in (False, True):
        response = await client.post("/v1/completions", json={"prompt": "x", "stream": stream}, headers=headers)
        assert response.headers["x-request-id"] == sent


@pytest.mark.parametrize("sent", ["", "<>", "a b", "a\tb", "é", "x" * 129, "x" * 10_000])
async def test_request_id_is_made(client: httpx.AsyncClient, sent: str) -> None:
    headers = {"x-request-id": sent.encode()}
    first, second = [(await client.get("/health", headers=headers)).headers["x-request-id"] for _ in range(2)]
    assert len({first, second, sent}) == 3


@pytest.mark.parametrize("headers", [[("x", "y")] * 300, [("x", "y" * 70_000)]])
async def test_too_many_headers(client: httpx.AsyncClient, headers: list[tuple[str, str]]) -> None:
    check(await client.get("/health", headers=headers), 431)


async def test_keys_with_letters_of_any_kind(engine: FakeEngine) -> None:
    async with serving(engine, api_key="a, Clé") as client:
        for key, status in (("a", 200), ("Clé", 200), ("Cle", 401), ("a, Clé", 401)):
            assert (await client.get("/v1/models", headers={"authorization": f"Bearer {key}".encode()})).status_code == status


async def test_pages_get_no_permission_by_default(client: httpx.AsyncClient) -> None:
    response = await client.get("/v1/models", headers={"origin": "https://other.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]


async def test_metrics_after_a_request(client: httpx.AsyncClient) -> None:
    await client.post("/v1/completions", json={"prompt": "hey", "max_tokens": 6})
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    for line in (
        'vsd_generation_tokens_total{model_name="vsd-demo"} 6.0',
        'vsd_prompt_tokens_total{model_name="vsd-demo"} 3.0',
        'vsd_spec_decode_num_drafts_total{model_name="vsd-demo"} 3.0',
        'vsd_requests_total{model_name="vsd-demo",outcome="length"} 1.0',
        'vsd_time_to_first_token_seconds_count{model_name="vsd-demo"} 1.0',
        'vsd_num_requests_running{model_name="vsd-demo"} 0.0',
    ):
        assert line in response.text


async def test_openapi_declares_bounds_and_errors(client: httpx.AsyncClient) -> None:
    api = (await client.get("/openapi.json")).json()
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        assert {"200", "400", "404", "413", "503"} <= set(api["paths"][path]["post"]["responses"])
    fields = api["components"]["schemas"]["CompletionRequest"]["properties"]
    assert fields["temperature"]["maximum"] == 2
    assert len(fields["prompt"]["anyOf"]) == 4
    fields = api["components"]["schemas"]["ChatRequest"]["properties"]
    assert fields["messages"]["minItems"] == 1
    assert fields["temperature"]["maximum"] == 2
    assert (await client.get("/version")).json()["version"] == api["info"]["version"]
