"""What the shared-noise rule is for: at temperature 1 its trees commit more per verification than a chain under the p/q rule."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from drafts.eagle3 import Eagle3Head
from server.engine.engine import Engine
from server.engine.types import SamplingParams
from tests.engine.engines import run
from tools.bench.reference_rules import ReferenceDecoder

NEW = 48
CHAINS = (3, 4, 5, 6, 7)
GAIN = 1.15


def chain_acceptance(model: PreTrainedModel, head: Eagle3Head, prompts: list[list[int]], length: int) -> float:
    chain = ReferenceDecoder(model, head, 1.0, 1, length, torch.Generator().manual_seed(length))
    committed, steps = map(sum, zip(*(chain.acceptance(prompt, NEW) for prompt in prompts), strict=True))
    return committed / steps


def tree_acceptance(engine: Engine, prompts: list[list[int]]) -> float:
    results = run(engine, [(prompt, SamplingParams(max_tokens=NEW, temperature=1.0, seed=i)) for i, prompt in enumerate(prompts)])
    steps = sum(result.speculation.num_steps for result in results)
    return 1 + sum(result.speculation.num_accepted_tokens for result in results) / steps


def test_a_tree_of_16_with_shared_noise_beats_the_best_chain(
    demo_engine: Callable[..., Engine], demo_model: PreTrainedModel, demo_prompts: list[list[int]], record_property: Callable
) -> None:
    engine = demo_engine(tree_nodes=16, max_num_seqs=16)
    head = engine.proposer.drafter.head
    best = max(CHAINS, key=lambda length: chain_acceptance(demo_model, head, demo_prompts[1::20], length))
    prompts = [prompt for i, prompt in enumerate(demo_prompts) if i % 10 in (0, 3, 6, 8)]
    chain = chain_acceptance(demo_model, head, prompts, best)
    tree = tree_acceptance(engine, prompts)
    record_property("acceptance_length", {"tree": tree, "chain": chain, "chain_length": best})
    print(f"tokens per verification at temperature 1: tree {tree:.2f}, best chain (of {best}) {chain:.2f}, gain {tree / chain:.2f}")
    assert tree >= GAIN * chain
