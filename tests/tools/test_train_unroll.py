"""Training-time test against serving: step k of a chain must be what the head computes when it drafts from the true prefix."""

import pytest
import torch

from drafts.eagle3 import Eagle3Head
from tests.tools.tiny_training import VOCAB, draft, tiny_head, tiny_teacher
from tools.train_vsd.data import Row, collate
from tools.train_vsd.m_step import cross_entropy
from tools.train_vsd.teacher import Teacher, new_head
from tools.train_vsd.unroll import unroll

STEPS = 4
ROWS = [Row([5, 6, 7, 8], [9, 10, 11, 12, 13, 14]), Row([3, 1], [4, 1, 5, 9, 2, 6, 5, 3, 5]), Row([30] * 7, [31, 32])]


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return tiny_teacher()


@pytest.fixture(scope="module")
def head(teacher: Teacher) -> Eagle3Head:
    return tiny_head(teacher)


def test_training_unrolls_what_serving_drafts(head: Eagle3Head, teacher: Teacher) -> None:
    batch = collate(ROWS)
    features, distributions = teacher(batch, None)
    with torch.no_grad():
        states = unroll(head, batch, features, STEPS)
    chains = [(b, a) for b, row in enumerate(ROWS) for a in range(len(row.answer) - 1)]
    compared = 0
    for first, (b, a) in enumerate(chains):
        row = ROWS[b]
        text = row.answer[a + 1 :][:STEPS]
        expected, logits = draft(head, teacher, row.prompt + row.answer[: a + 1], text[:-1], row.temperature)
        for k in range(len(text)):
            torch.testing.assert_close(states[k][b, a], expected[k], atol=5e-5, rtol=1e-4)
            torch.testing.assert_close(distributions[first + k], logits[k].softmax(-1), atol=2e-5, rtol=1e-4)
            compared += 1
    assert compared == 14 + 11 + 9 + 7


def test_chains_can_start_anywhere_and_read_anything(head: Eagle3Head, teacher: Teacher) -> None:
    batch = collate(ROWS[:2])
    features, _ = teacher(batch, None)
    starts = torch.tensor([[8, 3, 3], [2, 9, 1]])
    read = torch.tensor([[[17, 18, 19], [0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11], [12, 13, 14]]])  # [B, A, K - 1]
    told: list[int] = []

    def next_tokens(k: int, states: torch.Tensor) -> torch.Tensor:
        told.append(k)
        assert states.shape == (2, 3, head.config.hidden_size)
        return read[:, :, k - 1]

    with torch.no_grad():
        states = unroll(head, batch, features, STEPS, starts, next_tokens)
    assert told == [1, 2, 3]
    for b in range(2):
        text = ROWS[b].prompt + ROWS[b].answer
        for a in range(3):
            expected, _ = draft(head, teacher, text[: int(starts[b, a]) + 2], read[b, a].tolist(), 0.0)
            torch.testing.assert_close(torch.stack([state[b, a] for state in states]), torch.stack(expected), atol=5e-5, rtol=1e-4)


def test_a_reduced_vocabulary_is_renormalised_in_the_loss(teacher: Teacher) -> None:
    batch = collate(ROWS)
    _, whole = teacher(batch, None)
    ids = torch.tensor([3, 10, 40])
    _, reduced = teacher(batch, ids)
    torch.testing.assert_close(reduced, whole[:, ids])
    log_q = torch.randn(3).log_softmax(-1)
    p = reduced / reduced.sum(-1, keepdim=True)
    known = reduced.sum(-1) > 1e-3
    assert known.any()
    torch.testing.assert_close(cross_entropy(log_q.expand_as(p), reduced)[known], -(p @ log_q)[known])


def test_sampled_rows_are_compared_at_their_temperature(teacher: Teacher) -> None:
    rows = [row._replace(temperature=t) for row, t in zip(ROWS, (0.0, 0.5, 2.0), strict=True)]
    _, plain = teacher(collate(ROWS), None)
    _, p = teacher(collate(rows), None)
    parts = [len(row.answer) - 1 for row in ROWS]
    for ours, raw, t in zip(p.split(parts), plain.split(parts), (1.0, 0.5, 2.0), strict=True):
        torch.testing.assert_close(ours, (raw.log() / t).softmax(-1))


def test_a_new_head_starts_from_the_target(teacher: Teacher) -> None:
    rms = torch.tensor([2.0, 20.0, 200.0])
    head = new_head(teacher.model, rms)
    assert torch.equal(head.lm_head.weight, teacher.model.lm_head.weight)
    assert head.lm_head.weight.data_ptr() != teacher.model.lm_head.weight.data_ptr()
    assert torch.equal(head.norm, teacher.model.model.norm.weight)
    assert head.config.draft_vocab_size == head.config.vocab_size == VOCAB
    features = torch.randn(100, 3, 32) * rms[:, None]
    assert (head.combine(features.flatten(1)) - features[:, 2] / 200).abs().mean() < 0.3, "the high feature at its natural size"


def test_feature_rms(teacher: Teacher) -> None:
    batch = collate(ROWS[:1])
    features, _ = teacher(batch, None)
    low, middle, high = features[0].split(32, dim=-1)
    torch.testing.assert_close(teacher.feature_rms(batch), torch.stack([x.square().mean().sqrt() for x in (low, middle, high)]))
