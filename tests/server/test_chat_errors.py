"""What /v1/chat/completions refuses beyond the options that it shares, and chat templates that fail."""

import json
import time

import httpx
import pytest

from server.openai import chat_template
from server.openai.chat_protocol import MAX_MESSAGES
from tests.server.clients import JSON, check, serving
from tests.server.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio
PATH = "/v1/chat/completions"
HEY = [{"role": "user", "content": "hey"}]
CALL = {"id": "c1", "type": "function", "function": {"name": "area", "arguments": "{}"}}


@pytest.mark.parametrize(
    "messages",
    [
        [], None, "hey", {}, [1], ["hey"], [{}], [{"role": "user"}], [{"content": "x"}], [{"role": "king", "content": "x"}],
        [{"role": "user", "content": None}], [{"role": "user", "content": 1}], [{"role": "user", "content": {}}],
        [{"role": "user", "content": ["x"]}], [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"type": "text", "text": 1}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]}],
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}],
        [{"role": "assistant"}], [{"role": "assistant", "content": None, "tool_calls": []}],
        [{"role": "user", "content": "x", "tool_calls": [CALL]}],
        [{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "[1]"}}]}],
        [{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "{"}}]}],
        [{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "[" * 10_000}}]}],
        [{"role": "tool", "tool_call_id": "c1"}], [{"role": "user", "content": "\ud800"}],
        [{"role": "user", "content": "x"}] * (MAX_MESSAGES + 1),
    ],
)  # fmt: skip
async def test_messages(client: httpx.AsyncClient, messages: object) -> None:
    check(await client.post(PATH, content=json.dumps({"messages": messages}), headers=JSON), 400, param="messages")


async def test_what_is_wrong_with_a_part_is_said(client: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "x"}}]}]
    message = check(await client.post(PATH, json={"messages": messages}), 400, param="messages")
    assert "part 1 is of type 'image_url'" in message


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("max_tokens", 0), ("max_completion_tokens", 0), ("max_completion_tokens", "5"), ("logprobs", 3), ("top_logprobs", 2),
        ("top_logprobs", -1), ("tools", [{"type": "function"}]), ("tool_choice", "auto"), ("tool_choice", {"type": "function"}),
        ("functions", [{}]), ("function_call", "auto"), ("chat_template", "x"), ("chat_template_kwargs", []),
        ("chat_template_kwargs", {"tokenize": True}), ("chat_template_kwargs", {"chat_template": "x"}),
        ("chat_template_kwargs", {"messages": []}), ("chat_template_kwargs", {"conversations": []}), ("chat_template_kwargs", {"self": 1}),
        ("continue_final_message", 1), ("add_generation_prompt", "x"), ("add_special_tokens", 1),
    ],
)  # fmt: skip
async def test_option(client: httpx.AsyncClient, param: str, value: object) -> None:
    check(await client.post(PATH, json={"messages": HEY, param: value}), 400, param=param)


async def test_options_that_exclude_each_other(client: httpx.AsyncClient) -> None:
    both = {"messages": HEY, "continue_final_message": True, "add_generation_prompt": True}
    check(await client.post(PATH, json=both), 400, param="continue_final_message")
    check(await client.post(PATH, json={"messages": HEY, "logprobs": True, "top_logprobs": 21}), 400, param="top_logprobs")
    check(await client.post(PATH, json={"messages": HEY, "max_tokens": 3, "min_tokens": 4}), 400, param="min_tokens")
    check(await client.post(PATH, json={"messages": HEY, "min_tokens": 900}), 400, param="min_tokens")


@pytest.mark.parametrize("options", [{"messages": [{"role": "user", "content": "x" * 900}]}, {"max_tokens": 890}, {"max_tokens": 10**9}])
async def test_too_long(client: httpx.AsyncClient, options: dict) -> None:
    message = check(await client.post(PATH, json={"messages": HEY, **options}), 400, code="context_length_exceeded")
    assert message.startswith("This model's maximum context length is 900 tokens.")


async def test_without_a_limit_one_token_must_be_left(client: httpx.AsyncClient) -> None:
    def body(prompt_tokens: int) -> dict:
        return {"messages": [{"role": "user", "content": "x" * (prompt_tokens - len("[user]\n[assistant]"))}]}

    assert (await client.post(PATH, json=body(899))).json()["usage"]["completion_tokens"] == 1
    check(await client.post(PATH, json=body(900)), 400, code="context_length_exceeded")


async def test_what_the_template_says(client: httpx.AsyncClient) -> None:
    message = check(await client.post(PATH, json={"messages": [{"role": "tool", "content": "9"}]}), 400, param="messages")
    assert "a tool must say which call it answers" in message
    assert (await client.post(PATH, json={"messages": HEY, "max_tokens": 1})).status_code == 200


async def test_half_of_a_surrogate_pair_in_a_field_of_the_template(client: httpx.AsyncClient) -> None:
    body = json.dumps({"messages": HEY, "chat_template_kwargs": {"mood": "\ud800"}})
    check(await client.post(PATH, content=body, headers=JSON), 400, param="messages")


async def test_model_without_a_template() -> None:
    async with serving(FakeEngine(None)) as client:
        assert "/v1/completions" in check(await client.post(PATH, json={"messages": HEY}), 400, param="messages")
        check(await client.post("/tokenize", json={"messages": HEY}), 400, param="messages")
        assert (await client.get("/tokenizer_info")).json()["chat_template"] is None
        assert (await client.post("/tokenize", json={"prompt": "x"})).status_code == 200


async def test_templates_of_requests_where_they_are_trusted() -> None:
    async with serving(FakeEngine(None), trust_request_chat_template=True) as client:

        async def prompt_tokens(template: str) -> int:
            answer = await client.post(PATH, json={"messages": HEY, "max_tokens": 1, "chat_template": template})
            assert answer.status_code == 200, answer.text
            return answer.json()["usage"]["prompt_tokens"]

        assert await prompt_tokens("{{ messages[0].content }}") == 3
        for template in ("{{", "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ 1 / 0 }}", "{% include 'x' %}"):
            check(await client.post(PATH, json={"messages": HEY, "chat_template": template}), 400, param="messages")
        check(await client.post(PATH, json={"messages": HEY, "chat_template": ""}), 400, param="messages")
        large = "x" * (chat_template.MAX_TEMPLATE_CHARACTERS + 1)
        check(await client.post(PATH, json={"messages": HEY, "chat_template": large}), 400, param="chat_template")
        long = "{% for i in range(20000) %}{{ messages[0].content }}{% endfor %}"
        check(await client.post(PATH, json={"messages": HEY, "chat_template": long}), 400, code="context_length_exceeded")


@pytest.mark.parametrize("loop", ["{{ x }}", "{% set y = x %}", "{% for z in range(99999) %}{% endfor %}"])
async def test_template_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch, loop: str) -> None:
    monkeypatch.setattr(chat_template, "RENDER_SECONDS", 0.1)
    ranges = "".join(f"{{% for {name} in range(99999) %}}" for name in "abx")
    async with serving(FakeEngine(f"{ranges}{loop}{'{% endfor %}' * 3}")) as client:
        start = time.monotonic()
        assert "longer than 0.1 seconds" in check(await client.post(PATH, json={"messages": HEY}), 400, param="messages")
        assert time.monotonic() - start < 5
        assert (await client.post("/v1/completions", json={"prompt": "x"})).status_code == 200
