"""/v1/chat/completions, whole and as deltas: messages to a prompt, choices, log-probabilities, options."""

import httpx
import pytest

from tests.server.clients import read_events
from tests.server.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio
HEY = [{"role": "user", "content": "hey"}]
PROMPT = "[user]hey\n[assistant]"


async def chat(client: httpx.AsyncClient, **body: object) -> dict:
    response = await client.post("/v1/chat/completions", json={"messages": HEY, **body})
    assert response.status_code == 200, response.text
    return response.json()


async def deltas(client: httpx.AsyncClient, **body: object) -> list[dict]:
    return read_events(await client.post("/v1/chat/completions", json={"messages": HEY, "stream": True, **body}))


def text(events: list[dict], index: int = 0) -> str:
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") for choice in choices)


async def test_shape(client: httpx.AsyncClient) -> None:
    answer = await chat(client, max_tokens=3, model="vsd-demo")
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    message = {"role": "assistant", "content": "abc", "refusal": None}
    assert answer["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length", "stop_reason": None}]
    assert answer["usage"]["prompt_tokens"] == len(PROMPT)
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["metrics"]["speculative_decoding"]["num_spec_steps"] == 2


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({}, 900 - len(PROMPT)), ({"max_tokens": 4}, 4), ({"max_completion_tokens": 5}, 5),
        ({"max_tokens": 4, "max_completion_tokens": 5}, 5), ({"max_tokens": None}, 900 - len(PROMPT)),
    ],
)  # fmt: skip
async def test_tokens_are_what_is_asked_or_left(client: httpx.AsyncClient, options: dict, tokens: int) -> None:
    answer = await chat(client, **options)
    assert answer["usage"]["completion_tokens"] == tokens
    assert answer["choices"][0]["finish_reason"] == "length"


CALL = {"id": "c1", "type": "function", "function": {"name": "area", "arguments": '{"x": 3}'}}


@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        (HEY, "[user]hey\n"),
        ([{"role": "system", "content": "be kind"}, *HEY], "[system]be kind\n[user]hey\n"),
        ([{"role": "developer", "content": "be kind"}, *HEY], "[system]be kind\n[user]hey\n"),
        ([*HEY, {"role": "assistant", "content": "you", "name": "me"}, *HEY], "[user]hey\n[assistant]you\n[user]hey\n"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], "[user]a\nb\n"),
        ([{"role": "user", "content": []}], "[user]\n"),
        ([{"role": "user", "content": ""}], "[user]\n"),
        (
            [*HEY, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "c1", "content": "9"}],
            "[user]hey\n[assistant]area(3)\n[tool]9\n",
        ),
    ],
)
async def test_messages(client: httpx.AsyncClient, engine: FakeEngine, messages: list, prompt: str) -> None:
    answer = await chat(client, messages=messages, max_tokens=1)
    assert engine.prompts == [prompt + "[assistant]"]
    assert answer["usage"]["prompt_tokens"] == len(engine.prompts[0])


@pytest.mark.parametrize(
    ("options", "prompt"),
    [
        ({"add_generation_prompt": False}, "[user]hey\n"),
        ({"chat_template_kwargs": {"mood": "gladly, "}}, PROMPT + "gladly, "),
        ({"continue_final_message": True, "messages": [*HEY, {"role": "assistant", "content": "yes"}]}, "[user]hey\n[assistant]yes"),
    ],
)
async def test_template_options(client: httpx.AsyncClient, engine: FakeEngine, options: dict, prompt: str) -> None:
    await chat(client, **options, max_tokens=1)
    assert engine.prompts == [prompt]


async def test_options_reach_the_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    options = {
        "min_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1.5,
        "repetition_penalty": 1.2, "ignore_eos": True, "include_stop_str_in_output": True, "cache_salt": "mine", "max_tokens": 16,
    }  # fmt: skip
    await chat(
        client, **options, logit_bias={"7": -100}, stop="q", stop_token_ids=[9], seed=-5, logprobs=True, top_logprobs=2,
        speculation={"max_nodes": 3}, user="me", metadata={"a": "b"}, store=True, priority=-1, response_format={"type": "text"},
        tools=[], tool_choice="none", made_up=1,
    )  # fmt: skip
    (params,) = engine.params
    assert {name: getattr(params, name) for name in options} == options
    assert (params.logit_bias, params.stop, params.stop_token_ids, params.seed) == ({7: -100.0}, ("q",), (9,), -5)
    assert (params.logprobs, params.prompt_logprobs, params.max_draft_nodes) == (2, None, 3)


