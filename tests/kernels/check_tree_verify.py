"""The verification kernels against their references on one device: on the CPU for the interpreter's tests, on a GPU for its own."""

import random
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.filter_cuts import filter_cuts_triton
from kernels.noise import Noise, NoiseKey, gumbel_noise_reference, gumbel_noise_triton
from kernels.sampling import Allowed, Bans, Bias, Filters, OptionPointers, Penalties, SamplingBatch, TreePointers, apply_options
from kernels.tree_mask import tree_mask
from kernels.tree_verify import select_tokens, tree_verify_reference, tree_verify_triton


def check_noise(rows: int, vocab: int, device: str, run: Callable = gumbel_noise_triton) -> None:
    """The bits are the same, so that the noise differs by the logarithm's rounding alone."""
    generator = torch.Generator().manual_seed(rows + vocab)
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator).to(device)
    positions = torch.randint(0, 2**31, (rows,), generator=generator).to(device)
    ours, expected = run(seeds, positions, vocab), gumbel_noise_reference(seeds, positions, vocab)
    torch.testing.assert_close(ours, expected, rtol=2e-6, atol=2e-6)


def random_options(rng: random.Random, batch: int, vocab: int, parts: str, nodes: int = 1) -> SamplingBatch:
    """Options in which every request leaves about half neutral; ``parts``: letters of filters, penalties, bias, bans and grammar
    (f, p, b, s, g).
    """

    def column(values: list, neutral: float) -> Tensor:
        return torch.tensor([rng.choice(values) if rng.random() < 0.5 else neutral for _ in range(batch)])

    filters = penalties = bias = bans = allowed = None
    if "f" in parts:
        filters = Filters(column([1, 2, 5, 50], vocab), column([0.1, 0.5, 0.9, 0.99], 1.0), column([0.02, 0.2, 1.0], 0.0))
    if "p" in parts:
        generator = torch.Generator().manual_seed(rng.randrange(2**31))
        counts = torch.randint(0, 5, (batch, vocab), generator=generator).sub(2).clamp(min=0).int()
        prompt = torch.randint(0, 2, (batch, vocab), generator=generator).bool()
        penalties = Penalties(column([-1.5, 0.7], 0.0), column([-0.4, 0.3], 0.0), column([0.7, 1.3], 1.0), counts, prompt)
    if "b" in parts:
        ids = torch.tensor([[*rng.sample(range(vocab), 2), 0] for _ in range(batch)])
        bias = Bias(ids, torch.tensor([[3.0, -100.0, 0.0]]).repeat(batch, 1))
    if "s" in parts:
        bans = Bans(torch.tensor([[*rng.sample(range(vocab), 2), -1] for _ in range(batch)]), column([1, 2], -1))
    if "g" in parts:
        order = rng.sample(range(batch), batch)
        rows = torch.tensor([order[b] if rng.random() < 0.7 else -1 for b in range(batch)])
        generator = torch.Generator().manual_seed(rng.randrange(2**31))
        words = torch.randint(-(2**31), 2**31, (batch, nodes, -(-vocab // 32)), generator=generator)
        allowed = Allowed(rows, (words | 1 << rng.randrange(min(vocab, 32))).int())
    temperature = column([0.3, 0.7, 1.7], 1.0) if rng.random() < 0.8 else None
    return SamplingBatch(temperature, filters, penalties, bias, bans, allowed)


def to_device(value: object, device: str) -> object:
    """Tensors inside of (nested) named tuples."""
    if isinstance(value, Tensor):
        return value.to(device)
    return type(value)(*(to_device(part, device) for part in value)) if isinstance(value, tuple) else value


def random_parents(rng: random.Random, batch: int, nodes: int) -> Tensor:
    """From stars to chains, int64 [B, N]."""
    reach = [rng.choice([1, 2, 5, nodes]) for _ in range(batch)]
    return torch.tensor([[0, *(rng.randrange(max(0, node - r), node) for node in range(1, nodes))] for r in reach])


def check_tree_verify(
    seed: int, batch: int, nodes: int, vocab: int, dtype: torch.dtype, parts: str, sampled: bool, device: str,
    run: Callable = tree_verify_triton,
) -> None:  # fmt: skip
    """Path, count, committed tokens and health of random trees that mostly follow the target.

    Requests in which rounding could decide (two scores or a filter's edge too close) may differ; few may be so.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    options = to_device(random_options(rng, batch, vocab, parts, nodes), device)
    assert isinstance(options, SamplingBatch)
    logits = (torch.randn(batch, nodes, vocab, generator=generator) * 3).to(device, dtype)
    parent = random_parents(rng, batch, nodes).to(device)
    ancestors, depth = tree_mask(parent, nodes)
    max_depth = int(depth.max())
    noise = None
    if sampled:
        seeds = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator)
        key = NoiseKey(seeds, torch.arange(batch) * 7, torch.tensor([rng.random() < 0.8 for _ in range(batch)]))
        noise = Noise(to_device(key, device), max_depth + 1, vocab)  # type: ignore[arg-type]
    tokens = torch.randint(0, vocab, (batch, nodes), generator=generator)
    tokens[:, 1:][torch.rand(batch, nodes - 1, generator=generator) < 0.1] = -1
    tokens = tokens.to(device)
    follow = (torch.rand(batch, nodes, generator=generator) < 0.8).to(device)
    for level in range(1, max_depth + 1):
        wanted = select_tokens(logits, options, noise, tokens, depth, ancestors).gather(1, parent)
        tokens = torch.where(follow & (depth == level) & (tokens >= 0), wanted, tokens)

    ours = run(logits, options, noise, tokens, parent, depth, ancestors, max_depth)
    expected = tree_verify_reference(logits, options, noise, tokens, parent, depth, ancestors, max_depth)
    clear = ~close_calls(logits, options, noise, tokens, depth, ancestors)
    assert batch < 4 or clear.float().mean() >= 0.5
    for mine, other in zip(ours, expected, strict=True):
        assert mine.dtype == other.dtype
        assert torch.equal(mine[clear], other[clear])


def check_ties_infinities_and_nan(dtype: torch.dtype, device: str, run: Callable = tree_verify_triton) -> None:
    """The first of equal scores wins, in whatever tile; a row of -inf gives token 0; NaN is reported and disturbs no one."""
    logits = torch.zeros(5, 1, 3000, dtype=dtype, device=device)
    logits[0, 0, [1500, 2500]] = 1
    logits[1] = float("-inf")
    logits[2, 0, 2000] = float("nan")
    logits[3, 0, 2047] = float("inf")
    root = torch.zeros(5, 1, dtype=torch.long, device=device)
    options = SamplingBatch(torch.ones(5, device=device), None, None, None, None)
    ours = run(logits, options, None, root, root, root, root + 1, 0)
    expected = tree_verify_reference(logits, options, None, root, root, root, root + 1, 0)
    assert ours[3].tolist() == expected[3].tolist() == [True, True, False, True, True]
    healthy = ours[3]
    assert ours[2][healthy].flatten().tolist() == [1500, 0, 2047, 0]
    assert 0 <= ours[2][2].item() < 3000
    for mine, other in zip(ours, expected, strict=True):
        assert torch.equal(mine[healthy], other[healthy])


def close_calls(logits: Tensor, options: SamplingBatch, noise: Noise | None, tokens: Tensor, depth: Tensor, ancestors: Tensor) -> Tensor:
    """Requests, bool [B], in which two scores of a node differ by rounding, or a filter's edge decides."""
    scores = apply_options(logits, options, tokens, depth, ancestors)
    if noise is not None:
        scores = scores + noise.values[torch.arange(len(scores), device=scores.device)[:, None], depth]
    best = scores.topk(min(2, scores.shape[2])).values
    gap = best[:, :, 0] - best[:, :, -1]
    close = (gap > 0) & (gap < 1e-4)  # equal logits are equal everywhere: the first wins
    if options.filters is not None:
        chosen = scores.argmax(-1)
        for factor in (1 - 1e-4, 1 + 1e-4):
            top_k, top_p, min_p = options.filters
            near = options._replace(filters=Filters(top_k, torch.where(top_p < 1, top_p * factor, top_p), min_p * factor))
            close |= select_tokens(logits, near, noise, tokens, depth, ancestors) != chosen
    return close.any(1)


def check_filter_cuts(seed: int, vocab: int, dtype: torch.dtype, device: str) -> None:
    """Which tokens pass, by the filters' definitions in float64; only masses within rounding of an edge are free."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, nodes = 3, 2
    options = to_device(random_options(rng, batch, vocab, "f"), device)._replace(temperature=torch.ones(batch, device=device))  # type: ignore[attr-defined]
    logits = (torch.randn(batch, nodes, vocab, generator=generator) * rng.choice([0.1, 1, 10])).to(dtype)
    logits[0, 0, : vocab // 2] = float("-inf")
    logits[1, 1, vocab // 3] = -1e30
    logits = logits.to(device)
    index = torch.zeros(batch, nodes, dtype=torch.long, device=device)
    cuts = filter_cuts_triton(logits, OptionPointers.of(options, logits), TreePointers(index, index, index, nodes))
    assert cuts is not None
    kept = logits.float() >= cuts[:, :, None]
    x = logits.double()
    top_k, top_p, min_p = (option[:, None, None].to(x.device) for option in options.filters)
    in_top_k = x >= x.sort(descending=True).values.gather(2, (top_k - 1).clamp(max=vocab - 1).expand(-1, nodes, 1))
    assert torch.equal(kept & ~in_top_k & x.isfinite(), torch.zeros_like(kept))
    probability = torch.where(in_top_k, x, -torch.inf).softmax(-1)
    ascending, order = x.sort()
    mass = probability.gather(2, order).cumsum(2)
    above = mass[:, :, -1:] - mass.gather(2, torch.searchsorted(ascending, x, right=True) - 1)
    share = probability / probability.amax(2, keepdim=True)
    best = x == x.amax(2, keepdim=True)
    surely = in_top_k & ((above < top_p - 1e-5) | (top_p >= 1) | best) & ((share > min_p + 1e-5) | (min_p == 0) | best)
    maybe = in_top_k & ((above < top_p + 1e-5) | (top_p >= 1) | best) & ((share > min_p - 1e-5) | best)
    assert kept[surely].all()
    assert not (kept & ~maybe & x.isfinite()).any()
