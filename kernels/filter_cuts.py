"""Where top-k, top-p and min-p cut every row of logits off, without sorting it."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.jit import jit, tl, triton
from kernels.sampling import OptionPointers, TreePointers, adjust, load_options


@jit
def _tile(
    logits: tl.tensor, row: tl.tensor, options: tl.tuple, tree: tl.tuple, b: tl.tensor, node: tl.tensor, first: tl.tensor,
    vocab: tl.tensor, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The adjusted logits [BLOCK] of the tokens from ``first`` on, -inf past the end; ``row``: where the node's logits begin."""
    ids = first + tl.arange(0, BLOCK)
    inside = ids < vocab
    values = tl.load(logits + row + ids, mask=inside, other=float("-inf")).to(tl.float32)
    return tl.where(inside, adjust(values, options, load_options(options, b, ids, vocab), tree, b, node, ids), float("-inf"))


@jit
def _above(
    logits: tl.tensor, row: tl.tensor, options: tl.tuple, tree: tl.tuple, b: tl.tensor, node: tl.tensor, vocab: tl.tensor,
    value: tl.tensor, top: tl.tensor, MASS: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """How many logits lie above ``value``, or (MASS) the sum of their exp(x - top); and the neighbours: the smallest logit above
    ``value``, the largest that is not above it. NaN counts for nothing.
    """
    total = tl.zeros([BLOCK], tl.float32)
    over = tl.full([BLOCK], float("inf"), tl.float32)
    under = tl.full([BLOCK], float("-inf"), tl.float32)
    for first in range(0, vocab, BLOCK):
        x = _tile(logits, row, options, tree, b, node, first, vocab, BLOCK)
        above = x > value
        total += tl.where(above, tl.exp(x - top) if MASS else 1.0, 0.0)
        over = tl.minimum(over, tl.where(above, x, float("inf")))
        under = tl.maximum(under, tl.where(x <= value, x, float("-inf")))
    return tl.sum(total), tl.min(over), tl.max(under)


@jit
def _cut(
    logits: tl.tensor, row: tl.tensor, options: tl.tuple, tree: tl.tuple, b: tl.tensor, node: tl.tensor, vocab: tl.tensor,
    top: tl.tensor, limit: tl.tensor, MASS: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The smallest logit that has fewer than ``limit`` logits (less than ``limit`` mass) above it, by bisection; and a value below it
    with no logit between. Both -inf where every logit stays.

    Invariant: ``high`` is a logit of the row that stays, ``low`` a value that does not (-inf: none found yet, and the steps down from
    the top double). Every step lowers ``high`` or raises ``low``; the search ends when no logit or no float lies between them.
    """
    low = top - float("inf")
    high = top
    width = tl.maximum(tl.abs(top) * 0.001, 1.0)
    searching = top > low
    while searching:
        middle = tl.where(low == float("-inf"), high - width, low * 0.5 + high * 0.5)
        middle = tl.where(middle >= high, low, middle)
        total, over, under = _above(logits, row, options, tree, b, node, vocab, middle, top, MASS, BLOCK)
        if total < limit:
            high = under
            searching = under > float("-inf")
        else:
            searching = (over < high) & (middle > low)
            low = middle
        width *= 2
    return high, low


@jit
def filter_cuts_kernel(
    logits: tl.tensor, stride_b: tl.tensor, stride_n: tl.tensor, sampling: tl.tuple, tree: tl.tuple, cuts: tl.tensor, vocab: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One program per (node, request). Passes after the first find the row in the L2 cache."""
    node, b = tl.program_id(0), tl.program_id(1)
    top_k = tl.load(sampling.filters.top_k + b)
    top_p = tl.load(sampling.filters.top_p + b)
    min_p = tl.load(sampling.filters.min_p + b)
    row = b.to(tl.int64) * stride_b + node * stride_n
    cut = tl.full([], float("-inf"), tl.float32)
    if (top_k < vocab) | (top_p < 1) | (min_p > 0):
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        for first in range(0, vocab, BLOCK):
            best = tl.maximum(best, _tile(logits, row, sampling, tree, b, node, first, vocab, BLOCK))
        top = tl.max(best)
        if (top > float("-inf")) & (top < float("inf")):
            below = cut
            if top_k < vocab:
                cut, below = _cut(logits, row, sampling, tree, b, node, vocab, top, top_k.to(tl.float32), False, BLOCK)
            if top_p < 1:
                kept, _, _ = _above(logits, row, sampling, tree, b, node, vocab, below, top, True, BLOCK)
                enough, _ = _cut(logits, row, sampling, tree, b, node, vocab, top, top_p * kept, True, BLOCK)
                cut = tl.maximum(cut, enough)
            if min_p > 0:
                cut = tl.maximum(cut, top + tl.log(min_p))
    tl.store(cuts + b * tree.nodes + node, cut)


def filter_cuts_triton(logits: Tensor, options: OptionPointers, tree: TreePointers) -> Tensor | None:
    """``filter_cuts`` of raw logits [B, N, V], every other option applied on the way: float32 [B, N], or None without filters."""
    if options.filters is None:
        return None
    batch, nodes, vocab = logits.shape
    cuts = torch.empty(batch, nodes, device=logits.device)
    block = min(2048, triton.next_power_of_2(vocab))
    filter_cuts_kernel[nodes, batch](
        logits, *logits.stride()[:2], options, tree, cuts, vocab, BLOCK=block, num_warps=8, enable_fp_fusion=False
    )
    return cuts