async def test_choices_have_seeds_of_their_own(client: httpx.AsyncClient) -> None:
    answer = await chat(client, n=3, seed=2, max_tokens=2)
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["cd", "de", "ef"]
    assert answer["usage"]["prompt_tokens"] == len(PROMPT)
    assert answer["metrics"] == {"speculative_decoding": None}


async def test_stop_string(client: httpx.AsyncClient) -> None:
    (choice,) = (await chat(client, stop=["de", "zz"]))["choices"]
    assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == ("abc", "stop", "de")


async def test_logprobs(client: httpx.AsyncClient) -> None:
    (choice,) = (await chat(client, max_tokens=2, logprobs=True, top_logprobs=2))["choices"]
    alternatives = [{"token": "!", "logprob": -0.5, "bytes": [33]}, {"token": '"', "logprob": -1.5, "bytes": [34]}]
    assert choice["logprobs"] == {
        "content": [{"token": c, "logprob": -1.0, "bytes": [ord(c)], "top_logprobs": alternatives} for c in "ab"],
        "refusal": None,
    }


async def test_logprobs_without_alternatives(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    (choice,) = (await chat(client, max_tokens=2, logprobs=True))["choices"]
    assert [token["top_logprobs"] for token in choice["logprobs"]["content"]] == [[], []]
    assert (await chat(client, max_tokens=2, logprobs=False))["choices"][0]["logprobs"] is None
    assert [params.logprobs for params in engine.params] == [0, None]


async def test_bytes_join_to_the_text(client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens in the middle of a character complete nothing; the one that ends it has all its bytes."""
    ids = engine.tokenizer.backend_tokenizer.encode("é€").ids
    monkeypatch.setattr(engine, "_letter", lambda i: ids[i % len(ids)])
    (choice,) = (await chat(client, max_tokens=5, logprobs=True))["choices"]
    report = choice["logprobs"]["content"]
    assert choice["message"]["content"] == "é€"
    assert bytes(byte for token in report for byte in token["bytes"]).decode() == "é€"
    assert [token["token"] for token in report] == ["�", "é", "�", "�", "€"]


async def test_stream(client: httpx.AsyncClient) -> None:
    events = await deltas(client, max_tokens=5)
    assert all(set(event) == {"id", "object", "created", "model", "choices"} for event in events)
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    going_on = {"index": 0, "logprobs": None, "finish_reason": None, "stop_reason": None}
    first, *parts, last = [event["choices"][0] for event in events]
    assert first == {**going_on, "delta": {"role": "assistant", "content": ""}}
    assert all(set(part["delta"]) == {"content"} and part["delta"]["content"] for part in parts)
    assert text(events) == "abcde"
    assert last == {**going_on, "delta": {}, "finish_reason": "length"}


async def test_usage_in_the_closing_event(client: httpx.AsyncClient) -> None:
    *events, last = await deltas(client, max_tokens=5, stream_options={"include_usage": True})
    assert all(event["usage"] is None and "metrics" not in event for event in events)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 5
    assert last["metrics"]["speculative_decoding"]["num_spec_steps"] == 3


async def test_stream_of_several_choices(client: httpx.AsyncClient) -> None:
    events = await deltas(client, n=2, seed=0, max_tokens=4, stop="d")
    assert [text(events, index) for index in range(2)] == ["abc", "bc"]
    for index in range(2):
        choices = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert [bool(choice["delta"].get("role")) for choice in choices] == [True] + [False] * (len(choices) - 1)
        assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
        assert choices[-1]["stop_reason"] == "d"


async def test_logprobs_continue_over_events(client: httpx.AsyncClient) -> None:
    """Those of a stop string, whose text is cut off, come as well."""
    events = await deltas(client, logprobs=True, stop="ef")
    assert text(events) == "abcd"
    reports = [event["choices"][0]["logprobs"] for event in events]
    assert [token["token"] for report in reports if report for token in report["content"]] == list("abcdef")


async def test_failure_is_an_event_and_done_closes(client: httpx.AsyncClient) -> None:
    *events, last = await deltas(client, messages=[{"role": "user", "content": "fail!"}])
    assert text(events) == "ab"
    assert set(last["error"]) == {"message", "type", "param", "code"}
