"""The rule that chooses among trees of a few sizes, whose steps are timed at start."""

from typing import Any

import pytest

from server.engine.costs import measure_trees, tree_shapes
from server.engine.drafter import TreeShape
from server.engine.fixed_trees import COMPARING, FixedTreeRule
from server.engine.types import SamplingParams
from tests.engine.engines import build, tiny_model

SHAPE = TreeShape(16, 5, 6)
USUAL = {1: 1.0, 2: 1.8, 4: 2.6, 8: 3.2, 16: 3.6}


def seconds(flat: float, level: float = 0.0) -> dict[int, dict[TreeShape, float]]:
    """A step takes 1 up to ``flat`` rows, and what is beyond in proportion; drafting takes 0.2, and ``level`` for every level."""
    return {
        batch: {
            shape: max(1.0, batch * shape.nodes / flat) + (0.2 + level * shape.depth) * (shape.nodes > 1) for shape in tree_shapes(SHAPE)
        }
        for batch in (1, 2, 4, 8, 16, 32)
    }


def test_steps_are_timed_after_they_were_recorded() -> None:
    calls: list[tuple[int, TreeShape]] = []

    def step(batch: int, shape: TreeShape) -> float:
        calls.append((batch, shape))
        return 5.0 if calls.count(calls[-1]) == 1 else batch + shape.nodes / 100 + shape.depth / 1000

    found = measure_trees(step, tree_shapes(SHAPE), 4)
    assert found == {b: {s: b + s.nodes / 100 + s.depth / 1000 for s in tree_shapes(SHAPE)} for b in (1, 2, 4)}
    assert [(s.nodes, s.depth) for s in tree_shapes(SHAPE)] == [(1, 1), (2, 1), (4, 3), (8, 5), (16, 5), (8, 3), (16, 3)]


