"""Requests that lose their blocks to others: computed anew, with nothing to be seen of it."""

import random
from dataclasses import replace

import pytest
from transformers import PreTrainedModel

from server.engine.config import NGRAM
from server.engine.types import SamplingParams, StepStats
from tests.engine.engines import Result, Run, build, random_head, run, tiny_model

GREEDY = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
OPTIONS = [
    GREEDY,
    replace(GREEDY, temperature=1.0, seed=3, logprobs=2),
    replace(GREEDY, temperature=0.8, seed=4, presence_penalty=0.5, repetition_penalty=1.2, prompt_logprobs=1),
    replace(GREEDY, prompt_logprobs=2, logprobs=0, min_tokens=30, stop=("q",)),
    replace(GREEDY, temperature=0.7, seed=5, top_p=0.9, max_draft_nodes=2),
]
PROMPTS = [[(7 * i + j) % 250 for j in range(3 + 5 * i)] for i in range(7)]
REQUESTS = [(prompt, OPTIONS[i % len(OPTIONS)]) for i, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


def pool_bytes(engine_kwargs: dict, model: PreTrainedModel, head: bool, blocks: int) -> int:
    """Cache memory of so many blocks."""
    engine = build(model, random_head(model) if head else None, **engine_kwargs)
    per_token = engine.steps.target.kv_bytes_per_token
    if engine.proposer.drafter:
        config = engine.proposer.drafter.head.config
        per_token += 2 * config.num_key_value_heads * config.head_dim * 4
    return blocks * per_token * engine.pool.block_size


def same(ours: Result, theirs: Result) -> None:
    assert ours.token_ids == theirs.token_ids
    assert ours.text == theirs.text
    assert ours.finish_reason == theirs.finish_reason
    for mine, other in ((ours.logprobs, theirs.logprobs), (ours.prompt_logprobs, theirs.prompt_logprobs)):
        assert (mine is None) == (other is None)
        for a, b in zip(mine or (), other or (), strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert a.token_id == b.token_id
                assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


def preemptions(stats: list[StepStats]) -> int:
    return sum(step.preemptions for step in stats)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("kind", ["plain", "head", "ngram"])
def test_the_answers_are_those_of_a_large_pool(kind: str, cached: bool, model: PreTrainedModel) -> None:
    options = {"draft": NGRAM if kind == "ngram" else None, "tree_nodes": 8, "prefix_caching": cached}
    head = kind == "head"
    expected = run(build(model, random_head(model) if head else None, **options), REQUESTS)
    small = build(model, random_head(model) if head else None, kv_cache_memory=pool_bytes(options, model, head, 41), **options)
    going = Run(small)
    for i, (prompt, params) in enumerate(REQUESTS):
        going.add(str(i), prompt, params)
    results = going.finish()
    assert preemptions(going.stats) > 2
    for i, theirs in enumerate(expected):
        same(results[str(i)], theirs)
    assert small.pool.available == small.pool.num_blocks - 1
    assert sorted(small.pool._free_rows) == list(range(8))


def test_the_first_is_never_preempted(model: PreTrainedModel) -> None:
    options = {"tree_nodes": 1, "prefix_caching": False}
    engine = build(model, kv_cache_memory=pool_bytes(options, model, False, 21), **options)
    going = Run(engine)
    for i in range(6):
        going.add(str(i), PROMPTS[i], GREEDY)
    while engine.has_work():
        alive = list(engine.scheduler.running)
        oldest = alive[0].request_id if alive else None
        going.step()
        names = [request.request_id for request in (*engine.scheduler.running, *engine.scheduler.waiting)]
        assert names == sorted(names), "first come, first served"
        if oldest is not None and oldest in names:
            assert engine.scheduler.running[0].request_id == oldest
    assert preemptions(going.stats) > 2
    assert all(result.finish_reason == "length" for result in going.results.values())


def test_a_preempted_request_can_be_aborted(model: PreTrainedModel) -> None:
    options = {"tree_nodes": 4}
    engine = build(model, random_head(model), kv_cache_memory=pool_bytes(options, model, True, 24), **options)
    expected = run(build(model, random_head(model), **options), [(prompt, GREEDY) for prompt in PROMPTS[:4]])
    going = Run(engine)
    for i in range(4):
        going.add(str(i), PROMPTS[i], GREEDY)
    while not preemptions(going.stats):
        going.step()
    waiting = engine.scheduler.waiting[0]
    assert waiting.num_output
    engine.abort(waiting.request_id)
    going.finish()
    for i, theirs in enumerate(expected):
        if str(i) != waiting.request_id:
            same(going.results[str(i)], theirs)


def test_any_pool_that_holds_the_largest_request_serves_all(model: PreTrainedModel) -> None:
    """Random loads, arriving while others run: nobody starves, and nothing leaks."""
    rng = random.Random(0)
    options = {"tree_nodes": 6, "prefix_caching": True}
    for blocks in (24, 28, 37):
        engine = build(model, random_head(model), kv_cache_memory=pool_bytes(options, model, True, blocks), **options)
        going, names = Run(engine), iter(range(100))
        for _ in range(120):
            if rng.random() < 0.15:
                prompt = [rng.randrange(250) for _ in range(rng.randrange(1, 30))]
                going.add(str(next(names)), prompt, replace(GREEDY, max_tokens=rng.randrange(1, 30)))
            going.step()
        results = going.finish()
        assert all(result.finish_reason == "length" for result in results.values())
        assert engine.pool.available == engine.pool.num_blocks - 1


def test_a_failing_step_beside_a_preempted_request(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"tree_nodes": 4}
    engine = build(model, random_head(model), kv_cache_memory=pool_bytes(options, model, True, 24), **options)
    expected = run(build(model, random_head(model), **options), [(prompt, GREEDY) for prompt in PROMPTS[:4]])
    going = Run(engine)
    for i in range(4):
        going.add(str(i), PROMPTS[i], GREEDY)
    while not preemptions(going.stats):
        going.step()
    right = engine.steps.target.forward_parts
    monkeypatch.setattr(engine.steps.target, "forward_parts", lambda *args: 1 / 0)
    failing = {request.request_id for request in engine.scheduler.running}
    going.step()
    monkeypatch.setattr(engine.steps.target, "forward_parts", right)
    going.finish()
    for i, theirs in enumerate(expected):
        if str(i) in failing:
            assert going.results[str(i)].finish_reason == "error"
        else:
            same(going.results[str(i)], theirs)
    assert 0 < len(failing) < 4
    assert engine.pool.available == engine.pool.num_blocks - 1
