"""Chi-square tests: what comes out is distributed as the target says, with and without speculation, for every kind of option.

Equality by seed (the other lossless tests) cannot see a wrong law that both sides share; these tests can.
"""

import itertools
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import PreTrainedModel

from kernels.noise import Noise, NoiseKey
from kernels.sampling import Filters, SamplingBatch
from kernels.tree_verify import accept, select_tokens
from server.engine.drafter import TreeShape
from server.engine.types import SamplingParams
from tests.engine.engines import build, letter_tokenizer, random_head, run, tiny_model
from tests.engine.guided import Guide, random_tree
from tests.engine.reference_decoding import after_options
from tests.kernels.trees import words

VOCAB, LENGTH, SEEDS, P_VALUE = 8, 3, 4000, 1e-3
PROMPT = [3, 1, 4, 1]
BASE = SamplingParams(max_tokens=LENGTH, temperature=1.0, ignore_eos=True)
OPTIONS = {
    "temperature 1": BASE,
    "temperature 0.6": replace(BASE, temperature=0.6),
    "temperature 1.8": replace(BASE, temperature=1.8),
    "top_k": replace(BASE, top_k=3),
    "top_p": replace(BASE, top_p=0.8),
    "min_p": replace(BASE, min_p=0.25),
    "penalties": replace(BASE, presence_penalty=0.6, frequency_penalty=0.5, repetition_penalty=1.4),
    "bias": replace(BASE, logit_bias={2: 1.5, 6: -100.0}),
    "all": replace(
        BASE, temperature=0.9, top_k=6, top_p=0.95, min_p=0.02, presence_penalty=0.4, frequency_penalty=-0.3, repetition_penalty=1.2,
        logit_bias={0: 0.7},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    model = tiny_model("llama", seed=3, vocab_size=VOCAB)
    model.lm_head.weight.data *= 0.8 / model(torch.tensor([PROMPT])).logits.std()
    return model


@torch.inference_mode()
def exact_law(model: PreTrainedModel, params: SamplingParams) -> dict[tuple[int, ...], float]:
    """The probability of every continuation of LENGTH tokens, by enumeration."""
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for length in range(LENGTH):
        prefixes = list(itertools.product(range(VOCAB), repeat=length))
        logits = model(torch.tensor([[*PROMPT, *prefix] for prefix in prefixes])).logits[:, -1]
        for prefix, row in zip(prefixes, logits, strict=True):
            probabilities = after_options(row, params, PROMPT, list(prefix)).double().softmax(0)
            law.update({(*prefix, token): law[prefix] * float(probabilities[token]) for token in range(VOCAB)})
    return {sequence: probability for sequence, probability in law.items() if len(sequence) == LENGTH}


def p_value(law: dict[tuple[int, ...], float], samples: list[tuple[int, ...]]) -> float:
    """Chi-square of the samples; sequences that are expected fewer than five times share a cell. 0 when an impossible one occurs."""
    counts = Counter(samples)
    if any(law[sequence] == 0 for sequence in counts):
        return 0.0
    common = [sequence for sequence, probability in law.items() if probability * len(samples) >= 5]
    rare = set(law) - set(common)
    observed = [counts[sequence] for sequence in common] + [sum(counts[sequence] for sequence in rare)]
    expected = [law[sequence] * len(samples) for sequence in common] + [sum(law[sequence] for sequence in rare) * len(samples)]
    if expected[-1] < 1:
        observed, expected = observed[:-1], expected[:-1]
    return float(stats.chisquare(observed, np.array(expected) * sum(observed) / sum(expected)).pvalue)


def test_the_test_can_fail(model: PreTrainedModel) -> None:
    """A slightly wrong law is seen with this many samples, the right one is not refused."""
    law = exact_law(model, BASE)
    rng = random.Random(0)
    for wrong, passes in ((BASE, True), (replace(BASE, temperature=0.85), False), (replace(BASE, top_p=0.9), False)):
        other = exact_law(model, wrong)
        samples = rng.choices(list(other), weights=list(other.values()), k=SEEDS)
        assert (p_value(law, samples) > P_VALUE) == passes


@pytest.mark.parametrize("speculative", [False, True], ids=["plain", "speculative"])
@pytest.mark.parametrize("name", OPTIONS)
def test_three_tokens_follow_the_exact_law(name: str, speculative: bool, model: PreTrainedModel) -> None:
    """Trees of random tokens: of eight, some are always right."""
    engine = build(model, random_head(model) if speculative else None, letter_tokenizer(VOCAB), tree_nodes=12, max_num_seqs=250)
    if speculative:
        Guide(engine, {})
    first = 1_000_000 * speculative
    results = run(engine, [(PROMPT, replace(OPTIONS[name], seed=first + seed)) for seed in range(SEEDS)])
    if speculative:
        assert sum(result.speculation.num_accepted_tokens for result in results) > SEEDS // 3
    assert p_value(exact_law(model, OPTIONS[name]), [tuple(result.token_ids) for result in results]) > P_VALUE


def test_three_tokens_with_a_draft_that_knows_the_noise(model: PreTrainedModel) -> None:
    """The real drafter ranks by the very noise that the target will use; under a p/q rule this would be a bias."""
    engine = build(model, random_head(model), letter_tokenizer(VOCAB), tree_nodes=8, max_num_seqs=250)
    results = run(engine, [(PROMPT, replace(BASE, seed=7_000_000 + seed)) for seed in range(SEEDS)])
    assert sum(result.speculation.num_accepted_tokens for result in results) > SEEDS // 2
    assert p_value(exact_law(model, BASE), [tuple(result.token_ids) for result in results]) > P_VALUE


@pytest.mark.parametrize("nodes", [1, 6, 20])
def test_the_rule_by_itself(nodes: int) -> None:
    """Two tokens by ``select_tokens`` and ``accept`` over random trees, from fixed distributions, filtered and not."""
    count, temperature, top_k = 20_000, 0.7, 6
    generator = torch.Generator().manual_seed(nodes)
    table = torch.randn(VOCAB, VOCAB, generator=generator)  # logits after each token
    rng = random.Random(nodes)
    trees = [random_tree(rng, [], TreeShape(nodes, 3, 4), range(VOCAB)) for _ in range(count)]
    tokens = torch.tensor([[0, *drafted] for drafted, _ in trees])
    parent = torch.tensor([[0, *parents] for _, parents in trees])
    ancestors, depth = words(parent.tolist())
    filters = Filters(torch.full((count,), top_k), torch.ones(count), torch.zeros(count))
    options = SamplingBatch(torch.full((count,), temperature), filters, None, None, None)
    seeds = torch.arange(count)

    def noise(position: int) -> Noise:
        return Noise(NoiseKey(seeds, torch.full((count,), position), torch.ones(count, dtype=torch.bool)), 5, VOCAB)

    target = select_tokens(table[tokens.clamp(min=0)], options, noise(0), tokens, depth, ancestors)
    _, accepted, committed = accept(target, tokens, parent, depth, ancestors, 4)
    short = accepted == 0  # their second token comes from another step
    second = select_tokens(table[committed[:, :1]], options, noise(1), committed[:, :1], depth[:, :1], ancestors[:, :1])
    pairs = torch.stack((committed[:, 0], torch.where(short, second[:, 0], committed[:, 1])), dim=1)
    kept = torch.where(table < table.topk(top_k).values[:, -1:], float("-inf"), table)
    probabilities = (kept / temperature).double().softmax(-1)
    law = {(a, b): float(probabilities[0, a] * probabilities[a, b]) for a in range(VOCAB) for b in range(VOCAB)}
    assert nodes == 1 or 0.05 < short.float().mean() < 0.95
    assert p_value(law, [tuple(pair) for pair in pairs.tolist()]) > P_VALUE
