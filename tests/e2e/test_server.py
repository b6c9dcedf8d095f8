"""The real server process: what clients see, and that nothing stays behind."""

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import jsonschema
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.e2e.conftest import Server, launch, metric, wait_for_url, wait_until

PROMPT = "Once upon a time"
CHAT: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "Tell stories."},
    {"role": "user", "content": [{"type": "text", "text": "Write a story that begins like this: Once upon a time"}]},
]


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def test_openai_client(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["served"]
    whole = client.completions.create(model="served", prompt=PROMPT, max_tokens=20, temperature=0)
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 20
    assert whole.choices[0].finish_reason in ("length", "stop")
    parts = list(
        client.completions.create(
            model="served", prompt=PROMPT, max_tokens=20, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(choice.text for part in parts for choice in part.choices) == whole.choices[0].text
    usage = parts[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)


def test_openai_chat_client(client: openai.OpenAI, http: httpx.Client) -> None:
    """Whole and streamed, the text is that of the prompt which the template makes."""
    options = {"model": "served", "messages": CHAT, "max_completion_tokens": 20, "temperature": 0.7, "seed": 3}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    (choice,) = whole.choices
    assert choice.message.role == "assistant"
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert bytes(byte for token in choice.logprobs.content for byte in token.bytes or []).decode() == choice.message.content
    assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
    parts = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(c.delta.content or "" for part in parts for c in part.choices) == choice.message.content
    assert parts[-2].choices[0].finish_reason == choice.finish_reason
    assert whole.usage is not None
    assert parts[-1].usage is not None
    assert parts[-1].usage.total_tokens == whole.usage.total_tokens

    tokens = http.post("/tokenize", json={"messages": CHAT}).json()["tokens"]
    assert len(tokens) == whole.usage.prompt_tokens
    prompt = http.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert http.post("/tokenize", json={"prompt": prompt, "add_special_tokens": False}).json()["tokens"] == tokens
    completion = client.completions.create(model="served", prompt=tokens, max_tokens=20, temperature=0.7, seed=3)
    assert completion.choices[0].text == choice.message.content
    assert http.get("/tokenizer_info").json()["chat_template"]


def test_chat_goes_on_to_the_end_of_the_context(http: httpx.Client) -> None:
    words = "one two three "
    tokens = http.post("/tokenize", json={"prompt": words * 10}).json()
    repeats = (tokens["max_model_len"] - 100) * 10 // tokens["count"]
    body = {"messages": [{"role": "user", "content": words * repeats}], "ignore_eos": True, "temperature": 0}
    answer = http.post("/v1/chat/completions", json=body).json()
    assert answer["usage"]["total_tokens"] == tokens["max_model_len"]
    assert answer["choices"][0]["finish_reason"] == "length"
    if figures := answer["metrics"]["speculative_decoding"]:
        plain = http.post("/v1/chat/completions", json={**body, "speculation": {"enabled": False}}).json()
        assert plain["choices"][0]["message"] == answer["choices"][0]["message"]
        assert figures["num_spec_steps"] >= plain["metrics"]["speculative_decoding"]["num_spec_steps"] == 0


def test_openai_client_reads_the_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="other", prompt=PROMPT)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="served", prompt=PROMPT, max_tokens=10**6)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(model="served", messages=CHAT, tools=[{"type": "function", "function": {"name": "f"}}])
    assert tools.value.param == "tools"
    assert long.value.request_id


SCHEMA = {
    "type": "object",
    "properties": {"animal": {"enum": ["cat", "dog"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["animal", "legs"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0, 1])
def test_structured_output_of_the_openai_client(client: openai.OpenAI, temperature: float) -> None:
    """Valid, and the same without speculation."""
    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA, "strict": True}}
    options = {"model": "served", "messages": CHAT, "temperature": temperature, "seed": 3, "max_tokens": 96}
    answers = [
        client.chat.completions.create(**options, response_format=form, extra_body={"speculation": {"enabled": enabled}}).choices[0]
        for enabled in (True, False)
    ]
    assert answers[0].message.content == answers[1].message.content
    assert answers[0].finish_reason == "stop"
    jsonschema.validate(json.loads(answers[0].message.content or ""), SCHEMA)


def test_forced_calls_of_the_openai_client(client: openai.OpenAI) -> None:
    tools = [{"type": "function", "function": {"name": "count", "parameters": SCHEMA}}]
    named = {"type": "function", "function": {"name": "count"}}
    options = {"model": "served", "messages": CHAT, "tools": tools, "seed": 1, "max_tokens": 128, "parallel_tool_calls": False}
    for choice in ("required", named):
        answer = client.chat.completions.create(**options, tool_choice=choice).choices[0]
        assert answer.finish_reason == "tool_calls"
        [call] = answer.message.tool_calls or []
        assert call.function.name == "count"
        jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
        events = client.chat.completions.create(**options, tool_choice=choice, stream=True)
        parts = [part for event in events for part in event.choices[0].delta.tool_calls or []]
        assert parts[0].function.name == "count"
        assert "".join(part.function.arguments for part in parts) == call.function.arguments


def test_seed_repeats_and_batch_does_not_matter(client: openai.OpenAI) -> None:
    def generate(seed: int) -> list[str]:
        return [choice.text for choice in client.completions.create(model="served", prompt=PROMPT, max_tokens=24, seed=seed, n=2).choices]

    alone = [generate(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(generate, range(4)))
    assert together == alone
    assert [pair[1] for pair in alone[:3]] == [pair[0] for pair in alone[1:]]


def test_scoring_as_lm_eval_does(http: httpx.Client) -> None:
    first = http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "logprobs": 1}).json()["choices"][0]
    assert all(
        max(top.values()) == chosen
        for top, chosen in zip(first["logprobs"]["top_logprobs"], first["logprobs"]["token_logprobs"], strict=True)
    )
    text = PROMPT + "".join(first["logprobs"]["tokens"])
    body = {"prompt": [text, text], "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True, "seed": 1}
    answer = http.post("/v1/completions", json=body).json()
    for choice in answer["choices"]:
        report = choice["logprobs"]
        assert report["token_logprobs"][0] is None
        assert report["top_logprobs"][0] is None
        assert (
            len(report["tokens"]) == len(report["text_offset"]) == len(report["top_logprobs"]) == answer["usage"]["prompt_tokens"] // 2 + 1
        )
        assert choice["text"].startswith(text)
    assert http.post("/v1/completions", json={**body, "max_tokens": 0}).json()["choices"][0]["text"] == text


def test_every_option_at_once(http: httpx.Client) -> None:
    body = {
        "prompt": PROMPT, "max_tokens": 12, "min_tokens": 3, "temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.01,
        "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1, "logit_bias": {"40": 5, "41": -100}, "seed": 7,
        "stop": ["zzz"], "stop_token_ids": [3], "ignore_eos": True, "include_stop_str_in_output": True, "n": 2, "logprobs": 5,
    }  # fmt: skip
    first, again = (http.post("/v1/completions", json=body) for _ in range(2))
    assert first.status_code == 200, first.text
    for ours, theirs in zip(first.json()["choices"], again.json()["choices"], strict=True):
        chosen, repeated = ours.pop("logprobs"), theirs.pop("logprobs")
        assert ours == theirs
        assert chosen["tokens"] == repeated["tokens"]
        # The load rule sizes trees by the clock, and sums of other shapes round otherwise.
        assert chosen["token_logprobs"] == pytest.approx(repeated["token_logprobs"], abs=1e-3)
        assert [len(top) for top in chosen["top_logprobs"]] == [len(top) for top in repeated["top_logprobs"]]
    counts = [{name: response.json()["usage"][name] for name in ("prompt_tokens", "completion_tokens")} for response in (first, again)]
    assert counts[0] == counts[1]


def test_a_prompt_is_computed_once(http: httpx.Client) -> None:
    body = {"prompt": "All that glitters " * 6, "max_tokens": 4, "temperature": 0, "cache_salt": "glitter"}
    before, found = metric(http, "prefix_cache_queries_total"), metric(http, "prefix_cache_hits_total")
    first, again = (http.post("/v1/completions", json=body).json() for _ in range(2))
    assert first["choices"][0]["text"] == again["choices"][0]["text"]
    tokens, cached = again["usage"]["prompt_tokens"], again["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert first["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert tokens - 16 <= cached < tokens
    wait_until(lambda: metric(http, "prefix_cache_queries_total") == before + 2 * tokens)
    assert metric(http, "prefix_cache_hits_total") == found + cached


def test_speculation_statistics(http: httpx.Client, server_arguments: list[str]) -> None:
    answer = http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 30, "temperature": 0, "ignore_eos": True}).json()
    stats = answer["metrics"]["speculative_decoding"]
    if "none" in server_arguments:
        assert stats is None
        return
    assert sum(stats["acceptance_histogram"]) == stats["num_spec_steps"]
    assert stats["num_accepted_draft_tokens"] == sum(stats["accepted_by_depth"])
    assert metric(http, "spec_decode_num_drafts_total") >= stats["num_spec_steps"]
    if not server_arguments and stats["num_spec_steps"]:  # a head that knows nothing, or a busy machine, is rightly left unused
        assert stats["mean_acceptance_length"] > 1


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves_frees_everything(http: httpx.Client, server: Server, stream: bool) -> None:
    wait_until(lambda: metric(http, "num_requests_running") == 0)
    body = {"prompt": "x", "max_tokens": 400, "stream": stream, "ignore_eos": True, "n": 8}
    with httpx.Client(base_url=server.url, timeout=60) as gone, ThreadPoolExecutor(1) as pool:
        if stream:
            with gone.stream("POST", "/v1/completions", json=body) as response:
                next(response.iter_lines())
        else:
            future = pool.submit(gone.post, "/v1/completions", json=body, timeout=0.5)
            assert isinstance(future.exception(), httpx.ReadTimeout)
    wait_until(lambda: metric(http, "num_requests_running") == 0, 5)
    assert metric(http, "kv_cache_usage_ratio") == 0
    assert re.search(r'outcome="abort"} \d', http.get("/metrics").text)


def test_queue_full_and_then_not(http: httpx.Client, server: Server) -> None:
    """Eight run and eight wait; more than that never fit."""
    assert http.post("/v1/completions", json={"prompt": ["x"] * 17, "max_tokens": 1}).status_code == 400
    body = {"prompt": ["x"] * 16, "max_tokens": 400, "stream": True, "ignore_eos": True}
    with httpx.Client(base_url=server.url, timeout=60) as other, other.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()  # a reader that is forgotten hangs up
        next(lines)
        response = http.post("/v1/chat/completions", json={"messages": CHAT, "stream": True})
        assert response.status_code == 503
        assert response.headers["retry-after"]
    wait_until(lambda: metric(http, "num_requests_running") == 0)
    assert http.post("/v1/completions", json={"prompt": ["x"] * 16, "max_tokens": 1}).status_code == 200


def test_metrics_add_up(http: httpx.Client) -> None:
    before = metric(http, "generation_tokens_total")
    usage = http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 10, "n": 3, "ignore_eos": True}).json()["usage"]
    assert usage["completion_tokens"] == 30
    wait_until(lambda: metric(http, "generation_tokens_total") == before + 30)
    assert metric(http, "generation_tokens_per_second") > 0
    assert metric(http, "time_to_first_token_seconds_count") > 0


