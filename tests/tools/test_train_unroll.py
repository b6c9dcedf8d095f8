"""Training-time test against serving: step k of a chain must be what the head computes when it drafts from the true prefix."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from drafts.eagle3 import Eagle3Head
from tools.train_vsd.data import Row, collate
from tools.train_vsd.objectives import CHUNK, DECAY, agreement, chain_steps, eagle3
from tools.train_vsd.teacher import Teacher, new_head
from tools.train_vsd.unroll import unroll

STEPS = 4
ROWS = [Row([5, 6, 7, 8], [9, 10, 11, 12, 13, 14]), Row([3, 1], [4, 1, 5, 9, 2, 6, 5, 3, 5]), Row([30] * 7, [31, 32])]


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    return Teacher(LlamaForCausalLM(config))


@pytest.fixture(scope="module")
def head(teacher: Teacher) -> Eagle3Head:
    torch.manual_seed(1)
    head = new_head(teacher.model, torch.ones(3))
    for weight in head.parameters():
        torch.nn.init.normal_(weight, 1.0 if weight.ndim == 1 else 0.0, 0.2)
    return head


class Served:
    """A head with a plain growing cache for one sequence."""

    def __init__(self, head: Eagle3Head) -> None:
        self.head, self.keys, self.values = head, torch.empty(0), torch.empty(0)

    def row(self, token: int, hidden: Tensor, position: int) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys = torch.cat((self.keys.view(-1, *k.shape[1:]), k))
            self.values = torch.cat((self.values.view(-1, *v.shape[1:]), v))
            q, k, v = (x.transpose(0, 1) for x in (q, self.keys, self.values))
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(0, 1)

        return self.head(self.head.embed(torch.tensor([token])), hidden, torch.tensor([position]), attend)


def serving_rollout(head: Eagle3Head, teacher: Teacher, row: Row, chain: int) -> tuple[list[Tensor], list[Tensor]]:
    """Draft along the text from the moment that answer token ``chain`` is the last one committed. Returns the head's states, and
    the target's distributions that verification would compare them with, computed on the committed and drafted tokens alone."""
    text = row.prompt + row.answer
    root = len(row.prompt) + chain  # position of the last committed token, whose own feature is not known yet
    served, states, wanted = Served(head), [], []
    with torch.no_grad():
        committed = teacher.model(torch.tensor([text[:root]]), output_hidden_states=True).hidden_states
        features = head.combine(torch.cat([committed[i][0] for i in (2, 3, 3)], dim=-1))
        for i in range(root):
            y = served.row(text[i + 1], features[i : i + 1], i)
        for k in range(STEPS):
            states.append(y[0])
            if root + k + 1 < len(text):
                wanted.append(teacher.model(torch.tensor([text[: root + k + 1]])).logits[0, -1].softmax(-1))
                y = served.row(text[root + k + 1], y, root + k)
    return states, wanted


def test_training_unrolls_what_serving_drafts(head: Eagle3Head, teacher: Teacher) -> None:
    batch = collate(ROWS)
    features, distributions = teacher(batch, None)
    with torch.no_grad():
        states = unroll(head, batch, features, STEPS)
    steps = list(chain_steps(states, batch))
    compared = 0
    for b, row in enumerate(ROWS):
        for a in range(len(row.answer) - 1):
            expected, wanted = serving_rollout(head, teacher, row, a)
            for k in range(min(STEPS, len(row.answer) - 1 - a)):
                torch.testing.assert_close(states[k][b, a], expected[k], atol=2e-5, rtol=1e-4)
                alive = [(i, j) for i, other in enumerate(ROWS) for j in range(len(other.answer) - 1 - k)]
                state, teacher_row = (x[alive.index((b, a))] for x in steps[k])
                torch.testing.assert_close(state, states[k][b, a])
                torch.testing.assert_close(distributions[teacher_row], wanted[k], atol=2e-5, rtol=1e-4)
                compared += 1
    assert compared == sum(len(state) for state, _ in steps) == 14 + 11 + 9 + 7


def test_loss_and_gradient_are_those_of_the_plain_formula(head: Eagle3Head, teacher: Teacher) -> None:
    batch = collate([Row([1, 2], list(range(CHUNK // 8 + 10)))] * 9)  # more chains than one chunk, and not a multiple
    batch = batch._replace(tokens=batch.tokens % 50)
    features, distributions = teacher(batch, None)
    head.requires_grad_()

    def gradients(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(head.parameters())))

    result = eagle3(head, unroll(head, batch, features, 2), batch, distributions)
    plain, hits = torch.zeros(()), []
    for k, (state, rows) in enumerate(chain_steps(unroll(head, batch, features, 2), batch)):
        logits = head.logits(state)
        plain = plain + DECAY**k * F.cross_entropy(logits, distributions[rows]) / (1 + DECAY)
        hits.append((logits.argmax(-1) == distributions[rows].argmax(-1)).float().mean())
    torch.testing.assert_close(result.total, plain)
    torch.testing.assert_close(result.accuracy, torch.stack(hits))
    for ours, theirs in zip(gradients(result.total), gradients(plain), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    head.requires_grad_(False)
    sums = agreement(head, unroll(head, batch, features, 2), batch, distributions)
    torch.testing.assert_close(sums[:, 1] / sums[:, 0], result.accuracy)
    assert (sums[:, 2] <= sums[:, 0]).all()


def test_answers_shorter_than_the_unroll(head: Eagle3Head, teacher: Teacher) -> None:
    batch = collate([Row([1, 2, 3], [4, 5])])
    features, distributions = teacher(batch, None)
    result = eagle3(head, unroll(head, batch, features, STEPS), batch, distributions)
    assert len(result.accuracy) == 1


def test_a_reduced_vocabulary_is_renormalised(teacher: Teacher) -> None:
    batch = collate(ROWS)
    _, whole = teacher(batch, None)
    ids = torch.tensor([3, 10, 40])
    _, reduced = teacher(batch, ids)
    torch.testing.assert_close(reduced, whole[:, ids] / whole[:, ids].sum(-1, keepdim=True))


def test_a_new_head_starts_from_the_target(teacher: Teacher) -> None:
    rms = torch.tensor([2.0, 20.0, 200.0])
    head = new_head(teacher.model, rms)
    assert torch.equal(head.lm_head.weight, teacher.model.lm_head.weight)
    assert head.lm_head.weight.data_ptr() != teacher.model.lm_head.weight.data_ptr()
    assert torch.equal(head.norm, teacher.model.model.norm.weight)
    assert head.config.draft_vocab_size == head.config.vocab_size == 50
    features = torch.randn(100, 3, 32) * rms[:, None]
    assert (head.combine(features.flatten(1)) - features[:, 2] / 200).abs().mean() < 0.3, "the high feature at its natural size"


def test_feature_rms(teacher: Teacher) -> None:
    batch = collate(ROWS[:1])
    features, _ = teacher(batch, None)
    low, middle, high = features[0].split(32, dim=-1)
    torch.testing.assert_close(teacher.feature_rms(batch), torch.stack([x.square().mean().sqrt() for x in (low, middle, high)]))
