"""Draft temperatures and the acceptance length by tree size, measured with the engine and kept in the head's metadata."""

from collections.abc import Sequence
from dataclasses import replace

from tqdm import tqdm

from drafts.eagle3 import HeadMetadata
from server.engine.drafter import TreeShape
from server.engine.engine import Engine
from server.engine.types import SamplingParams
from tools.train_vsd.evaluate import evaluate

SIGMAS = (0.25, 0.35, 0.45, 0.55, 0.65, 0.8, 1.0, 1.2)
NODES = (1, 2, 4, 8, 16, 32)
GRID_NODES = 16


def calibrate(engine: Engine, metadata: HeadMetadata, prompts: Sequence[list[int]], max_tokens: int, concurrency: int) -> HeadMetadata:
    """``metadata`` with the best draft temperature at request temperatures 0 and 1, and the acceptance length at temperature 0 for
    each number of nodes. ``engine`` is built for the largest tree; its shape and draft temperature are changed on the way.
    """
    full = engine.shape
    best: list[tuple[float, float]] = []
    with tqdm(total=2 * len(SIGMAS) + len(NODES) - 1, desc="calibrating") as bar:

        def measure(shape: TreeShape, temperature: float, sigma: float) -> float:
            engine.shape, engine.steps.sigma = shape, ((0.0, sigma),)
            sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=0)
            length = float(evaluate(engine, prompts, sampling, concurrency)["acceptance_length"])
            bar.set_postfix_str(f"T={temperature} sigma={sigma} nodes={shape.nodes}: {length:.3f}")
            bar.update()
            return length

        for temperature in (0.0, 1.0):
            lengths = {sigma: measure(full.shrunk(GRID_NODES), temperature, sigma) for sigma in SIGMAS}
            best.append((temperature, max(lengths, key=lengths.__getitem__)))
        by_nodes = {nodes: round(measure(full.shrunk(nodes), 0.0, best[0][1]), 4) for nodes in NODES if nodes > 1}
    engine.shape, engine.steps.sigma = full, tuple(best)
    return replace(metadata, draft_temperature=tuple(best), acceptance_length={1: 1.0} | by_nodes)
