"""Every sampling option on trees against simple code that sees one row and its whole path: transformers' own where it has one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kernels.noise import Noise, NoiseKey, gumbel_noise
from kernels.sampling import Allowed, Bans, Bias, Filters, Penalties, SamplingBatch, apply_filters, apply_options
from kernels.tree_verify import select_tokens, tree_verify
from tests.kernels.trees import climb, forests, words

VOCAB = 23
NEUTRAL = {
    "temperature": 1.0, "top_k": VOCAB, "top_p": 1.0, "min_p": 0.0, "presence": 0.0, "frequency": 0.0, "repetition": 1.0,
    "bias": {}, "bans": [], "until": 0, "allowed": None,
}  # fmt: skip


def random_options(draw: st.DrawFn) -> dict:
    """Options of one request; every option is neutral half of the time."""

    def maybe(name: str, values: st.SearchStrategy) -> object:
        return draw(values) if draw(st.booleans()) else NEUTRAL[name]

    return {
        "temperature": maybe("temperature", st.sampled_from([0.3, 0.7, 1.7])),
        "top_k": maybe("top_k", st.integers(1, VOCAB + 5)),
        "top_p": maybe("top_p", st.sampled_from([0.01, 0.5, 0.9, 0.99])),
        "min_p": maybe("min_p", st.sampled_from([0.02, 0.2, 0.9, 1.0])),
        "presence": maybe("presence", st.sampled_from([-1.5, 0.7, 2.0])),
        "frequency": maybe("frequency", st.sampled_from([-0.4, 0.3, 1.1])),
        "repetition": maybe("repetition", st.sampled_from([0.7, 1.3, 2.0])),
        "bias": maybe("bias", st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, -1.0, 2.5]), max_size=4)),
        "bans": maybe("bans", st.lists(st.integers(0, VOCAB - 1), unique=True, max_size=3)),
        "until": draw(st.integers(-2, 4)),
        "allowed": maybe("allowed", st.lists(st.sets(st.integers(0, VOCAB - 1), min_size=1), min_size=9, max_size=9)),
    }


def one_row(logits: Tensor, options: dict, prompt: list[int], output: list[int], drafted: list[int], node: int) -> Tensor:
    """Logits [V] after ``prompt``, ``output`` (node 0 is its last token) and the ``drafted`` ancestors, of which ``node`` is the last."""
    logits = logits.clone()
    for token, value in options["bias"].items():
        logits[token] += value
    if len(drafted) < options["until"]:
        for token in options["bans"]:
            logits[token] = float("-inf")
    if options["allowed"]:
        logits[sorted(set(range(VOCAB)) - options["allowed"][node])] = float("-inf")
    generated = output + drafted
    row = logits[None]
    if prompt + generated and options["repetition"] != 1.0:
        row = RepetitionPenaltyLogitsProcessor(options["repetition"])(torch.tensor([prompt + generated]), row)
    for token in set(generated):
        row[0, token] -= options["frequency"] * generated.count(token) + options["presence"]
    row = TemperatureLogitsWarper(options["temperature"])(None, row)
    row = TopKLogitsWarper(min(options["top_k"], VOCAB))(None, row)
    if options["top_p"] < 1:
        row = TopPLogitsWarper(options["top_p"])(None, row)
    if options["min_p"] > 0:
        row = MinPLogitsWarper(options["min_p"])(None, row)
    return row[0]


def as_batch(options: list[dict], prompts: list[list[int]], outputs: list[list[int]]) -> SamplingBatch:
    """The tensors of all requests, every part present."""

    def column(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor([row[name] for row in options], dtype=dtype)

    def padded(rows: list[list], fill: float) -> Tensor:
        width = max(1, *map(len, rows))
        return torch.tensor([row + [fill] * (width - len(row)) for row in rows])

    counts = torch.stack([torch.bincount(torch.tensor(output, dtype=torch.long), minlength=VOCAB) for output in outputs]).int()
    seen = torch.zeros(len(options), VOCAB, dtype=torch.bool)
    for i, prompt in enumerate(prompts):
        seen[i, prompt] = True

    def bits(tokens: set[int]) -> int:
        return sum(1 << token for token in tokens)

    rules = [row["allowed"] or [set(range(VOCAB))] * 9 for row in options]
    places = torch.tensor([i if row["allowed"] else -1 for i, row in enumerate(options)])
    allowed = Allowed(places, torch.tensor([[[bits(tokens)] for tokens in nodes] for nodes in rules], dtype=torch.int32))
    return SamplingBatch(
        column("temperature"),
        Filters(column("top_k", torch.long).clamp(max=VOCAB), column("top_p"), column("min_p")),
        Penalties(column("presence"), column("frequency"), column("repetition"), counts, seen),
        Bias(padded([list(row["bias"]) for row in options], 0), padded([list(row["bias"].values()) for row in options], 0.0)),
        Bans(padded([row["bans"] for row in options], -1), column("until", torch.long)),
        allowed,
    )


@given(forests(max_batch=3, max_nodes=9), st.data())
def test_every_option_along_every_path(forest: list[list[int]], data: st.DataObject) -> None:
    ancestors, depth = words(forest)
    shape = (len(forest), len(forest[0]))
    token = st.integers(0, VOCAB - 1)
    prompts, outputs = ([data.draw(st.lists(token, max_size=6)) for _ in forest] for _ in range(2))
    options = [random_options(data.draw) for _ in forest]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    logits = torch.randn(*shape, VOCAB, generator=generator) * 2
    tokens = torch.randint(-1, VOCAB, shape, generator=generator)
    before = logits.clone()
    batch = as_batch(options, prompts, outputs)
    assert batch.allowed is not None
    batch = batch._replace(allowed=batch.allowed._replace(words=batch.allowed.words[:, : shape[1]]))
    ours = apply_options(logits, batch, tokens.clamp(min=0), depth, ancestors)
    assert torch.equal(logits, before), "written in place"
    for b, parent in enumerate(forest):
        for node in range(shape[1]):
            drafted = [int(tokens[b, j].clamp(min=0)) for j in climb(parent, node)[1:]]
            expected = one_row(logits[b, node], options[b], prompts[b], outputs[b], drafted, node)
            torch.testing.assert_close(ours[b, node], expected, rtol=1e-5, atol=1e-5)


@given(
    st.sampled_from(["filters", "penalties", "bias", "bans", "allowed"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 50),
)
def test_neutral_rows_do_not_notice_the_options_of_others(part: str, dtype: torch.dtype, seed: int) -> None:
    """Losslessness in mixed batches: a part that another request uses leaves this request's logits as they are, to the bit."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(1, 3, VOCAB, generator=generator) * 4).to(dtype)
    ancestors, depth = words([[0, 0, 1]])
    tokens = torch.randint(VOCAB, (1, 3), generator=generator)
    own = {**NEUTRAL, "temperature": 0.7}
    full = as_batch([own], [[1, 2]], [[3]])
    alone = SamplingBatch(full.temperature, None, None, None, None)
    mixed = alone._replace(**{part: getattr(full, part)})
    if mixed.allowed is not None:
        mixed = mixed._replace(allowed=mixed.allowed._replace(words=mixed.allowed.words[:, :3]))
    expected, ours = (apply_options(logits, options, tokens, depth, ancestors) for options in (alone, mixed))
    assert torch.equal(expected.float(), ours.float())