def test_drafts_from_the_text_alone(server_arguments: list[str], http: httpx.Client) -> None:
    """The same text as with the head, and a request may go without."""
    target = server_arguments[:1]
    process, log = launch(*target, "--draft", "ngram", "--served-model-name", "served", "--max-num-seqs", "1")
    try:
        body = {"prompt": "one two three four five six seven\n" * 6, "max_tokens": 48, "temperature": 0}
        expected = http.post("/v1/completions", json=body).json()["choices"]
        with httpx.Client(base_url=wait_for_url(process, log), timeout=120) as client:
            for speculation in ({}, {"max_nodes": 2}, {"enabled": False}):
                answer = client.post("/v1/completions", json={**body, "speculation": speculation}).json()
                assert answer["choices"] == expected
                figures = answer["metrics"]["speculative_decoding"]
                assert figures["num_draft_tokens"] <= figures["num_spec_steps"] * speculation.get("max_nodes", 15)
                assert speculation.get("enabled", True) or figures["num_spec_steps"] == 0
    finally:
        process.terminate()
        process.wait(60)


def test_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    process, log = launch(str(tmp_path))
    assert process.wait(280) == 1
    errors = [line for line in log if line.startswith("error: ")]
    assert len(errors) == 1
    assert os.fspath(tmp_path) in errors[0]
    assert not any("Traceback" in line for line in log)
