"""The losses on draft paths against enumeration: a vocabulary of 3, paths of 3 tokens, all 27 of them, any prefix-dependent p and q."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tools.train_vsd.m_step import (
    DECAY,
    LOG_ZERO,
    OBJECTIVES,
    SIGMA,
    Paths,
    VsdSettings,
    acceptance,
    at_tokens,
    coverage,
    elbo,
    path_log_probs,
    path_weights,
    rejection_weights,
    utility,
    vsd,
)

V, K = 3, 3
EVERY = torch.tensor(list(itertools.product(range(V), repeat=K)))  # [27, 3]
ALIVE = torch.ones_like(EVERY, dtype=torch.bool)
STEPS = 1 + DECAY + DECAY**2 + DECAY**3  # what the losses of 4 steps are divided by


def tables(seed: int, scale: float = 1.5) -> list[Tensor]:
    """Random logits of the next token after every prefix, [V], [V, V] and [V, V, V]."""
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn((V,) * (i + 1), generator=generator, dtype=torch.float64) for i in range(K)]


def along(logits: list[Tensor], paths: Tensor = EVERY) -> Tensor:
    """Log-probabilities of the next token at every step of every path, [M, K, V]."""
    return torch.stack([logits[i][tuple(paths[:, :i].T)].expand(len(paths), V) for i in range(K)], dim=1).log_softmax(-1)


def sampled(drawn_by_target: bool) -> Paths:
    return Paths(EVERY, ALIVE, torch.zeros_like(ALIVE), False, len(EVERY), drawn_by_target)


def greedy(p: Tensor) -> Paths:
    return Paths(EVERY, ALIVE, p.argmax(-1) == EVERY, True, len(EVERY), False)


def expected(law: Tensor, values: Tensor) -> Tensor:
    """Under the path law with log-probabilities ``law`` [27, K]."""
    return (law.sum(-1).exp() * values).sum()


def at(values: Tensor) -> Tensor:
    return at_tokens(values, EVERY, LOG_ZERO)


@pytest.mark.parametrize("seed", range(5))
def test_the_bound_is_below_the_marginal_acceptance(seed: int) -> None:
    log_q, log_p = at(along(tables(seed))), at(along(tables(seed + 100)))
    assert expected(log_q, torch.ones(27)) == pytest.approx(1)
    accepted = acceptance(log_q, log_p, sampled(False), "speculative")
    assert torch.equal(accepted, (log_p - log_q).exp().clamp(max=1))
    marginal = expected(log_p, accepted.prod(-1)).log()
    assert expected(log_q, elbo(log_q, log_p, accepted.log())) < marginal


def test_the_bound_is_tight_at_the_posterior_over_surviving_paths() -> None:
    log_p = at(along(tables(1)))
    accepted = at(along(tables(2))).exp()  # any acceptance that does not depend on q
    posterior = log_p.sum(-1).exp() * accepted.prod(-1)
    marginal = posterior.sum().log()
    joint = (posterior / posterior.sum()).view(V, V, V)
    prefixes = [joint.sum((1, 2)), joint.sum(2), joint]
    log_q = torch.stack([
        prefixes[0].log()[EVERY[:, 0]],
        (prefixes[1] / prefixes[0][:, None]).log()[tuple(EVERY[:, :2].T)],
        (prefixes[2] / prefixes[1][:, :, None]).log()[tuple(EVERY.T)],
    ], dim=1)  # fmt: skip
    terms = elbo(log_q, log_p, accepted.log())
    torch.testing.assert_close(terms, marginal.expand(27))  # every path says the same, so its mean has no variance
    other = 0.9 * log_q + 0.1 * at(along(tables(3)))
    other = other - other.sum(-1).exp().sum().log() / K
    assert expected(other, elbo(other, log_p, accepted.log())) < marginal - 1e-4
    same = acceptance(log_p, log_p, sampled(False), "speculative")
    assert expected(log_p, elbo(log_p, log_p, same.log())) == 0


def last_accepted_token(accepted: Tensor) -> Tensor:
    """A prefix-closed utility that is no sum over steps: 7 for a whole path, else the square of its second accepted token's id."""
    return 7 * accepted.prod(-1) + EVERY[:, 1] ** 2 * accepted[:, :2].prod(-1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("worth", [lambda accepted: utility(accepted, ALIVE), last_accepted_token])
def test_target_text_thinned_by_r_is_draft_paths_thinned_by_a(seed: int, worth: Callable[[Tensor], Tensor]) -> None:
    log_q, log_p = at(along(tables(seed))), at(along(tables(seed + 10)))
    a, r = acceptance(log_q, log_p, sampled(False), "speculative"), acceptance(log_q, log_p, sampled(True), "speculative")
    assert not torch.allclose(a, r)
    torch.testing.assert_close(expected(log_q, worth(a)), expected(log_p, worth(r)))
    surviving = log_q.sum(-1).exp() * a.prod(-1)
    torch.testing.assert_close(surviving, log_p.sum(-1).exp() * r.prod(-1))
    torch.testing.assert_close(surviving, torch.minimum(log_q, log_p).sum(-1).exp())


def test_utility_is_the_expected_number_of_accepted_drafts() -> None:
    accepted = at(along(tables(4))).exp()
    wanted = [a * (1 - b) + 2 * a * b * (1 - c) + 3 * a * b * c for a, b, c in accepted]
    torch.testing.assert_close(utility(accepted, ALIVE), torch.stack(wanted))
    ended = ALIVE.clone()
    ended[:, 2] = False
    torch.testing.assert_close(utility(accepted, ended), torch.stack([a * (1 - b) + 2 * a * b for a, b, _ in accepted]))


def test_acceptance_by_equality() -> None:
    p = along(tables(5)).exp()
    log_q, log_p = at(along(tables(6))), at(p.log())
    best = greedy(p)
    for law in ("noise", "speculative"):
        assert torch.equal(acceptance(log_q, log_p, best, law), best.chosen.double()), "equality at temperature 0 under either law"
    assert torch.equal(acceptance(log_q, log_p, best._replace(greedy=False), "noise"), best.chosen.double())
    # The accepted drafts of a chain at temperature 0 are the prefixes of the one greedy path that the draft drew.
    text = p.argmax(-1)[(p.argmax(-1) == EVERY).all(-1)][0]
    prefix = log_q[(text == EVERY).all(-1)][0].cumsum(-1).exp()
    torch.testing.assert_close(expected(log_q, utility(best.chosen.double(), ALIVE)), prefix.sum())


@pytest.mark.parametrize("length", [1, 2, 3])
def test_coverage_is_the_chance_that_sampled_paths_contain_the_prefix(length: int) -> None:
    log_q = at(along(tables(7)))
    law = log_q.sum(-1).exp()
    prefix = EVERY[14, :length]
    contains = (EVERY[:, :length] == prefix).all(-1)
    covered = coverage(log_q[14, :length].sum(), 4).item()
    draws = torch.cartesian_prod(*[torch.arange(27)] * 4)
    assert covered == pytest.approx(law[draws].prod(-1)[contains[draws].any(-1)].sum().item(), rel=1e-6)
    drawn = torch.multinomial(law, 32 * 4000, replacement=True, generator=torch.Generator().manual_seed(0)).view(4000, 32)
    assert coverage(log_q[14, :length].sum(), 32).item() == pytest.approx(contains[drawn].any(-1).double().mean().item(), abs=0.025)


@pytest.mark.parametrize("paths", [1, 32, 80])
def test_coverage_weighs_prefixes_adaptively(paths: int) -> None:
    q = torch.tensor([1e-12, 1e-4, 1 / paths / 3, 1 / paths / 1.1, 0.3, 0.9, 0.9999], dtype=torch.float64)
    log_q = q.log().requires_grad_()
    (weight,) = torch.autograd.grad(coverage(log_q, paths).sum(), log_q)
    torch.testing.assert_close(weight, paths * q * (1 - q) ** (paths - 1), rtol=1e-6, atol=1e-12)
    grid = torch.linspace(-12, -1e-3, 2000, dtype=torch.float64, requires_grad=True)
    (weights,) = torch.autograd.grad(coverage(grid, paths).sum(), grid)
    if paths > 1:
        assert grid[weights.argmax()].exp().item() == pytest.approx(1 / paths, rel=0.02)


@pytest.mark.parametrize("paths", [1, 32, 80, 100_000])
def test_coverage_at_the_extremes(paths: int) -> None:
    log_q = torch.tensor([0.0, -1e-9, -1e-7, -1e-3, LOG_ZERO, -150.0, -1e30], requires_grad=True)
    covered = coverage(log_q, paths)
    (weights,) = torch.autograd.grad(covered.sum(), log_q)
    assert covered.isfinite().all()
    assert weights.isfinite().all()
    assert ((covered >= 0) & (covered <= 1)).all()
    assert (covered[:3] > 1 - 1e-5).all()
    assert (covered[5:] == 0).all()
    assert covered[4].item() == pytest.approx(paths * torch.tensor(LOG_ZERO).exp().item(), rel=1e-4), "small Q keeps its precision"
    assert (weights >= 0).all()


class Case:
    """Six paths of 4 steps over 6 tokens in float32, with ends and, where asked, tokens that the draft's vocabulary lacks."""

    def __init__(self, greedy: bool, drawn_by_target: bool = True, group: int = 1, seed: int = 0, missing: bool = True) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(6, 4, 6, generator=generator).mul(2).requires_grad_()
        self.p = torch.randn(6, 4, 6, generator=generator).mul(2).softmax(-1)
        if missing:
            self.p = self.p * 0.8  # the rest of the target's probability lies outside of the draft's vocabulary
        tokens = torch.randint(6, (6, 4), generator=generator)
        tokens[0] = self.logits.detach()[0].argmax(-1)
        if missing and drawn_by_target:
            tokens[1, 2] = tokens[4, 0] = -1
        live = torch.arange(4) < torch.tensor([4, 4, 2, 1, 3, 4])[:, None] if drawn_by_target else torch.ones(6, 4, dtype=torch.bool)
        chosen = live if drawn_by_target else torch.rand(6, 4, generator=generator) < 0.5
        self.paths = Paths(tokens, live, chosen, greedy, group, drawn_by_target)

    @property
    def log_q(self) -> Tensor:
        return self.logits.log_softmax(-1)

    def naive(self, weigh: Callable[[int, int], float], loss: Callable[[int, int], Tensor]) -> Tensor:
        """sum_i weigh(m, i) loss(m, i) over the live steps of every path."""
        live = self.paths.live
        return torch.stack([sum((weigh(m, i) * loss(m, i) for i in range(4) if live[m, i]), torch.zeros(())) for m in range(6)])

    def cross_entropy(self, m: int, i: int) -> Tensor:
        p = self.p[m, i] / self.p[m, i].sum()
        return -sum((p[v] * self.log_q[m, i, v] for v in range(6)), torch.zeros(()))

    def minus_log_overlap(self, m: int, i: int) -> Tensor:
        return -sum((torch.minimum(self.p[m, i, v], self.log_q[m, i, v].exp()) for v in range(6)), torch.zeros(())).log()


def decay(m: int, i: int) -> float:
    return DECAY**i / STEPS


def test_eagle3_and_lk_against_loops() -> None:
    case = Case(greedy=False)
    for name, loss in (("eagle3", case.cross_entropy), ("lk", case.minus_log_overlap)):
        result = OBJECTIVES[name](VsdSettings())(case.log_q, case.p, case.paths)
        torch.testing.assert_close(result, case.naive(decay, loss))


def test_vat_against_loops() -> None:
    case = Case(greedy=True)

    def weight(m: int, i: int) -> float:
        first = next((j for j in range(4) if case.logits[m, j].argmax() != case.paths.tokens[m, j]), 4)
        return (1 if i < first else DECAY ** (i - first)) / STEPS

    torch.testing.assert_close(OBJECTIVES["vat"](VsdSettings())(case.log_q, case.p, case.paths), case.naive(weight, case.cross_entropy))
    verdicts = torch.tensor([[1.0, 1, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]])
    wanted = [[1, 1, 1, DECAY], [1, DECAY, DECAY**2, DECAY**3], [1, 1, 1, 1]]
    torch.testing.assert_close(rejection_weights(verdicts), torch.tensor(wanted))


def gradient(case: Case, loss: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss.sum(), case.logits, retain_graph=True)
    return found


FULL = VsdSettings(paths=8, car=0.3, shared_noise=0.5)
FORMS = [("eagle3", True), ("lk", True), ("vat", True), ("vsd", True), ("vsd", False)]


@pytest.mark.parametrize(("objective", "greedy"), FORMS)
@pytest.mark.parametrize("noisy", [False, True])
def test_what_is_past_the_end_changes_nothing(objective: str, greedy: bool, noisy: bool) -> None:
    case = Case(greedy)
    paths = case.paths if not noisy or greedy else case.paths._replace(noise=torch.randn(6, 4, 6))
    loss = OBJECTIVES[objective](FULL)
    result = loss(case.log_q, case.p, paths)
    assert (gradient(case, result)[~paths.live] == 0).all()
    other = torch.where(paths.live[..., None], case.logits, 50 * torch.randn(6, 4, 6)).log_softmax(-1)
    p = torch.where(paths.live[..., None], case.p, torch.rand(6, 4, 6))
    changed = paths._replace(tokens=torch.where(paths.live, paths.tokens, 5 - paths.tokens.clamp(min=0)))
    torch.testing.assert_close(loss(other, p, changed), result, rtol=0, atol=0)
    dead = paths._replace(live=torch.zeros_like(paths.live))
    assert (loss(case.log_q, case.p, dead) == 0).all()


def test_a_token_that_the_draft_lacks_ends_the_coverage() -> None:
    case = Case(greedy=True)
    log_q = path_log_probs(case.log_q, case.paths)
    assert log_q[1, 2] == log_q[4, 0] == LOG_ZERO
    assert (log_q[~case.paths.live] == 0).all()
    found = gradient(case, vsd(VsdSettings(paths=8, anchor=0.0, car=0.0))(case.log_q, case.p, case.paths))
    assert (found[1, :2] != 0).any(-1).all()
    assert found[1, 2:].abs().max() < 1e-9, "no prefix that ends behind the missing token can be covered"
    assert found[4].abs().max() < 1e-9


@pytest.mark.parametrize("noise", [False, True])
def test_vsd_on_target_text_against_loops(noise: bool) -> None:
    for greedy in (True, False):
        case = Case(greedy)
        gumbel = torch.randn(6, 4, 6) if noise else None
        settings = VsdSettings(paths=8, car=0.3, survival=0.7, anchor=0.2, shared_noise=0.6)
        result = vsd(settings)(case.log_q, case.p, case.paths._replace(noise=gumbel))

        def covered(m: int, log_q: Tensor) -> Tensor:
            loss, before, prefix = torch.zeros(()), 1.0, torch.ones(())
            for i in range(int(case.paths.live[m].sum())):  # noqa: B023
                token = int(case.paths.tokens[m, i])  # noqa: B023
                q = log_q[m, i, token].exp() if token >= 0 else torch.tensor(LOG_ZERO).exp()
                prefix = prefix * q
                c = 1 - (1 - prefix) ** 8
                loss = loss + (0.3 * before * (1 - q) - c) / STEPS
                before = c.item()
            return loss

        wanted = 0.2 * case.naive(decay, case.cross_entropy)
        if greedy:
            wanted = wanted + torch.stack([covered(m, case.log_q) for m in range(6)])
        else:
            wanted = wanted + 0.7 * case.naive(decay, case.minus_log_overlap)
            if gumbel is not None:
                drafted = ((case.logits + gumbel) / SIGMA).log_softmax(-1)
                wanted = wanted + 0.6 * torch.stack([covered(m, drafted) for m in range(6)])
        torch.testing.assert_close(result, wanted)
        torch.testing.assert_close(gradient(case, result), gradient(case, wanted), atol=1e-6, rtol=1e-4)


def test_coverage_without_car_is_weighted_log_likelihood() -> None:
    case = Case(greedy=True, missing=False)
    with_arw, without = (vsd(VsdSettings(paths=8, arw=arw, car=0.0, anchor=0.0)) for arw in (True, False))
    log_prefix = path_log_probs(case.log_q, case.paths).cumsum(-1)
    prefix = log_prefix.detach().exp()
    weights = 8 * prefix * (1 - prefix) ** 7 * case.paths.live
    ours = gradient(case, with_arw(case.log_q, case.p, case.paths))
    torch.testing.assert_close(ours, gradient(case, -(weights * log_prefix) / STEPS))
    plain = gradient(case, without(case.log_q, case.p, case.paths))
    torch.testing.assert_close(plain, gradient(case, -log_prefix * case.paths.live / 4 / STEPS))


@pytest.mark.parametrize("drawn_by_target", [True, False])
@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize(("arw", "car"), [(True, 0.3), (False, 0.3), (True, 0.0), (False, 0.0)])
@pytest.mark.parametrize("law", ["noise", "speculative"])
def test_gradients_are_finite_at_extreme_probabilities(drawn_by_target: bool, greedy: bool, arw: bool, car: float, law: str) -> None:
    case = Case(greedy, drawn_by_target, group=1 if drawn_by_target else 3, missing=False)
    with torch.no_grad():
        case.logits[0] = torch.nn.functional.one_hot(case.paths.tokens[0].clamp(min=0), 6) * 1e4  # certain of the path
        case.logits[1] = torch.nn.functional.one_hot(case.paths.tokens[1].clamp(min=0), 6) * -1e4  # certain of all others
        case.logits[2] *= 1e-30
        case.p[3] = torch.nn.functional.one_hot(torch.zeros(4, dtype=torch.long), 6).float()
        case.p[4] = 0.0  # nothing of the target lies in the draft's vocabulary
    noise = torch.randn(6, 4, 6).mul(10) if drawn_by_target and not greedy else None
    settings = VsdSettings(paths=80, arw=arw, car=car, shared_noise=0.5, law=law)  # type: ignore[arg-type]
    result = vsd(settings)(case.log_q, case.p, case.paths._replace(noise=noise))
    assert result.isfinite().all()
    assert gradient(case, result).isfinite().all()


def test_path_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    utilities = torch.rand(20, 16, generator=generator) * 5
    weights = path_weights(utilities)
    torch.testing.assert_close(weights.sum(-1), torch.ones(20))
    torch.testing.assert_close(weights.square().sum(-1).reciprocal(), torch.full((20,), 8.0), rtol=0.01, atol=0)
    assert torch.equal(weights.argsort(-1), utilities.argsort(-1))
    torch.testing.assert_close(path_weights(utilities, share=0.25).square().sum(-1).reciprocal(), torch.full((20,), 4.0), rtol=0.01, atol=0)
    torch.testing.assert_close(path_weights(utilities * 3 + 100), weights, atol=1e-3, rtol=0)  # the scale of utilities does not matter
    torch.testing.assert_close(path_weights(torch.full((2, 5), 3.0)), torch.full((2, 5), 0.2))
    # More best paths than the share: they have it all, equally.
    tied = path_weights(torch.tensor([[4.0, 4, 4, 0]]))
    torch.testing.assert_close(tied, torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0]]), atol=1e-6, rtol=0)
    assert path_weights(torch.tensor([[1e4, 0, 0, 0]])).isfinite().all()