def test_without_temperatures_all_are_1() -> None:
    logits = torch.randn(2, 3, VOCAB, generator=torch.Generator().manual_seed(0))
    ancestors, depth = words([[0, 0, 1]] * 2)
    tokens = torch.zeros(2, 3, dtype=torch.long)
    none, ones = (
        SamplingBatch(t, Filters(torch.tensor([3, 5]), torch.ones(2), torch.zeros(2)), None, None, None) for t in (None, torch.ones(2))
    )
    assert torch.equal(apply_options(logits, none, tokens, depth, ancestors), apply_options(logits, ones, tokens, depth, ancestors))


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 30.0])
def test_neutral_filters_keep_every_token_of_a_large_vocabulary(scale: float) -> None:
    """Rounding in the running sum of 150,000 probabilities must not remove what nobody asked to remove."""
    logits = torch.randn(4, 1, 150_000, generator=torch.Generator().manual_seed(0)) * scale
    filters = Filters(torch.full((4,), 150_000), torch.ones(4), torch.zeros(4))
    assert torch.equal(apply_filters(logits, filters), logits)


def test_ties_of_top_k_are_kept_and_at_least_one_token_stays() -> None:
    logits = torch.tensor([[[1.0, 3.0, 3.0, 3.0, 0.0]]])
    two = apply_filters(logits, Filters(torch.tensor([2]), torch.ones(1), torch.zeros(1)))
    assert two.isfinite().tolist() == [[[False, True, True, True, False]]]
    for top_k, top_p, min_p in ((1, 1e-9, 1.0), (5, 0.0, 0.0), (5, 1.0, 1.0)):
        filters = Filters(torch.tensor([top_k]), torch.tensor([top_p]), torch.tensor([min_p]))
        assert apply_filters(logits, filters).isfinite().any()


