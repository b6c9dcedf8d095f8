"""One level of a draft tree: from the head's logits to the most likely children and the nodes to expand next."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import cpu
from kernels.filter_cuts import filter_cuts_triton
from kernels.jit import jit, tl, triton
from kernels.noise import Noise, gumbel_at, gumbel_tile
from kernels.sampling import OptionPointers, SamplingBatch, TreePointers, adjust, apply_options, has_kernel, load_options

BLOCK = 512  # tokens of the vocabulary that a program scores
MOST_SEGMENTS = 2048  # of a row: what a program can hold that looks for the best


class DraftLevel(NamedTuple):
    """Children of R rows, ``topk`` each: child c of a request is child c % topk of row c // topk."""

    scores: Tensor  # float32 [B, R * topk], log-probability of the path; -inf: a child that cannot be drawn
    tokens: Tensor  # int64 [B, R * topk], target ids
    best_scores: Tensor  # float32 [B, topk], of the ``topk`` best children of all rows, best first
    best: Tensor  # int64 [B, topk], which children they are
    best_rows: Tensor  # int64 [B, topk], the rows that they are children of
    best_tokens: Tensor  # int64 [B, topk], target ids


def draft_level_reference(
    logits: Tensor,
    options: SamplingBatch,
    noise: Noise | None,
    depth: int,
    sigma: Tensor,
    target_ids: Tensor | None,
    scores: Tensor,
    topk: int,
) -> DraftLevel:
    """``draft_level`` in plain PyTorch."""
    # Penalties count the committed text alone here: a guess need not be exact.
    none = torch.zeros(logits.shape[:2], dtype=torch.long, device=logits.device)
    logits = apply_options(logits, _of_draft(options, target_ids), none, none + depth, none)
    if noise is not None:
        drawn = noise.at(depth)
        logits = logits + (drawn if target_ids is None else drawn[:, target_ids])[:, None]
    children, ids = (logits / sigma[:, None, None]).log_softmax(-1).topk(topk, dim=-1)
    children = torch.nan_to_num(children, nan=float("-inf"), neginf=float("-inf"))  # a NaN fills its whole row
    children = (children + scores[:, :, None]).flatten(1)
    tokens = (ids if target_ids is None else target_ids[ids]).flatten(1)
    best_scores, best = children.topk(topk, dim=1)
    return DraftLevel(children, tokens, best_scores, best, best // topk, tokens.gather(1, best))


def _of_draft(options: SamplingBatch, target_ids: Tensor | None) -> SamplingBatch:
    """What can be said of draft ids: bias, bans and penalties speak of target ids."""
    return options if target_ids is None else options._replace(bias=None, bans=None, penalties=None)


@jit
def _scores(
    logits: tl.tensor, sampling: tl.tuple, per_token: tl.tuple, tree: tl.tuple, cuts: tl.tensor, gumbel: tl.tensor,
    inverse_sigma: tl.tensor, b: tl.tensor, row: tl.tensor, ids: tl.tensor, inside: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """(Logits after options + noise) / sigma, float32 of the shape of ``ids``, -inf where not ``inside``; ``logits``: of the row."""
    x = tl.load(logits + ids, mask=inside, other=float("-inf")).to(tl.float32)
    x = adjust(x, sampling, per_token, tree, b, row, ids)
    if cuts is not None:
        x = tl.where(x < tl.load(cuts + b * tree.nodes + row), float("-inf"), x)
    return (x + gumbel) * inverse_sigma


@jit
def segments_kernel(
    logits: tl.tensor, stride_b: tl.tensor, stride_n: tl.tensor, sampling: tl.tuple, tree: tl.tuple, cuts: tl.tensor, noise: tl.tuple,
    depth: tl.tensor, sigma: tl.tensor, target_ids: tl.tensor, tops: tl.tensor, sums: tl.tensor, vocab: tl.tensor, segments: tl.tensor,
    BLOCK: tl.constexpr, SEGMENT: tl.constexpr,
) -> None:  # fmt: skip
    """One program per (tile of the vocabulary, request): of every row and segment the largest score, and the sum of the exponentials
    relative to it; tops, sums [B, R, segments]. The rows share their noise.
    """
    tile, b = tl.program_id(0), tl.program_id(1)
    ids = tile * BLOCK + tl.arange(0, BLOCK)
    inside = ids < vocab
    per_token = load_options(sampling, b, ids, vocab)
    gumbel = tl.zeros([BLOCK], tl.float32)
    if noise is not None:  # noqa: SIM102  (known when the kernel is compiled, and not)
        if tl.load(noise.sampled + b) != 0:
            seed, position = tl.load(noise.seeds + b), tl.load(noise.positions + b) + depth
            if target_ids is None:
                gumbel = gumbel_tile(seed, position, tile * BLOCK, BLOCK)
            else:
                gumbel = gumbel_at(seed, position, tl.load(target_ids + ids, mask=inside, other=0))
    inverse_sigma = 1.0 / tl.load(sigma + b)
    segment = tile * (BLOCK // SEGMENT) + tl.arange(0, BLOCK // SEGMENT)
    for row in range(tree.nodes):
        of_row = logits + b.to(tl.int64) * stride_b + row * stride_n
        x = _scores(of_row, sampling, per_token, tree, cuts, gumbel, inverse_sigma, b, row, ids, inside)
        x = tl.reshape(tl.where(inside, x, float("-inf")), [BLOCK // SEGMENT, SEGMENT])
        top = tl.max(tl.where(x == x, x, float("-inf")), 1)
        # A segment of -inf adds nothing; NaN and +inf make the row's sum NaN, and then it has no children.
        total = tl.sum(tl.exp(x - tl.where(top == float("-inf"), 0.0, top)[:, None]), 1)
        place = (b * tree.nodes + row) * segments + segment
        tl.store(tops + place, top, mask=segment < segments)
        tl.store(sums + place, total, mask=segment < segments)


@jit
def row_children_kernel(
    logits: tl.tensor, stride_b: tl.tensor, stride_n: tl.tensor, sampling: tl.tuple, tree: tl.tuple, cuts: tl.tensor, noise: tl.tuple,
    depth: tl.tensor, sigma: tl.tensor, target_ids: tl.tensor, tops: tl.tensor, sums: tl.tensor, parent_scores: tl.tensor,
    scores: tl.tensor, tokens: tl.tensor, vocab: tl.tensor, segments: tl.tensor, topk: tl.tensor,
    SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr, TOPK: tl.constexpr,
) -> None:  # fmt: skip
    """One program per (row, request): its ``topk`` best scores, which lie in the ``topk`` segments with the largest tops, normalised,
    with the parent's score added.
    """
    row, b = tl.program_id(0), tl.program_id(1)
    line = b * tree.nodes + row
    segment = tl.arange(0, SEGMENTS)
    best = tl.load(tops + line * segments + segment, mask=segment < segments, other=float("-inf"))
    top = tl.max(best)
    top = tl.where(top == float("-inf"), 0.0, top)
    normaliser = top + tl.log(tl.sum(tl.load(sums + line * segments + segment, mask=segment < segments, other=0.0) * tl.exp(best - top)))
    offset = tl.load(parent_scores + line) - normaliser
    child = tl.arange(0, TOPK)
    chosen = tl.full([TOPK], -1, tl.int32)
    for k in range(topk):
        value = tl.max(best)
        first = tl.min(tl.where(best == value, segment, SEGMENTS))
        chosen = tl.where(child == k, tl.where(value > float("-inf"), first, -1), chosen)
        best = tl.where(segment == first, float("-inf"), best)

    ids = tl.reshape(chosen[:, None] * SEGMENT + tl.arange(0, SEGMENT)[None, :], [TOPK * SEGMENT])
    inside = (ids >= 0) & (ids < vocab)
    ids = tl.where(inside, ids, 0)
    gumbel = tl.zeros([TOPK * SEGMENT], tl.float32)
    token = ids if target_ids is None else tl.load(target_ids + ids)
    if noise is not None:  # noqa: SIM102
        if tl.load(noise.sampled + b) != 0:
            gumbel = gumbel_at(tl.load(noise.seeds + b), tl.load(noise.positions + b) + depth, token)
    of_row = logits + b.to(tl.int64) * stride_b + row * stride_n
    per_token = load_options(sampling, b, ids, vocab)
    x = _scores(of_row, sampling, per_token, tree, cuts, gumbel, 1.0 / tl.load(sigma + b), b, row, ids, inside)
    x = tl.where(inside & (x == x), x, float("-inf"))
    candidate = tl.arange(0, TOPK * SEGMENT)
    for k in range(topk):
        value = tl.max(x)
        first = tl.min(tl.where(x == value, candidate, TOPK * SEGMENT))
        score = value + offset
        tl.store(scores + line * topk + k, tl.where(score == score, score, float("-inf")))
        tl.store(tokens + line * topk + k, tl.sum(tl.where(candidate == first, token, 0)).to(tl.int64))
        x = tl.where(candidate == first, float("-inf"), x)


@jit
def best_children_kernel(
    scores: tl.tensor, tokens: tl.tensor, best_scores: tl.tensor, best: tl.tensor, best_rows: tl.tensor, best_tokens: tl.tensor,
    children: tl.tensor, topk: tl.tensor, CHILDREN: tl.constexpr,
) -> None:  # fmt: skip
    """One program per request: the ``topk`` best children of all its rows."""
    b = tl.program_id(0)
    child = tl.arange(0, CHILDREN)
    x = tl.load(scores + b * children + child, mask=child < children, other=float("-inf"))
    for k in range(topk):
        value = tl.max(x)
        first = tl.min(tl.where(x == value, child, CHILDREN))
        tl.store(best_scores + b * topk + k, value)
        tl.store(best + b * topk + k, first)
        tl.store(best_rows + b * topk + k, first // topk)
        tl.store(best_tokens + b * topk + k, tl.load(tokens + b * children + first))
        x = tl.where(child == first, float("-inf"), x)


def draft_level_triton(
    logits: Tensor,
    options: SamplingBatch,
    noise: Noise | None,
    depth: int,
    sigma: Tensor,
    target_ids: Tensor | None,
    scores: Tensor,
    topk: int,
) -> DraftLevel:
    """``draft_level`` in three kernels, four where a request filters."""
    batch, rows, vocab = logits.shape
    device = logits.device
    pointers = OptionPointers.of(_of_draft(options, target_ids), logits)
    tree = TreePointers(None, None, None, rows)
    if pointers.banned is not None or pointers.counts is not None:
        # A tree of roots: no row has a drafted ancestor to count.
        none = torch.zeros(batch, rows, dtype=torch.long, device=device)
        tree = TreePointers(none - 1, none, none + depth, rows)
    cuts = filter_cuts_triton(logits, pointers, tree)
    segment = 32
    while triton.cdiv(vocab, segment) > MOST_SEGMENTS and segment < BLOCK:
        segment *= 2
    segments = triton.cdiv(vocab, segment)
    tops, sums = (torch.empty(batch, rows, segments, device=device) for _ in range(2))
    inputs = logits, *logits.stride()[:2], pointers, tree, cuts, noise and noise.key, depth, sigma, target_ids, tops, sums
    segments_kernel[triton.cdiv(vocab, BLOCK), batch](*inputs, vocab, segments, BLOCK, segment, num_warps=1, enable_fp_fusion=False)
    level = DraftLevel(
        torch.empty(batch, rows * topk, device=device),
        torch.empty(batch, rows * topk, dtype=torch.long, device=device),
        torch.empty(batch, topk, device=device),
        *(torch.empty(batch, topk, dtype=torch.long, device=device) for _ in range(3)),
    )
    row_children_kernel[rows, batch](
        *inputs, scores.contiguous(), level.scores, level.tokens, vocab, segments, topk,
        triton.next_power_of_2(segments), segment, triton.next_power_of_2(topk), num_warps=1 if topk <= 8 else 4, enable_fp_fusion=False,
    )  # fmt: skip
    best_children_kernel[(batch,)](*level, rows * topk, topk, CHILDREN=triton.next_power_of_2(rows * topk))
    return level


def draft_level_cpu(
    logits: Tensor,
    options: SamplingBatch,
    noise: Noise | None,
    depth: int,
    sigma: Tensor,
    target_ids: Tensor | None,
    scores: Tensor,
    topk: int,
) -> DraftLevel:
    """``draft_level`` in one call, for options of ``has_kernel``."""
    batch, rows, vocab = logits.shape
    level = DraftLevel(
        torch.empty(batch, rows * topk),
        torch.empty(batch, rows * topk, dtype=torch.long),
        torch.empty(batch, topk),
        *(torch.empty(batch, topk, dtype=torch.long) for _ in range(3)),
    )
    drawn = None if noise is None else noise.at(depth)
    cpu.launch(
        "draft_level", logits.dtype, logits.contiguous(), options.temperature, drawn, 0 if drawn is None else drawn.stride(0),
        sigma.contiguous(), 1, target_ids, scores.contiguous(), batch, rows, vocab, topk, *level,
    )  # fmt: skip
    return level


def draft_level(
    logits: Tensor,
    options: SamplingBatch,
    noise: Noise | None,
    depth: int,
    sigma: Tensor,
    target_ids: Tensor | None,
    scores: Tensor,
    topk: int,
) -> DraftLevel:
    """The ``topk`` most likely survivors after each row, and the best ``topk`` of all rows.

    A child's score is its row's score plus log softmax((draft logits after options + noise) / sigma): with the request's own noise
    the draft guesses the token that verification will draw.
    logits [B, R, Vd] of the head; depth: of the rows' nodes; sigma float32 [B]; target_ids int64 [Vd]: of a reduced draft vocabulary,
    None where draft ids are target ids; scores float32 [B, R]: of the rows; topk at most Vd. Ties go either way.
    """
    if not logits.is_cuda and has_kernel(_of_draft(options, target_ids)) and cpu.serves(logits):
        return draft_level_cpu(logits, options, noise, depth, sigma, target_ids, scores, topk)
    level = draft_level_triton if logits.is_cuda else draft_level_reference
    return level(logits, options, noise, depth, sigma, target_ids, scores, topk)