class TestRule:
    """The rule on requests of a tiny engine that decodes nothing."""

    def requests(self, count: int, **params: Any) -> list:
        engine = build(tiny_model("llama"), max_num_seqs=32)
        for i in range(count):
            engine.add_request(str(i), [5], SamplingParams(temperature=0, **params))
        return list(engine.scheduler.waiting)

    @pytest.mark.parametrize(("batch", "nodes"), [(1, 16), (8, 8), (32, 2)])
    def test_trees_shrink_with_the_batch(self, batch: int, nodes: int) -> None:
        plan = FixedTreeRule(SHAPE, seconds(64.0), USUAL).choose(self.requests(batch))
        assert plan.shape.nodes == nodes
        assert len(plan.drafting) == batch
        assert plan.shape.level_price == plan.shape.node_price == 0
        assert plan.gain > 1.1

    def test_nobody_drafts_where_it_cannot_pay(self) -> None:
        rule = FixedTreeRule(SHAPE, seconds(8.0), USUAL)
        requests = self.requests(32)
        plans = [rule.choose(requests) for _ in range(200)]
        tried = [i for i, plan in enumerate(plans) if plan.drafting]
        assert 2 <= len(tried) <= 6
        assert {len(plans[i].drafting) for i in tried} == {8}, "a few tell as much"
        assert all(plans[i].apart for i in tried)

    def test_learns_what_requests_accept(self) -> None:
        rule, requests = FixedTreeRule(SHAPE, seconds(64.0), USUAL), self.requests(4)
        steps = 0
        while (plan := rule.choose(requests)).drafting and steps < 20:
            steps += 1
            plan.drafts = [(request, plan.shape.nodes - 1, 0) for request in plan.drafting]
            plan.nodes, plan.levels = plan.shape.nodes, plan.shape.depth
            rule.observe(plan, None)
        assert 2 < steps < 20

    def test_learns_what_steps_take(self) -> None:
        rule, requests = FixedTreeRule(SHAPE, seconds(64.0), USUAL), self.requests(4)
        for _ in range(60):
            plan = rule.choose(requests)
            plan.drafts = [(request, plan.shape.nodes - 1, 2) for request in plan.drafting]
            plan.nodes, plan.levels = plan.shape.nodes, plan.shape.depth
            rule.observe(plan, 1.0 if not plan.drafting else 1.2 if plan.shape.nodes == 4 else 9.0)
        assert plan.shape.nodes == 4

    def test_requests_that_may_not_draft_do_not(self) -> None:
        requests = self.requests(3) + self.requests(1, max_draft_nodes=0)
        plan = FixedTreeRule(SHAPE, seconds(64.0), USUAL).choose(requests)
        assert plan.drafting == requests[:3]
        assert not FixedTreeRule(SHAPE, seconds(64.0), USUAL).choose(requests[3:]).drafting

    @pytest.mark.parametrize("share", [0.6, 1.0], ids=["deep trees accept more", "they do not"])
    @pytest.mark.parametrize("batch", [4, 32])
    def test_learns_whether_levels_pay(self, batch: int, share: float) -> None:
        """Trees are as deep as the step before began them; five levels take a fifth more of a step than three."""
        rule, requests, depths, begun = FixedTreeRule(SHAPE, seconds(512.0, level=0.12), USUAL), self.requests(batch), [], SHAPE
        for _ in range(40 * COMPARING):
            plan = rule.choose(requests)
            accepted = rule.usual(begun.nodes) * (share if begun.depth == 3 else 1.0)
            plan.drafts = [(request, begun.nodes - 1, accepted) for request in plan.drafting]
            plan.nodes, plan.levels, begun = begun.nodes, begun.depth, plan.shape
            rule.observe(plan, None)
            depths.append(plan.shape.depth)
        last = depths[-4 * COMPARING :]
        assert last.count(5 if share < 1 else 3) >= 4 * (COMPARING - 2)

    def test_learns_of_which_trees_requests_accept_more(self) -> None:
        """The figures known beforehand speak for two nodes at this load."""
        rule, requests, begun, nodes = FixedTreeRule(SHAPE, seconds(80.0), USUAL), self.requests(32), SHAPE.shrunk(2), list[int]()
        for _ in range(30 * COMPARING):
            plan = rule.choose(requests)
            accepted = rule.usual(begun.nodes) * (1.5 if (begun.nodes, begun.depth) == (4, 3) else 1.0)
            plan.drafts = [(request, begun.nodes - 1, accepted) for request in plan.drafting]
            plan.nodes, plan.levels, begun = begun.nodes, begun.depth, plan.shape
            rule.observe(plan, None)
            nodes.append(plan.shape.nodes)
        assert set(nodes[: COMPARING - 3]) == {2}
        assert nodes[-4 * COMPARING :].count(4) >= 4 * (COMPARING - 2)

    @pytest.mark.parametrize("slow", [1.0, 2.0], ids=["plain steps", "trees"])
    def test_a_bad_moment_is_forgotten(self, slow: float) -> None:
        """Of one kind of step alone, which then is right or wrong for ever."""
        rule, requests = FixedTreeRule(SHAPE, seconds(64.0), USUAL), self.requests(32)
        share = 0.1 if slow == 1.0 else 1.0  # of what is usual: drafting pays or not
        drafting = []
        for step in range(1500):
            plan = rule.choose(requests)
            is_bad = 100 <= step < 140 and bool(plan.drafting) == (slow == 2.0)
            usual = rule.usual(plan.shape.nodes) * share
            plan.drafts = [(request, plan.shape.nodes - 1, usual) for request in plan.drafting]
            plan.nodes, plan.levels = plan.shape.nodes, plan.shape.depth
            true = rule._first[32][plan.shape if plan.drafting else SHAPE.shrunk(1)]
            rule.observe(plan, true * (2.0 if is_bad else 1.0))
            drafting.append(bool(plan.drafting) and not plan.apart)
        before, after = sum(drafting[50:100]), sum(drafting[-50:])
        assert (before, after) == ((0, 0) if slow == 1.0 else (50, 50))
        assert sum(drafting[140:]) != before * len(drafting[140:]) / 50, "for a while it was wrong"

    def test_what_small_trees_accept_is_expected_of_large_ones(self) -> None:
        """Under another load it was learned that requests accept more than is usual of trees of eight nodes; larger ones were not tried."""
        rule, requests, begun, nodes = FixedTreeRule(SHAPE, seconds(80.0, level=0.02), USUAL), self.requests(1), SHAPE, list[int]()
        rule._factors[0, next(shape for shape in tree_shapes(SHAPE) if (shape.nodes, shape.depth) == (8, 3))] = 2.0
        accepted = {2: 0.8, 4: 2.4, 8: 5.0, 16: 9.0}
        for _ in range(10 * COMPARING):
            plan = rule.choose(requests)
            plan.drafts = [(request, begun.nodes - 1, accepted[begun.nodes]) for request in plan.drafting]
            plan.nodes, plan.levels, begun = begun.nodes, begun.depth, plan.shape
            rule.observe(plan, None)
            nodes.append(plan.shape.nodes)
        assert nodes[-4 * COMPARING :].count(16) >= 4 * (COMPARING - 2)
