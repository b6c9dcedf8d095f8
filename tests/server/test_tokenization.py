"""/tokenize, /detokenize, /tokenizer_info: vLLM's shapes, and what they refuse."""

import httpx
import pytest
from tokenizers.processors import TemplateProcessing

from tests.server.clients import check
from tests.server.fake_engine import CHAT_TEMPLATE, FakeEngine

pytestmark = pytest.mark.anyio
HEY = [{"role": "user", "content": "hey"}]


async def post(client: httpx.AsyncClient, path: str, **body: object) -> dict:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def test_prompt(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    ids = engine.tokenizer.backend_tokenizer.encode("hé").ids
    assert await post(client, "/tokenize", prompt="hé") == {"count": 3, "max_model_len": 900, "tokens": ids, "token_strs": None}
    assert (await post(client, "/tokenize", prompt="hé", return_token_strs=True))["token_strs"] == ["h", "Ã", "©"]
    assert (await post(client, "/tokenize", prompt=""))["count"] == 0
    assert (await post(client, "/tokenize", prompt="x" * 901))["count"] == 901, "longer than the context is an answer, too"


async def test_messages_become_the_prompt_that_chat_takes(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for options in ({}, {"add_generation_prompt": False}, {"chat_template_kwargs": {"mood": "so"}}, {"continue_final_message": True}):
        tokens = (await post(client, "/tokenize", messages=HEY, **options))["tokens"]
        await post(client, "/v1/chat/completions", messages=HEY, max_tokens=1, **options)
        assert (await post(client, "/detokenize", tokens=tokens))["prompt"] == engine.prompts[-1]


@pytest.mark.parametrize(("options", "before"), [({}, True), ({"add_special_tokens": True}, True), ({"add_special_tokens": False}, False)])
async def test_special_tokens_around_a_prompt(client: httpx.AsyncClient, engine: FakeEngine, options: dict, before: bool) -> None:
    bos = engine.tokenizer.eos_token_id
    engine.tokenizer.backend_tokenizer.post_processor = _begin_with_eos(bos)
    tokens = (await post(client, "/tokenize", prompt="a", **options))["tokens"]
    assert tokens[:-1] == [bos] * before
    chat = (await post(client, "/tokenize", messages=HEY))["tokens"]
    assert bos not in chat, "the template has what it wants"
    assert (await post(client, "/tokenize", messages=HEY, add_special_tokens=True))["tokens"] == [bos, *chat]
    for special in (False, True):
        answer = await post(client, "/v1/chat/completions", messages=HEY, max_tokens=1, add_special_tokens=special)
        assert answer["usage"]["prompt_tokens"] == len(chat) + special


def _begin_with_eos(token: int) -> object:
    return TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", token)])


async def test_detokenize(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    tokens = [*engine.tokenizer.backend_tokenizer.encode("hé").ids, engine.tokenizer.eos_token_id]
    assert await post(client, "/detokenize", tokens=tokens) == {"prompt": "hé<eos>"}
    assert await post(client, "/detokenize", tokens=[]) == {"prompt": ""}


async def test_tokenizer_info(client: httpx.AsyncClient) -> None:
    info = (await client.get("/tokenizer_info")).json()
    assert info["eos_token"] == "<eos>"
    assert info["chat_template"] == CHAT_TEMPLATE
    assert info["tokenizer_class"]
    assert (info["vocab_size"], info["model_max_length"]) == (257, 900)


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": HEY}, 400, "prompt"),
        ("/tokenize", {"prompt": ["x"]}, 400, "prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"messages": HEY, "chat_template": "x"}, 400, "chat_template"),
        ("/tokenize", {"messages": HEY, "tools": [{}]}, 400, "tools"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": [257]}, 400, "tokens"),
        ("/detokenize", {"tokens": [2**63]}, 400, "tokens"),
        ("/detokenize", {"tokens": "x"}, 400, "tokens"),
        ("/detokenize", {"tokens": [True]}, 400, "tokens"),
    ],
)
async def test_refused(client: httpx.AsyncClient, path: str, body: dict, status: int, param: str) -> None:
    check(await client.post(path, json=body), status, param=param)


async def test_unknown_model_and_far_too_long(client: httpx.AsyncClient) -> None:
    check(await client.post("/tokenize", json={"prompt": "x", "model": "gpt"}), 404, param="model", code="model_not_found")
    check(await client.post("/detokenize", json={"tokens": [1], "model": "gpt"}), 404, param="model", code="model_not_found")
    check(await client.post("/tokenize", json={"prompt": "x" * 10**6}), 400, code="context_length_exceeded")
    check(await client.get("/tokenize"), 405)
