"""How many CPU threads a step runs on: what is fastest here, by measurement."""

import time
from collections.abc import Callable

import torch

from kernels.tree_layout import TreeLayout
from server.engine.target import Target

GAIN = 1.1  # that one more thread must bring: it may be a core that the event loop wants
TURNS = 5
ROWS = (1, 8)  # of a plain step, and of one with a small tree


@torch.inference_mode()
def choose_threads(target: Target, limit: int) -> int:
    """The fewest threads, of 1, 2, 4, ... and ``limit``, that no greater number beats by GAIN."""
    counts = sorted({limit, *(1 << i for i in range(limit.bit_length()) if 1 << i < limit)})
    runs = [_forward(target, rows) for rows in ROWS]
    seconds = [float("inf")] * len(counts)
    for _ in range(TURNS):
        for i, count in enumerate(counts):
            torch.set_num_threads(count)
            start = time.perf_counter()
            for run in runs:
                run()
            seconds[i] = min(seconds[i], time.perf_counter() - start)
    best = 0
    for i in range(1, len(counts)):
        if seconds[best] > GAIN * seconds[i]:
            best = i
    return counts[best]


def _forward(target: Target, rows: int) -> Callable[[], object]:
    """A pass over a chunk of ``rows`` tokens of no request."""
    block_size = max(ROWS)
    cache = target.new_cache(2, block_size)
    tokens = torch.zeros(1, rows, dtype=torch.long)
    length = torch.zeros(1, dtype=torch.long)
    return lambda: target.forward(
        tokens, TreeLayout(torch.ones(1, 1, dtype=torch.long), length, torch.arange(rows)[None], None, None, block_size, 0), cache
    )
