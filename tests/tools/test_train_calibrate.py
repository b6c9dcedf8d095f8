"""Draft temperatures by maximum likelihood, on drafts whose right temperature is known."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from kernels.noise import gumbel_noise
from tests.engine.engines import build, random_head, tiny_model
from tools.train_vsd.calibrate import SIGMAS, best_sigma, calibration_rows, fit_served, fit_sigmas, likelihood_loss
from tools.train_vsd.data import AnswerSettings, Batch, Row, collate

VOCAB, DEPTH = 24, 3


class Bigrams(nn.Module):
    """Target and head at once: the next token depends on the last alone. The draft's logits are ``scale`` times the target's."""

    def __init__(self, scale: float, drafted: int = VOCAB) -> None:
        super().__init__()
        self.scale, self.drafted = scale, drafted
        self.table = 2 * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))
        self.fc = nn.Linear(1, 1)
        self.d2t = torch.zeros(drafted, dtype=torch.long) if drafted < VOCAB else None
        self.config = SimpleNamespace(vocab_size=VOCAB, draft_vocab_size=drafted)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]

    def combine(self, features: Tensor) -> Tensor:
        return features

    def condition(self, *_: object) -> None:
        return None

    def angles(self, *_: object) -> None:
        return None

    def forward(self, embeddings: Tensor, hidden: Tensor, *_: object) -> Tensor:
        return embeddings

    def logits(self, y: Tensor, *_: object) -> Tensor:
        return self.scale * y[..., : self.drafted]

    def to_target_ids(self, ids: Tensor) -> Tensor:
        return ids

    def rows(self, temperature: float, count: int, choose: Callable[[Tensor, Tensor, int], Tensor]) -> list[Row]:
        """Texts of 60 tokens after [0, 1]; ``choose``(logits [count, V], seeds [count], position) picks the next tokens."""
        text, seeds = torch.tensor([[0, 1]]).expand(count, -1), torch.arange(count) + 7
        for position in range(2, 62):
            text = torch.cat((text, choose(self.table[text[:, -1]], seeds, position)[:, None]), dim=1)
        return [Row([0, 1], tokens[2:], temperature, int(seed)) for tokens, seed in zip(text.tolist(), seeds, strict=True)]


def no_teacher(batch: Batch, draft_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.zeros(*batch.tokens.shape, 1), torch.empty(0)


def unknown_draw(logits: Tensor, seeds: Tensor, position: int) -> Tensor:
    """A sample whose noise the draft does not know."""
    return torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(position))[:, 0]


def own_noise(logits: Tensor, seeds: Tensor, position: int) -> Tensor:
    return (logits + gumbel_noise(seeds, torch.full_like(seeds, position), VOCAB)).argmax(-1)


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.7])
def test_the_fit_finds_what_the_logits_were_multiplied_by(scale: float) -> None:
    head = Bigrams(scale)
    [(temperature, sigmas)] = fit_sigmas(head, no_teacher, head.rows(0.0, 60, unknown_draw), DEPTH)  # type: ignore[arg-type]
    assert temperature == 0.0
    assert sigmas == pytest.approx([scale] * DEPTH, rel=0.04)


def test_tokens_that_a_head_cannot_draft_do_not_count() -> None:
    head = Bigrams(0.6, drafted=VOCAB - 4)
    [(_, sigmas)] = fit_sigmas(head, no_teacher, head.rows(0.0, 60, unknown_draw), DEPTH)  # type: ignore[arg-type]
    assert sigmas == pytest.approx([0.6] * DEPTH, rel=0.05)


def test_the_requests_own_noise_is_known() -> None:
    """With the target's own logits and noise every guess is right, so that nothing is too sharp; unknown noise leaves nothing to fit."""
    head = Bigrams(1.0)
    rows = head.rows(1.0, 20, own_noise)
    assert fit_sigmas(head, no_teacher, rows, 2) == ((1.0, (0.1, 0.1)),)  # type: ignore[arg-type]
    assert fit_sigmas(head, no_teacher, [row._replace(seed=None) for row in rows], 2) == ()  # type: ignore[arg-type]


def test_levels_that_no_answer_reaches_are_left_out() -> None:
    head = Bigrams(1.0)
    rows = [row._replace(answer=row.answer[:3]) for row in head.rows(0.0, 5, unknown_draw)]
    [(_, sigmas)] = fit_sigmas(head, no_teacher, rows, 4)  # type: ignore[arg-type]
    assert len(sigmas) == 2


def test_the_minimum_lies_between_the_tried_values() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4000, 30) * 3
    right = torch.multinomial(logits.softmax(-1), 1)[:, 0]
    assert best_sigma(likelihood_loss(logits * 0.37, right)) == pytest.approx(0.37, rel=0.03)
    assert best_sigma(SIGMAS) == 0.1


def test_the_noise_of_an_answer_can_be_made_again() -> None:
    """Position of the noise is the token's index in prompt and answer together."""
    model = tiny_model(spread=0.12)
    engine = build(model, random_head(model), tree_nodes=8)
    rows = calibration_rows(engine, [[72, 101], [40, 41, 42], [7] * 9, [5]], AnswerSettings(max_tokens=20, seed=11), 4)
    assert sorted({row.temperature for row in rows}) == [0.0, 1.0]
    batch = collate(rows)
    with torch.no_grad():
        log_p = model(batch.tokens).logits.log_softmax(-1)
    for b, row in enumerate(rows):
        assert row.seed is not None
        places = torch.arange(len(row.answer)) + len(row.prompt)
        noise = gumbel_noise(torch.full_like(places, row.seed), places, log_p.shape[-1]) if row.temperature else 0.0
        assert (log_p[b, places - 1] + noise).argmax(-1).tolist() == row.answer


def test_the_served_pair_is_left_as_it_was() -> None:
    model = tiny_model(spread=0.12)
    engine = build(model, random_head(model), tree_nodes=8, tree_depth=3)
    prompts = [[72, 101], [40, 41, 42]]
    rows = calibration_rows(engine, prompts, AnswerSettings(max_tokens=12), 2)
    assert [(t, len(sigmas)) for t, sigmas in fit_served(engine, rows)] == [(0.0, 3), (1.0, 3)]
    assert calibration_rows(engine, prompts, AnswerSettings(max_tokens=12), 2) == rows
