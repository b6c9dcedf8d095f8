"""What an engine tries before it serves: whole steps of requests made for it. They record graphs, and tell what steps cost."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from drafts.eagle3 import Eagle3Head
from kernels.tree_layout import Rows, TreeLayout
from server.engine.budget import LoadRule, default_acceptance
from server.engine.config import EngineConfig
from server.engine.costs import StepCost, cost_of_trees, kept_costs, machine, measure_costs, measure_trees, tree_shapes
from server.engine.drafter import REPLAYED_ROWS, Drafter, TreeShape
from server.engine.fixed_trees import FixedTreeRule
from server.engine.graphs import LEAST_CONTEXT, in_eighths, in_halves, power_of_two
from server.engine.kv_cache import PADDING_BLOCK, BlockPool
from server.engine.ngram import FullDrafts
from server.engine.prompts import PIECE, most_entries
from server.engine.scheduler import GPU_PREFILL_ROWS
from server.engine.steps import Steps
from server.engine.target import SHORT_CONTEXT, SHORT_NODES, Target
from server.engine.types import SamplingParams

if TYPE_CHECKING:
    from server.engine.engine import Engine

PROMPT_TOKENS, NEW_TOKENS = 112, 128  # of the requests, which share the prompt's blocks


@torch.inference_mode()
def choose_rule(engine: "Engine", target: Target, head: Eagle3Head | None, config: EngineConfig) -> LoadRule:
    """The rule that decides how much a load may draft, from the cost of steps on this machine."""
    full, trial = engine.shape, _Trial(engine, head is not None)
    known = (head.metadata.acceptance_length if head and head.metadata else {}) or default_acceptance(full.nodes)
    try:
        if not engine.steps.graphs:
            return LoadRule(full, _costs(trial, target, head, config), known, head is not None)
        _record_graphs(engine.steps, full, config.max_num_seqs)
        seconds = measure_trees(trial.step, tree_shapes(full), config.max_num_seqs)
    finally:
        trial.end()
    if head:
        return FixedTreeRule(full, seconds, known)
    return LoadRule(full, {batch: cost_of_trees(of) for batch, of in seconds.items()}, known, head=False)


def _record_graphs(steps: Steps, full: TreeShape, max_seqs: int) -> None:
    """Record the graphs of prompts, and those of trees that the requests of a trial do not need: of more entries, with prompts among them,
    and of contexts that are not short.
    """
    prompts = sorted({in_eighths(count) for count in range(1, GPU_PREFILL_ROWS // PIECE + 1)})
    blank = [_blank_prompts(steps.pool, count) for count in prompts]
    for nodes in sorted({power_of_two(shape.nodes) for shape in tree_shapes(full) if power_of_two(shape.nodes) <= PIECE}):
        for entries in sorted({in_halves(count) for count in range(1, most_entries(nodes, max_seqs) + 1)}):
            contexts = {SHORT_CONTEXT, LEAST_CONTEXT} if nodes <= SHORT_NODES else {LEAST_CONTEXT}
            own = {min(contexts)} if entries <= in_halves(max_seqs) else set()
            blank += [_blank_trees(steps.pool, entries, nodes, context) for context in sorted(contexts - own)]
    for rows in tqdm(blank, desc="recording graphs", unit="graph", leave=False):
        steps.target.forward_parts([rows], steps.cache)
    steps.cache.clear([PADDING_BLOCK])
    if steps.proposer.drafter:
        _record_rows(steps.proposer.drafter, steps.pool, max_seqs)


def _record_rows(drafter: Drafter, pool: BlockPool, max_seqs: int) -> None:
    """Record what brings the draft cache up to date: any number of rows of any number of requests."""
    features = drafter.state.new_zeros(REPLAYED_ROWS, drafter.head.fc.in_features)
    zero = torch.zeros(REPLAYED_ROWS, dtype=torch.long, device=features.device)
    for rows in sorted({in_eighths(count) for count in range(1, REPLAYED_ROWS + 1)}):
        drafter.write(features[:rows], *(zero[:rows],) * 3)
    for count in sorted({in_eighths(count) for count in range(1, max_seqs + 1)}):
        own = zero[:count]
        drafter.extend(own, features[:count], own, own, own, own, *_nobodys(pool, count), own.float(), 0)
    drafter.cache.clear([PADDING_BLOCK])


def _blank_prompts(pool: BlockPool, entries: int) -> Rows:
    """As many entries of a batch as prompts in pieces may have, of nobody's: to record graphs with."""
    rows = torch.arange(PIECE, device=pool.tables.device).expand(entries, -1)
    layout = TreeLayout(*_nobodys(pool, entries), rows, None, rows == 0, pool.block_size, 0)
    return Rows(torch.zeros_like(rows), layout, torch.arange(entries, device=rows.device) * PIECE)


