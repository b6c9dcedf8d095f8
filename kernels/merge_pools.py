"""Two sets of drafted nodes as one, with every path once."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kernels.jit import jit, tl, triton

ENTRIES = 1024  # pairs of nodes that a program compares at a time
OTHERS = 16  # nodes that a program holds at least, so that few kernels are compiled


def merge_pools_reference(
    scores: Tensor, tokens: Tensor, parents: Tensor, more_scores: Tensor, more_tokens: Tensor, more_parents: Tensor, levels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``merge_pools`` in plain PyTorch."""
    drafted = scores.shape[1]
    own = torch.arange(drafted + 1, drafted + 1 + more_scores.shape[1], device=scores.device).expand_as(more_tokens)
    root = torch.zeros_like(own[:, :1])
    places = own  # of the other nodes in the joined pool
    above = torch.cat((root, places), dim=1).gather(1, more_parents)
    for _ in range(levels):  # nodes are the same when their parents are, and their tokens
        same = (parents[:, None] == above[:, :, None]) & (tokens[:, None] == more_tokens[:, :, None])
        places = torch.where(same.any(2), same.int().argmax(2) + 1, own)
        above = torch.cat((root, places), dim=1).gather(1, more_parents)
    joined = torch.cat((scores, torch.full_like(more_scores, float("-inf"))), dim=1)
    joined = joined.scatter_reduce(1, places - 1, more_scores, "amax")
    return joined, torch.cat((tokens, more_tokens), dim=1), torch.cat((parents, above), dim=1)


@partial(jit, do_not_specialize=["drafted", "more", "levels"])  # they are as many as a request's text happens to propose
def merge_pools_kernel(
    scores: tl.tensor, tokens: tl.tensor, parents: tl.tensor, more_scores: tl.tensor, more_tokens: tl.tensor, more_parents: tl.tensor,
    scores_out: tl.tensor, tokens_out: tl.tensor, parents_out: tl.tensor, drafted: tl.tensor, more: tl.tensor, levels: tl.tensor,
    MORE: tl.constexpr, CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    """One program per request."""
    b = tl.program_id(0)
    other = tl.arange(0, MORE)
    inside = other < more
    token = tl.load(more_tokens + b * more + other, mask=inside, other=-2).to(tl.int32)
    parent = tl.load(more_parents + b * more + other, mask=inside, other=0).to(tl.int32)
    score = tl.load(more_scores + b * more + other, mask=inside, other=float("-inf"))
    own = drafted + 1 + other
    place = own
    above = tl.where(parent == 0, 0, tl.gather(place, tl.maximum(parent - 1, 0), 0))
    for _ in range(levels):
        found = tl.zeros([MORE], tl.int32)
        for first in range(0, drafted, CHUNK):
            node = first + tl.arange(0, CHUNK)
            is_node = node < drafted
            node_token = tl.load(tokens + b * drafted + node, mask=is_node, other=-3).to(tl.int32)
            node_parent = tl.load(parents + b * drafted + node, mask=is_node, other=-1).to(tl.int32)
            same = (node_token[None, :] == token[:, None]) & (node_parent[None, :] == above[:, None])
            found = tl.maximum(found, tl.max(tl.where(same, node[None, :] + 1, 0), 1))
        place = tl.where(found > 0, found, own)
        above = tl.where(parent == 0, 0, tl.gather(place, tl.maximum(parent - 1, 0), 0))

    out = b * (drafted + more)
    for first in range(0, drafted, CHUNK):
        node = first + tl.arange(0, CHUNK)
        is_node = node < drafted
        raised = tl.max(tl.where(place[:, None] == node[None, :] + 1, score[:, None], float("-inf")), 0)
        known = tl.load(scores + b * drafted + node, mask=is_node, other=float("-inf"))
        tl.store(scores_out + out + node, tl.maximum(known, raised), mask=is_node)
        tl.store(tokens_out + out + node, tl.load(tokens + b * drafted + node, mask=is_node, other=0), mask=is_node)
        tl.store(parents_out + out + node, tl.load(parents + b * drafted + node, mask=is_node, other=0), mask=is_node)
    out += drafted
    tl.store(scores_out + out + other, tl.where(place == own, score, float("-inf")), mask=inside)
    tl.store(tokens_out + out + other, token.to(tl.int64), mask=inside)
    tl.store(parents_out + out + other, above.to(tl.int64), mask=inside)


def merge_pools_triton(
    scores: Tensor, tokens: Tensor, parents: Tensor, more_scores: Tensor, more_tokens: Tensor, more_parents: Tensor, levels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``merge_pools`` in one launch."""
    (batch, drafted), more = scores.shape, more_scores.shape[1]
    out = scores.new_empty(batch, drafted + more)
    tokens_out, parents_out = (tokens.new_empty(batch, drafted + more) for _ in range(2))
    width = max(OTHERS, triton.next_power_of_2(more))
    merge_pools_kernel[(batch,)](
        *(part.contiguous() for part in (scores, tokens, parents, more_scores, more_tokens, more_parents)),
        out, tokens_out, parents_out, drafted, more, levels, width, max(16, ENTRIES // width),
    )  # fmt: skip
    return out, tokens_out, parents_out


def merge_pools(
    scores: Tensor, tokens: Tensor, parents: Tensor, more_scores: Tensor, more_tokens: Tensor, more_parents: Tensor, levels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, tokens and parents of M and C drafted nodes as those of M + C. A path that both have is one node, with the larger score; the
    other of the two can no longer be.

    Scores float32 [B, M] and [B, C], -inf for nodes that cannot be; tokens and parents int64, a node's parent in its own pool counted from
    1 on, 0 for the root; parents come first, siblings differ. levels: how deep the shallower pool is.
    """
    merge = merge_pools_triton if scores.is_cuda else merge_pools_reference
    return merge(scores, tokens, parents, more_scores, more_tokens, more_parents, levels)
