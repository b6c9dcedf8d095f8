"""Functions that a model may or must call: what the template and the engine are told, and calls in answers and in streams."""

import json
from collections.abc import AsyncIterator

import httpx
import jsonschema
import pytest

from server.engine.types import Grammar
from tests.server.clients import check, read_events, serving
from tests.server.fake_engine import CHAT_TEMPLATE, FakeEngine

pytestmark = pytest.mark.anyio
PATH = "/v1/chat/completions"
HEY = [{"role": "user", "content": "hey"}]
POINT = {
    "type": "object",
    "properties": {"at": {"$ref": "#/$defs/point"}, "zoom": {"type": "integer"}},
    "required": ["at"],
    "$defs": {"point": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}},
}
SHOW = {"type": "function", "function": {"name": "show", "description": "Show a place.", "parameters": POINT}}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [SHOW, NOW]
NAMED = {"type": "function", "function": {"name": "show"}}
CALLING = (
    'So.\n<tool_call>\n{"name": "show", "arguments": {"at": [1, 2]}}\n</tool_call>\n<tool_call>{"name": "now", "arguments": {}}</tool_call>'
)
TEMPLATE = "{% if tools %}[tools]{% for tool in tools %}{{ tool | tojson }}{% endfor %}\n{% endif %}" + CHAT_TEMPLATE


class Says(FakeEngine):
    """Every request says ``text``, two tokens per step, and ends."""

    def __init__(self, text: str, template: str = TEMPLATE) -> None:
        super().__init__(template)
        self.said = [*self.tokenizer.backend_tokenizer.encode(text).ids, 256]

    def _letter(self, i: int) -> int:
        return self.said[min(i, len(self.said) - 1)]


@pytest.fixture
async def hermes() -> AsyncIterator[tuple[httpx.AsyncClient, Says]]:
    engine = Says(CALLING)
    async with serving(engine, tool_call_parser="hermes") as client:
        yield client, engine


async def answer(client: httpx.AsyncClient, **body: object) -> dict:
    response = await client.post(PATH, json={"messages": HEY, "tools": TOOLS, **body})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


async def streamed(client: httpx.AsyncClient, **body: object) -> tuple[str, list[dict], str]:
    """Content, calls and reason of a streamed answer, put together as clients do."""
    content, calls, reason = "", list[dict](), ""
    for event in read_events(await client.post(PATH, json={"messages": HEY, "tools": TOOLS, "stream": True, **body})):
        (choice,) = event["choices"]
        content += choice["delta"].get("content") or ""
        for call in choice["delta"].get("tool_calls", []):
            if call["index"] == len(calls):
                assert call["id"]
                assert (call["type"], call["function"]["arguments"]) == ("function", "")
                calls.append({"name": call["function"]["name"], "arguments": ""})
            else:
                assert call["index"] == len(calls) - 1
                assert set(call) == {"index", "function"}
                assert set(call["function"]) == {"arguments"}
            calls[-1]["arguments"] += call["function"]["arguments"]
        reason = choice["finish_reason"] or reason
    return content, calls, reason


def functions(choice: dict) -> list[dict]:
    calls = choice["message"]["tool_calls"]
    assert len({call["id"] for call in calls}) == len(calls)
    assert all(set(call) == {"id", "type", "function"} and call["type"] == "function" for call in calls)
    return [call["function"] for call in calls]


async def test_the_template_is_told(hermes: tuple[httpx.AsyncClient, Says]) -> None:
    client, engine = hermes
    await answer(client)
    await answer(client, tool_choice="none")
    told, untold = engine.prompts
    assert told.startswith('[tools]{"type": "function", "function": {"name": "show", "description": "Show a place."')
    assert "tools" not in untold
    assert [params.grammar for params in engine.params] == [None, None]


async def test_calls_of_its_own_accord(hermes: tuple[httpx.AsyncClient, Says]) -> None:
    client, _ = hermes
    choice = await answer(client)
    assert choice["message"]["content"] == "So."
    assert functions(choice) == [{"name": "show", "arguments": '{"at": [1, 2]}'}, {"name": "now", "arguments": "{}"}]
    assert choice["finish_reason"] == "tool_calls"
    content, calls, reason = await streamed(client)
    assert (content, calls, reason) == ("So.", functions(choice), "tool_calls")


async def test_one_call_at_most(hermes: tuple[httpx.AsyncClient, Says]) -> None:
    client, _ = hermes
    choice = await answer(client, parallel_tool_calls=False)
    assert [function["name"] for function in functions(choice)] == ["show"]
    assert (await streamed(client, parallel_tool_calls=False))[1] == functions(choice)


async def test_without_tools_a_call_is_text(hermes: tuple[httpx.AsyncClient, Says]) -> None:
    client, _ = hermes
    for options in ({"tool_choice": "none"}, {"tools": []}, {"tools": None}):
        choice = await answer(client, **options)
        assert choice["message"] == {"role": "assistant", "content": CALLING, "refusal": None}
        assert choice["finish_reason"] == "stop"


