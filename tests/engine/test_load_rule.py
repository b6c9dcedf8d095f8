"""The load rule: fewer nodes under load, none when they do not pay, and it learns."""

import math

import pytest

from server.engine import budget
from server.engine.budget import LoadRule, default_acceptance, measure_costs, powers_of_two
from server.engine.drafter import TreeShape

SHAPE = TreeShape(16, 5, 4)
ACCEPTANCE = {1: 1.0, 2: 1.6, 4: 2.2, 8: 2.8, 16: 3.2}


def compute_bound(overhead: float, per_row: float, batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)) -> dict[tuple[int, int], float]:
    """A machine whose step costs ``overhead`` seconds and ``per_row`` for every node of every request."""
    return {(batch, nodes): overhead + per_row * batch * nodes for batch in batches for nodes in powers_of_two(16)}


def test_powers_of_two() -> None:
    assert powers_of_two(1) == [1]
    assert powers_of_two(16) == [1, 2, 4, 8, 16]
    assert powers_of_two(33) == [1, 2, 4, 8, 16, 32, 33]


def test_the_tree_shrinks_with_the_batch_down_to_none() -> None:
    rule = LoadRule(SHAPE, compute_bound(1.0, 0.02), ACCEPTANCE)
    nodes = [rule.choose(batch).nodes for batch in (1, 2, 4, 8, 16, 32)]
    assert nodes == sorted(nodes, reverse=True)
    assert nodes[0] == 16
    assert nodes[-1] < 4
    assert LoadRule(SHAPE, compute_bound(1.0, 1.0), ACCEPTANCE).choose(32) == SHAPE.shrunk(1)


def test_it_picks_the_fastest_by_its_own_figures() -> None:
    seconds = compute_bound(1.0, 0.03)
    rule = LoadRule(SHAPE, seconds, ACCEPTANCE)
    for batch in (1, 2, 4, 8, 16, 32):
        speeds = {nodes: ACCEPTANCE[nodes] / seconds[batch, nodes] for nodes in ACCEPTANCE}
        fastest = max(speeds, key=speeds.__getitem__)
        assert rule.choose(batch).nodes == (fastest if speeds[fastest] > budget.MIN_GAIN * speeds[1] else 1)


def test_a_gain_within_the_error_of_the_prediction_is_not_taken() -> None:
    acceptance = {1: 1.0, 16: budget.MIN_GAIN - 0.01}
    flat = {(1, 1): 1.0, (1, 16): 1.0}
    assert LoadRule(SHAPE, flat, acceptance).choose(1).nodes == 1
    assert LoadRule(SHAPE, flat, {1: 1.0, 16: budget.MIN_GAIN + 0.01}).choose(1).nodes == 16


def test_costs_between_and_beyond_measured_batches() -> None:
    rule = LoadRule(SHAPE, compute_bound(1.0, 0.5, (2, 4)), ACCEPTANCE)
    assert rule.cost(3, 8) == pytest.approx(1 + 0.5 * 3 * 8)
    assert rule.cost(1, 8) == rule.cost(2, 8)
    assert rule.cost(100, 8) == rule.cost(4, 8)


def test_a_tree_that_was_never_worth_it_is_not_chosen() -> None:
    seconds = compute_bound(1.0, 0.0) | {(4, 16): math.inf, (8, 16): math.inf, (8, 8): math.inf}
    rule = LoadRule(SHAPE, seconds, ACCEPTANCE)
    assert rule.choose(2).nodes == 16
    assert rule.choose(3).nodes == 8, "nor between a batch where it was and one where it was not"
    assert rule.choose(4).nodes == 8
    assert rule.choose(6).nodes == 4
    assert rule.choose(8).nodes == 4


def test_poor_acceptance_turns_speculation_off_and_it_comes_back() -> None:
    rule = LoadRule(SHAPE, compute_bound(1.0, 0.02), ACCEPTANCE)
    steps = 0
    while rule.choose(4).nodes > 1:
        rule.observe(rule.choose(4).nodes, [0, 0, 0, 0])
        steps += 1
    assert 3 < steps < 300
    for _ in range(3000):
        if rule.choose(4).nodes > 1:
            break
        rule.observe(1, [0, 0, 0, 0])
    assert rule.choose(4).nodes > 1, "plain steps forget, so that speculation is tried again"


def test_the_running_estimate_meets_the_truth() -> None:
    rule = LoadRule(SHAPE, compute_bound(1.0, 0.02), ACCEPTANCE)
    for _ in range(400):
        rule.observe(16, [1, 2, 1, 2])
    assert rule.expected_acceptance(16) == pytest.approx(2.5, abs=0.01)
    assert rule.expected_acceptance(1) == 1
    assert 1 < rule.expected_acceptance(4) < ACCEPTANCE[4]


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


def test_measuring_runs_every_size_and_skips_the_hopeless(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[int, int]] = []

    def run(batch: int, shape: TreeShape) -> float:
        ran.append((batch, shape.nodes))
        return 0.001 * batch * (1 if shape.nodes < 8 else 100)

    seconds = measure_costs(run, SHAPE, 6)
    assert set(seconds) == {(batch, nodes) for batch in (1, 2, 4, 6) for nodes in (1, 2, 4, 8, 16)}
    assert seconds[1, 4] == pytest.approx(0.001)
    assert ran.count((1, 4)) == budget.MAX_TURNS
    assert seconds[1, 8] == pytest.approx(0.1), "measured, and never the fastest"
    assert math.isinf(seconds[1, 16])
    assert (1, 16) not in ran
    assert all(math.isfinite(seconds[batch, nodes]) for batch in (1, 2, 4, 6) for nodes in (1, 2, 4))
    assert math.isinf(seconds[2, 8]), "at one request it never paid"
    monkeypatch.setattr(budget, "MEASURING_SECONDS", 0.0)
    seconds = measure_costs(run, SHAPE, 6)
    assert all(math.isfinite(seconds[batch, 1]) for batch in (1, 2, 4, 6))
    assert math.isinf(seconds[6, 2])


def test_a_burst_of_other_work_hits_no_single_size() -> None:
    steps = 0

    def run(batch: int, shape: TreeShape) -> float:
        nonlocal steps
        steps += 1
        return 0.001 * (50 if 3 <= steps <= 7 else 1)  # five slow steps in a row

    assert set(measure_costs(run, SHAPE, 1).values()) == {0.001}
