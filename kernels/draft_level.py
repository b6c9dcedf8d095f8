"""One level of a draft tree: from the head's logits to the most likely children and the nodes to expand next."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.filter_cuts import filter_cuts_triton
from kernels.jit import jit, tl, triton
from kernels.noise import Noise, gumbel_at, gumbel_tile
from kernels.sampling import OptionPointers, SamplingBatch, TreePointers, adjust, apply_options, load_options


class DraftLevel(NamedTuple):
    """Children of R rows, ``topk`` each: child c of a request is child c % topk of row c // topk."""

    scores: Tensor  # float32 [B, R * topk], log-probability of the path; -inf: a child that cannot be drawn
    tokens: Tensor  # int64 [B, R * topk], target ids
    best_scores: Tensor  # float32 [B, topk], of the ``topk`` best children of all rows, best first
    best: Tensor  # int64 [B, topk], which children they are


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
        drawn = noise.values[:, depth]
        logits = logits + (drawn if target_ids is None else drawn[:, target_ids])[:, None]
    children, ids = (logits / sigma[:, None, None]).log_softmax(-1).topk(topk, dim=-1)
    children = torch.nan_to_num(children, nan=float("-inf"), neginf=float("-inf"))  # a NaN fills its whole row
    children = (children + scores[:, :, None]).flatten(1)
    tokens = (ids if target_ids is None else target_ids[ids]).flatten(1)
    best_scores, best = children.topk(topk, dim=1)
    return DraftLevel(children, tokens, best_scores, best)


def _of_draft(options: SamplingBatch, target_ids: Tensor | None) -> SamplingBatch:
    """What can be said of draft ids: bias, bans and penalties speak of target ids."""
    return options if target_ids is None else options._replace(bias=None, bans=None, penalties=None)


@jit
def tile_children_kernel(
    logits: tl.tensor, stride_b: tl.tensor, stride_n: tl.tensor, sampling: tl.tuple, tree: tl.tuple, cuts: tl.tensor, noise: tl.tuple,
    depth: tl.tensor, sigma: tl.tensor, target_ids: tl.tensor, values: tl.tensor, ids_out: tl.tensor, sums: tl.tensor,
    vocab: tl.tensor, topk: tl.tensor, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One program per (tile of the vocabulary, request): of every row the tile's ``topk`` scores, and the sum of their exponentials
    relative to the largest. values, ids_out [B, R, tiles, topk]; sums [B, R, tiles].
    """
    tile, b, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
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
    for row in range(tree.nodes):
        x = tl.load(logits + b.to(tl.int64) * stride_b + row * stride_n + ids, mask=inside, other=float("-inf")).to(tl.float32)
        x = adjust(x, sampling, per_token, tree, b, row, ids)
        if cuts is not None:
            x = tl.where(x < tl.load(cuts + b * tree.nodes + row), float("-inf"), x)
        x = (x + gumbel) * inverse_sigma
        top = tl.max(x)
        out = (b * tree.nodes + row) * tiles + tile
        # A tile of -inf adds nothing; NaN and +inf make the row's sum NaN, and then it has no children.
        tl.store(sums + out, tl.sum(tl.exp(x - tl.where(top == float("-inf"), 0.0, top))))
        x = tl.where(x == x, x, float("-inf"))
        for k in range(topk):
            value = tl.max(x)
            token = tl.min(tl.where(x == value, ids, vocab))
            tl.store(values + out * topk + k, value)
            tl.store(ids_out + out * topk + k, token)
            x = tl.where(ids == token, float("-inf"), x)


@jit
def row_children_kernel(
    values: tl.tensor, ids: tl.tensor, sums: tl.tensor, parent_scores: tl.tensor, target_ids: tl.tensor, scores: tl.tensor,
    tokens: tl.tensor, tiles: tl.tensor, topk: tl.tensor, CANDIDATES: tl.constexpr, TILES: tl.constexpr,
) -> None:  # fmt: skip
    """One program per row: its ``topk`` best of all tiles, normalised, with the parent's score added."""
    row = tl.program_id(0)
    tile = tl.arange(0, TILES)
    tops = tl.load(values + (row * tiles + tile) * topk, mask=tile < tiles, other=float("-inf"))
    top = tl.max(tops)
    top = tl.where(top == float("-inf"), 0.0, top)
    normaliser = top + tl.log(tl.sum(tl.load(sums + row * tiles + tile, mask=tile < tiles, other=0.0) * tl.exp(tops - top)))
    offset = tl.load(parent_scores + row) - normaliser
    candidate = tl.arange(0, CANDIDATES)
    x = tl.load(values + row * tiles * topk + candidate, mask=candidate < tiles * topk, other=float("-inf"))
    for k in range(topk):
        value = tl.max(x)
        first = tl.min(tl.where(x == value, candidate, CANDIDATES))
        token = tl.load(ids + row * tiles * topk + first).to(tl.int64)
        if target_ids is not None:
            token = tl.load(target_ids + token)
        score = value + offset
        tl.store(scores + row * topk + k, tl.where(score == score, score, float("-inf")))
        tl.store(tokens + row * topk + k, token)
        x = tl.where(candidate == first, float("-inf"), x)


@jit
def best_children_kernel(
    scores: tl.tensor, best_scores: tl.tensor, best: tl.tensor, children: tl.tensor, topk: tl.tensor, CHILDREN: tl.constexpr,
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
    pointers = OptionPointers.of(_of_draft(options, target_ids), vocab)
    tree = TreePointers(None, None, None, rows)
    if pointers.banned is not None or pointers.counts is not None:
        # A tree of roots: no row has a drafted ancestor to count.
        none = torch.zeros(batch, rows, dtype=torch.long, device=device)
        tree = TreePointers(none - 1, none, none + depth, rows)
    cuts = filter_cuts_triton(logits, pointers, tree)
    block = min(max(512, triton.next_power_of_2(triton.cdiv(vocab, 64))), triton.next_power_of_2(vocab))
    tiles = triton.cdiv(vocab, block)
    values = torch.empty(batch, rows, tiles, topk, device=device)
    ids = torch.empty(batch, rows, tiles, topk, dtype=torch.int32, device=device)
    sums = torch.empty(batch, rows, tiles, device=device)
    tile_children_kernel[tiles, batch](
        logits, *logits.stride()[:2], pointers, tree, cuts, noise and noise.key, depth, sigma, target_ids, values, ids, sums, vocab, topk,
        BLOCK=block, num_warps=max(1, block // 512), enable_fp_fusion=False,
    )  # fmt: skip
    level = DraftLevel(
        torch.empty(batch, rows * topk, device=device),
        torch.empty(batch, rows * topk, dtype=torch.long, device=device),
        torch.empty(batch, topk, device=device),
        torch.empty(batch, topk, dtype=torch.long, device=device),
    )
    row_children_kernel[(batch * rows,)](
        values, ids, sums, scores.contiguous(), target_ids, level.scores, level.tokens, tiles, topk,
        CANDIDATES=triton.next_power_of_2(tiles * topk), TILES=triton.next_power_of_2(tiles),
    )  # fmt: skip
    best_children_kernel[(batch,)](
        level.scores, level.best_scores, level.best, rows * topk, topk, CHILDREN=triton.next_power_of_2(rows * topk)
    )
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
    level = draft_level_triton if logits.is_cuda else draft_level_reference
    return level(logits, options, noise, depth, sigma, target_ids, scores, topk)
