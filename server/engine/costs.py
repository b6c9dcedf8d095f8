"""What steps cost on this machine, by measurement at start."""

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from tqdm import tqdm

from kernels import cpu
from server.engine.drafter import TreeShape
from server.engine.graphs import in_halves

logger = logging.getLogger(__name__)
UNMEASURED = 1e9  # seconds of trees that are not worth measuring: nobody will have any
MEASURING_SECONDS = 15.0  # at start-up, after which larger batches decode plainly
TURN_SECONDS, MAX_TURNS = 1.0, 15  # per batch size
IN_A_ROW, PLAIN_IN_A_ROW = 2, 8  # steps of a kind in a turn: up to so many plain ones after larger ones take longer, for whatever reason
TREE_TURNS = 5  # of a kind of step whose graphs are recorded,
RECORDING_SECONDS = 120.0  # within so much time,
MAX_TREE_ROWS = 1024  # and for so many nodes of a batch, which on an H200 took as long as four plain steps (8 billion parameters)
FEW_LEVELS = 4  # of trees that have no shallow ones beside them
KEPT_SECONDS = 7 * 24 * 3600.0  # that a machine is taken to stay the same
MANY_ROWS, FEWEST_NODES = 64, 4  # of a batch, and of a tree, by which what nodes cost is measured: more are seldom worth it
MEASURED_ROWS = 9  # by which the draft cache is behind, beside 1, when its cost is measured


class StepCost(NamedTuple):
    """Seconds of a step at one batch size: ``plain``, or ``base`` + ``level`` for each level but the first + ``node`` for each node.

    ``row``: for each row but the first that a request's draft cache is behind, which is a row per committed token. ``text``: of trees
    that no head has drafted, beside those of a plain step and ``node`` for each drafted node.
    """

    plain: float
    base: float
    level: float
    node: float
    row: float = 0.0
    text: float = 0.0

    def tree(self, levels: int, nodes: int) -> float:
        """Seconds of a step whose trees were grown by ``levels`` levels and verified with ``nodes`` nodes, the draft cache a row behind."""
        return self.base + self.level * (levels - 1) + self.node * nodes


def powers_of_two(limit: int) -> list[int]:
    """1, 2, 4, ... and ``limit``."""
    return sorted({limit, *(1 << i for i in range(limit.bit_length()) if 1 << i <= limit)})


