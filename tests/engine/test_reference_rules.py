"""The reference rule itself is exact, so that a comparison with it means something."""

import pytest
import torch
from scipy import stats

from tools.bench.reference_rules import recursive_rejection, residual, sample

VOCAB, COUNT = 5, 20_000


@pytest.fixture(scope="module")
def laws() -> tuple[torch.Tensor, torch.Tensor]:
    """What target and head say after each token."""
    generator = torch.Generator().manual_seed(0)
    target, head = (torch.randn(VOCAB, VOCAB, generator=generator, dtype=torch.float64).softmax(-1) for _ in range(2))
    return target, head


def draw_pairs(laws: tuple[torch.Tensor, torch.Tensor], paths: int, same: bool = False, share_noise: bool = False) -> tuple[float, float]:
    """p value of the first two tokens after token 0 under the target's law, and the accepted tokens of a verification of paths of two.

    ``same``: all paths are one; ``share_noise``: the first path is drawn with the numbers that accept it.
    """
    target, head = laws
    generator = torch.Generator().manual_seed(1)
    counts, accepted = [0] * (VOCAB * VOCAB), 0
    for _ in range(COUNT):
        uniforms = torch.rand(4 * paths + 2, generator=generator, dtype=torch.float64)
        drawing, accepting = uniforms[: 2 * paths].view(paths, 2), uniforms[2 * paths : 4 * paths + 1]
        if share_noise:
            drawing[0] = accepting[:2]
        drafted = []
        for own in drawing:
            first = sample(head[0], (drawing[0] if same else own)[0])
            drafted.append([first, sample(head[first], (drawing[0] if same else own)[1])])
        p = torch.stack([target[[0, *path]] for path in drafted])
        q = torch.stack([head[[0, path[0]]] for path in drafted])
        tokens = recursive_rejection(p, q, drafted, accepting)
        accepted += len(tokens) - 1
        if len(tokens) == 1:
            tokens.append(sample(target[tokens[0]], uniforms[-1]))
        counts[tokens[0] * VOCAB + tokens[1]] += 1
    expected = (target[0][:, None] * target).flatten() * COUNT
    return float(stats.chisquare(counts, expected.numpy()).pvalue), accepted / COUNT


def test_it_is_exact_and_more_paths_accept_more(laws: tuple[torch.Tensor, torch.Tensor]) -> None:
    target, head = laws
    (exact, accepted), (exact_of_three, accepted_of_three) = draw_pairs(laws, 1), draw_pairs(laws, 3)
    assert min(exact, exact_of_three) > 1e-3
    overlap = torch.minimum(target, head)
    assert abs(accepted - float(overlap[0].sum() + overlap[0] @ overlap.sum(1))) < 0.02, "a chain accepts the overlap of the laws"
    assert accepted_of_three > 1.1 * accepted


@pytest.mark.parametrize("how", [{"paths": 1, "share_noise": True}, {"paths": 3, "same": True}])
def test_draws_that_are_not_independent_bias_it(how: dict, laws: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Why noise must never be shared under a p/q rule, and proof that the test above can fail."""
    assert draw_pairs(laws, **how)[0] < 1e-6


def test_equal_distributions_accept_everything() -> None:
    p = torch.full((1, 4, VOCAB), 1 / VOCAB, dtype=torch.float64)
    uniforms = torch.tensor([0.999999, 0.0, 0.5, 0.3], dtype=torch.float64)
    assert recursive_rejection(p, p[:, :3], [[1, 2, 3]], uniforms) == [1, 2, 3, 1]


def test_an_impossible_token_is_rejected_even_by_a_zero_uniform() -> None:
    p = torch.tensor([[[0.0, 1.0], [0.5, 0.5]]], dtype=torch.float64)
    q = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    assert recursive_rejection(p, q, [[0]], torch.zeros(2, dtype=torch.float64)) == [1]
    assert residual(p[0, 0], q[0, 0]).tolist() == [0.0, 1.0]
