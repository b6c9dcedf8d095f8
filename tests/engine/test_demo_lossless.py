"""The demo pair as it is served: a hundred prompts, token for token, at every temperature and with trees of every size."""

from collections.abc import Callable

import pytest
from transformers import PreTrainedModel

from server.engine.engine import Engine
from server.engine.types import SamplingParams
from tests.engine.conftest import NEW
from tests.engine.engines import Result, run
from tests.engine.reference_decoding import decode

MakeEngine = Callable[..., Engine]
GREEDY = SamplingParams(max_tokens=NEW, temperature=0)


def acceptance_length(results: list[Result]) -> float:
    """Tokens per verification, bonus token counted, pooled."""
    steps = sum(result.speculation.num_steps for result in results)
    return 1 + sum(result.speculation.num_accepted_tokens for result in results) / steps


def check_greedy(engine: Engine, prompts: list[list[int]], expected: list[list[int]]) -> list[Result]:
    results = run(engine, [(prompt, GREEDY) for prompt in prompts])
    wrong = [i for i, (result, wanted) in enumerate(zip(results, expected, strict=True)) if result.token_ids != wanted]
    assert not wrong, f"prompts {wrong} differ from generate"
    return results


def test_the_prompts_are_a_fair_set(demo_greedy: list[list[int]], demo_prompts: list[list[int]]) -> None:
    assert len(demo_prompts) == len({tuple(prompt) for prompt in demo_prompts}) == 100
    assert len({tuple(text) for text in demo_greedy}) > 60
    assert sum(len(text) == NEW for text in demo_greedy) > 40


@pytest.mark.parametrize("batch", [8, 1])
def test_plain_decoding_equals_generate(
    batch: int, demo_engine: MakeEngine, demo_prompts: list[list[int]], demo_greedy: list[list[int]]
) -> None:
    check_greedy(demo_engine(head=False, max_num_seqs=batch), demo_prompts, demo_greedy)


@pytest.mark.parametrize("batch", [8, 1])
def test_trees_of_16_equal_generate(
    batch: int, demo_engine: MakeEngine, demo_prompts: list[list[int]], demo_greedy: list[list[int]]
) -> None:
    results = check_greedy(demo_engine(tree_nodes=16, max_num_seqs=batch), demo_prompts, demo_greedy)
    assert acceptance_length(results) > 1.5, "a draft that is never right would make this test say little"


@pytest.mark.parametrize("nodes", [1, 2, 3, 5, 8, 32, 64])
def test_trees_of_other_sizes_equal_generate(
    nodes: int, demo_engine: MakeEngine, demo_prompts: list[list[int]], demo_greedy: list[list[int]], pytestconfig: pytest.Config
) -> None:
    """A third of the prompts together, and a few one at a time; another part for every size. With --every-prompt all, both ways."""
    whole = pytestconfig.getoption("--every-prompt")
    for batch, part in ((8, slice(nodes % 3, None, 3)), (1, slice(nodes % 12, None, 16))):
        part = slice(None) if whole else part
        check_greedy(demo_engine(tree_nodes=nodes, max_num_seqs=batch), demo_prompts[part], demo_greedy[part])


def test_under_the_load_rule(demo_engine: MakeEngine, demo_prompts: list[list[int]], demo_greedy: list[list[int]]) -> None:
    check_greedy(demo_engine(load_rule=True, max_num_seqs=4), demo_prompts[::3], demo_greedy[::3])


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_sampled_text_is_the_same_with_and_without_speculation(
    temperature: float, demo_engine: MakeEngine, demo_model: PreTrainedModel, demo_prompts: list[list[int]]
) -> None:
    requests = [(prompt, SamplingParams(max_tokens=NEW, temperature=temperature, seed=i)) for i, prompt in enumerate(demo_prompts)]
    plain = [result.token_ids for result in run(demo_engine(head=False, max_num_seqs=16), requests)]
    results = run(demo_engine(tree_nodes=16, max_num_seqs=8), requests)
    wrong = [i for i, (result, wanted) in enumerate(zip(results, plain, strict=True)) if result.token_ids != wanted]
    assert not wrong, f"prompts {wrong} differ between trees and plain decoding"
    assert acceptance_length(results) > 1.5
    eos = frozenset(demo_model.generation_config.eos_token_id)
    for i in range(0, len(requests), 12):
        assert decode(demo_model, *requests[i], eos).tokens == plain[i], f"prompt {i} differs from the reference"


def test_options_in_mixed_batches_of_the_demo_pair(
    demo_engine: MakeEngine, demo_model: PreTrainedModel, demo_prompts: list[list[int]]
) -> None:
    kinds: list[dict] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 0.8, "top_k": 20, "logprobs": 3},
        {"temperature": 1.3, "min_p": 0.05, "min_tokens": 30},
        {"temperature": 0.6, "presence_penalty": 0.8, "frequency_penalty": 0.5},
        {"temperature": 1.0, "repetition_penalty": 1.3, "logit_bias": {5: 2.0}},
    ]
    requests = [
        (prompt, SamplingParams(max_tokens=NEW, seed=1000 + i, **kinds[i % len(kinds)])) for i, prompt in enumerate(demo_prompts[:18])
    ]
    eos = frozenset(demo_model.generation_config.eos_token_id)
    expected = [decode(demo_model, prompt, params, eos) for prompt, params in requests]
    results = run(demo_engine(tree_nodes=33, max_num_seqs=7), requests)
    assert [result.token_ids for result in results] == [wanted.tokens for wanted in expected]
    for result, wanted in zip(results, expected, strict=True):
        for entry, logprobs in zip(result.logprobs, wanted.logprobs, strict=False):
            assert entry.logprob == pytest.approx(float(logprobs[entry.token_id]), abs=1e-4)
