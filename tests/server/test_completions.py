"""/v1/completions without a stream: the four prompt forms, options, echo, logprobs, usage, statistics."""

import httpx
import pytest

from tests.server.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio


async def complete(client: httpx.AsyncClient, **body: object) -> dict:
    response = await client.post("/v1/completions", json={"prompt": "hey", **body})
    assert response.status_code == 200, response.text
    return response.json()


async def test_shape(client: httpx.AsyncClient) -> None:
    answer = await complete(client, max_tokens=3, model="vsd-demo")
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["model"] == "vsd-demo"
    assert answer["choices"] == [{"index": 0, "text": "abc", "logprobs": None, "finish_reason": "length", "stop_reason": None}]
    cached = {"cached_tokens": 2}  # as this engine tells: all but one
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6, "prompt_tokens_details": cached}


async def test_default_is_16_tokens(client: httpx.AsyncClient) -> None:
    assert (await complete(client))["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("prompt", "prompt_tokens", "choices"),
    [("hey", 3, 1), (["hey", "you there"], 12, 2), ([70, 71], 2, 1), ([[70], [71, 72], [73]], 4, 3)],
)
async def test_prompt_forms(client: httpx.AsyncClient, prompt: object, prompt_tokens: int, choices: int) -> None:
    answer = await complete(client, prompt=prompt, max_tokens=2)
    assert answer["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 2 * choices,
        "total_tokens": prompt_tokens + 2 * choices,
        "prompt_tokens_details": {"cached_tokens": prompt_tokens - choices},
    }
    assert [choice["index"] for choice in answer["choices"]] == list(range(choices))


async def test_choices_of_all_prompts_in_index_order_with_seeds_of_their_own(client: httpx.AsyncClient) -> None:
    answer = await complete(client, prompt=["xx", "yyy"], n=3, seed=2, max_tokens=2)
    assert [choice["text"] for choice in answer["choices"]] == ["cd", "de", "ef"] * 2
    assert answer["metrics"] == {"speculative_decoding": None}
    assert answer["usage"]["prompt_tokens"] == 5
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}, "counted once for each prompt, as its tokens are"


async def test_options_reach_the_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    options = {
        "min_tokens": 2, "temperature": 0.5, "top_p": 0.9, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1.5,
        "repetition_penalty": 1.2, "ignore_eos": True, "include_stop_str_in_output": True, "cache_salt": "mine",
    }  # fmt: skip
    await complete(client, **options, top_k=-1, logit_bias={"7": -100}, stop="q", stop_token_ids=[9], seed=-5, logprobs=2, best_of=1)
    (params,) = engine.params
    assert {name: getattr(params, name) for name in options} == options
    assert (params.top_k, params.logit_bias, params.stop, params.stop_token_ids, params.seed) == (0, {7: -100.0}, ("q",), (9,), -5)
    assert (params.logprobs, params.prompt_logprobs, params.max_tokens) == (2, None, 16)


async def test_null_means_default_and_unknown_fields_are_ignored(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await complete(client, stop=None, max_tokens=None, temperature=None, seed=None, stream=None, user="me", made_up=[1])
    assert engine.params[0].stop == ()
    assert engine.params[0].max_tokens == 16


async def test_largest_seed_wraps(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.gate.set()
    await complete(client, seed=2**63 - 1, n=2, max_tokens=1)
    assert sorted(params.seed or 0 for params in engine.params) == [-(2**63), 2**63 - 1]


async def test_stop_string(client: httpx.AsyncClient) -> None:
    (choice,) = (await complete(client, stop=["de", "zz"]))["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("abc", "stop", "de")


async def test_logprobs(client: httpx.AsyncClient) -> None:
    (choice,) = (await complete(client, max_tokens=3, logprobs=2))["choices"]
    report = choice["logprobs"]
    assert report["tokens"] == ["a", "b", "c"]
    assert report["text_offset"] == [0, 1, 2]
    assert report["token_logprobs"] == [-1.0] * 3
    assert [sorted(top.values()) for top in report["top_logprobs"]] == [[-1.5, -1.0, -0.5]] * 3
    assert [top["b"] for top in report["top_logprobs"][1:2]] == [-1.0]


async def test_logprobs_0_reports_the_chosen_token(client: httpx.AsyncClient) -> None:
    (choice,) = (await complete(client, max_tokens=2, logprobs=0))["choices"]
    assert choice["logprobs"]["top_logprobs"] == [{"a": -1.0}, {"b": -1.0}]


async def test_echo(client: httpx.AsyncClient) -> None:
    assert (await complete(client, echo=True, max_tokens=2))["choices"][0]["text"] == "heyab"
    ids = (await complete(client, prompt="hey", echo=True, max_tokens=1, logprobs=0))["choices"][0]
    assert ids["logprobs"]["tokens"] == ["h", "e", "y", "a"]


async def test_echo_scores_a_prompt_as_lm_eval_asks(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    ids = engine.tokenizer.backend_tokenizer.encode("héy").ids
    answer = await complete(client, prompt=[ids, ids], echo=True, max_tokens=1, logprobs=1, temperature=0, seed=3)
    for choice in answer["choices"]:
        report = choice["logprobs"]
        assert choice["text"] == "héyd"
        assert report["tokens"] == ["h", "", "é", "y", "d"]
        assert report["text_offset"] == [0, 1, 1, 2, 3]
        assert report["token_logprobs"] == [None] + [-1.0] * 4
        assert report["top_logprobs"][0] is None
        assert all(max(top.values()) == -0.5 for top in report["top_logprobs"][1:])


@pytest.mark.parametrize("logprobs", [None, 1])
async def test_echo_without_completion(client: httpx.AsyncClient, logprobs: int | None) -> None:
    answer = await complete(client, echo=True, max_tokens=0, logprobs=logprobs)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("hey", "length")
    assert answer["usage"]["completion_tokens"] == 0
    assert logprobs is None or choice["logprobs"]["tokens"] == ["h", "e", "y"]


@pytest.mark.parametrize(
    ("speculation", "nodes"),
    [(None, None), ({}, None), ({"max_nodes": 3}, 3), ({"max_nodes": None}, None), ({"enabled": False, "max_nodes": 3}, 0)],
)
async def test_a_request_limits_its_drafts(
    client: httpx.AsyncClient, engine: FakeEngine, speculation: dict | None, nodes: int | None
) -> None:
    await complete(client, speculation=speculation)
    assert engine.params[0].max_draft_nodes == nodes


async def test_speculation_statistics(client: httpx.AsyncClient) -> None:
    answer = await complete(client, max_tokens=6)
    assert answer["metrics"]["speculative_decoding"] == {
        "mean_acceptance_length": 2.0,
        "draft_acceptance_rate": 1 / 3,
        "acceptance_histogram": [0, 3, 0],
        "num_spec_steps": 3,
        "num_accepted_draft_tokens": 3,
        "num_draft_tokens": 9,
        "num_spec_tokens": 15,
        "verified_nodes": 12,
        "accepted_by_depth": [3, 0],
    }


async def test_models(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["vsd-demo"]
    assert (await client.get("/v1/models/vsd-demo")).json() == listed["data"][0]
