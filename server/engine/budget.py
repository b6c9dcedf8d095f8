"""The load rule: how many nodes a step may verify, from measured step costs and expected acceptance."""

import math
from collections.abc import Callable, Iterable, Mapping

from tqdm import tqdm

from server.engine.drafter import TreeShape

MIN_GAIN = 1.1  # predicted speed-up below which a step decodes plainly: predictions err by some percent
_UNKNOWN_GAIN_PER_DOUBLING = 0.4  # accepted tokens per doubling of the tree, for heads that bring no figures
MEASURING_SECONDS = 15.0  # at start-up, after which larger batches decode plainly
TURN_SECONDS, MAX_TURNS = 1.0, 5  # per batch size
_MEMORY = 0.98  # of the running acceptance estimate, per step


def powers_of_two(limit: int) -> list[int]:
    """1, 2, 4, ... and ``limit``."""
    return sorted({limit, *(1 << i for i in range(limit.bit_length()) if 1 << i <= limit)})


class LoadRule:
    """Chooses the tree shape that is expected to commit the most tokens per second at a batch size, down to plain decoding.

    ``seconds[(batch, nodes)]``: measured cost of a whole step; ``acceptance``: tokens committed per verification by nodes, which a
    running ratio of observed to expected acceptance corrects.
    """

    def __init__(self, shape: TreeShape, seconds: Mapping[tuple[int, int], float], acceptance: Mapping[int, float]) -> None:
        self.shape, self.seconds = shape, dict(seconds)
        self.batches = sorted({batch for batch, _ in seconds})
        self.nodes = sorted({nodes for _, nodes in seconds})
        self.acceptance = dict(acceptance)
        self.ratio = 1.0

    def expected_acceptance(self, nodes: int) -> float:
        """Tokens that a verification of ``nodes`` nodes commits, the bonus token counted."""
        return 1 + self.ratio * (_interpolate(self.acceptance, nodes) - 1)

    def cost(self, batch: int, nodes: int) -> float:
        """Seconds of a step, linear between the measured batch sizes."""
        return _interpolate({b: self.seconds[b, nodes] for b in self.batches}, batch)

    def choose(self, batch: int) -> TreeShape:
        best, best_speed = 1, MIN_GAIN / self.cost(batch, 1)
        for nodes in self.nodes[1:]:
            speed = self.expected_acceptance(nodes) / self.cost(batch, nodes)
            if speed > best_speed:
                best, best_speed = nodes, speed
        return self.shape.shrunk(best)

    def observe(self, nodes: int, accepted: Iterable[int]) -> None:
        """Learn from the accepted draft nodes of one step's requests; plain steps forget slowly, so that speculation is tried again."""
        expected = _interpolate(self.acceptance, nodes) - 1
        counts = list(accepted)
        seen = sum(counts) / len(counts) / expected if nodes > 1 and expected > 0 else 1.0
        weight = 1 - _MEMORY ** len(counts) if nodes > 1 else 1e-3
        self.ratio += (seen - self.ratio) * weight


def default_acceptance(nodes: int) -> dict[int, float]:
    """A cautious guess for heads without calibration."""
    return {n: 1 + _UNKNOWN_GAIN_PER_DOUBLING * math.log2(n) for n in powers_of_two(nodes)}


def measure_costs(run: Callable[[int, TreeShape], float], shape: TreeShape, max_batch: int) -> dict[tuple[int, int], float]:
    """Time steps at every batch and tree size (powers of two); ``run(batch, shape)`` does one and returns its seconds.

    Tree sizes take turns, so that another program's burst of work hits them all, and the best of a few turns counts. A tree that
    costs more than its nodes could ever commit is never worth it, nor is a larger one, nor the same one at a larger batch: those
    are not run again and count as infinite. Nor are trees run once MEASURING_SECONDS are spent.
    """
    seconds: dict[tuple[int, int], float] = {}
    sizes, spent = powers_of_two(shape.nodes), 0.0
    for batch in tqdm(powers_of_two(max_batch), desc="measuring step costs", unit="batch size", leave=False):
        seconds.update({(batch, nodes): math.inf for nodes in powers_of_two(shape.nodes)})
        until = spent + TURN_SECONDS
        for _ in range(MAX_TURNS):
            for nodes in sizes:
                if nodes > 1 and spent > MEASURING_SECONDS:
                    break
                smaller = shape.shrunk(nodes)
                taken = run(batch, smaller)
                spent += taken
                seconds[batch, nodes] = min(seconds[batch, nodes], taken)
                if nodes > 1 and taken > (smaller.depth + 1) * seconds[batch, 1]:
                    break
            if spent > until:
                break
        sizes = [nodes for nodes in sizes if nodes == 1 or seconds[batch, nodes] <= (shape.shrunk(nodes).depth + 1) * seconds[batch, 1]]
    return seconds


def _interpolate(points: Mapping[int, float], x: int) -> float:
    """Piecewise linear; beyond the ends the nearest value."""
    below = max((p for p in points if p <= x), default=min(points))
    above = min((p for p in points if p >= x), default=max(points))
    if below == above or math.isinf(points[above]):
        return points[above]
    return points[below] + (points[above] - points[below]) * (x - below) / (above - below)
