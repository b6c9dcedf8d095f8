"""Standard speculative sampling on a chain, as other engines do it: the rule that ours is compared with.

Leviathan et al. (2023), algorithm 1; Chen et al. (2023), algorithm 2. Pure functions of distributions and uniforms.
"""

import torch
from torch import Tensor


def sample(probabilities: Tensor, uniform: Tensor) -> int:
    """The token whose share of the unit interval holds ``uniform``. probabilities float64 [V]."""
    cumulative = probabilities.cumsum(0)
    inside = torch.searchsorted(cumulative, uniform * cumulative[-1], right=True).clamp(max=len(probabilities) - 1)
    return int(inside)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """What to draw from after a rejection: the normalised positive part of p - q. p, q float64 [V]."""
    left = (p - q).clamp(min=0)
    return left / left.sum() if left.sum() > 0 else p


def chain_rejection(p: Tensor, q: Tensor, drafted: list[int], uniforms: Tensor) -> list[int]:
    """The tokens that a verification commits: the accepted part of the chain, and one more.

    p: float64 [K + 1, V], the target's distributions after 0..K drafted tokens; q: float64 [K, V], those that ``drafted`` was drawn
    from; uniforms: float64 [K + 1] in [0, 1), independent of the draft. Token i is accepted with probability min(1, p / q); the first
    rejected one is replaced by a draw from the residual; if none is, the token after the chain is drawn from p.
    """
    for i, token in enumerate(drafted):
        if uniforms[i] * q[i, token] >= p[i, token]:
            # The acceptance test used up this uniform: conditional on rejection it is not uniform any more.
            return [*drafted[:i], sample(residual(p[i], q[i]), uniforms[-1])]
    return [*drafted, sample(p[-1], uniforms[-1])]
