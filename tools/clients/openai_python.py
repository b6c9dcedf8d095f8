"""openai-python: what it makes of whole answers, streams, structured output, calls of functions, errors and refusals."""

import asyncio
import json
import time
from threading import Timer
from typing import Any, Literal

import openai
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel

from tools.clients.checks import KEY, ROWS, Setting, expect

MODEL, PROMPT = "demo", "Once upon a time"
CHAT: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Which animal has four legs?"}]
SAMPLING: dict[str, Any] = {"temperature": 0.8, "seed": 3}
HELD_SECONDS = 1.5  # how long the server stays full, from the first refusal on


class Animal(BaseModel):
    """An animal."""

    kind: Literal["cat", "dog", "hen"]
    legs: int
    is_wild: bool


def synchronous(setting: Setting, key: str = KEY, retries: int = 0) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{setting.url}/v1", api_key=key, max_retries=retries)


def check_answers(setting: Setting) -> str:
    client = synchronous(setting)
    expect([model.id for model in client.models.list()] == [MODEL], "the list of models is not the served one")
    expect(client.models.retrieve(MODEL).id == MODEL, "the served model is not found by its name")
    whole = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=24, **SAMPLING)
    events = list(
        client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=24, stream=True, stream_options={"include_usage": True}, **SAMPLING
        )
    )
    text = "".join(choice.text for event in events for choice in event.choices)
    expect(text == whole.choices[0].text, f"completion: {text!r} in a stream, {whole.choices[0].text!r} as a whole")
    usage = events[-1].usage
    expect(usage and whole.usage and usage.total_tokens == whole.usage.total_tokens, f"usage {usage} in a stream, {whole.usage} as a whole")
    options: dict[str, Any] = {"model": MODEL, "messages": CHAT, "max_completion_tokens": 24, **SAMPLING}
    answer = client.chat.completions.create(**options).choices[0]
    parts = [event.choices[0] for event in client.chat.completions.create(**options, stream=True)]
    text = "".join(part.delta.content or "" for part in parts)
    expect(text == answer.message.content, f"chat: {text!r} in a stream, {answer.message.content!r} as a whole")
    expect(parts[0].delta.role == answer.message.role == "assistant", f"role {parts[0].delta.role}")
    expect(parts[-1].finish_reason == answer.finish_reason, f"finish reasons {parts[-1].finish_reason} and {answer.finish_reason}")
    return "the same texts"


def check_asynchronous(setting: Setting) -> str:
    return asyncio.run(_many_at_once(setting))


async def _many_at_once(setting: Setting, requests: int = 2 * ROWS) -> str:
    """As many as the server holds: greedy texts do not depend on their company, streamed or not."""
    async with openai.AsyncOpenAI(base_url=f"{setting.url}/v1", api_key=KEY, max_retries=0) as client:

        async def ask(number: int) -> str | None:
            prompt: list[ChatCompletionMessageParam] = [{"role": "user", "content": f"Count {number // 2} hens."}]
            options: dict[str, Any] = {"model": MODEL, "messages": prompt, "max_completion_tokens": 24, "temperature": 0}
            if number % 2:
                return (await client.chat.completions.create(**options)).choices[0].message.content
            events = await client.chat.completions.create(**options, stream=True)
            return "".join([event.choices[0].delta.content or "" async for event in events])

        texts = await asyncio.gather(*(ask(number) for number in range(requests)))
    expect(texts[::2] == texts[1::2], f"streamed: {texts[::2]}, whole: {texts[1::2]}")
    return f"{requests} requests"


def check_structured(setting: Setting) -> str:
    client = synchronous(setting)
    parsed = client.chat.completions.parse(model=MODEL, messages=CHAT, response_format=Animal, max_completion_tokens=128, **SAMPLING)
    animal = parsed.choices[0].message.parsed
    expect(isinstance(animal, Animal), f"not parsed: {parsed.choices[0].message.content!r}")
    with client.chat.completions.stream(
        model=MODEL, messages=CHAT, response_format=Animal, max_completion_tokens=128, **SAMPLING
    ) as stream:
        streamed = stream.get_final_completion().choices[0].message.parsed
    expect(streamed == animal, f"{streamed!r} in a stream, {animal!r} as a whole")
    plain = client.chat.completions.create(
        model=MODEL, messages=CHAT, response_format={"type": "json_object"}, max_completion_tokens=400, **SAMPLING
    ).choices[0]
    expect(plain.finish_reason == "length" or isinstance(json.loads(plain.message.content or ""), dict), "no JSON object")
    return repr(animal)


