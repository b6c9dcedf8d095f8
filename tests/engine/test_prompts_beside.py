"""Where steps are replayed as graphs: prompts that are computed by the forward pass of other requests' trees."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernels.tree_layout import Rows, TreeLayout
from kernels.tree_mask import tree_mask
from server.engine import engine as engine_module
from server.engine.ahead import Passed
from server.engine.engine import Engine
from server.engine.graphs import Graphs, in_eighths, in_halves
from server.engine.lean import LeanDecoder
from server.engine.prompts import BESIDE, LEAST_ROWS, PIECE, fit_beside
from server.engine.target import Target
from server.engine.types import SamplingParams
from tests.engine.engines import Run, run, tiny_model
from tests.engine.recorder import KINDS, Recorded

MakeEngine = Callable[..., Engine]
BLOCK = 4


def pieces(lengths: list[int], starts: list[int], tables: torch.Tensor) -> Rows:
    """Entries of PIECE rows, of which the first ``lengths`` are live."""
    rows = torch.arange(PIECE).expand(len(lengths), -1)
    tokens = (torch.arange(rows.numel()).view(rows.shape) * 7 + 11) % 250
    live = rows < torch.tensor(lengths)[:, None]
    keep = torch.tensor([i * PIECE + length - 1 for i, length in enumerate(lengths)])
    return Rows(tokens, TreeLayout(tables, torch.tensor(starts), rows, None, live, BLOCK, max(starts)), keep)


@pytest.mark.parametrize(
    ("rows", "trees", "nodes", "longest", "fits"),
    [
        (3, 32, 4, 200, True),
        (3, 32, 3, 200, True),  # of which graphs make four
        (57, 32, 4, 200, False),  # more than is recorded for trees
        (1, 128, 8, 200, False),
        (24, 128, 1, 200, True),
        (3, 32, 4, 1020, True),
        (3, 32, 4, 1030, False),  # recorded when it is needed, for trees alone
        (1, 1, 64, 10, False),
    ],
)  # fmt: skip
def test_what_fits(rows: int, trees: int, nodes: int, longest: int, fits: bool) -> None:
    prompts = pieces([PIECE] * rows, [0] * rows, torch.zeros(rows, 1, dtype=torch.long))
    assert fit_beside(prompts, trees, nodes, longest, 128) == fits
    assert not fit_beside(prompts._replace(keep=None), trees, nodes, longest, 128), "all rows' logits are wanted"


def test_what_is_recorded_fits() -> None:
    """Four times as many entries as requests, and no more, but for few requests."""
    one = pieces([PIECE], [0], torch.zeros(1, 1, dtype=torch.long))
    for most, max_seqs in ((BESIDE * 64, 64), (LEAST_ROWS, 2)):
        assert fit_beside(one, most - PIECE, 1, 10, max_seqs)
        assert not fit_beside(one, most - PIECE + 1, 1, 10, max_seqs)


@pytest.mark.parametrize("taps", [False, True])
@pytest.mark.parametrize("nodes", [1, 4, PIECE])
@torch.inference_mode()
def test_prompts_and_trees_by_one_graph_are_what_they_are_alone(nodes: int, taps: bool) -> None:
    """A prompt of three pieces, the last of which is short, one that follows five cached tokens, and trees of which one is a chain."""
    model = tiny_model("mistral")
    target = Target(model, taps, LeanDecoder(model))
    recorded = Recorded()
    graphs = Graphs(recorded, in_halves), Graphs(Recorded(), in_eighths)
    own = torch.arange(1, 41).view(2, 20)
    first, second = torch.arange(41, 77), torch.arange(77, 113)
    prompts = pieces([PIECE, PIECE, 5, 3], [0, PIECE, 2 * PIECE, 5], torch.stack((first, first, first, second)))
    chain, star = torch.arange(nodes).sub(1).clamp(min=0), torch.zeros(nodes, dtype=torch.long)
    ancestors, depth = tree_mask(torch.stack((chain, star)), nodes)
    tokens = torch.arange(2 * nodes).view(2, nodes) + 30
    layout = TreeLayout(torch.nn.functional.pad(own, (0, 16)), torch.tensor([9, 6]), depth, ancestors, None, BLOCK, 9)
    parts = [prompts, Rows(tokens, layout)]

    def computed(together: bool, by_graphs: bool) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        target.graphs, target.prompt_graphs = graphs if by_graphs else (None, None)
        cache = target.new_cache(120, BLOCK)
        for k in range(target.num_layers):
            generator = torch.Generator().manual_seed(k)
            for held in (cache.k[k], cache.v[k]):
                held.copy_(torch.randn(held.shape, generator=generator))
        passes = [parts] if together else [[part] for part in parts]
        return [(x.clone(), None if y is None else y.clone()) for rows in passes for x, y in target.forward_parts(rows, cache)]

    before = recorded.count
    results = computed(together=True, by_graphs=True)
    assert recorded.count == before + 1
    for expected in (computed(together=False, by_graphs=True), computed(together=True, by_graphs=False)):
        for (logits, features), (other, others), part in zip(results, expected, parts, strict=True):
            torch.testing.assert_close(logits, other, atol=1e-5, rtol=1e-4)
            assert (features is None) == (others is None) == (not taps)
            if features is not None and others is not None:
                live = torch.ones_like(part.tokens, dtype=torch.bool) if part.layout.live is None else part.layout.live
                torch.testing.assert_close(features[live], others[live], atol=1e-5, rtol=1e-4)


def watch(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What becomes of prompts beside trees from now on: computed with this step's or with the next step's."""
    seen: list[str] = []
    forward_parts, pass_ahead = engine.steps.target.forward_parts, engine.steps.next.pass_ahead

    def counted(parts: list[Rows], *others: Any) -> list:
        if len(parts) == 2 and parts[0].layout.ancestors is None:
            seen.append("together")
        return forward_parts(parts, *others)

    def passes(*arguments: Any) -> Passed | None:
        passed = pass_ahead(*arguments)
        if passed and passed.prompts:
            seen.append("ahead")
        return passed

    monkeypatch.setattr(engine.steps.target, "forward_parts", counted)
    monkeypatch.setattr(engine.steps.next, "pass_ahead", passes)
    return seen


