"""What a head is trained for. An objective maps the unrolled states of a batch and the target's distributions to a loss."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drafts.eagle3 import Eagle3Head
from tools.train_vsd.data import Batch

DECAY = 0.8  # weight of step k is DECAY ** k (EAGLE-3)
CHUNK = 256  # rows of logits made at a time: they stay in the processor's cache and never exist all at once


class Loss(NamedTuple):
    total: Tensor  # scalar, differentiable
    accuracy: Tensor  # [steps], share of the target's most likely tokens that the head puts first


Objective = Callable[[Eagle3Head, list[Tensor], Batch, Tensor], Loss]


def chain_steps(states: list[Tensor], batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Per step: the states of the chains still within their answer [M, H], and their row in the teacher's distributions [M].

    The teacher has one row per chain, in the order of the batch; step k of chain a is compared with row a + k.
    """
    ahead = torch.arange(states[0].shape[1], device=states[0].device)
    offset = (batch.chains.cumsum(0) - batch.chains)[:, None]
    for k, state in enumerate(states):
        alive = ahead + k < batch.chains[:, None]  # [B, A]
        yield state[alive], (offset + ahead + k)[alive]


def eagle3(head: Eagle3Head, states: list[Tensor], batch: Batch, teacher: Tensor) -> Loss:
    """Soft cross-entropy against the target's distributions ``teacher`` [chains, Vd], weighted by DECAY ** step."""
    best = teacher.argmax(-1)
    total, weights, accuracy = torch.zeros((), device=teacher.device), 0.0, []
    for k, (state, rows) in enumerate(chain_steps(states, batch)):
        if len(rows) == 0:
            break
        loss, correct = SoftCrossEntropy.apply(head.output(state), head.lm_head.weight, teacher, best, rows)
        total = total + DECAY**k * loss / len(rows)
        weights += DECAY**k
        accuracy.append(correct / len(rows))
    return Loss(total / weights, torch.stack(accuracy))


OBJECTIVES: dict[str, Objective] = {"eagle3": eagle3}


class SoftCrossEntropy(torch.autograd.Function):
    """Sum of -sum_v p log softmax(W x) over rows, with its gradients made in the forward pass, CHUNK rows of logits at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, teacher: Tensor, best: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """x [M, H], weight [Vd, H], teacher [R, Vd], best [R], rows [M] -> (loss, number of rows whose argmax is ``best``)."""
        loss, correct = x.new_zeros(()), x.new_zeros(())
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        for start in range(0, len(x), CHUNK):
            part = slice(start, start + CHUNK)
            p = teacher[rows[part]]
            logits = x[part] @ weight.T
            log_z = logits.logsumexp(-1, keepdim=True)
            loss += (log_z[:, 0] - torch.linalg.vecdot(p, logits)).sum()
            correct += (logits.argmax(-1) == best[rows[part]]).sum()
            grad = logits.sub_(log_z).exp_().sub_(p)
            torch.mm(grad, weight, out=grad_x[part])
            grad_weight.addmm_(grad.T, x[part])
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad_loss, grad_weight * grad_loss, None, None, None


@torch.no_grad()
def agreement(head: Eagle3Head, states: list[Tensor], batch: Batch, teacher: Tensor) -> Tensor:
    """Sums over the chains of each step, [steps, 3]: their number, right first choices, and overlaps sum_v min(p, q)."""
    sums = []
    for state, rows in chain_steps(states, batch):
        step = torch.zeros(3)
        for x, r in zip(state.split(CHUNK), rows.split(CHUNK), strict=True):
            q, p = head.logits(x).softmax(-1), teacher[r]
            step += torch.stack([torch.tensor(len(r)), (q.argmax(-1) == p.argmax(-1)).sum().cpu(), torch.minimum(p, q).sum().cpu()])
        sums.append(step)
    return torch.stack(sums)
