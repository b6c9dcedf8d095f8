"""M-step: losses on draft paths, pure functions of the draft's and the target's probabilities along them.

M paths of K tokens; paths of one anchor are neighbours, S of them. q is the draft, p the target after the request's temperature,
z a path, a_i the probability that verification accepts z_i given that it accepted what is before it, W_i = prod_{j<=i} a_j,
Q_i = prod_{j<=i} q_j(z_j). The paper (Zou et al., "Variational Speculative Decoding", ICML 2026, arXiv 2602.05774) publishes the bound
and the names ARW and CAR, not their formulas: those here are this project's reading.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

DECAY = 0.8  # weight of step k is DECAY ** k (EAGLE-3)
SIGMA = 0.8  # drafting temperature of sampled requests, about what calibration finds
LOG_ZERO = -30.0  # of a token that the draft's vocabulary lacks

Law = Literal["noise", "speculative"]
"""How a sampled request's drafts are verified. noise: by equality with the token that the request's own noise draws, as this server
does; speculative: with probability min(1, p / q). At temperature 0 both are equality with the most likely token."""


class Paths(NamedTuple):
    """Paths that are verified in one way. ``drawn_by_target``: the tokens are the target's own text; else the draft proposed them."""

    tokens: Tensor  # int64 [M, K], draft ids; -1: outside the draft's vocabulary
    live: Tensor  # bool [M, K], False past the end of the text
    chosen: Tensor  # bool [M, K], the token is the one that the target commits there
    greedy: bool
    group: int  # S
    drawn_by_target: bool
    noise: Tensor | None = None  # float32 [M, K, Vd], the Gumbel noise that sampled text was drawn with


@dataclass(frozen=True)
class VsdSettings:
    """Weights of the VSD loss. ``paths``: S of the coverage. ``arw`` False: every position of a path weighs the same."""

    paths: int = 16
    arw: bool = True
    car: float = 0.1
    survival: float = 1.0
    anchor: float = 0.5
    shared_noise: float = 0.0
    law: Law = "noise"


Objective = Callable[[Tensor, Tensor, Paths], Tensor]
"""(log q [M, K, Vd], p [M, K, Vd], paths) -> every path's share of its anchor's loss [M]."""


def decays(steps: int, device: torch.device) -> Tensor:
    """Weights of the steps, float32 [K], of sum 1."""
    return DECAY ** torch.arange(steps, device=device) / decay_sum(steps)


def decay_sum(steps: int) -> float:
    """sum_i DECAY ** i over ``steps``."""
    return (1 - DECAY**steps) / (1 - DECAY)


def cross_entropy(log_q: Tensor, p: Tensor) -> Tensor:
    """CE_i = -sum_v p_i(v) log q_i(v), p renormalised where the draft's vocabulary is a part of the target's; [..., V] -> [...]."""
    return -torch.linalg.vecdot(p, log_q) / p.sum(-1).clamp(min=1e-4)


def overlap(log_q: Tensor, p: Tensor) -> Tensor:
    """alpha_i = sum_v min(p_i(v), q_i(v)), the acceptance of speculative sampling; [..., V] -> [...]."""
    return torch.minimum(p, log_q.exp()).sum(-1)


def at_tokens(values: Tensor, tokens: Tensor, missing: float) -> Tensor:
    """values [..., V] at ``tokens`` [...], ``missing`` where a token is -1."""
    return values.gather(-1, tokens.clamp(min=0)[..., None])[..., 0].masked_fill(tokens < 0, missing)


def path_log_probs(log_q: Tensor, paths: Paths) -> Tensor:
    """log q_i(z_i), [M, K]; 0 past the end of the text."""
    return at_tokens(log_q, paths.tokens, LOG_ZERO).masked_fill(~paths.live, 0.0)


