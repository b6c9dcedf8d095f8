"""python -m tools.bench.laws: tokens per verification at temperatures above 0 by the rule that accepts, with the same target and head.

- shared noise: this engine's trees, drafted with the noise that verification will draw with.
- deterministic tree: the same trees from the head's probabilities alone, verified in the same way.
- p/q chain: a chain drawn from the head, accepted with probability min(1, p / q).
- recursive rejection: chains drawn independently, accepted by p/q one after the other.

Each rule has the shape that was the fastest for it on other prompts than those that are reported. The last two are references without a
cache: speeds, of all four for comparison, are modelled as tokens per verification over this machine's measured seconds of a step with as
many levels and nodes, one stream.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from drafts.eagle3 import Eagle3Head
from kernels.noise import Noise
from kernels.sampling import SamplingBatch
from server.engine.ahead import Drafted
from server.engine.batch import Placed
from server.engine.config import EngineConfig, EngineError
from server.engine.costs import StepCost
from server.engine.drafter import TreeShape
from server.engine.engine import Engine
from server.engine.loading import load
from server.engine.ngram import Draft
from server.engine.proposer import Proposer
from server.engine.request import Request
from server.engine.types import SamplingParams, Tree
from tools.bench.arguments import PROMPTS, ROOT, add_model, complete_draft, positive, temperatures
from tools.bench.reference_rules import ReferenceDecoder
from tools.prompts import PromptError, read_prompts
from tools.train_vsd.generate import complete

TUNING = ROOT / "benchmarks" / "training" / "gsm8k_train.jsonl"
TREES = ((4, 2, 3), (8, 3, 4), (16, 5, 6))  # nodes, depths, and most children
CHAINS = (1, 2, 3, 5, 7)  # lengths
PATHS = ((2, 1), (3, 1), (2, 2), (3, 2), (2, 4), (3, 3), (3, 5))  # numbers and lengths of independent chains


@dataclass(frozen=True)
class Row:
    """``tokens_per_second``: modelled, one stream."""

    law: str
    temperature: float
    shape: str
    acceptance_length: float
    tokens_per_second: float


class Shape(NamedTuple):
    """What one verification holds: ``levels`` and drafted ``nodes``. ``measure``: (prompts, temperature) -> tokens per verification."""

    name: str
    levels: int
    nodes: int
    measure: Callable[[Sequence[list[int]], float], float]


class Deterministic(Proposer):
    """Drafts as if it did not know the noise."""

    def propose(
        self, requests: list[Request], at: Placed, shape: TreeShape, options: SamplingBatch, noise: Noise | None,
        drafts: list[Draft] | None, ahead: Drafted | None = None,
    ) -> Tree:  # fmt: skip
        return super().propose(requests, at, shape, options, None, drafts)


@dataclass
class Bench:
    """One target and head, for all rules. ``reference``: the target without our attention; ``cost``: of this machine's steps."""

    ours: Engine
    deterministic: Engine
    reference: PreTrainedModel
    head: Eagle3Head
    cost: StepCost
    max_tokens: int

    @classmethod
    def load(cls, config: EngineConfig, max_tokens: int) -> "Bench":
        target, head, tokenizer = load(config)
        if head is None:
            raise EngineError("no draft head was given: what is compared is how its drafts are accepted")
        ours, deterministic = (Engine(target, head, tokenizer, replace(config, load_rule=False, ngrams=False)) for _ in range(2))
        drafter, unsharpened = deterministic.proposer.drafter, ((0.0, (1.0,)),)  # noise sharpens a guess, probabilities are what they are
        steps, proposer = deterministic.steps, Deterministic(drafter, deterministic.pool, unsharpened)
        deterministic.proposer = steps.proposer = steps.verifications.proposer = proposer
        rule = Engine(target, head, tokenizer, replace(config, max_num_seqs=1)).load_rule
        assert rule is not None
        reference = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32, use_safetensors=True).eval()
        return cls(ours, deterministic, reference, head, rule.costs[1], max_tokens)

    def tree(self, engine: Engine, shape: TreeShape, prompts: Sequence[list[int]], temperature: float) -> float:
        """Tokens per verification of an engine's own trees."""
        engine.shape = shape
        requests = [(p, SamplingParams(max_tokens=self.max_tokens, temperature=temperature, seed=i)) for i, p in enumerate(prompts)]
        stats = [completion.speculation for completion in complete(engine, requests, 8)]
        return 1 + sum(s.num_accepted_tokens for s in stats) / max(1, sum(s.num_steps for s in stats))

    def paths(self, paths: int, length: int, prompts: Sequence[list[int]], temperature: float) -> float:
        """Tokens per verification of so many independent chains."""
        decoder = ReferenceDecoder(self.reference, self.head, temperature, paths, length, torch.Generator().manual_seed(0))
        counts = [decoder.acceptance(prompt, self.max_tokens) for prompt in tqdm(prompts, desc=f"{paths} x {length}", leave=False)]
        return sum(committed for committed, _ in counts) / max(1, sum(steps for _, steps in counts))

    def laws(self) -> dict[str, list[Shape]]:
        """Shapes by rule."""
        trees = [TreeShape(nodes, depth, topk) for nodes, depth, topk in TREES]

        def of_tree(engine: Engine) -> list[Shape]:
            return [Shape(f"{t.nodes} nodes, depth {t.depth}", t.depth, t.nodes - 1, partial(self.tree, engine, t)) for t in trees]

        def of_paths(shapes: Sequence[tuple[int, int]]) -> list[Shape]:
            return [Shape(f"{count} x {length}", length, count * length, partial(self.paths, count, length)) for count, length in shapes]

        return {
            "shared noise": of_tree(self.ours),
            "deterministic tree": of_tree(self.deterministic),
            "p/q chain": of_paths([(1, length) for length in CHAINS]),
            "recursive rejection": of_paths(PATHS),
        }


