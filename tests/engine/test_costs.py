"""What steps cost: measured in parts, and kept for the next start."""

import os
import time
from pathlib import Path

import pytest

from server.engine.costs import KEPT_SECONDS, MAX_TURNS, StepCost, kept_costs, measure_costs, powers_of_two
from server.engine.drafter import TreeShape
from tests.engine.engines import build, random_head, tiny_model

SHAPE = TreeShape(16, 5, 4)


def steps(level: float, node: float) -> dict[int, StepCost]:
    return {batch: StepCost(1.0, 1.0, level, node * batch, 0.01) for batch in (1, 2, 4)}


def test_powers_of_two() -> None:
    assert powers_of_two(1) == [1]
    assert powers_of_two(16) == [1, 2, 4, 8, 16]
    assert powers_of_two(33) == [1, 2, 4, 8, 16, 32, 33]


def test_cost_of_a_step() -> None:
    cost = StepCost(plain=1.0, base=2.0, level=0.5, node=0.1)
    assert cost.tree(levels=1, nodes=2) == pytest.approx(2.2)
    assert cost.tree(levels=4, nodes=10) == pytest.approx(2 + 3 * 0.5 + 1.0)


def true_cost(batch: int, shape: TreeShape) -> float:
    if shape.nodes == 1 or shape.depth == 0:
        return 1e-3 * (1 if shape.nodes == 1 else 1.05 + 0.01 * batch * (shape.nodes - 1))
    return 1e-3 * (1.2 + 0.3 * (shape.depth - 1) + 0.01 * batch * shape.nodes)


def true_sync(batch: int, rows: int) -> float:
    return 1e-3 * (0.1 + 0.02 * batch * rows)


def test_measuring_finds_the_parts_of_the_cost() -> None:
    ran: list[tuple[int, TreeShape]] = []

    def run(batch: int, shape: TreeShape) -> float:
        ran.append((batch, shape))
        return true_cost(batch, shape)

    costs = measure_costs(run, true_sync, SHAPE, 6)
    assert sorted(costs) == [1, 2, 4, 6]
    for batch, cost in costs.items():
        assert cost == pytest.approx(StepCost(1e-3, 1.2e-3 + true_sync(batch, 1), 0.3e-3, 0.01e-3 * batch, 0.02e-3, 0.05e-3))
        assert cost.tree(3, 8) == pytest.approx(true_cost(batch, TreeShape(8, 3, 4)) + true_sync(batch, 1))
    assert {(shape.nodes == 1, ran.count((batch, shape))) for batch, shape in ran} == {(True, 8 * MAX_TURNS), (False, 2 * MAX_TURNS)}
    assert {max(shape.nodes for own, shape in ran if own == batch) for batch in (1, 4, 6)} == {16, 10}, "of few rows in all"
    assert all(shape.lookahead <= SHAPE.lookahead for _, shape in ran)


@pytest.mark.parametrize("shape", [TreeShape(2, 1, 1), TreeShape(2, 5, 6), TreeShape(64, 1, 8)])
def test_measuring_shapes_with_a_part_missing(shape: TreeShape) -> None:
    cost = measure_costs(true_cost, true_sync, shape, 1)[1]
    assert cost.tree(shape.depth, shape.nodes) == pytest.approx(true_cost(1, shape) + true_sync(1, 1))
    assert cost.tree(1, 2) == pytest.approx(true_cost(1, shape._replace(nodes=2, depth=1)) + true_sync(1, 1))


def test_a_step_after_one_of_another_kind_does_not_count() -> None:
    """It finds the processor's caches full of other things; and after large steps, several plain ones take longer."""
    last: list[TreeShape] = []

    def run(batch: int, shape: TreeShape) -> float:
        cold = last[-1:] != [shape] or (shape.nodes == 1 and last[-5:] != [shape] * 5)
        last.append(shape)
        return true_cost(batch, shape) + (1.0 if cold else 0.0)

    assert measure_costs(run, true_sync, SHAPE, 1) == measure_costs(true_cost, true_sync, SHAPE, 1)


def test_a_burst_of_other_work_hits_no_single_kind_of_step() -> None:
    steps = 0

    def run(batch: int, shape: TreeShape) -> float:
        nonlocal steps
        steps += 1
        return true_cost(batch, shape) * (50 if 3 <= steps <= 7 else 1)

    assert measure_costs(run, true_sync, SHAPE, 1) == measure_costs(true_cost, true_sync, SHAPE, 1)


def test_costs_are_kept_for_the_next_start(tmp_path: Path) -> None:
    found = iter((steps(0.1, 0.05), steps(0.2, 0.1), steps(0.3, 0.2)))
    first = kept_costs(tmp_path / "new", "a model", lambda: next(found))
    assert kept_costs(tmp_path / "new", "a model", lambda: next(found)) == first == steps(0.1, 0.05)
    assert kept_costs(tmp_path / "new", "another", lambda: next(found)) == steps(0.2, 0.1)
    assert kept_costs(None, "a model", lambda: next(found)) == steps(0.3, 0.2)


def test_old_costs_are_measured_anew(tmp_path: Path) -> None:
    kept_costs(tmp_path, "a model", lambda: steps(0.1, 0.05))
    [file] = tmp_path.iterdir()
    for age, costs in ((KEPT_SECONDS - 60, steps(0.1, 0.05)), (KEPT_SECONDS + 60, steps(0.2, 0.1))):
        os.utime(file, (time.time() - age,) * 2)
        assert kept_costs(tmp_path, "a model", lambda: steps(0.2, 0.1)) == costs


@pytest.mark.parametrize("text", ["", "[]", '{"costs": {"1": {"plain": 1}}}', '{"costs": {"x": {}}}', b"\xff"])
def test_a_file_of_costs_that_is_broken_is_replaced(text: str | bytes, tmp_path: Path) -> None:
    kept_costs(tmp_path, "a model", lambda: steps(0.1, 0.05))
    [file] = tmp_path.iterdir()
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert kept_costs(tmp_path, "a model", lambda: steps(0.2, 0.1)) == steps(0.2, 0.1)
    assert kept_costs(tmp_path, "a model", dict) == steps(0.2, 0.1)


def test_costs_that_cannot_be_kept_are_measured(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    assert kept_costs(tmp_path / "file" / "below", "a model", lambda: steps(0.1, 0.05)) == steps(0.1, 0.05)
    assert "cannot be kept" in caplog.text


def test_an_engine_starts_with_the_costs_of_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    first = build(model, random_head(model), load_rule=True, cost_cache=tmp_path)
    monkeypatch.setattr("server.engine.trial.measure_costs", lambda *_: pytest.fail("measured again"))
    second = build(model, random_head(model), load_rule=True, cost_cache=tmp_path)
    assert first.load_rule is not None
    assert second.load_rule is not None
    assert second.load_rule.costs == first.load_rule.costs
    monkeypatch.setattr("server.engine.trial.measure_costs", lambda *_: steps(0.1, 0.1))
    other = build(model, random_head(model), load_rule=True, cost_cache=tmp_path, tree_nodes=4)
    assert other.load_rule is not None
    assert other.load_rule.costs == steps(0.1, 0.1)
