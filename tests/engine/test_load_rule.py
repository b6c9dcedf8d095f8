"""The load rule: less drafting under load, none where it does not pay, and it learns."""

import pytest
import torch

from kernels.best_nodes import best_nodes
from server.engine import budget
from server.engine.budget import LoadRule, StepCost, default_acceptance, measure_costs, powers_of_two
from server.engine.drafter import TreeShape, _worthwhile

SHAPE = TreeShape(16, 5, 4)
ACCEPTANCE = {1: 1.0, 2: 1.6, 4: 2.2, 8: 2.8, 16: 3.2}
BATCHES = (1, 2, 4, 8, 16, 32)


def machine(level: float, node: float, batches: tuple[int, ...] = BATCHES) -> dict[int, StepCost]:
    """A machine whose plain step costs 1, whatever the batch, and every further level and node of a request so much."""
    return {batch: StepCost(1.0, 1.0, level, node * batch) for batch in batches}


def test_powers_of_two() -> None:
    assert powers_of_two(1) == [1]
    assert powers_of_two(16) == [1, 2, 4, 8, 16]
    assert powers_of_two(33) == [1, 2, 4, 8, 16, 32, 33]


def test_cost_of_a_step() -> None:
    cost = StepCost(plain=1.0, base=2.0, level=0.5, node=0.1)
    assert cost.tree(levels=1, nodes=2) == pytest.approx(2.2)
    assert cost.tree(levels=4, nodes=10) == pytest.approx(2 + 3 * 0.5 + 1.0)


def test_prices_rise_with_the_load_until_it_decodes_plainly() -> None:
    rule = LoadRule(SHAPE, machine(0.1, 0.02), ACCEPTANCE)
    shapes = [rule.choose(batch) for batch in BATCHES]
    drafting = [shape for shape in shapes if shape.nodes > 1]
    assert shapes[0] in drafting
    assert shapes[-1] == SHAPE.shrunk(1)
    assert shapes[: len(drafting)] == drafting, "once too busy, always too busy"
    per_request = [shape.node_price / batch for shape, batch in zip(drafting, BATCHES, strict=False)]
    assert per_request == sorted(per_request)


def test_prices_are_what_the_time_would_bring_otherwise() -> None:
    rule = LoadRule(SHAPE, {4: StepCost(plain=0.1, base=0.2, level=0.02, node=0.001)}, ACCEPTANCE)
    shape = rule.choose(4)
    tokens_per_second = 4 * rule.gain(4) / 0.1
    assert shape.level_price == pytest.approx(tokens_per_second * 0.02)
    assert shape.node_price == pytest.approx(tokens_per_second * 0.001)


def test_a_batch_between_measured_sizes_counts_as_the_next_larger() -> None:
    rule = LoadRule(SHAPE, machine(0.1, 0.02, (1, 4)), ACCEPTANCE)
    assert rule.gain(3) == rule.gain(4)
    assert rule.gain(100) == rule.gain(4)
    assert rule.gain(1) > rule.gain(4)


def test_a_gain_within_the_error_of_the_estimate_is_not_taken() -> None:
    def rule(accepted: float) -> LoadRule:
        return LoadRule(SHAPE, {1: StepCost(1.0, budget.OPTIMISM, 0.0, 0.0)}, {1: 1.0, 16: accepted})

    assert rule(budget.MIN_GAIN - 0.01).choose(1).nodes == 1
    assert rule(budget.MIN_GAIN + 0.01).choose(1).nodes == 16


def test_poor_acceptance_turns_speculation_off_and_it_comes_back() -> None:
    rule = LoadRule(SHAPE, machine(0.1, 0.02), ACCEPTANCE)
    steps = 0
    while rule.choose(4).nodes > 1:
        rule.observe(4, 5, 16, [0, 0, 0, 0])
        steps += 1
    assert 3 < steps < 100
    assert rule.choose(1).nodes > 1, "another batch size has its own estimate"
    for _ in range(3000):
        if rule.choose(4).nodes > 1:
            break
        rule.observe(4, 0, 1, [])
    assert rule.choose(4).nodes > 1, "plain steps forget, so that speculation is tried again"


def test_the_estimate_meets_the_truth() -> None:
    rule = LoadRule(SHAPE, machine(0.1, 0.02), ACCEPTANCE)
    for _ in range(400):
        rule.observe(2, 3, 8, [1, 2])
    assert rule.gain(2) == pytest.approx(2.5 / (1 + 2 * 0.1 + 8 * 0.04), abs=0.01)


def test_requests_that_draft_nothing_bring_one_token() -> None:
    rule = LoadRule(SHAPE, machine(0.0, 0.0), ACCEPTANCE)
    for _ in range(400):
        rule.observe(4, 3, 8, [2, 1])
    assert rule.gain(4) == pytest.approx((2 * 1 + 3 + 2) / 4, abs=0.01)


