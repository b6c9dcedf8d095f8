"""The kernels of a draft level against their references on one device: on the CPU for the interpreter's tests, on a GPU for its own."""

import random
from collections.abc import Callable

import torch

from kernels.best_nodes import best_nodes_reference, best_nodes_triton
from kernels.draft_level import draft_level_reference, draft_level_triton
from kernels.merge_pools import merge_pools_reference, merge_pools_triton
from kernels.noise import Noise, NoiseKey
from kernels.sampling import SamplingBatch
from tests.kernels.check_tree_verify import random_options, to_device


def check_draft_level(
    seed: int, batch: int, rows: int, vocab: int, topk: int, dtype: torch.dtype, parts: str, reduced: bool, sampled: bool, device: str,
    run: Callable = draft_level_triton,
) -> None:  # fmt: skip
    """Scores agree; so do tokens and choices wherever a score is far enough from the next that rounding cannot swap them."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    target_vocab = vocab * 3 if reduced else vocab
    options = to_device(random_options(rng, batch, target_vocab, parts.replace("f", "")), device)
    assert isinstance(options, SamplingBatch)
    if "f" in parts:
        options = options._replace(filters=to_device(random_options(rng, batch, vocab, "f"), device).filters)  # type: ignore[attr-defined]
    logits = (torch.randn(batch, rows, vocab, generator=generator) * 3).to(device, dtype)
    noise = None
    if sampled:
        key = NoiseKey(torch.arange(batch) - 2, torch.arange(batch) * 9, torch.arange(batch) % 3 != 1)
        noise = Noise(to_device(key, device), 4, target_vocab)  # type: ignore[arg-type]
    target_ids = torch.randperm(target_vocab, generator=generator)[:vocab].sort().values.to(device) if reduced else None
    sigma = torch.tensor([rng.choice([0.4, 1.0, 1.3]) for _ in range(batch)], device=device)
    scores = -torch.rand(batch, rows, generator=generator).to(device)
    arguments = (logits, options, noise, 2, sigma, target_ids, scores, topk)
    ours, expected = run(*arguments), draft_level_reference(*arguments)
    for mine, other in zip(ours, expected, strict=True):
        assert mine.shape == other.shape
        assert mine.dtype == other.dtype
    torch.testing.assert_close(ours.scores, expected.scores, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.best_scores, expected.best_scores, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.best_rows, ours.best // topk)
    assert torch.equal(ours.best_tokens, ours.tokens.gather(1, ours.best))
    by_row = expected.scores.view(batch, rows, topk)
    for mine, other, value in (
        (ours.tokens.view(by_row.shape), expected.tokens.view(by_row.shape), by_row),
        (ours.best, expected.best, expected.best_scores),
    ):
        gaps = value.diff(dim=-1).abs()
        apart = torch.ones_like(value, dtype=torch.bool)
        apart[..., 1:] &= gaps > 1e-3
        apart[..., :-1] &= gaps > 1e-3
        apart[..., -1] = False  # the next one was not kept
        apart &= value.isfinite()
        assert torch.equal(mine[apart], other[apart])


def random_pools(rng: random.Random, batch: int, topk: int, levels: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, tokens and parents as a drafter makes them, with ties, dead children and children as good as their parent."""
    pools = []
    for _ in range(batch):
        scores, parents, tokens, rows = [], [], [], [(0, 0.0)]
        for _ in range(levels):
            first = len(scores) + 1
            for parent, score in rows:
                for token in rng.sample(range(vocab), topk):
                    scores.append(score - rng.choice([0.0, 0.5, 0.5, 1.0, 3.0, float("inf")]))
                    parents.append(parent)
                    tokens.append(token)
            rows = sorted(((i + 1, scores[i]) for i in range(first - 1, len(scores))), key=lambda row: -row[1])[:topk]
        pools.append((scores, tokens, parents))
    scores, tokens, parents = zip(*pools, strict=True)
    return torch.tensor(scores), torch.tensor(tokens), torch.tensor(parents)


def check_best_nodes(
    seed: int, batch: int, topk: int, levels: int, nodes: int, node_price: float, device: str, run: Callable = best_nodes_triton
) -> None:
    pool = random_pools(random.Random(seed), batch, topk, levels, 1000)
    arguments = [part.to(device) for part in (torch.arange(batch), *pool)]
    ours, expected = (choose(*arguments, nodes, node_price) for choose in (run, best_nodes_reference))
    for mine, other in zip(ours, expected, strict=True):
        assert torch.equal(mine, other)


def check_merge_pools(seed: int, batch: int, topk: tuple[int, int], levels: tuple[int, int], device: str) -> None:
    """So few tokens that many paths are in both."""
    rng = random.Random(seed)
    first, second = (random_pools(rng, batch, k, n, max(topk) + 2) for k, n in zip(topk, levels, strict=True))
    arguments = [part.to(device) for part in (*first, *second)]
    ours, expected = (merge(*arguments, min(levels)) for merge in (merge_pools_triton, merge_pools_reference))
    for mine, other in zip(ours, expected, strict=True):
        assert torch.equal(mine, other)