def compare(bench: Bench, tuning: Sequence[list[int]], prompts: Sequence[list[int]], temperature: float) -> Iterator[Row]:
    """Every rule at its best shape of the tuning prompts."""

    def speed(shape: Shape, acceptance: float) -> float:
        return acceptance / bench.cost.tree(shape.levels, 1 + shape.nodes)

    for law, shapes in bench.laws().items():
        best = max(shapes, key=lambda shape: speed(shape, shape.measure(tuning, temperature)))
        acceptance = best.measure(prompts, temperature)
        yield Row(law, temperature, best.name, acceptance, speed(best, acceptance))


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 when the models or prompts cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.laws", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model(parser)
    parser.add_argument("--prompts", type=Path, default=PROMPTS, metavar="FILE", help="JSON lines with turns, messages or prompt")
    parser.add_argument("--limit", type=positive, default=16, metavar="N", help="prompts taken from the file (default %(default)s)")
    parser.add_argument("--tuning", type=Path, default=TUNING, metavar="FILE", help="prompts that shapes are chosen on, a quarter as many")
    parser.add_argument("--max-tokens", type=positive, default=48, metavar="N", help="generated per prompt (default %(default)s)")
    parser.add_argument("--temperature", type=temperatures, default=[0.3, 0.7, 1.0], metavar="T,T", help="(default 0.3,0.7,1)")
    parser.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)), metavar="N", help="on a CPU (default: all)")
    args = parser.parse_args(argv)
    complete_draft(parser, args)
    config = EngineConfig(args.model, args.draft, "cpu", "float32", threads=args.threads, max_num_seqs=8)
    try:
        bench = Bench.load(config, args.max_tokens)
        prompts = read_prompts(args.prompts, bench.ours.tokenizer, args.limit)
        tuning = read_prompts(args.tuning, bench.ours.tokenizer, max(1, args.limit // 4))
    except (EngineError, PromptError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    rows: list[Row] = []
    print(f"{'temperature':>11}  {'rule':<20} {'shape':<20} {'tokens per verification':>23} {'modelled tokens/s':>18}")
    for temperature in args.temperature:
        for row in compare(bench, tuning, prompts, temperature):
            rows.append(row)
            print(
                f"{temperature:11g}  {row.law:<20} {row.shape:<20} {row.acceptance_length:23.2f} {row.tokens_per_second:18.1f}", flush=True
            )
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