def acceptance(log_q_z: Tensor, log_p_z: Tensor, paths: Paths, law: Law) -> Tensor:
    """a_i, [M, K], from log q_i(z_i) and log p_i(z_i).

    For text that the target drew, the speculative law gives r_i = min(1, q / p): q min(1, p / q) = p min(1, q / p), so that expected
    prefix utilities over target text thinned by r are those over draft paths thinned by a.
    """
    if paths.greedy or law == "noise":
        return paths.chosen.to(log_q_z.dtype)
    ratio = log_q_z - log_p_z if paths.drawn_by_target else log_p_z - log_q_z
    return ratio.clamp(max=0).exp()


def utility(accepted: Tensor, live: Tensor) -> Tensor:
    """L(z) = sum_i prod_{j<=i} a_j: expected accepted drafts of a path, [M, K] -> [M]."""
    return (accepted * live).cumprod(-1).sum(-1)


def before(cumulative: Tensor) -> Tensor:
    """A cumulative product [M, K] at i - 1: 1 for the first step."""
    return torch.cat((torch.ones_like(cumulative[:, :1]), cumulative[:, :-1]), dim=1)


def elbo(log_q_z: Tensor, log_p_z: Tensor, log_a: Tensor) -> Tensor:
    """One draft path's term of E_{z~q}[log kappa(z)] - KL(q || p) <= log E_{z~p}[kappa(z)], kappa = prod_i a_i; [M, K] -> [M]."""
    return (log_a + log_p_z - log_q_z).sum(-1)


def coverage(log_q_path: Tensor, paths: int) -> Tensor:
    """c = 1 - (1 - Q)^S from log Q: the probability that S sampled draft paths contain the prefix.

    This is the marginal acceptance at temperature 0 in closed form. Its gradient weighs log Q by S Q (1 - Q)^(S - 1), the adaptive
    rejection weight: little for prefixes that are safe or hopeless, most at Q = 1 / S.
    """
    return -torch.expm1(paths * torch.log1p(-log_q_path.exp().clamp(max=1 - 1e-6)))


def rejection_weights(accepted: Tensor) -> Tensor:
    """VAT (arXiv 2608.30135): weight 1 before a path's first rejection, and DECAY ** steps restarted there; [M, K] -> [M, K]."""
    steps = torch.arange(accepted.shape[1], device=accepted.device)
    first = (accepted >= 0.5).long().cumprod(1).sum(1, keepdim=True)
    return DECAY ** (steps - first).clamp(min=0)


def path_weights(utilities: Tensor, share: float = 0.5) -> Tensor:
    """softmax(U / eta) over each anchor's paths, [A, S] -> [A, S], eta such that the effective number of paths is ``share`` of S.

    Bisection over 1 / eta: the effective number 1 / sum w^2 falls from S to the number of best paths.
    """
    low, high = torch.zeros_like(utilities[:, :1]), torch.full_like(utilities[:, :1], 64.0)
    for _ in range(20):
        middle = (low + high) / 2
        spread = (middle * utilities).softmax(-1).square().sum(-1, keepdim=True).reciprocal() > share * utilities.shape[1]
        low, high = torch.where(spread, middle, low), torch.where(spread, high, middle)
    return (low * utilities).softmax(-1)


def eagle3(log_q: Tensor, p: Tensor, paths: Paths) -> Tensor:
    """Training-time test (EAGLE-3, arXiv 2503.01840): sum_i w_i CE_i, w_i ~ DECAY ** i."""
    return (cross_entropy(log_q, p) * paths.live) @ decays(log_q.shape[1], p.device) / paths.group


def lk(log_q: Tensor, p: Tensor, paths: Paths) -> Tensor:
    """LK, alpha form (arXiv 2602.23881): sum_i w_i (-log alpha_i), w_i ~ DECAY ** i."""
    return (-overlap(log_q, p).clamp(min=1e-4).log() * paths.live) @ decays(log_q.shape[1], p.device) / paths.group


