"""Every sampling option, with speculation and without, whole and streamed, one choice and three, with log-probabilities and echo."""

import asyncio
import json
from collections.abc import AsyncIterator
from itertools import product
from pathlib import Path

import httpx
import pytest

from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.openai.protocol import GenerationRequest
from tests.server.clients import read_events, serving

pytestmark = pytest.mark.anyio
DEMO = Path(__file__).resolve().parents[2] / "drafts" / "demo"
PROMPT = "Once upon a time there was"
SAMPLED = {"temperature": 1.0, "seed": 7}
OPTIONS: dict[str, dict] = {
    "temperature": {"temperature": 0.0},
    "seed": SAMPLED,
    "top_p": {**SAMPLED, "top_p": 0.6},
    "top_k": {**SAMPLED, "top_k": 3},
    "min_p": {**SAMPLED, "min_p": 0.2},
    "presence_penalty": {"temperature": 0.0, "presence_penalty": 1.5},
    "frequency_penalty": {**SAMPLED, "frequency_penalty": 1.5},
    "repetition_penalty": {"temperature": 0.0, "repetition_penalty": 1.4},
    "logit_bias": {"temperature": 0.0, "logit_bias": {"300": 4.0, "301": -100}},
    "min_tokens": {**SAMPLED, "min_tokens": 10, "stop": ["e"]},
    "stop": {"temperature": 0.0, "stop": ["ttl", "ved t"]},
    "include_stop_str_in_output": {"temperature": 0.0, "stop": ["ttl", "ved t"], "include_stop_str_in_output": True},
    "stop_token_ids": {**SAMPLED, "stop_token_ids": list(range(260, 280))},
    "ignore_eos": {**SAMPLED, "ignore_eos": True},
    "response_format": {**SAMPLED, "response_format": {"type": "json_object"}},
    "structured_outputs": {**SAMPLED, "structured_outputs": {"choice": ["seven apples", "seven pears", "eight"]}},
}
NO_SAMPLING = {
    "model", "n", "stream", "stream_options", "speculation", "cache_salt", "priority", "user", "metadata", "store", "allowed_token_ids",
    "bad_words", "use_beam_search", "prompt_logprobs",
}  # fmt: skip
EXTRAS: dict[str, list[dict]] = {
    "/v1/completions": [{}, {"logprobs": 2}, {"echo": True}, {"echo": True, "logprobs": 0}],
    "/v1/chat/completions": [{}, {"logprobs": True, "top_logprobs": 2}],
}


@pytest.fixture(scope="module")
def demo() -> Engine:
    return Engine.from_config(
        EngineConfig(model=str(DEMO / "target"), draft=str(DEMO / "vsd"), load_rule=False, tree_nodes=10, max_num_seqs=32, threads=1)
    )


@pytest.fixture
async def client(demo: Engine) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(demo, max_queued_requests=4096) as client:  # type: ignore[arg-type]
        yield client


def test_no_option_is_forgotten() -> None:
    assert set(OPTIONS) == set(GenerationRequest.model_fields) - NO_SAMPLING


def whole(answer: dict) -> tuple[list, dict]:
    """Text, log-probabilities and reasons of every choice, and the usage."""
    found = []
    for choice in sorted(answer["choices"], key=lambda choice: choice["index"]):
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        found.append([text, choice["logprobs"], choice["finish_reason"], choice.get("stop_reason")])
    return found, answer["usage"]


def streamed(events: list[dict]) -> tuple[list, dict]:
    """The same, put together from events."""
    found: dict[int, list] = {}
    for choice in (choice for event in events for choice in event["choices"]):
        now = found.setdefault(choice["index"], ["", None, None, None])
        now[0] += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
        for name, part in (choice.get("logprobs") or {}).items():
            if part is not None:
                now[1] = now[1] or {}
                now[1][name] = now[1].get(name, []) + part
        if choice["finish_reason"] is not None:
            now[2:] = choice["finish_reason"], choice.get("stop_reason")
    return [found[i] for i in sorted(found)], next(event["usage"] for event in events if event.get("usage"))


