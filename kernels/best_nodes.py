"""The best nodes of all that were drafted, as one tree."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kernels import cpu
from kernels.jit import jit, tl, triton

CHUNK = 64  # candidates that a program compares with as many at a time
CANDIDATES, NODES = 256, 64  # that a program holds at least, so that few kernels are compiled: it is hardly slower


def best_nodes_reference(
    roots: Tensor, scores: Tensor, tokens: Tensor, parents: Tensor, nodes: int, node_price: float
) -> tuple[Tensor, Tensor]:
    """``best_nodes`` in plain PyTorch."""
    ordered, order = scores.sort(dim=1, descending=True, stable=True)
    count = worthwhile_nodes(ordered, nodes, node_price)
    drafted = scores.shape[1]
    kept = order[:, :count].masked_fill(ordered[:, :count].isneginf(), drafted).sort(dim=1).values
    alive, kept = kept < drafted, kept.clamp(max=drafted - 1)
    parents = parents.gather(1, kept)
    parent = torch.where(parents == 0, 0, torch.searchsorted(kept + 1, parents) + 1)
    root = roots[:, None]
    parent = torch.cat((torch.zeros_like(root), torch.where(alive, parent, 0)), dim=1)
    return torch.cat((root, torch.where(alive, tokens.gather(1, kept), -1)), dim=1), parent


def worthwhile_nodes(ordered: Tensor, nodes: int, node_price: float) -> int:
    """The most drafted nodes of a request, at least one; ordered: scores float32 [B, M], best first. A price makes the host wait."""
    count = min(nodes - 1, ordered.shape[1])
    return count if node_price == 0 else max(1, min(count, int((ordered.exp().amax(0) >= node_price).sum())))


@partial(jit, do_not_specialize=["drafted", "count"])  # so that few are compiled
def rank_kernel(scores: tl.tensor, stays: tl.tensor, drafted: tl.tensor, count: tl.tensor, CHUNK: tl.constexpr) -> None:
    """One program per (chunk of candidates, request): a candidate stays when fewer than ``count`` are ahead of it; stays int32 [B, M]."""
    b = tl.program_id(1)
    mine = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    score = tl.load(scores + b * drafted + mine, mask=mine < drafted, other=float("-inf"))
    ahead = tl.zeros([CHUNK], tl.int32)
    for start in range(0, drafted, CHUNK):
        other = start + tl.arange(0, CHUNK)
        rival = tl.load(scores + b * drafted + other, mask=other < drafted, other=float("-inf"))[None, :]
        wins = (rival > score[:, None]) | ((rival == score[:, None]) & (other[None, :] < mine[:, None]))
        ahead += tl.sum(wins.to(tl.int32), 1)
    kept = (score > float("-inf")) & (ahead < count)
    tl.store(stays + b * drafted + mine, kept.to(tl.int32), mask=mine < drafted)


@partial(jit, do_not_specialize=["drafted", "count"])
def compact_kernel(
    roots: tl.tensor, stays: tl.tensor, tokens: tl.tensor, parents: tl.tensor, tokens_out: tl.tensor, parent_out: tl.tensor,
    drafted: tl.tensor, count: tl.tensor, NODES: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One program per request: the node of a candidate that stays is the number of those that stay up to it."""
    b = tl.program_id(0)
    candidate = tl.arange(0, BLOCK)
    inside = candidate < drafted
    kept = tl.load(stays + b * drafted + candidate, mask=inside, other=0)
    place = tl.cumsum(kept)
    up = tl.load(parents + b * drafted + candidate, mask=inside, other=0).to(tl.int32)
    parent = tl.where(up == 0, 0, tl.gather(place, tl.maximum(up - 1, 0), 0))
    token = tl.load(tokens + b * drafted + candidate, mask=inside, other=-1)
    out = b * (count + 1)
    tl.store(tokens_out + out + place, token, mask=kept != 0)
    tl.store(parent_out + out + place, parent.to(tl.int64), mask=kept != 0)
    node = tl.arange(0, NODES)
    rest = (node <= count) & ((node == 0) | (node > tl.sum(kept)))
    tl.store(tokens_out + out + node, tl.where(node == 0, tl.load(roots + b), -1), mask=rest)
    tl.store(parent_out + out + node, tl.zeros([NODES], tl.int64), mask=rest)


def best_nodes_triton(
    roots: Tensor, scores: Tensor, tokens: Tensor, parents: Tensor, nodes: int, node_price: float
) -> tuple[Tensor, Tensor]:
    """``best_nodes`` in two kernels, after a sort where nodes have a price."""
    batch, drafted = scores.shape
    ordered = scores.sort(dim=1, descending=True).values if node_price > 0 else scores
    count = worthwhile_nodes(ordered, nodes, node_price)
    stays = torch.empty(batch, drafted, dtype=torch.int32, device=scores.device)
    token, parent = (torch.empty(batch, count + 1, dtype=torch.long, device=scores.device) for _ in range(2))
    rank_kernel[triton.cdiv(drafted, CHUNK), batch](scores.contiguous(), stays, drafted, count, CHUNK)
    compact_kernel[(batch,)](
        roots.contiguous(), stays, tokens.contiguous(), parents.contiguous(), token, parent, drafted, count,
        max(NODES, triton.next_power_of_2(count + 1)), max(CANDIDATES, triton.next_power_of_2(drafted)),
        num_warps=8 if drafted > 1024 else 4,
    )  # fmt: skip
    return token, parent


def best_nodes_cpu(roots: Tensor, scores: Tensor, tokens: Tensor, parents: Tensor, nodes: int, node_price: float) -> tuple[Tensor, Tensor]:
    """``best_nodes`` in one call."""
    batch, drafted = scores.shape
    most = min(nodes - 1, drafted)
    if most == 0:
        return roots[:, None], torch.zeros_like(roots)[:, None]
    out = roots.new_empty(2, batch, most + 1)
    inputs = (part.contiguous() for part in (roots, scores, tokens, parents))
    count = cpu.launch("best_nodes", None, *inputs, batch, drafted, most, node_price, out[0], out[1])
    return out[0, :, : count + 1], out[1, :, : count + 1]


def best_nodes(roots: Tensor, scores: Tensor, tokens: Tensor, parents: Tensor, nodes: int, node_price: float) -> tuple[Tensor, Tensor]:
    """The root and the best ``nodes`` - 1 of M drafted nodes, parents before children, as tokens and parents int64 [B, N].

    roots int64 [B]; scores float32 [B, M], -inf for nodes that cannot be; tokens int64 [B, M]; parents int64 [B, M]: a node's parent in
    the pool, counted from 1 on, 0 for the root; node_price: survival probability that the n-th best node of some request must have
    for trees to have n of them, 0: N = min(nodes, M + 1). Where a request has fewer, dead nodes come last: token -1, parent 0. A
    child never scores above its parent, and of equal scores the first stays: a kept node's parent is kept.
    """
    best = best_nodes_triton if scores.is_cuda else best_nodes_cpu if cpu.serves(scores) else best_nodes_reference
    return best(roots, scores, tokens, parents, nodes, node_price)