def measure_costs(
    run: Callable[[int, TreeShape], float], sync: Callable[[int, int], float], shape: TreeShape, max_batch: int
) -> dict[int, StepCost]:
    """Time steps at batch sizes 1, 2, 4, ...; ``run(batch, shape)`` does one with the draft cache up to date, and returns its seconds;
    ``sync(batch, rows)`` brings it up to date after so many rows of every request.

    Five kinds of step tell the parts of the cost: plain, one level with one drafted node, all levels with one, all levels with many
    nodes, no level with as many; and two numbers of rows. They take turns, so that another program's burst of work hits them all, and
    the best of a few turns counts. Once MEASURING_SECONDS are spent, larger batches are taken to decode plainly.
    """
    costs: dict[int, StepCost] = {}
    spent = 0.0
    for batch in tqdm(powers_of_two(max_batch), desc="measuring step costs", unit="batch size", leave=False):
        slim, many = shape._replace(nodes=2), shape._replace(nodes=min(shape.nodes, max(FEWEST_NODES, MANY_ROWS // batch)))
        kinds = (shape.shrunk(1), slim._replace(depth=1), slim, many, many._replace(depth=0))
        best, until = [math.inf] * (len(kinds) + 2), spent + TURN_SECONDS
        if spent > MEASURING_SECONDS:
            costs[batch] = StepCost(plain=1.0, base=UNMEASURED, level=0.0, node=UNMEASURED)
            continue
        for _ in range(MAX_TURNS):
            # Several times each: the first find the processor slowed down by other kinds, and its caches full of theirs.
            runs = [[run(batch, kind) for _ in range(IN_A_ROW if kind.nodes > 1 else PLAIN_IN_A_ROW)] for kind in kinds]
            late = [sync(batch, rows) for rows in (1, MEASURED_ROWS)]
            best = list(map(min, best, [*map(min, runs), *late]))
            spent += sum(map(sum, runs)) + sum(late)
            if spent > until:
                break
        costs[batch] = _parts(best, shape.depth, many.nodes, batch)
    return costs


def tree_shapes(full: TreeShape) -> list[TreeShape]:
    """Trees of 1, 2, 4, ... nodes, of all the levels that they can fill, and of half as many where these are more than a few."""
    deep = [full.shrunk(nodes) for nodes in powers_of_two(full.nodes)]
    return deep + [shape._replace(depth=(shape.depth + 1) // 2) for shape in deep if shape.depth > FEW_LEVELS]


def measure_trees(run: Callable[[int, TreeShape], float], shapes: Sequence[TreeShape], max_batch: int) -> dict[int, dict[TreeShape, float]]:
    """Seconds of steps whose requests all have trees of one of ``shapes``, by batch size and shape; ``run`` as in ``measure_costs``.

    The first step of a kind records graphs, and the next may find few of the requests ready; the median of those after it counts. Once
    RECORDING_SECONDS are spent, larger batches are taken to decode plainly, and their graphs are recorded when they are first used.
    """
    seconds: dict[int, dict[TreeShape, float]] = {}
    start = time.perf_counter()
    batches = sorted({min(in_halves(batch), max_batch) for batch in range(1, max_batch + 1)})
    for batch in tqdm(batches, desc="timing trees", unit="batch size", leave=False):
        if time.perf_counter() - start > RECORDING_SECONDS:
            logger.warning("timing trees took over %.0f s: %d and more requests will decode plainly", RECORDING_SECONDS, batch)
            seconds[batch] = {shape: 1.0 for shape in shapes if shape.nodes == 1}
            continue
        timed = [shape for shape in shapes if shape.nodes == 1 or shape.nodes * batch <= MAX_TREE_ROWS]
        seconds[batch] = {shape: median([run(batch, shape) for _ in range(2 + TREE_TURNS)][2:]) for shape in timed}
    return seconds


def cost_of_trees(seconds: Mapping[TreeShape, float]) -> StepCost:
    """The parts of what ``measure_trees`` timed at one batch size; trees whose drafting is part of it have no levels of their own."""
    deep = {shape.nodes: max(t for other, t in seconds.items() if other.nodes == shape.nodes) for shape in seconds}
    nodes = max(deep)
    node = (deep[nodes] - deep[2]) / (nodes - 2) if nodes > 2 else 0.0
    base = deep.get(2, UNMEASURED) - 2 * node
    return StepCost(deep[1], base, 0.0, node, text=max(0.0, base + node - deep[1]))


def _parts(seconds: list[float], depth: int, nodes: int, batch: int) -> StepCost:
    """The cost's parts from what ``measure_costs`` timed with trees of ``depth`` levels and so many ``nodes``."""
    plain, one_level, all_levels, all_nodes, text, row, rows = seconds
    node = max(0.0, all_nodes - all_levels) / max(1, nodes - 2)
    level = max(0.0, all_levels - one_level) / max(1, depth - 1)
    late = max(0.0, rows - row) / (MEASURED_ROWS - 1) / batch
    return StepCost(plain, one_level + row - 2 * node, level, node, late, max(0.0, text - plain - node * (nodes - 1)))


def machine(device: torch.device) -> str:
    """What steps take their time on, in words that a restart does not change."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        processor = f"{cpu.processor('model name')} of {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
        name = f"{processor}, {torch.get_num_threads()} threads, {cpu.version()}"
    return f"{name}, torch {torch.__version__}"


def kept_costs(directory: Path | None, key: str, measure: Callable[[], dict[int, StepCost]]) -> dict[int, StepCost]:
    """What ``measure`` found for the same ``key`` at a start in the last KEPT_SECONDS, from a file in ``directory``; else what it finds
    now, kept there.

    A file that cannot be read or written costs a warning and a measurement. ``directory`` None keeps nothing.
    """
    if directory is None:
        return measure()
    named = hashlib.sha256(f"{StepCost._fields}: {key}".encode()).hexdigest()[:16]
    path = directory / f"step-costs-{named}.json"
    try:
        if path.exists() and time.time() - path.stat().st_mtime < KEPT_SECONDS:
            return {int(batch): StepCost(**parts) for batch, parts in json.loads(path.read_text())["costs"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("the step costs in %s cannot be read and are measured anew: %s", path, error)
    costs = measure()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"of": key, "costs": {batch: cost._asdict() for batch, cost in costs.items()}}, indent=2) + "\n")
    except OSError as error:
        logger.warning("the step costs cannot be kept in %s: %s", path, error)
    return costs