def check_tools(setting: Setting) -> str:
    client, tools = synchronous(setting), [openai.pydantic_function_tool(Animal, name="report_animal")]
    options: dict[str, Any] = {"model": MODEL, "messages": CHAT, "tools": tools, "max_completion_tokens": 256, **SAMPLING}
    forced = client.chat.completions.parse(**options, tool_choice="required", parallel_tool_calls=False)
    called = forced.choices[0].message.tool_calls or []
    expect(len(called) == 1 and isinstance(called[0].function.parsed_arguments, Animal), f"forced: {called}")
    expect(forced.choices[0].finish_reason == "tool_calls", f"finish reason {forced.choices[0].finish_reason}")
    options["tool_choice"] = {"type": "function", "function": {"name": "report_animal"}}
    (named,) = client.chat.completions.parse(**options).choices[0].message.tool_calls or []
    expect(named.function.name == "report_animal", f"named: {named}")
    expect(isinstance(named.function.parsed_arguments, Animal), f"named: {named}")
    with client.chat.completions.stream(**options) as stream:
        deltas = "".join(event.arguments_delta for event in stream if event.type == "tool_calls.function.arguments.delta")
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or []
    expect(
        deltas == streamed.function.arguments == named.function.arguments,
        f"{deltas!r} in a stream, {named.function.arguments!r} as a whole",
    )
    _answer_call(client, options, named.id, named.function.arguments)
    return f"{named.function.name}: {named.function.parsed_arguments!r}"


def _answer_call(client: openai.OpenAI, options: dict[str, Any], call: str, arguments: str) -> None:
    """The turn after a call: its result goes back to the model."""
    made = {"id": call, "type": "function", "function": {"name": "report_animal", "arguments": arguments}}
    turns = [*CHAT, {"role": "assistant", "tool_calls": [made]}, {"role": "tool", "tool_call_id": call, "content": "Thank you."}]
    answer = client.chat.completions.create(**{**options, "messages": turns, "tool_choice": "none", "max_completion_tokens": 8}).choices[0]
    expect(answer.message.content and not answer.message.tool_calls, f"after the result: {answer.message}")


def check_errors(setting: Setting) -> str:
    client = synchronous(setting)
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    cases: list[tuple[type[openai.APIStatusError], str | None, str | None, openai.OpenAI, dict[str, Any]]] = [
        (openai.BadRequestError, None, "temperature", client, {"temperature": 3}),
        (openai.BadRequestError, None, "response_format", client, {"extra_body": {"response_format": schema}}),
        (openai.BadRequestError, "context_length_exceeded", None, client, {"max_tokens": 10**6}),
        (openai.NotFoundError, "model_not_found", "model", client, {"model": "other"}),
        (openai.AuthenticationError, "invalid_api_key", None, synchronous(setting, key="Wrong"), {}),
    ]
    for kind, code, param, asking, fields in cases:
        for stream in (False, True):
            try:
                asking.completions.create(**{"model": MODEL, "prompt": PROMPT, "stream": stream, **fields})
            except openai.APIStatusError as error:
                found = type(error), error.code, error.param
                expect(found == (kind, code, param), f"{fields}: {found}, not {(kind, code, param)}")
                expect(error.request_id, f"{fields}: no request id")
            else:
                expect(False, f"{fields}: no error")
    return f"{len(cases)} kinds, whole and streamed"


def check_retries(setting: Setting) -> str:
    """A request that finds the server full is refused, and comes through once there is a place."""
    holding = synchronous(setting).completions.create(
        model=MODEL, prompt=PROMPT, n=2 * ROWS, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(holding))
    try:
        synchronous(setting).completions.create(model=MODEL, prompt=PROMPT, max_tokens=1)
        expect(False, "the server took more than it holds")
    except openai.InternalServerError as error:
        expect((error.status_code, error.code) == (503, "server_overloaded"), f"{error.status_code}, {error.code}")
        wait = float(error.response.headers["retry-after"])
    Timer(HELD_SECONDS, holding.close).start()
    start = time.monotonic()
    answer = synchronous(setting, retries=20).completions.with_raw_response.create(model=MODEL, prompt=PROMPT, max_tokens=1)
    seconds = time.monotonic() - start
    expect(answer.retries_taken >= 1, "it was never refused")
    expect(seconds >= wait * answer.retries_taken, f"{answer.retries_taken} retries in {seconds:.1f} s, though Retry-After is {wait:g} s")
    expect(answer.parse().choices[0].finish_reason == "length", "no answer in the end")
    return f"answered after {answer.retries_taken} retries and {seconds:.1f} s"