async def ask(client: httpx.AsyncClient, path: str, body: dict, speculation: bool, stream: bool) -> tuple[list, dict]:
    body = {"max_tokens": 14, **body, "speculation": {"enabled": speculation}}
    body |= {"prompt": PROMPT} if path == "/v1/completions" else {"messages": [{"role": "user", "content": PROMPT}]}
    if not stream:
        response = await client.post(path, json=body, timeout=300)
        assert response.status_code == 200, response.text
        return whole(response.json())
    response = await client.post(path, json={**body, "stream": True, "stream_options": {"include_usage": True}}, timeout=300)
    return streamed(read_events(response))


def json_like(logprobs: dict | None) -> object:
    """Without what is null, which a stream leaves out."""
    return None if logprobs is None else json.loads(json.dumps({name: part for name, part in logprobs.items() if part}))


def rounded(value: object) -> object:
    """Log-probabilities to within what a batch's other rows change; lists and objects as they are."""
    if isinstance(value, float):
        return pytest.approx(value, abs=1e-3)
    if isinstance(value, list):
        return [rounded(item) for item in value]
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items() if item is not None}
    return value


def tokens(logprobs: dict) -> list:
    return logprobs["tokens"] if "tokens" in logprobs else [token["token"] for token in logprobs["content"]]


@pytest.mark.parametrize("path", EXTRAS)
@pytest.mark.parametrize("option", OPTIONS)
async def test_the_ways_to_ask_agree(client: httpx.AsyncClient, option: str, path: str) -> None:
    cells = [{**OPTIONS[option], **extra, "n": n} for extra, n in product(EXTRAS[path], (1, 3))]
    ways = list(product((True, False), (True, False)))
    answers = await asyncio.gather(*(ask(client, path, cell, *way) for cell, way in product(cells, ways)))
    for cell, (wanted, *others) in zip(cells, zip(*[iter(answers)] * len(ways), strict=True), strict=True):
        choices, usage = wanted
        assert len(choices) == cell["n"]
        for others_choices, others_usage in others:
            assert others_usage["completion_tokens"] == usage["completion_tokens"], cell
            assert [(c[0], *c[2:]) for c in others_choices] == [(c[0], *c[2:]) for c in choices], cell
            for ours, theirs in zip(choices, others_choices, strict=True):
                assert json_like(theirs[1]) == rounded(json_like(ours[1])), cell
        if "logprobs" in cell and "echo" not in cell:
            assert sum(len(tokens(choice[1])) for choice in choices) == usage["completion_tokens"], "no token beyond the end"


async def test_choices_differ_and_come_again(client: httpx.AsyncClient) -> None:
    ask_three = {**SAMPLED, "n": 3}
    first, second = await asyncio.gather(*(ask(client, "/v1/completions", ask_three, True, False) for _ in range(2)))
    assert first[0] == second[0]
    assert len({choice[0] for choice in first[0]}) == 3


async def test_a_stop_string_inside_an_accepted_block(client: httpx.AsyncClient) -> None:
    """The answer is cut there, though the tokens after it were accepted in the same step."""
    body = {"prompt": PROMPT, "max_tokens": 40, "temperature": 0.0, "logprobs": 0}
    answer = (await client.post("/v1/completions", json=body)).json()
    assert answer["metrics"]["speculative_decoding"]["mean_acceptance_length"] > 2
    (choice,) = answer["choices"]
    cut = 0
    for place in range(6, 30):
        text = choice["text"]
        stop = text[place : place + 3]
        found = text.index(stop)
        cut_answer = (await client.post("/v1/completions", json={**body, "stop": stop})).json()
        (other,) = cut_answer["choices"]
        assert other["text"] == text[:found]
        assert other["stop_reason"] == stop
        count = cut_answer["usage"]["completion_tokens"]
        assert other["logprobs"]["tokens"] == choice["logprobs"]["tokens"][:count]
        assert len("".join(other["logprobs"]["tokens"][:-1])) < found + len(stop), "no token after the one that completes it"
        steps = cut_answer["metrics"]["speculative_decoding"]
        cut += 1 + steps["num_spec_steps"] + steps["num_accepted_draft_tokens"] > count  # the first token came with the prompt
    assert cut > 5, "some steps accepted more than was kept"