@pytest.mark.parametrize("kind", ["head", "head and texts", "plain", "few blocks"])
def test_texts_are_those_of_prompts_computed_alone(
    kind: str, demo_engine: MakeEngine, demo_prompts: list[list[int]], recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests of every kind come while others are under way; two are aborted while their prompts are computed, or soon after."""
    few = kind == "few blocks"
    requests = [
        (demo_prompts[i % 40], SamplingParams(**{"max_tokens": (20 + 6 * (i % 7)) * (2 if few else 1), "seed": i, **KINDS[i % len(KINDS)]}))
        for i in range(4 * len(KINDS))
        if KINDS[i % len(KINDS)].keys().isdisjoint({"grammar", "logprobs"}) or i < len(KINDS)
    ]
    config: dict[str, Any] = {"max_num_seqs": 8, "load_rule": False}
    if few:
        config |= {"tree_nodes": 4, "ngrams": False}
        full = demo_engine(**config)
        assert full.proposer.drafter
        caches = full.steps.cache, full.proposer.drafter.cache
        config["kv_cache_memory"] = 30 * sum(part.nbytes for cache in caches for part in (*cache.k, *cache.v)) // full.pool.num_blocks
    engine = demo_engine(**{"head": kind != "plain", "ngrams": kind == "head and texts", **config})
    seen = watch(engine, monkeypatch)
    running = Run(engine)
    for i, request in enumerate(requests):
        running.add(str(i), *request)
        if i % 5 == 3:
            running.add(f"aborted {i}", demo_prompts[-i], SamplingParams(max_tokens=50))
        running.step()
        if i % 5 == 3:
            engine.abort(f"aborted {i}")
        running.step()
    results = running.finish()
    assert engine.pool.usage == 0
    if few:
        assert sum(stats.preemptions for stats in running.stats) > 0
    assert seen.count("together" if kind == "head and texts" else "ahead") > 5
    monkeypatch.setattr(engine_module, "_graphs", lambda target, config: (None, None))
    plain = run(demo_engine(head=False, max_num_seqs=8), requests)
    assert [results[str(i)].token_ids for i in range(len(requests))] == [result.token_ids for result in plain]
    assert sum(stats.prompt_tokens for stats in running.stats) >= sum(len(prompt) for prompt, _ in requests)


def test_a_long_prompt_waits_for_one_step_at_most(
    demo_engine: MakeEngine, demo_prompts: list[list[int]], recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short ones that go along with trees do not keep it from a pass of its own."""
    engine = demo_engine(max_num_seqs=8, load_rule=False, ngrams=False, max_model_len=1400)
    seen, running = watch(engine, monkeypatch), Run(engine)
    for i in range(3):
        running.add(str(i), demo_prompts[i], SamplingParams(max_tokens=100, temperature=0, ignore_eos=True))
    running.step()
    running.step()
    running.add("short", demo_prompts[3], SamplingParams(max_tokens=20, temperature=0, ignore_eos=True))
    running.step()
    assert seen[-1] == "ahead"
    running.add("long", demo_prompts[4] * 16, SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))
    running.add("shorter", demo_prompts[5], SamplingParams(max_tokens=20, temperature=0, ignore_eos=True))
    for _ in range(3):
        running.step()
    assert len(running.results["short"].token_ids) > 0
    assert len(running.results["long"].token_ids) > 0
    running.finish()


