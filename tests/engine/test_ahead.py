"""What is begun of the next step, and kept true for a later one, where steps are replayed as graphs."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.tree_layout import Rows
from server.engine import engine as engine_module
from server.engine.ahead import Passed
from server.engine.costs import MAX_TREE_ROWS
from server.engine.draft_cache import PENDING_ROWS
from server.engine.drafter import Grown
from server.engine.engine import Engine
from server.engine.kv_cache import PagedTensors
from server.engine.request import Request
from server.engine.target import Target
from server.engine.types import SamplingParams, Tree
from server.engine.verifications import Proposal, Verification
from tests.engine.engines import Result, Run, run
from tests.engine.recorder import KINDS, Recorded

MakeEngine = Callable[..., Engine]


def watch(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Proposal]:
    """What is verified from now on."""
    seen, verification = [], engine.steps.verifications._verification

    def spied(proposal: Proposal) -> Verification:
        found = verification(proposal)
        seen.append(found.proposal)
        return found

    monkeypatch.setattr(engine.steps.verifications, "_verification", spied)
    return seen


@pytest.mark.parametrize("ngrams", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafting_ahead_drafts_what_drafting_later_would(
    temperature: float, ngrams: bool, demo_engine: MakeEngine, demo_prompts: list[list[int]], recorded: Recorded,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Requests come and end at different times. Without texts, the target goes ahead as well."""
    requests = [
        (demo_prompts[i], SamplingParams(max_tokens=20 + 7 * i, seed=i, temperature=temperature, ignore_eos=True)) for i in range(5)
    ]

    def drafted(ahead: bool) -> tuple[list[Result], dict[tuple[str, int], tuple], int]:
        engine, trees, passes = demo_engine(max_num_seqs=3, load_rule=False, ngrams=ngrams), {}, itertools.count()
        verification, pass_ahead = engine.steps.verifications._verification, engine.steps.next.pass_ahead

        def record(proposal: Proposal) -> Verification:
            found = verification(proposal)
            tree = found.proposal.tree
            for request, tokens, parents in zip(proposal.requests, tree.tokens.tolist(), tree.parent.tolist(), strict=True):
                trees[request.request_id, len(request.token_ids)] = tokens, parents
            return found

        def counted(*arguments: Any) -> Passed | None:
            passed = pass_ahead(*arguments) if ahead else None
            return passed and next(passes) >= 0 and passed

        monkeypatch.setattr(engine.steps.verifications, "_verification", record)
        monkeypatch.setattr(engine.steps.next, "pass_ahead", counted)
        if not ahead:
            monkeypatch.setattr(engine.steps.next, "draft", lambda *_: None)
            monkeypatch.setattr(engine.steps.next, "_may_join", lambda *_: False)
        return run(engine, requests), trees, next(passes)

    (results, trees, passes), (later, others, _) = drafted(ahead=True), drafted(ahead=False)
    assert [result.token_ids for result in results] == [result.token_ids for result in later]
    assert trees == others
    assert all(set(tokens[1:]) != {-1} for tokens, _ in trees.values()), "those that come have trees at once"
    assert passes == 0 if ngrams else passes > 10


