"""Computed prompts are used again, and nobody can tell from the text."""

import itertools
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from server.engine.budget import Plan
from server.engine.engine import Engine
from server.engine.request import Request
from server.engine.types import SamplingParams
from tests.engine.engines import POISON, Run, build, poisoned_model, random_head, run, tiny_model
from tests.engine.guided import Guide
from tests.engine.reference_decoding import decode

BLOCK = 4
GREEDY = SamplingParams(max_tokens=11, temperature=0, ignore_eos=True)
SEEDED = replace(GREEDY, temperature=0.9, seed=3)
SAMPLING = {"greedy": GREEDY, "seeded": SEEDED}
LENGTHS = (3, 4, 5, 8, 9)
Shape = tuple[int, int, int] | None  # tree nodes, depth, top-k; None: no head
SHAPES: list[Shape] = [None, (1, 1, 1), (2, 1, 1), (6, 2, 3), (12, 4, 3)]


Chats = dict[tuple[str, int], tuple[list[int], list[int], list[int]]]
"""By sampling and length of the first prompt: the second prompt, and what is generated after each."""


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return poisoned_model()


def engine_of(model: PreTrainedModel, shape: Shape = (12, 4, 3), **options: object) -> Engine:
    if shape is None:
        return build(model, block_size=BLOCK, **options)
    nodes, depth, topk = shape
    head = random_head(model)
    head.lm_head.weight.data[POISON] = 0  # never drafted
    return build(model, head, block_size=BLOCK, tree_nodes=nodes, tree_depth=depth, tree_topk=topk, **options)


def words(length: int, start: int = 0) -> list[int]:
    return [(start + 7 * i * i + 3 * i) % 70 for i in range(length)]


def hits(going: Run) -> int:
    return sum(stats.prefix_cache_hits for stats in going.stats)


def blocks_of(engine: Engine, request: Request) -> list[int]:
    return engine.pool.tables[request.row].tolist()


@pytest.fixture(scope="module")
def chats(model: PreTrainedModel) -> Chats:
    chats = {}
    for (name, params), length in itertools.product(SAMPLING.items(), LENGTHS):
        prompt = words(length, start=length)
        wanted = decode(model, prompt, params).tokens
        turn = [*prompt, *wanted, 5, 6, 7]
        chats[name, length] = turn, wanted, decode(model, turn, params).tokens
    return chats


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sampling", SAMPLING)
def test_the_text_is_the_same_at_every_block_boundary(model: PreTrainedModel, chats: Chats, shape: Shape, sampling: str) -> None:
    """Every prompt twice, then as the beginning of a chat's next turn; the true text is drafted now and then."""
    params = SAMPLING[sampling]
    cached, without = engine_of(model, shape), engine_of(model, shape, prefix_caching=False)
    for length in LENGTHS:
        prompt = words(length, start=length)
        turn, wanted, wanted_turn = chats[sampling, length]
        if shape:
            futures = {"0": prompt + wanted, "1": prompt + wanted, "2": turn + wanted_turn}
            for engine in (cached, without):
                Guide(engine, futures, [token for token in range(256) if token != POISON])
        for engine in (cached, without):
            going = Run(engine)
            going.add("0", prompt, params)
            going.finish()
            assert hits(going) == 0
            going.add("1", prompt, params)
            going.finish()
            again = (length - 1) // BLOCK * BLOCK
            assert hits(going) == (again if engine is cached else 0)
            going.add("2", turn, params)
            results = going.finish()
            assert [results[str(i)].token_ids for i in range(3)] == [wanted, wanted, wanted_turn]
            generated = (length + params.max_tokens - 1) // BLOCK * BLOCK  # the last token was never computed
            assert hits(going) == (again + generated if engine is cached else 0)
            looked_up = sum(stats.prefix_cache_queries for stats in going.stats)
            assert looked_up == (2 * length + len(turn) if engine is cached else 0)
            assert sum(stats.prompt_tokens for stats in going.stats) == 2 * length + len(turn) - hits(going)
            assert results["2"].last.num_cached_tokens == (generated if engine is cached else 0)