def test_selected_tokens_are_the_noisy_argmax_at_each_depth() -> None:
    ancestors, depth = words([[0, 0, 1, 1, 2], [0, 0, 0, 0, 0]])
    logits = torch.randn(2, 5, VOCAB, generator=torch.Generator().manual_seed(1))
    drawn = gumbel_noise(torch.tensor([3, 3, 3, 3]), torch.tensor([10, 11, 12, 13]), VOCAB)
    noise = Noise(NoiseKey(torch.tensor([3, 4]), torch.tensor([10, 20]), torch.tensor([True, False])), 4, VOCAB)
    options = SamplingBatch(torch.tensor([0.5, 1.0]), None, None, None, None)
    tokens = torch.zeros(2, 5, dtype=torch.long)
    ours = select_tokens(logits, options, noise, tokens, depth, ancestors)
    for node in range(5):
        assert ours[0, node] == (logits[0, node] / 0.5 + drawn[depth[0, node]]).argmax()
        assert ours[1, node] == logits[1, node].argmax()
    assert torch.equal(select_tokens(logits, options, None, tokens, depth, ancestors), logits.argmax(-1))


def test_tree_verify_is_select_then_accept() -> None:
    parent = torch.tensor([[0, 0, 0, 2, 3]])
    ancestors, depth = words(parent.tolist())
    logits = torch.zeros(1, 5, 6)
    tokens = torch.tensor([[0, 1, 2, 3, 4]])
    for node, follows in enumerate([2, 5, 3, 5, 1]):  # root -> 2 (node 2) -> 3 (node 3) -> 5, which no node holds
        logits[0, node, follows] = 1
    greedy = SamplingBatch(torch.ones(1), None, None, None, None)
    path, accepted, committed, healthy = tree_verify(logits, greedy, None, tokens, parent, depth, ancestors, 3)
    assert path.tolist() == [[0, 2, 3, -1]]
    assert accepted.tolist() == [2]
    assert committed.tolist() == [[2, 3, 5, -1]]
    assert healthy.tolist() == [True]


def test_tree_verify_names_the_requests_with_nan() -> None:
    logits = torch.zeros(3, 1, 6)
    logits[1, 0, 4] = float("nan")
    logits[2, 0, 4] = float("inf")
    root = torch.zeros(3, 1, dtype=torch.long)
    options = SamplingBatch(torch.ones(3), None, None, None, None)
    assert tree_verify(logits, options, None, root, root, root, root + 1, 0)[3].tolist() == [True, False, True]


@pytest.mark.parametrize("part", ["filters", "penalties", "bias", "bans"])
@pytest.mark.parametrize("sampled", [False, True])
def test_one_nan_is_found_in_any_node_whatever_the_options(part: str, sampled: bool) -> None:
    row = {**NEUTRAL, "temperature": 0.7, "top_p": 0.5, "presence": 1.0, "bias": {1: 2.0}, "bans": [2], "until": 3}
    full = as_batch([row] * 3, [[1, 2]] * 3, [[3]] * 3)
    options = SamplingBatch(full.temperature, None, None, None, None)._replace(**{part: getattr(full, part)})
    parent = torch.tensor([[0, 0, 1]] * 3)
    ancestors, depth = words(parent.tolist())
    seeds = torch.arange(3)
    noise = Noise(NoiseKey(seeds, seeds, torch.ones(3, dtype=torch.bool)), 3, VOCAB) if sampled else None
    logits = torch.randn(3, 3, VOCAB, generator=torch.Generator().manual_seed(0))
    logits[0, 0, 4] = logits[2, 2, VOCAB - 1] = float("nan")
    healthy = tree_verify(logits, options, noise, torch.ones_like(parent), parent, depth, ancestors, 2)[3]
    assert healthy.tolist() == [False, True, False]


@given(st.data(), st.sampled_from([0.05, 0.3, 0.7, 0.95, 0.999]))
def test_top_p_treats_equal_probabilities_equally(data: st.DataObject, top_p: float) -> None:
    """A token stays exactly when less than ``top_p`` lies strictly above it, or when it is the best."""
    weights = torch.tensor(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=12)), dtype=torch.float64)
    ours = apply_filters(weights.log().float()[None, None], Filters(torch.tensor([len(weights)]), torch.tensor([top_p]), torch.zeros(1)))
    above = (weights * (weights > weights[:, None])).sum(1) / weights.sum()
    clear = (above - top_p).abs() > 1e-5  # rounding may decide the others
    expected = (above < top_p) | (weights == weights.max())
    assert torch.equal(ours[0, 0].isfinite()[clear], expected[clear])
