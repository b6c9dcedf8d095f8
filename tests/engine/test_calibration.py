"""Drafting temperatures that the engine learns for heads which bring none."""

import pytest
import torch
from transformers import PreTrainedModel

from drafts.eagle3 import HeadMetadata
from server.engine.calibration import HIGH, LOW, LearnedSigma
from server.engine.engine import DEFAULT_SIGMA
from server.engine.request import Request
from server.engine.types import SamplingParams, Verdict
from tests.engine.engines import build, byte_tokenizer, random_head, run, tiny_model

PROMPTS = ([72, 101], [40, 41, 42, 43], [200, 7, 7], [65] * 9)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model(spread=0.12)


def serve(learned: LearnedSigma, temperature: float, true: float, steps: int) -> float:
    """Guess with softmax(logits / learned sigma) where softmax(logits / true) is the law; returns the learned sigma at ``temperature``."""
    rng = torch.Generator().manual_seed(int(10 * temperature))
    sigma = 0.0
    for _ in range(steps):
        (_, (cold,)), (_, (warm,)) = learned.points
        sigma = cold + (warm - cold) * temperature
        logits = 2 * torch.randn(20, generator=rng)
        right = torch.multinomial((logits / true).softmax(-1), 1, generator=rng) == logits.argmax()
        learned.observe(temperature, float((logits / sigma).softmax(-1).max()), bool(right))
    return sigma


@pytest.mark.parametrize("true", [0.4, 0.7, 1.1])
def test_it_finds_the_sigma_that_drafts_follow(true: float) -> None:
    learned = LearnedSigma(DEFAULT_SIGMA)
    assert serve(learned, 0.0, true, 2000) == pytest.approx(true, rel=0.2)
    assert learned.points[1] == (1.0, (pytest.approx(0.6),)), "greedy requests say nothing about sampling"
    assert serve(learned, 1.0, 1.5 - true, 2000) == pytest.approx(1.5 - true, rel=0.2)
    assert serve(learned, 0.5, 0.8, 2000) == pytest.approx(0.8, rel=0.2)


def test_it_stays_within_bounds() -> None:
    learned = LearnedSigma(DEFAULT_SIGMA)
    for _ in range(3000):
        learned.observe(0.0, 1.0, right=False)
        learned.observe(1.0, 0.0, right=True)
    assert learned.points == ((0.0, (pytest.approx(HIGH),)), (1.0, (pytest.approx(LOW),)))


def test_texts_stay_while_sigma_moves(model: PreTrainedModel) -> None:
    requests = [(prompt, SamplingParams(max_tokens=40, temperature=t, seed=3)) for prompt in PROMPTS for t in (0.0, 0.6, 1.0)]
    plain = run(build(model), requests)
    engine = build(model, random_head(model), tree_nodes=16)
    engine.proposer.learned = LearnedSigma(DEFAULT_SIGMA)
    assert [result.token_ids for result in run(engine, requests)] == [result.token_ids for result in plain]
    assert engine.proposer.sigma != DEFAULT_SIGMA


def test_the_first_of_a_verdict_learn_from_their_guesses(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build(model, random_head(model), tree_nodes=4)
    proposer, learned, told = engine.proposer, LearnedSigma(DEFAULT_SIGMA), []
    proposer.learned = learned
    monkeypatch.setattr(learned, "observe", lambda *said: told.append(said))
    proposer.guesses = torch.tensor([9, 7]), torch.tensor([0.75, 0.25]).log()
    params, tokenizer = SamplingParams(temperature=0), byte_tokenizer().backend_tokenizer
    requests = [Request.create(name, [1], params, 0, frozenset(), tokenizer, 260) for name in "ab"]
    none = torch.zeros(3, 1, dtype=torch.long)
    proposer.tell(requests, Verdict(none, none[:, 0], torch.tensor([[9], [8], [7]])))()
    assert told == [(0.0, pytest.approx(0.75), True), (0.0, pytest.approx(0.25), False)]


def test_only_uncalibrated_heads_learn(model: PreTrainedModel) -> None:
    def learns(sigma: float | None = None, calibrated: bool = False, **options: object) -> bool:
        head = random_head(model)
        if calibrated:
            head.metadata = HeadMetadata("", "", "eagle3", draft_temperature=((0.0, (0.5,)),))
        engine = build(model, head, tree_nodes=4, max_num_seqs=1, draft_temperature=sigma, **{"load_rule": True, **options})
        assert engine.proposer.sigma == (DEFAULT_SIGMA if not calibrated and sigma is None else ((0.0, (0.5,)),))
        return engine.proposer.learned is not None

    assert learns()
    assert not learns(calibrated=True)
    assert not learns(sigma=0.5)
    assert not learns(load_rule=False), "measurements keep what they measure"