def draft_rows(engine: Engine, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Draft K of all rows, and the state, of a request for ``tokens`` right after its first tree; and how many tokens it took over."""
    engine.add_request("probe", tokens, replace(GREEDY, max_tokens=6))
    while not (engine.scheduler.running and engine.scheduler.running[0].draft_len >= len(tokens)):
        engine.step()
    [request] = engine.scheduler.running
    assert engine.proposer.drafter is not None
    slots = torch.tensor(blocks_of(engine, request)).repeat_interleave(BLOCK) * BLOCK + torch.arange(BLOCK).repeat(
        len(blocks_of(engine, request))
    )
    keys = engine.proposer.drafter.cache.k[0].flatten(0, 1)[slots[: len(tokens)]].clone()
    state = engine.proposer.drafter.state[1 + request.row].clone()
    engine.abort("probe")
    return keys, state, request.num_cached_tokens


@pytest.mark.parametrize("length", [7, 8, 9, 12])
def test_draft_rows_that_are_taken_over_are_those_of_a_fresh_computation(model: PreTrainedModel, length: int) -> None:
    """Two prompts that are equal up to ``length`` tokens: the draft's row of the last equal token depends on the first different one."""
    common = words(length)
    first, second = [*common, 1, 2, 3, 4, 5], [*common, 60, 2, 3, 4, 5]
    engine = engine_of(model)
    run(engine, [(first, GREEDY)])
    keys, state, taken = draft_rows(engine, second)
    fresh_keys, fresh_state, nothing = draft_rows(engine_of(model), second)
    assert (taken, nothing) == ((length - 1) // BLOCK * BLOCK, 0)
    torch.testing.assert_close(keys, fresh_keys, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state, fresh_state, atol=1e-5, rtol=1e-4)
    other_keys, _, _ = draft_rows(engine_of(model), first)
    assert not torch.allclose(other_keys[length - 1], keys[length - 1], atol=1e-3), "the look-ahead matters for this row"


def test_drafts_hit_as_often_after_a_takeover(model: PreTrainedModel) -> None:
    """The whole drafting is what it would be without the cache, tree by tree."""
    prompt = words(26)
    engine = engine_of(model)
    first, again = (run(engine, [(prompt, SEEDED)])[0] for _ in range(2))
    assert again.last is not None
    assert again.last.num_cached_tokens == 24
    assert again.speculation == first.speculation


@pytest.mark.parametrize("shape", [None, (12, 4, 3)], ids=str)
def test_requests_that_run_together_share_blocks(model: PreTrainedModel, shape: Shape) -> None:
    common = words(18)
    prompts = [[*common, i, i + 1, i + 2] for i in range(5)]
    params = [replace(SEEDED, seed=i, max_tokens=20 + 4 * i) for i in range(5)]
    wanted = [decode(model, prompt, one).tokens for prompt, one in zip(prompts, params, strict=True)]
    engine = engine_of(model, shape)
    going = Run(engine)
    going.add("0", prompts[0], params[0])
    for _ in range(3):
        going.step()
    for i in range(1, 5):
        going.add(str(i), prompts[i], params[i])
    going.step()
    assert hits(going) == 4 * 16
    tables = [blocks_of(engine, request) for request in engine.scheduler.running]
    assert all(table[:4] == tables[0][:4] for table in tables)
    assert len({block for table in tables for block in table[4:6]}) == 2 * len(tables)
    engine.abort("2")
    results = going.finish()
    assert all(results[str(i)].token_ids == wanted[i] for i in (0, 1, 3, 4))


@pytest.mark.parametrize("shape", [None, (12, 4, 3)], ids=str)
def test_a_pool_that_is_always_full(model: PreTrainedModel, shape: Shape) -> None:
    """Blocks are taken from kept prefixes again and again, chats go on and come back."""
    engine = engine_of(model, shape)
    small = engine_of(model, shape, kv_cache_memory=_bytes_per_block(engine) * 30, max_num_seqs=3)
    chats = [words(5 + 3 * i, start=i) for i in range(6)]
    going = Run(small)
    for turn in range(3):
        for i in (turn, *range(6), 5 - turn):
            going.add(f"{turn}-{i}-{len(going.results)}", chats[i], replace(SEEDED, seed=turn))
        results = going.finish()
        for name, result in results.items():
            if name.startswith(f"{turn}-"):
                chat = chats[int(name.split("-")[1])]
                assert result.token_ids == decode(model, chat, replace(SEEDED, seed=turn)).tokens
        for i in range(6):
            chats[i] = chats[i] + results[next(name for name in results if name.startswith(f"{turn}-{i}-"))].token_ids + [i]
    assert 0 < hits(going) < sum(stats.prefix_cache_queries for stats in going.stats) / 2


def _bytes_per_block(engine: Engine) -> int:
    caches = [engine.steps.cache] + ([engine.proposer.drafter.cache] if engine.proposer.drafter else [])
    return sum(cache.k.nbytes + cache.v.nbytes for cache in caches) // engine.pool.num_blocks


def test_speculation_that_is_off_delays_the_offer(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without trees the draft's rows lag behind, and half a block is not to be had; they are made up for when the request ends."""
    engine = engine_of(model)
    plain = engine.shape.shrunk(1)
    monkeypatch.setattr(engine, "_plan", lambda requests: Plan(plain, requests))
    prompt = words(17)
    going = Run(engine)
    going.add("0", prompt, GREEDY)
    for _ in range(4):
        going.step()
    going.add("1", [*prompt, 9], GREEDY)
    going.step()
    assert hits(going) == 0
    assert engine.scheduler.running[0].draft_len == 0
    going.finish()
    going.add("2", [*prompt, 9], GREEDY)
    going.step()
    assert hits(going) == 16
    assert going.finish()["2"].token_ids == decode(model, [*prompt, 9], GREEDY).tokens
    monkeypatch.undo()
    keys, state, taken = draft_rows(engine, [*prompt, 9])
    fresh_keys, fresh_state, _ = draft_rows(engine_of(model), [*prompt, 9])
    assert taken == 16
    torch.testing.assert_close(keys, fresh_keys, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state, fresh_state, atol=1e-5, rtol=1e-4)


def test_a_draft_cache_that_cannot_be_completed_is_not_offered(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(model)

    def wrong(*_: object) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(engine.proposer.drafter, "extend", wrong)
    going = Run(engine)
    for name in ("0", "1"):
        going.add(name, words(9), GREEDY)
        assert going.finish()[name].token_ids == decode(model, words(9), GREEDY).tokens
    assert hits(going) == 0


@pytest.mark.parametrize("shape", [None, (12, 4, 3)], ids=str)
def test_a_nan_is_never_shared(model: PreTrainedModel, shape: Shape) -> None:
    """A failing request takes over good blocks, alone and beside their owner; afterwards they are good, or forgotten."""
    engine = engine_of(model, shape)
    prompt, poisoned = words(14), [*words(14), *[POISON] * 9]
    wanted = decode(model, prompt, GREEDY).tokens
    going = Run(engine)
    going.add("first", prompt, GREEDY)
    for _ in range(2):
        going.step()
    for name in ("bad beside", "bad alone", "bad again"):
        before = hits(going)
        going.add(name, poisoned, GREEDY)
        going.finish()
        assert going.results[name].finish_reason == "error"
        assert hits(going) - before == (0 if name == "bad again" else 12)
        caches = [engine.steps.cache, *([engine.proposer.drafter.cache] if engine.proposer.drafter else [])]
        assert all(cache.k.isfinite().all() and cache.v.isfinite().all() for cache in caches)
    going.add("last", prompt, GREEDY)
    results = going.finish()
    assert results["first"].token_ids == results["last"].token_ids == wanted


@pytest.mark.parametrize("shape", [None, (12, 4, 3)], ids=str)
def test_an_aborted_prompt_is_not_offered(model: PreTrainedModel, shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.scheduler.PREFILL_ROWS", 8)
    engine, prompt = engine_of(model, shape), words(41)
    going = Run(engine)
    going.add("short", prompt[:13], GREEDY)
    going.finish()
    going.add("aborted", prompt, GREEDY)
    going.step()
    assert engine.scheduler.running[0].context_len == 12 + 8
    engine.abort("aborted")
    assert engine.pool.usage == 0
    before = hits(going)
    going.add("whole", prompt, GREEDY)
    assert going.finish()["whole"].token_ids == decode(model, prompt, GREEDY).tokens
    assert hits(going) - before == 12, "what the aborted request had taken over is still there"


def test_prompt_logprobs_are_computed_and_not_looked_up(model: PreTrainedModel) -> None:
    engine = engine_of(model)
    prompt, params = words(13), replace(GREEDY, prompt_logprobs=2)
    run(engine, [(prompt, GREEDY)])
    going = Run(engine)
    going.add("0", prompt, params)
    reported = going.finish()["0"].prompt_logprobs
    [alone] = run(engine_of(model, prefix_caching=False), [(prompt, params)])
    assert reported is not None
    assert alone.prompt_logprobs is not None
    assert len(reported) == len(prompt)
    for ours, wanted in zip(reported[1:], alone.prompt_logprobs[1:], strict=True):
        assert ours is not None
        assert wanted is not None
        assert (ours.token_id, ours.logprob) == (wanted.token_id, pytest.approx(wanted.logprob, abs=1e-4))
    assert (hits(going), sum(stats.prefix_cache_queries for stats in going.stats)) == (0, 0)


def test_salts_share_nothing(model: PreTrainedModel) -> None:
    engine, prompt = engine_of(model), words(13)
    found = []
    for salt in (None, "a", "b", "a", None):
        [result] = run(engine, [(prompt, replace(GREEDY, cache_salt=salt))])
        assert result.last is not None
        found.append(result.last.num_cached_tokens)
    assert found == [0, 0, 0, 12, 12]


def test_measuring_leaves_nothing_to_take_over() -> None:
    engine = engine_of(tiny_model("llama"), load_rule=True)  # where nothing is poisoned: trials draft with noise, any token may come up
    assert engine.load_rule is not None
    [result] = run(engine, [([0] * 17, GREEDY)])  # what measuring decodes
    assert result.last is not None
    assert result.last.num_cached_tokens == 0