def test_plain_steps_keep_the_draft_cache_true(
    demo_engine: MakeEngine, demo_prompts: list[list[int]], recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trees after many plain steps are those of an engine whose features all wait for them, and few features wait meanwhile."""
    requests = [(demo_prompts[i], SamplingParams(max_tokens=60 + i, seed=i, temperature=i % 2, ignore_eos=True)) for i in range(5)]

    def drafted(bounded: bool) -> tuple[list[list[int]], list[Tree], int]:
        engine = demo_engine(max_num_seqs=3, load_rule=False, ngrams=False)
        full, most, proposals = engine.shape, 0, watch(engine, monkeypatch)
        if not bounded:
            monkeypatch.setattr(engine.proposer.cache, "bound", lambda _: None)
        running = Run(engine)
        for i, request in enumerate(requests):
            running.add(str(i), *request)
        for step in itertools.count():
            if not engine.has_work():
                trees = [proposal.tree for proposal in proposals if len(proposal.tree.tokens[0]) > 1]
                return [result.token_ids for result in running.results.values()], trees, most
            engine.shape = full if step % 30 > 24 else full.shrunk(1)
            running.step()
            if step % 30 < 24:
                most = max([most, *(request.num_pending for request in engine.scheduler.decoding())])
        raise AssertionError

    (texts, trees, most), (others, expected, unbounded) = drafted(bounded=True), drafted(bounded=False)
    assert texts == others
    assert len(trees) == len(expected) > 6
    assert all(torch.equal(*pair) for tree, other in zip(trees, expected, strict=True) for pair in zip(tree, other, strict=True))
    assert most <= PENDING_ROWS < unbounded


def test_where_drafting_ahead_fails_the_next_step_drafts(
    demo_engine: MakeEngine, demo_prompts: list[list[int]], recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [(prompt, SamplingParams(max_tokens=30, temperature=0)) for prompt in demo_prompts[:3]]
    good = run(demo_engine(max_num_seqs=3, load_rule=False), requests)
    engine, attempts = demo_engine(max_num_seqs=3, load_rule=False), itertools.count()
    go_on = engine.proposer.drafter.go_on

    def fails(*arguments: Any) -> Grown:
        if next(attempts) % 2:
            raise RuntimeError("no memory")
        return go_on(*arguments)

    monkeypatch.setattr(engine.proposer.drafter, "go_on", fails)
    running = Run(engine)
    for i, request in enumerate(requests):
        running.add(str(i), *request)
    results = list(running.finish().values())
    assert [result.token_ids for result in results] == [result.token_ids for result in good]
    assert [r.speculation.num_accepted_tokens for r in results] == [r.speculation.num_accepted_tokens for r in good]
    assert sum(stats.failed_drafts for stats in running.stats) == next(attempts) // 2 > 2


@pytest.mark.parametrize("max_num_seqs", [2, 6], ids=["who is new drafts at once", "a step later"])
@pytest.mark.parametrize("failing", ["extend", "grow"])
def test_where_joining_those_that_draft_fails_it_is_done_later(
    failing: str, max_num_seqs: int, demo_engine: MakeEngine, demo_prompts: list[list[int]], recorded: Recorded,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    requests = [(demo_prompts[i], SamplingParams(max_tokens=12 + 5 * i, temperature=i % 2, seed=i, ignore_eos=True)) for i in range(12)]
    good = run(demo_engine(max_num_seqs=max_num_seqs, load_rule=False, ngrams=False), requests)
    engine, attempts = demo_engine(max_num_seqs=max_num_seqs, load_rule=False, ngrams=False), itertools.count()
    joining = list[bool]()
    failed = itertools.count()

    def observed(join: Callable) -> Callable:
        def joins(*arguments: Any) -> Any:
            joining.append(True)
            try:
                return join(*arguments)
            finally:
                joining.clear()

        return joins

    right = getattr(engine.proposer.drafter, failing)

    def fails(*arguments: Any) -> Any:
        if joining and next(attempts) % 2:
            next(failed)
            raise RuntimeError("no memory")
        return right(*arguments)

    monkeypatch.setattr(engine.proposer, "join", observed(engine.proposer.join))
    monkeypatch.setattr(engine.proposer, "take_in", observed(engine.proposer.take_in))
    monkeypatch.setattr(engine.proposer.drafter, failing, fails)
    running = Run(engine)
    for i, request in enumerate(requests):
        running.add(str(i), *request)
    results = list(running.finish().values())
    assert [result.token_ids for result in results] == [result.token_ids for result in good]
    times = next(failed)
    assert sum(stats.failed_drafts for stats in running.stats) == times
    assert times >= 2 or (failing == "grow" and max_num_seqs == 6), "few do not keep many waiting"
    accepted, others = (sum(result.speculation.num_accepted_tokens for result in of) for of in (results, good))
    assert accepted > 0.9 * others, "caches are true again"


def test_the_shape_of_trees_may_change_at_any_step(
    demo_engine: MakeEngine, demo_prompts: list[list[int]], recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the target has gone ahead of is verified, larger or smaller than what is drafted then."""
    requests = [(demo_prompts[i], SamplingParams(max_tokens=60, seed=i, temperature=i % 2, ignore_eos=True)) for i in range(6)]
    engine = demo_engine(max_num_seqs=4, load_rule=False, ngrams=False)
    full, running, verified = engine.shape, Run(engine), watch(engine, monkeypatch)
    for i, request in enumerate(requests):
        running.add(str(i), *request)
    planned = []
    for nodes in itertools.cycle((4, 2, 32, 8, 8, 4, 1, 16, 2, 4, 4, 1, 1, 2, 2, 32, 2)):
        if not engine.has_work():
            break
        engine.shape = full.shrunk(nodes)
        planned.append(nodes)
        running.step()
    assert sum(stats.failed_drafts for stats in running.stats) == 0
    found = [len(proposal.tree.tokens[0]) for proposal in verified if proposal.by_head]
    assert len(set(found)) == 5, "of every size"
    monkeypatch.setattr(engine_module, "_graphs", lambda target, config: (None, None))
    plain = run(demo_engine(head=False, max_num_seqs=4), requests)
    assert [result.token_ids for result in running.results.values()] == [result.token_ids for result in plain]


def test_a_few_that_are_new_draft_a_step_later(
    demo_engine: MakeEngine, demo_prompts: list[list[int]], recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside many that draft; their first step has roots alone."""
    requests = [(demo_prompts[i], SamplingParams(max_tokens=40, seed=i, temperature=i % 2, ignore_eos=True)) for i in range(7)]
    engine = demo_engine(max_num_seqs=8, load_rule=False, ngrams=False)
    running, verified = Run(engine), watch(engine, monkeypatch)
    for i in range(6):
        running.add(str(i), *requests[i])
    for _ in range(3):
        running.step()
    running.add("6", *requests[6])
    for _ in range(6):
        running.step()
    drafted = [
        int((proposal.tree.tokens[place] >= 0).sum()) - 1
        for proposal in verified
        for place, request in enumerate(proposal.requests)
        if request.request_id == "6"
    ]
    assert drafted[0] == 0
    assert all(nodes > 0 for nodes in drafted[1:])
    assert len(drafted) > 2
    running.finish()
    monkeypatch.setattr(engine_module, "_graphs", lambda target, config: (None, None))
    plain = run(demo_engine(head=False, max_num_seqs=8), requests)
    assert [running.results[str(i)].token_ids for i in range(7)] == [result.token_ids for result in plain]


@pytest.mark.parametrize("head", [False, True])
def test_passes_are_made_ahead_of_plain_steps(
    head: bool, demo_engine: MakeEngine, demo_prompts: list[list[int]], recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests of every kind come and end at different times, two are aborted, and a pass fails now and then."""
    requests = [
        (demo_prompts[i], SamplingParams(**{"max_tokens": 9 + 5 * (i % 7), "seed": i, **KINDS[i % len(KINDS)], "max_draft_nodes": 0}))
        for i in range(3 * len(KINDS))
        if "logprobs" not in KINDS[i % len(KINDS)] or i < len(KINDS)
    ]
    used, passes = [], itertools.count()
    of, forward_parts = Passed.of, Target.forward_parts

    def spied(passed: Passed, others: list[Request]) -> Passed | None:
        found = of(passed, others)
        used.append((len(others), len(passed.requests), 0 if found is None else len(found.requests)))
        return found

    def fails(target: Target, parts: list[Rows], cache: PagedTensors) -> list[tuple[Tensor, Tensor | None]]:
        if next(passes) % 20 == 19:
            raise RuntimeError("no memory")
        return forward_parts(target, parts, cache)

    monkeypatch.setattr(Passed, "of", spied)
    engine = demo_engine(head=head, max_num_seqs=4, load_rule=False)
    monkeypatch.setattr(Target, "forward_parts", fails)
    running = Run(engine)
    for name in ("aborted", "aborted too"):
        running.add(name, demo_prompts[0], SamplingParams(max_tokens=120, temperature=0))
    for i, request in enumerate(requests):
        running.add(str(i), *request)
    for step in range(30):
        running.step()
        if step in (10, 17):
            engine.abort("aborted" if step == 10 else "aborted too")
    results = running.finish()
    monkeypatch.setattr(engine_module, "_graphs", lambda target, config: (None, None))
    monkeypatch.setattr(Target, "forward_parts", forward_parts)
    plain = run(demo_engine(head=False, max_num_seqs=4), requests)
    assert [results[str(i)].token_ids for i in range(len(requests))] == [result.token_ids for result in plain]
    assert sum(wanted == held == found for wanted, held, found in used) > 20, "the whole batch goes on"
    assert any(found < held for _, held, found in used), "some have ended"
    assert not any(found < wanted for wanted, _, found in used), "those that are new go along"
    assert len(used) < next(passes), "and the others were made in their turn"


def test_a_pass_made_ahead_is_for_one_place(demo_engine: MakeEngine, demo_prompts: list[list[int]], recorded: Recorded) -> None:
    """As after a step that failed at the end, and is done again."""
    engine = demo_engine(head=False, max_num_seqs=2)
    for i in range(2):
        engine.add_request(str(i), demo_prompts[i], SamplingParams(max_tokens=20, temperature=0, ignore_eos=True))
    for _ in range(3):
        engine.step()
    ahead = engine.steps.ahead
    assert isinstance(ahead, Passed)
    first, second = ahead.requests
    assert ahead.of([first, second]) is ahead
    first.context_len -= 1
    found = ahead.of([first, second])
    assert found is not None
    assert found.requests == [second]
    assert torch.equal(found.logits, ahead.logits[1:])
    assert ahead.of([first]) is None
    assert ahead.of([first, second, first, first]) is None, "most would wait a step"


@pytest.mark.parametrize(
    ("nodes", "depth", "topk", "block_size"), [(17, 16, 1, 1), (9, 8, 1, 2), (33, 8, 4, 1), (5, 4, 1, 1), (16, 5, 6, 16)]
)
def test_nothing_reaches_beyond_the_block_tables(
    nodes: int, depth: int, topk: int, block_size: int, demo_engine: MakeEngine, demo_prompts: list[list[int]], recorded: Recorded,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of requests as long as can be, whose trees graphs fill up to a power of two."""
    shape = {"tree_nodes": nodes, "tree_depth": depth, "tree_topk": topk, "block_size": block_size}
    engine = demo_engine(max_num_seqs=8, load_rule=False, ngrams=False, **shape)
    forward_parts, room = engine.steps.target.forward_parts, list[int]()

    def spied(parts: list[Rows], *others: Any) -> list[tuple[Tensor, Tensor | None]]:
        for part in parts:
            layout = part.layout
            assert int(layout.context_lens.max()) <= layout.max_context
            if layout.ancestors is not None:
                slots = layout.block_tables.shape[1] * layout.block_size
                room.append(slots - int(layout.context_lens.max()) - part.tokens.shape[1])
        return forward_parts(parts, *others)

    monkeypatch.setattr(engine.steps.target, "forward_parts", spied)
    prompts = demo_prompts[:16]
    run(engine, [(p, SamplingParams(max_tokens=engine.max_request_tokens - len(p), temperature=0, ignore_eos=True)) for p in prompts])
    assert 0 <= min(room) < 4 * nodes, "no further than needed"


def test_the_target_goes_ahead_of_no_more_rows_than_are_recorded(
    demo_engine: MakeEngine, demo_prompts: list[list[int]], recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many requests come while few have large trees."""
    engine = demo_engine(max_num_seqs=32, load_rule=False, ngrams=False, tree_nodes=64, tree_topk=8)
    running, proposals = Run(engine), watch(engine, monkeypatch)
    for i in range(17):
        running.add(str(i), demo_prompts[i], SamplingParams(max_tokens=100 if i < 2 else 30, temperature=0, ignore_eos=True))
        for _ in range(5 if i == 1 else 0):
            running.step()
    full = engine.shape
    while engine.has_work():
        engine.shape = full if len(engine.scheduler.decoding()) <= 2 else full.shrunk(4)
        running.step()
    assert max(proposal.tree.tokens.numel() for proposal in proposals) <= MAX_TREE_ROWS
    assert max(len(proposal.requests) for proposal in proposals) == 17