def test_where_the_pass_fails_prompts_are_computed_in_their_turn(
    demo_engine: MakeEngine, demo_prompts: list[list[int]], recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [(demo_prompts[i], SamplingParams(max_tokens=20, seed=i, temperature=i % 2)) for i in range(10)]
    engine = demo_engine(max_num_seqs=4, load_rule=False, ngrams=False)
    right, failed = engine.steps.target.forward_parts, list[int]()

    def fails(parts: list[Rows], *others: Any) -> list:
        if len(parts) == 2:
            failed.append(1)
            raise RuntimeError("no memory")
        return right(parts, *others)

    monkeypatch.setattr(engine.steps.target, "forward_parts", fails)
    results = run(engine, requests)
    monkeypatch.setattr(engine_module, "_graphs", lambda target, config: (None, None))
    plain = run(demo_engine(head=False, max_num_seqs=4), requests)
    assert [result.token_ids for result in results] == [result.token_ids for result in plain]
    assert len(failed) > 3


@pytest.mark.parametrize("kind", ["texts that propose nothing", "a head that fails"])
def test_prompts_do_not_wait_for_a_pass_that_is_not_made(
    kind: str, demo_engine: MakeEngine, demo_prompts: list[list[int]], recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody drafts in the end, the trees of the plan do not come."""
    config: dict[str, Any] = {"max_num_seqs": 64, "load_rule": False, "max_model_len": 1000}
    if kind == "a head that fails":
        engine = demo_engine(tree_nodes=16, ngrams=False, **config)
        assert engine.proposer.drafter
        monkeypatch.setattr(engine.proposer.drafter, "grow", lambda *_: 1 / 0)
    else:
        engine = demo_engine(head=False, draft="ngram", tree_nodes=8, **config)
    running = Run(engine)
    for i in range(2):
        running.add(str(i), list(range(10 * i + 5, 10 * i + 9)), SamplingParams(max_tokens=60, temperature=5.0, seed=i, ignore_eos=True))
    for _ in range(4):
        running.step()
    running.add("new", (demo_prompts[2] * 40)[:300], SamplingParams(max_tokens=3, seed=1, ignore_eos=True))
    for _ in range(3):
        running.step()
    assert running.results["new"].token_ids


def test_where_the_pass_is_never_made_prompts_wait_once(
    demo_engine: MakeEngine, demo_prompts: list[list[int]], recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = demo_engine(max_num_seqs=8, load_rule=False, ngrams=False, tree_nodes=4)
    monkeypatch.setattr(engine.steps.next, "pass_ahead", lambda *_: None)
    running = Run(engine)
    monkeypatch.setattr(engine.steps, "_fit_beside", lambda *_: False)
    running.add("0", demo_prompts[0], SamplingParams(max_tokens=60, temperature=0, ignore_eos=True))
    for _ in range(4):
        running.step()
    running.add("1", demo_prompts[1], SamplingParams(max_tokens=3, temperature=0, ignore_eos=True))
    running.step()
    running.step()
    assert running.results["1"].token_ids


@pytest.mark.parametrize("prompt_logprobs", [None, 1])
@pytest.mark.parametrize("others", [1, 6], ids=["drafts at once", "a step later"])
def test_who_wants_no_token_fills_no_block(
    others: int, prompt_logprobs: int | None, demo_engine: MakeEngine, demo_prompts: list[list[int]], recorded: Recorded
) -> None:
    """The head's last row of such a prompt is of a token that does not exist."""
    engine = demo_engine(max_num_seqs=8, load_rule=False, ngrams=False)
    running = Run(engine)
    for i in range(others):
        running.add(str(i), demo_prompts[i], SamplingParams(max_tokens=60, temperature=0, ignore_eos=True))
    for _ in range(4):
        running.step()
    prompt = (demo_prompts[1] * 10)[: 2 * engine.pool.block_size]
    running.add("none", prompt, SamplingParams(max_tokens=0, prompt_logprobs=prompt_logprobs))
    results = running.finish()
    assert results["none"].token_ids == []
    assert results["none"].finish_reason == "length"
    assert all(len(results[str(i)].token_ids) == 60 for i in range(others))


def test_a_prompt_that_loses_its_blocks_meanwhile_is_computed_anew(
    demo_engine: MakeEngine, demo_prompts: list[list[int]], recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [(demo_prompts[i], SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)) for i in range(3)]
    engine = demo_engine(max_num_seqs=4, load_rule=False, ngrams=False, tree_nodes=4, prefix_caching=False)
    expected = run(demo_engine(max_num_seqs=4, load_rule=False, ngrams=False, tree_nodes=4), requests)
    running = Run(engine)
    for i in range(2):
        running.add(str(i), *requests[i])
    for _ in range(3):
        running.step()
    running.add("2", *requests[2])
    running.step()
    assert isinstance(engine.steps.ahead, Passed)
    assert engine.steps.ahead.prompts, "its prompt is being computed"
    make_room, preempted = engine.scheduler.make_room, iter([engine.scheduler.running[-1]])
    monkeypatch.setattr(engine.scheduler, "make_room", lambda: next(preempted, None) or make_room())
    results = running.finish()
    assert sum(stats.preemptions for stats in running.stats) == 1
    assert [results[str(i)].token_ids for i in range(3)] == [result.token_ids for result in expected]
