"""The load rule: how much a step may draft, from measured step costs and observed acceptance."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from tqdm import tqdm

from server.engine.drafter import TreeShape

MIN_GAIN = 1.15  # speed-up over plain decoding below which a step decodes plainly: on a fast processor estimates err by a tenth
OPTIMISM = 1.15  # of the first estimate: it knows fixed trees alone, and a rule that never drafts never learns
MEASURING_SECONDS = 15.0  # at start-up, after which larger batches decode plainly
TURN_SECONDS, MAX_TURNS = 1.0, 5  # per batch size
_UNKNOWN_GAIN_PER_DOUBLING = 0.4  # accepted tokens per doubling of the tree, for heads that bring no figures
_MEMORY = 0.99  # of the running estimates, per observed request
_FORGETTING = 1e-3  # per plain step: speculation is tried again


class StepCost(NamedTuple):
    """Seconds of a step at one batch size: ``plain``, or ``base`` + ``level`` for each level but the first + ``node`` for each node."""

    plain: float
    base: float
    level: float
    node: float

    def tree(self, levels: int, nodes: int) -> float:
        """Seconds of a step whose trees were grown by ``levels`` levels and verified with ``nodes`` nodes."""
        return self.base + self.level * (levels - 1) + self.node * nodes


class _Estimate:
    """What trees bring at one batch size: tokens per request and step, and what such a step costs, in plain steps."""

    def __init__(self, tokens: float, cost: float) -> None:
        self.first = (tokens, cost)
        self.tokens, self.cost = tokens, cost

    @property
    def gain(self) -> float:
        """Speed over plain decoding."""
        return self.tokens / self.cost

    def move(self, tokens: float, cost: float, weight: float) -> None:
        self.tokens += (tokens - self.tokens) * weight
        self.cost += (cost - self.cost) * weight


class LoadRule:
    """Decides at every step whether to draft at all, and what a level and a node must be worth.

    Time has a price: the tokens that the batch commits in it as things go. A level or a node that is expected to bring less than its
    own time is worth is left out, so trees grow where the head is sure and where the load leaves room. Estimates are kept per measured
    batch size. They count modelled and not clocked seconds, so that other programs' bursts do not disturb them.

    ``costs``: by batch size; ``acceptance``: tokens per verification by number of nodes of a fixed tree, where the estimates begin.
    """

    def __init__(self, shape: TreeShape, costs: Mapping[int, StepCost], acceptance: Mapping[int, float]) -> None:
        self.shape, self.costs = shape, dict(costs)
        self._estimates = {batch: _first_estimate(shape, cost, acceptance) for batch, cost in costs.items()}

    def gain(self, batch: int) -> float:
        """The estimated speed-up over plain decoding."""
        return self._estimates[self._measured(batch)].gain

    def choose(self, batch: int) -> TreeShape:
        """The largest tree for a step of ``batch`` requests, with its prices; one node where plain decoding is as fast."""
        measured = self._measured(batch)
        gain, cost = self._estimates[measured].gain, self.costs[measured]
        if gain < MIN_GAIN:
            return self.shape.shrunk(1)
        speed = batch * gain / cost.plain
        return self.shape._replace(level_price=speed * cost.level, node_price=speed * cost.node)

    def observe(self, batch: int, levels: int, nodes: int, accepted: Iterable[int]) -> None:
        """Learn from a step that grew ``levels`` levels and verified ``nodes`` nodes, of which requests accepted so many."""
        measured = self._measured(batch)
        estimate, cost, counts = self._estimates[measured], self.costs[measured], list(accepted)
        if nodes == 1 or not counts:
            estimate.move(*estimate.first, _FORGETTING)
        else:
            estimate.move(1 + sum(counts) / batch, cost.tree(levels, nodes) / cost.plain, 1 - _MEMORY ** len(counts))

    def _measured(self, batch: int) -> int:
        """The measured batch size that stands for ``batch``: the next larger one."""
        return min((size for size in self.costs if size >= batch), default=max(self.costs))


class FreeDraftRule(LoadRule):
    """The load rule where drafting costs nothing: trees are known before it is decided, so each step's own tree says what it will bring.

    Plain decoding is what a tree must beat, MIN_GAIN times; the price of a level is that of all but its nodes.
    """

    def choose(self, batch: int) -> TreeShape:
        cost = self.costs[self._measured(batch)]
        needed = MIN_GAIN * batch / cost.plain
        speed = max(needed, batch * self.gain(batch) / cost.plain)
        return self.shape._replace(level_price=needed * cost.tree(1, 1) - batch, node_price=speed * cost.node)


def _first_estimate(shape: TreeShape, cost: StepCost, acceptance: Mapping[int, float]) -> _Estimate:
    """The best fixed tree by the figures known beforehand."""
    trees = [shape.shrunk(nodes) for nodes in powers_of_two(shape.nodes) if nodes > 1]
    estimates = [
        _Estimate(OPTIMISM * _interpolate(acceptance, tree.nodes), cost.tree(tree.depth, tree.nodes) / cost.plain) for tree in trees
    ]
    return max(estimates, key=lambda estimate: estimate.gain, default=_Estimate(1.0, 1.0))


def powers_of_two(limit: int) -> list[int]:
    """1, 2, 4, ... and ``limit``."""
    return sorted({limit, *(1 << i for i in range(limit.bit_length()) if 1 << i <= limit)})


def default_acceptance(nodes: int) -> dict[int, float]:
    """A cautious guess for heads without calibration."""
    return {n: 1 + _UNKNOWN_GAIN_PER_DOUBLING * math.log2(n) for n in powers_of_two(nodes)}


def measure_costs(run: Callable[[int, TreeShape], float], shape: TreeShape, max_batch: int) -> dict[int, StepCost]:
    """Time steps at batch sizes 1, 2, 4, ...; ``run(batch, shape)`` does one and returns its seconds.

    Four kinds of step tell the parts of the cost: plain, one level with one drafted node, all levels with one, all levels with all
    nodes. They take turns, so that another program's burst of work hits them all, and the best of a few turns counts. Once
    MEASURING_SECONDS are spent, larger batches are taken to decode plainly.
    """
    slim = shape._replace(nodes=2)
    kinds = (shape.shrunk(1), slim._replace(depth=1), slim, shape)
    costs: dict[int, StepCost] = {}
    spent = 0.0
    for batch in tqdm(powers_of_two(max_batch), desc="measuring step costs", unit="batch size", leave=False):
        best, until = [math.inf] * len(kinds), spent + TURN_SECONDS
        if spent > MEASURING_SECONDS:
            costs[batch] = StepCost(plain=1.0, base=1e9, level=0.0, node=0.0)
            continue
        for _ in range(MAX_TURNS):
            for i, kind in enumerate(kinds):
                taken = run(batch, kind)
                spent += taken
                best[i] = min(best[i], taken)
            if spent > until:
                break
        costs[batch] = _parts(best, shape)
    return costs


def _parts(seconds: list[float], shape: TreeShape) -> StepCost:
    """The cost's parts from the four kinds of ``measure_costs``."""
    plain, one_level, all_levels, all_nodes = seconds
    node = max(0.0, all_nodes - all_levels) / max(1, shape.nodes - 2)
    level = max(0.0, all_levels - one_level) / max(1, shape.depth - 1)
    return StepCost(plain, one_level - 2 * node, level, node)


def _interpolate(points: Mapping[int, float], x: int) -> float:
    """Piecewise linear; beyond the ends the nearest value."""
    below = max((p for p in points if p <= x), default=min(points))
    above = min((p for p in points if p >= x), default=max(points))
    if below == above:
        return points[above]
    return points[below] + (points[above] - points[below]) * (x - below) / (above - below)