def vat(log_q: Tensor, p: Tensor, paths: Paths) -> Tensor:
    """VAT's weighting of the soft cross-entropy: the verdict on the draft's first choice along the text decides where decay starts."""
    right = log_q.detach().argmax(-1) == paths.tokens
    weights = rejection_weights(right.float()) / decay_sum(log_q.shape[1])
    return (weights * cross_entropy(log_q, p) * paths.live).sum(-1) / paths.group


def vsd(settings: VsdSettings) -> Objective:
    """The VSD loss: an anchor on every step (the KL term of the bound), and a term for acceptance that depends on how the paths came
    about: ``_covered`` on greedy text, ``lk`` on sampled text, ``_weighted_paths`` on drafted paths."""

    def vsd_loss(log_q: Tensor, p: Tensor, paths: Paths) -> Tensor:
        anchor = settings.anchor * eagle3(log_q, p, paths)
        if not paths.drawn_by_target:
            return anchor + _weighted_paths(log_q, p, paths, settings)
        if paths.greedy:
            return anchor + _covered(log_q, paths, settings)
        loss = anchor + settings.survival * lk(log_q, p, paths)
        if paths.noise is not None:
            drafted = ((log_q + paths.noise) / SIGMA).log_softmax(-1)
            loss = loss + settings.shared_noise * _covered(drafted, paths, settings)
        return loss

    return vsd_loss


def _covered(log_q: Tensor, paths: Paths, settings: VsdSettings) -> Tensor:
    """-sum_i c_i, plus CAR: sg(c_{i-1}) (1 - q_i(y_i)), confidence put on tokens that verification rejects. Without ARW
    -sum_i log Q_i / K: every prefix of the path weighs the same, whatever its probability. Divided by sum_i DECAY ** i, as the losses
    per step are."""
    log_q_y = path_log_probs(log_q, paths)
    steps = log_q.shape[1]
    log_prefix = log_q_y.cumsum(-1)
    covered = coverage(log_prefix, settings.paths)
    gain = covered if settings.arw else log_prefix / steps
    wasted = before(covered).detach() * -torch.expm1(log_q_y)
    return ((settings.car * wasted - gain) * paths.live).sum(-1) / decay_sum(steps)


def _weighted_paths(log_q: Tensor, p: Tensor, paths: Paths, settings: VsdSettings) -> Tensor:
    """-sum_s w_s sum_i W_{i-1} [a_i log q_i(z_i) + (1 - a_i) sum_v p_i log q_i], w_s = softmax(U_s / eta): rejected tokens are corrected
    with the target. CAR: -W_{i-1} (1 - a_i) log(1 - q_i(z_i)). Divided as ``_covered`` is."""
    log_q_z = path_log_probs(log_q, paths)
    with torch.no_grad():
        log_p_z = at_tokens(p, paths.tokens, 0.0).clamp(min=1e-30).log()
        accepted = acceptance(log_q_z, log_p_z, paths, settings.law) * paths.live
        reached = before(accepted.cumprod(-1)) * paths.live
        utilities = utility(accepted, paths.live).unflatten(0, (-1, paths.group))
        weights = path_weights(utilities) if settings.arw else torch.full_like(utilities, 1 / paths.group)
    corrected = one_hot_entropy(log_q, p) if paths.greedy else cross_entropy(log_q, p)
    likelihood = accepted * -log_q_z + (1 - accepted) * corrected
    wasted = -(1 - accepted) * torch.log1p(-log_q_z.exp().clamp(max=1 - 1e-4))
    return weights.flatten() * (reached * (likelihood + settings.car * wasted)).sum(-1) / decay_sum(log_q.shape[1])


def one_hot_entropy(log_q: Tensor, p: Tensor) -> Tensor:
    """-log q_i(argmax p_i), [..., V] -> [...]."""
    return -log_q.gather(-1, p.argmax(-1, keepdim=True))[..., 0]


OBJECTIVES: dict[str, Callable[[VsdSettings], Objective]] = {
    "eagle3": lambda settings: eagle3,
    "lk": lambda settings: lk,
    "vat": lambda settings: vat,
    "vsd": vsd,
}