def _blank_trees(pool: BlockPool, entries: int, nodes: int, context: int) -> Rows:
    """Trees of nobody's, as if the longest context were ``context``: to record graphs with."""
    rows = torch.arange(nodes, device=pool.tables.device).expand(entries, -1)
    zero = torch.zeros_like(rows)
    return Rows(zero, TreeLayout(*_nobodys(pool, entries), zero, zero + 1 << rows, None, pool.block_size, context))


def _nobodys(pool: BlockPool, batch: int) -> tuple[Tensor, Tensor]:
    """Block tables and context lengths."""
    tables = torch.zeros_like(pool.tables[:1]).expand(batch, -1)
    return tables, torch.zeros(batch, dtype=torch.long, device=tables.device)


def _costs(trial: "_Trial", target: Target, head: Eagle3Head | None, config: EngineConfig) -> dict[int, StepCost]:
    steps = f"{trial.full}, prompts of {len(trial.prompt)} and {trial.new_tokens} tokens, batches up to {config.max_num_seqs}"
    steps += f", blocks of {config.block_size}"
    what = f"{target.model.config.to_json_string()}; {head and head.config}; {target.dtype}; {steps}; {machine(target.device)}"
    return kept_costs(config.cost_cache, what, lambda: measure_costs(trial.step, trial.sync, trial.full, config.max_num_seqs))


class _Trial:
    """Requests of an engine with the largest tree ``full``."""

    def __init__(self, engine: "Engine", head: bool) -> None:
        self.engine, self.head, self.full = engine, head, engine.shape
        self.prompt = [0] * max(1, min(PROMPT_TOKENS, engine.max_request_tokens // 2))
        self.new_tokens = min(NEW_TOKENS, engine.max_request_tokens - len(self.prompt))
        self.names: list[str] = []

    def step(self, batch: int, shape: TreeShape) -> float:
        """Seconds of a step of ``batch`` requests, as many as before or more, with trees of ``shape``."""
        engine, by_graphs = self.engine, self.engine.steps.graphs is not None
        is_new = shape != engine.shape
        if is_new:
            engine.shape, engine.steps.ahead = shape, None
        # By graphs the first step of a shape does not count: with texts it compiles all kernels that the shape needs.
        by_text = not self.head or shape.depth == 0 or (by_graphs and is_new)
        engine.proposer.ngrams = FullDrafts() if by_text else None
        # A single request is greedy by graphs, so that kernels are compiled without noise as well.
        self._add(batch - engine.num_running - engine.num_waiting, greedy=by_graphs and batch == 1)
        if engine.proposer.cache and not by_graphs:  # its cost is measured apart
            engine.proposer.cache.sync(engine.scheduler.decoding())
        return engine.step()[1].seconds

    def _add(self, count: int, greedy: bool) -> None:
        if count <= 0:
            return
        params = SamplingParams(max_tokens=self.new_tokens, temperature=0.0 if greedy else 1.0, seed=0, ignore_eos=True)
        for _ in range(count):
            self.names.append(f"trial-{len(self.names)}")
            self.engine.add_request(self.names[-1], self.prompt, params)
        self.engine.step()
        while self.engine.num_waiting or any(request.prefilling for request in self.engine.scheduler.running):
            self.engine.step()

    def sync(self, batch: int, rows: int) -> float:
        """Seconds in which the draft caches of the requests catch up with ``rows`` rows each."""
        cache = self.engine.proposer.cache
        return cache.sync_seconds(self.engine.scheduler.decoding(), rows) if cache else 0.0

    def end(self) -> None:
        """Leave the engine as if nothing had run."""
        engine = self.engine
        engine.shape, engine.proposer.ngrams, engine.steps.ahead = self.full, None, None
        for name in self.names:
            engine.abort(name)
        engine.pool.forget_all()