def test_drafted_paths_against_loops() -> None:
    for greedy in (True, False):
        for law in ("noise", "speculative"):
            for arw in (True, False):
                case = Case(greedy, drawn_by_target=False, group=3, seed=3, missing=False)
                settings = VsdSettings(arw=arw, car=0.3, anchor=0.2, law=law)  # type: ignore[arg-type]
                result = vsd(settings)(case.log_q, case.p, case.paths)
                terms, utilities = [], []
                for m in range(6):
                    reached, worth, loss = 1.0, 0.0, torch.zeros(())
                    for i in range(4):
                        z = int(case.paths.tokens[m, i])
                        log_q = case.log_q[m, i, z]
                        a = float(case.paths.chosen[m, i])
                        if law == "speculative" and not greedy:
                            a = min(1.0, (case.p[m, i, z] / log_q.exp()).item())
                        corrected = -case.log_q[m, i, case.p[m, i].argmax()] if greedy else case.cross_entropy(m, i)
                        loss = loss + reached * (-a * log_q + (1 - a) * (corrected - 0.3 * torch.log1p(-log_q.exp()))) / sum(
                            0.8**k for k in range(4)
                        )
                        reached *= a
                        worth += reached
                    terms.append(loss)
                    utilities.append(worth)
                grouped = torch.tensor(utilities).view(2, 3)
                weights = path_weights(grouped) if arw else torch.full((2, 3), 1 / 3)
                anchor = 0.2 / 3 * case.naive(decay, case.cross_entropy)
                wanted = weights.flatten() * torch.stack(terms) + anchor
                torch.testing.assert_close(result, wanted)
                torch.testing.assert_close(gradient(case, result), gradient(case, wanted), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("greedy", [True, False])
def test_less_weight_on_a_rejected_token_is_less_loss(greedy: bool) -> None:
    case = Case(greedy, drawn_by_target=False, group=1, missing=False)
    tokens = case.paths.tokens
    chosen = torch.tensor([True, False, False, False]).expand(6, 4)
    with torch.no_grad():
        case.p = case.p.scatter(-1, tokens[..., None], 0.0)
        case.p /= case.p.sum(-1, keepdim=True)
    losses = {car: vsd(VsdSettings(anchor=0.0, car=car)) for car in (0.0, 0.5)}
    paths = case.paths._replace(chosen=chosen)
    slopes = {car: gradient(case, loss(case.log_q, case.p, paths)) for car, loss in losses.items()}
    rejected = tokens[:, 1, None]
    for slope in slopes.values():
        assert (slope[:, 1].gather(1, rejected) > 0).all()
        assert (slope[:, 2:] == 0).all(), "nothing is asked of steps that verification does not reach"
    assert (slopes[0.5][:, 1].gather(1, rejected) > slopes[0.0][:, 1].gather(1, rejected)).all()
    with torch.no_grad():
        lower = case.logits - torch.nn.functional.one_hot(tokens, 6) * torch.tensor([0, 1, 0, 0])[:, None]
        for loss in losses.values():
            assert (loss(lower.log_softmax(-1), case.p, paths) < loss(case.log_q, case.p, paths)).all()


@pytest.mark.parametrize("depends_on_q", [False, True])
def test_the_score_function_gradient_of_the_bound(depends_on_q: bool) -> None:
    leaves = [table.requires_grad_() for table in tables(8)]
    log_p = at(along(tables(9)))

    def log_accepted() -> Tensor:
        return acceptance(at(along(leaves)), log_p, sampled(False), "speculative").log() if depends_on_q else at(along(tables(10)))

    log_q = at(along(leaves))
    exact = torch.autograd.grad(expected(log_q, elbo(log_q, log_p, log_accepted())), leaves)
    log_q, log_a = at(along(leaves)), log_accepted()
    weights = (log_q.sum(-1).exp() * elbo(log_q, log_p, log_a)).detach()
    surrogate = (weights * log_q.sum(-1)).sum() + (log_q.sum(-1).exp().detach() * log_a.sum(-1)).sum()
    if not depends_on_q:
        assert not log_a.requires_grad
    for ours, theirs in zip(torch.autograd.grad(surrogate, leaves), exact, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.abs().max() > 1e-3