async def test_an_answer_without_calls() -> None:
    async with serving(Says("No { need."), tool_call_parser="llama3_json") as client:
        choice = await answer(client)
        assert choice["message"] == {"role": "assistant", "content": "No { need.", "refusal": None}
        assert (choice["finish_reason"], await streamed(client)) == ("stop", ("No { need.", [], "stop"))


async def test_a_call_that_is_cut_off(hermes: tuple[httpx.AsyncClient, Says]) -> None:
    client, _ = hermes
    choice = await answer(client, max_tokens=56)
    assert choice["finish_reason"] == "length"
    [function] = functions(choice)
    assert '{"at": [1, 2]}'.startswith(function["arguments"])
    assert (await streamed(client, max_tokens=56)) == ("So.", [function], "length")


async def test_llama() -> None:
    async with serving(Says('{"name": "show", "parameters": {"at": [1, 2]}}'), tool_call_parser="llama3_json") as client:
        choice = await answer(client, tool_choice="auto")
        assert choice["message"]["content"] is None
        assert functions(choice) == [{"name": "show", "arguments": '{"at": [1, 2]}'}]
        assert await streamed(client) == ("", functions(choice), "tool_calls")


async def test_a_named_function() -> None:
    """Its arguments are all that the model writes; no parser is needed."""
    engine = Says('{"at": [1, 2]}', CHAT_TEMPLATE)
    async with serving(engine) as client:
        choice = await answer(client, tool_choice=NAMED)
        assert choice["message"]["content"] is None
        assert functions(choice) == [{"name": "show", "arguments": '{"at": [1, 2]}'}]
        assert await streamed(client, tool_choice=NAMED) == ("", functions(choice), "tool_calls")
        assert engine.params[0].grammar == Grammar("json_schema", json.dumps(POINT))


async def test_required_calls() -> None:
    engine = Says('[{"name": "now", "arguments": {}}, {"name": "show", "arguments": {"at": [1, 2]}}]', CHAT_TEMPLATE)
    async with serving(engine) as client:
        choice = await answer(client, tool_choice="required")
        assert choice["message"]["content"] is None
        assert functions(choice) == [{"name": "now", "arguments": "{}"}, {"name": "show", "arguments": '{"at": [1, 2]}'}]
        assert await streamed(client, tool_choice="required") == ("", functions(choice), "tool_calls")
        await answer(client, tool_choice="required", parallel_tool_calls=False)
    several, _, one = (json.loads(params.grammar.text) for params in engine.params if params.grammar)
    calls = [{"name": "show", "arguments": {"at": [1, 2]}}, {"name": "now", "arguments": {}}]
    jsonschema.validate(calls, several)
    jsonschema.validate(calls[:1], one)
    wrong = [
        [],
        [{"name": "show", "arguments": {"at": [1]}}],
        [{"name": "now", "arguments": {"x": 1}}],
        [{"name": "other", "arguments": {}}],
    ]
    for refused, schema in [*((refused, several) for refused in wrong), (calls, one)]:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(refused, schema)


async def test_logprobs_of_calls_come_once(hermes: tuple[httpx.AsyncClient, Says]) -> None:
    client, engine = hermes
    events = read_events(await client.post(PATH, json={"messages": HEY, "tools": TOOLS, "stream": True, "logprobs": True}))
    reports = [event["choices"][0]["logprobs"] for event in events]
    assert sum(len(report["content"]) for report in reports if report) == len(engine.said)


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("tools", {"tools": [{"type": "function"}]}), ("tools", {"tools": [{"type": "retrieval"}]}), ("tools", {"tools": {}}),
        ("tools", {"tools": [NOW, NOW]}), ("tools", {"tools": [{"type": "function", "function": {"name": "a b"}}]}),
        ("tools", {"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)]}),
        ("tools", {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "wood"}}}], "tool_choice": "required"}),
        ("tool_choice", {"tools": None, "tool_choice": "required"}), ("tool_choice", {"tools": None, "tool_choice": "auto"}),
        ("tool_choice", {"tool_choice": "some"}), ("tool_choice", {"tool_choice": {"type": "function", "function": {"name": "other"}}}),
        ("tool_choice", {"tool_choice": {"type": "function"}}), ("parallel_tool_calls", {"parallel_tool_calls": 3}),
        ("response_format", {"tool_choice": "required", "response_format": {"type": "json_object"}}),
        ("structured_outputs", {"structured_outputs": {"regex": "a"}}), ("min_tokens", {"tool_choice": "required", "min_tokens": 1}),
    ],
)  # fmt: skip
async def test_refused(hermes: tuple[httpx.AsyncClient, Says], param: str, body: dict) -> None:
    client, engine = hermes
    check(await client.post(PATH, json={"messages": HEY, "tools": TOOLS, **body}), 400, param=param)
    assert not engine.params


async def test_free_calls_need_a_parser_and_a_template_that_knows_tools() -> None:
    async with serving(Says("x")) as client:
        assert "--tool-call-parser" in check(await client.post(PATH, json={"messages": HEY, "tools": TOOLS}), 400, param="tools")
    async with serving(Says("x", CHAT_TEMPLATE), tool_call_parser="hermes") as client:
        assert "template" in check(await client.post(PATH, json={"messages": HEY, "tools": TOOLS}), 400, param="tools")
