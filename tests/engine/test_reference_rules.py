"""The reference rule itself is exact, so that a comparison with it means something."""

import torch
from scipy import stats

from tools.bench.reference_rules import chain_rejection, recursive_rejection, residual, sample

VOCAB, COUNT = 5, 20_000


def draw_pairs(tables: torch.Tensor, drafts: torch.Tensor, share_noise: bool) -> tuple[list[int], float]:
    """First two tokens of chains of one: p = tables[token], q = drafts[token], starting after token 0."""
    generator = torch.Generator().manual_seed(1)
    counts, accepted = [0] * (VOCAB * VOCAB), 0
    for _ in range(COUNT):
        uniforms = torch.rand(4, generator=generator, dtype=torch.float64)
        draft_uniform = uniforms[0] if share_noise else uniforms[3]
        token = sample(drafts[0], draft_uniform)
        tokens = chain_rejection(torch.stack((tables[0], tables[token])), drafts[:1], [token], uniforms[:2])
        accepted += len(tokens) - 1
        if len(tokens) == 1:
            tokens.append(sample(tables[tokens[0]], uniforms[2]))
        counts[tokens[0] * VOCAB + tokens[1]] += 1
    return counts, accepted / COUNT


def test_chain_rejection_is_exact_and_accepts_the_overlap() -> None:
    generator = torch.Generator().manual_seed(0)
    tables, drafts = (torch.randn(VOCAB, VOCAB, generator=generator, dtype=torch.float64).softmax(-1) for _ in range(2))
    expected = (tables[0][:, None] * tables).flatten() * COUNT
    counts, accepted = draw_pairs(tables, drafts, share_noise=False)
    assert stats.chisquare(counts, expected.numpy()).pvalue > 1e-3
    assert abs(accepted - float(torch.minimum(tables[0], drafts[0]).sum())) < 0.02


def test_a_shared_uniform_biases_it() -> None:
    """Why noise must never be shared under a p/q rule, and proof that the test above can fail."""
    generator = torch.Generator().manual_seed(0)
    tables, drafts = (torch.randn(VOCAB, VOCAB, generator=generator, dtype=torch.float64).softmax(-1) for _ in range(2))
    counts, _ = draw_pairs(tables, drafts, share_noise=True)
    assert stats.chisquare(counts, ((tables[0][:, None] * tables).flatten() * COUNT).numpy()).pvalue < 1e-6


def test_equal_distributions_accept_everything() -> None:
    p = torch.full((4, VOCAB), 1 / VOCAB, dtype=torch.float64)
    uniforms = torch.tensor([0.999999, 0.0, 0.5, 0.3], dtype=torch.float64)
    assert chain_rejection(p, p[:3], [1, 2, 3], uniforms) == [1, 2, 3, 1]


def test_an_impossible_token_is_rejected_even_by_a_zero_uniform() -> None:
    p = torch.tensor([[0.0, 1.0], [0.5, 0.5]], dtype=torch.float64)
    q = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    assert chain_rejection(p, q, [0], torch.zeros(2, dtype=torch.float64)) == [1]
    assert residual(p[0], q[0]).tolist() == [0.0, 1.0]


def draw_paths(tables: torch.Tensor, drafts: torch.Tensor, paths: int, count: int, same: bool) -> tuple[list[int], float]:
    """First two tokens after token 0 of paths of two, p = tables[token before], q = drafts[token before]; ``same``: all paths are one."""
    generator = torch.Generator().manual_seed(1)
    counts, accepted = [0] * (VOCAB * VOCAB), 0
    for _ in range(count):
        uniforms = torch.rand(4 * paths + 2, generator=generator, dtype=torch.float64)
        drafted = []
        for i in range(paths):
            draw = uniforms[0:2] if same else uniforms[2 * i : 2 * i + 2]
            first = sample(drafts[0], draw[0])
            drafted.append([first, sample(drafts[first], draw[1])])
        p = torch.stack([tables[[0, *path]] for path in drafted])
        q = torch.stack([drafts[[0, path[0]]] for path in drafted])
        tokens = recursive_rejection(p, q, drafted, uniforms[2 * paths : 4 * paths + 1])
        accepted += len(tokens) - 1
        if len(tokens) == 1:
            tokens.append(sample(tables[tokens[0]], uniforms[-1]))
        counts[tokens[0] * VOCAB + tokens[1]] += 1
    return counts, accepted / count


def test_recursive_rejection_is_exact_and_more_paths_accept_more() -> None:
    generator = torch.Generator().manual_seed(0)
    tables, drafts = (torch.randn(VOCAB, VOCAB, generator=generator, dtype=torch.float64).softmax(-1) for _ in range(2))
    expected = (tables[0][:, None] * tables).flatten() * COUNT
    one, three = (draw_paths(tables, drafts, paths, COUNT, same=False) for paths in (1, 3))
    for counts, _ in (one, three):
        assert stats.chisquare(counts, expected.numpy()).pvalue > 1e-3
    assert three[1] > 1.1 * one[1]
    counts, _ = draw_paths(tables, drafts, 3, COUNT, same=True)
    assert stats.chisquare(counts, expected.numpy()).pvalue < 1e-6, "candidates that are not independent bias it"


def test_recursive_rejection_of_one_path_is_the_rule_of_chains() -> None:
    generator = torch.Generator().manual_seed(2)
    p, q = (torch.randn(1, rows, VOCAB, generator=generator, dtype=torch.float64).softmax(-1) for rows in (4, 3))
    for _ in range(200):
        uniforms, drafted = (
            torch.rand(4, generator=generator, dtype=torch.float64),
            torch.randint(VOCAB, (3,), generator=generator).tolist(),
        )
        assert recursive_rejection(p, q, [drafted], uniforms) == chain_rejection(p[0], q[0], drafted, uniforms)