def test_default_acceptance_grows_slowly() -> None:
    guess = default_acceptance(32)
    assert guess[1] == 1
    values = [guess[nodes] for nodes in sorted(guess)]
    assert values == sorted(values)
    assert guess[32] < 4


def test_shrunk_shapes_hold_their_nodes() -> None:
    for nodes in range(1, 17):
        shape = SHAPE.shrunk(nodes)
        assert shape.nodes == nodes
        assert shape.depth <= max(1, nodes - 1)
        assert shape.topk <= max(1, nodes - 1)
        assert shape.lookahead <= SHAPE.lookahead


# Trees at a price


def test_levels_and_nodes_are_bought_at_their_price() -> None:
    scores = torch.tensor([[0.6, 0.3, 0.02], [0.9, 0.05, 0.01]]).log()  # columns bring 1.5, 0.35 and 0.03 tokens
    assert _worthwhile(scores, SHAPE) == 3, "free"
    assert _worthwhile(scores, SHAPE._replace(node_price=0.1)) == 2
    assert _worthwhile(scores, SHAPE._replace(node_price=0.5)) == 1
    assert _worthwhile(scores, SHAPE._replace(node_price=2.0)) == 0
    assert _worthwhile(scores, SHAPE._replace(level_price=1.8)) == 3
    assert _worthwhile(scores, SHAPE._replace(level_price=2.0)) == 0
    assert _worthwhile(scores, SHAPE._replace(level_price=1.8, node_price=0.5)) == 0


@pytest.mark.parametrize(("price", "nodes"), [(0.0, 6), (0.04, 5), (0.15, 4), (0.4, 3), (5.0, 2)])
def test_verified_nodes_are_the_ones_that_pay(price: float, nodes: int) -> None:
    scores = torch.tensor([[0.6, 0.2, 0.02, 0.45, 0.1]]).log()
    parents = torch.tensor([[0, 0, 0, 1, 1]])  # the last two are children of the first
    tokens, _ = best_nodes(torch.tensor([3]), scores, torch.tensor([[7, 8, 9, 5, 6]]), parents, 6, price)
    assert tokens.shape == (1, nodes), "the best drafted node is always verified"
    assert tokens[0, :2].tolist() == [3, 7]
    assert set(tokens[0].tolist()) == set([3, 7, 5, 8, 6, 9][:nodes])


# Measuring


def true_cost(batch: int, shape: TreeShape) -> float:
    return 1e-3 * (1 if shape.nodes == 1 else 1.2 + 0.3 * (shape.depth - 1) + 0.01 * batch * shape.nodes)


def test_measuring_finds_the_parts_of_the_cost() -> None:
    ran: list[tuple[int, TreeShape]] = []

    def run(batch: int, shape: TreeShape) -> float:
        ran.append((batch, shape))
        return true_cost(batch, shape)

    costs = measure_costs(run, SHAPE, 6)
    assert sorted(costs) == [1, 2, 4, 6]
    for batch, cost in costs.items():
        assert cost == pytest.approx(StepCost(1e-3, 1.2e-3, 0.3e-3, 0.01e-3 * batch))
        assert cost.tree(3, 8) == pytest.approx(true_cost(batch, TreeShape(8, 3, 4)))
    assert all(ran.count((1, shape)) == budget.MAX_TURNS for _, shape in ran)
    assert all(shape.lookahead <= SHAPE.lookahead for _, shape in ran)


@pytest.mark.parametrize("shape", [TreeShape(2, 1, 1), TreeShape(2, 5, 6), TreeShape(64, 1, 8)])
def test_measuring_shapes_with_a_part_missing(shape: TreeShape) -> None:
    cost = measure_costs(true_cost, shape, 1)[1]
    assert cost.tree(shape.depth, shape.nodes) == pytest.approx(true_cost(1, shape))
    assert cost.tree(1, 2) == pytest.approx(true_cost(1, shape._replace(nodes=2, depth=1)))


def test_a_burst_of_other_work_hits_no_single_kind_of_step() -> None:
    steps = 0

    def run(batch: int, shape: TreeShape) -> float:
        nonlocal steps
        steps += 1
        return true_cost(batch, shape) * (50 if 3 <= steps <= 7 else 1)

    assert measure_costs(run, SHAPE, 1) == measure_costs(true_cost, SHAPE, 1)


def test_measuring_ends_and_larger_batches_then_decode_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "MEASURING_SECONDS", 0.005)
    costs = measure_costs(true_cost, SHAPE, 32)
    assert costs[1].base < 1 < costs[32].base
    rule = LoadRule(SHAPE, costs, ACCEPTANCE)
    assert rule.choose(32) == SHAPE.shrunk(1)
    for _ in range(100):
        rule.observe(32, 0, 1, [])
    assert rule.choose(32) == SHAPE.shrunk(1)
