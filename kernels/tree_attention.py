"""Attention of new rows over a paged KV cache, with a tree or causal mask on the newest columns."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cpu
from kernels.jit import compute_capability, jit, tl, triton
from kernels.tree_layout import TreeLayout

FEW_ROWS = 32  # of a request, for which a CPU reads K and V where they lie; with more, copies for the library's matrix products pay,
SHORT_CONTEXT = 1024  # in float32 where contexts are longer than that
LARGEST_HEAD = 256  # as in native/attention.h
LOG2_E = 1.4426950408889634
COMBINED = 2  # outputs whose splits one program adds up
PROGRAMS = 264  # of one request with a long context: two for every multiprocessor of a large GPU, or one with a tile of 128 rows


def tree_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, layout: TreeLayout, scale: float, sliding_window: int | None = None,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """softmax(q K^T * scale + mask) V for every new row, K and V of the new rows already in the cache.

    q: [B, N, Hq, D]; k_cache, v_cache: [blocks, block, Hkv, D], contiguous, Hq a multiple of Hkv. softcap: scores become
    softcap * tanh(score / softcap). sinks: float32 [Hq], one more logit in every softmax, without a value. Returns [B, N, Hq, D] in
    q's dtype. What rows that are not ``live`` get is finite and otherwise undefined. Where q is that of the live rows alone, [R, Hq, D],
    so is the result.
    """
    if reads_in_place(layout, q.dtype) and q.shape[-1] <= LARGEST_HEAD and softcap is None and sinks is None and cpu.serves(q):
        return tree_attention_cpu(q, k_cache, v_cache, layout, scale, sliding_window)
    attend = tree_attention_triton if q.is_cuda else tree_attention_reference
    if q.dim() == 4:
        return attend(q, k_cache, v_cache, layout, scale, sliding_window, softcap, sinks)
    out = attend(_padded(q, layout), k_cache, v_cache, layout, scale, sliding_window, softcap, sinks)
    return out.flatten(0, 1).index_select(0, layout.live_rows)


def reads_in_place(layout: TreeLayout, dtype: torch.dtype) -> bool:
    """Whether a CPU's kernel is faster than the library's."""
    return layout.depth.shape[1] <= FEW_ROWS or (dtype == torch.float32 and layout.max_context <= SHORT_CONTEXT)


def tree_attention_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, layout: TreeLayout, scale: float, sliding_window: int | None = None,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``tree_attention`` in plain PyTorch."""
    batch, rows, heads, size = q.shape
    kv_heads = k_cache.shape[2]
    keys, values = (_visible_rows(cache, layout).transpose(1, 2) for cache in (k_cache, v_cache))  # [B, Hkv, L, D]
    # Heads that share a KV head become rows of it: K and V are never repeated.
    group = heads // kv_heads
    queries = q.view(batch, rows, kv_heads, group, size).permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, group * rows, size)
    mask = layout.mask(sliding_window, group, q.dtype)
    if softcap is None and sinks is None:
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    else:
        scores = queries.float() @ keys.float().transpose(2, 3)
        scores = (scores * scale if softcap is None else softcap * torch.tanh(scores * (scale / softcap))) + mask
        if sinks is not None:
            sink = sinks.view(1, kv_heads, group, 1).expand(batch, -1, -1, rows).reshape(batch, kv_heads, group * rows, 1)
            scores = torch.cat((scores, sink), dim=-1)
        out = (scores.softmax(-1)[..., : keys.shape[2]] @ values.float()).to(q.dtype)
    return out.view(batch, kv_heads, group, rows, size).permute(0, 3, 1, 2, 4).reshape(batch, rows, heads, size)


def _visible_rows(cache: Tensor, layout: TreeLayout) -> Tensor:
    """K or V of all requests' first blocks, [B, L, Hkv, D]; where they lie next to each other, nothing is copied."""
    if layout.only_run is not None:
        return cache[layout.only_run : layout.only_run + layout.num_blocks].flatten(0, 1)[None]
    blocks = layout.block_tables[:, : layout.num_blocks].flatten()
    # Whole blocks as flat rows: the copy is one memcpy per block.
    return cache.flatten(1).index_select(0, blocks).view(len(layout.block_tables), -1, *cache.shape[2:])


def tree_attention_cpu(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, layout: TreeLayout, scale: float, sliding_window: int | None = None,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``tree_attention`` where K and V lie, for head sizes up to LARGEST_HEAD and without ``softcap`` and ``sinks``."""
    assert softcap is sinks is None
    assert k_cache.dtype == v_cache.dtype == q.dtype
    if q.dim() == 4 and layout.live is not None:
        own = tree_attention_cpu(q.flatten(0, 1)[layout.live_rows], k_cache, v_cache, layout, scale, sliding_window)
        return _padded(own, layout)
    if q.stride(-1) != 1:
        q = q.contiguous()
    out, (heads, size) = q.new_empty(q.shape), q.shape[-2:]
    cpu.launch(
        "tree_attention", q.dtype, q, q.stride(0), *q.stride()[-3:-1], k_cache, v_cache, layout.words.own, sliding_window or 0, heads,
        k_cache.shape[2], size, scale, out,
    )  # fmt: skip
    return out


def _padded(rows: Tensor, layout: TreeLayout) -> Tensor:
    """The live rows [R, Hq, D] among zeros [B, N, Hq, D]."""
    padded = rows.new_zeros(layout.depth.numel(), *rows.shape[1:]).index_copy_(0, layout.live_rows, rows)
    return padded.unflatten(0, layout.depth.shape)


class Tiles(NamedTuple):
    """How the kernel cuts its work: rows and columns of a tile, the least columns and the greatest number of a request's splits; and
    how a program does it: by so many warps, with loads that run ahead by ``stages`` (half as many tiles: a row is looked up first).
    """

    rows: int
    columns: int
    min_split: int
    max_splits: int
    warps: int
    stages: int


def choose_tiles(rows: int, group: int, kv_heads: int, size: int, dtype: torch.dtype, capability: int) -> Tiles:
    """Nothing here depends on the batch, so that a request's result does not."""
    single = dtype == torch.float32  # without tensor cores, larger tiles would spill
    roomy = capability // 10 in (9, 10)  # elsewhere Q stays in registers, and shared memory is less than half as large
    most_rows = 128 if size <= 128 else 64
    needed = max(16, triton.next_power_of_2(rows * group))
    # Two tiles of 64 rows are as fast as one of 128 in a large batch, and faster for one request.
    tile_rows = 16 if single else 64 if needed == 128 else min(needed, most_rows)
    large = tile_rows == 128 or tile_rows * size > 8192
    columns, stages = 16 if single else (64 if roomy else 32) * most_rows // 128, 5
    if roomy and tile_rows == 16 and size <= 128 and not single:
        columns, stages = 128, 3
    programs = PROGRAMS // 2 if roomy and large else PROGRAMS
    splits = max(1, programs // (kv_heads * triton.cdiv(rows * group, tile_rows)))
    # A split's partial result is written and read again, which must stay little beside the K and V that the split reads.
    return Tiles(tile_rows, columns, max(256, 8 * min(needed, 128)), splits, 8 if large else 4, stages)


def tree_attention_triton(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, layout: TreeLayout, scale: float, sliding_window: int | None = None,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``tree_attention`` by split-KV: programs for parts of a request's columns, then a sum weighted by their log-sum-exp."""
    batch, rows, heads, size = q.shape
    kv_heads = k_cache.shape[2]
    if q.stride(3) != 1:
        q = q.contiguous()
    tiles = choose_tiles(rows, heads // kv_heads, kv_heads, size, q.dtype, compute_capability(q.device))
    longest = layout.max_context if sliding_window is None else min(layout.max_context, sliding_window + tiles.columns)
    splits = min(tiles.max_splits, max(1, (longest + layout.first_column + rows) // tiles.min_split))
    out = q.new_empty(batch, rows, heads, size)
    parts = out if splits == 1 else out.new_empty(splits, *out.shape)
    lse = None if splits == 1 else parts.new_empty(parts.shape[:-1], dtype=torch.float32)
    ancestors, live = (None if part is None else part.contiguous() for part in (layout.ancestors, layout.live))
    if ancestors is not None:
        ancestors = ancestors.view(torch.int32)  # comparing single bits of two halves takes fewer registers
    words = 0 if ancestors is None else ancestors[0].numel() // rows
    row_tiles = triton.cdiv(rows * (heads // kv_heads), tiles.rows)
    tree_attention_kernel[row_tiles * kv_heads, splits, batch](
        q, k_cache, v_cache, layout.block_tables, layout.context_lens, layout.depth, ancestors, live, sinks, parts, lse,
        LOG2_E * (scale if softcap is None else softcap), None if softcap is None else scale / softcap,
        rows, layout.first_column, layout.block_tables.stride(0), layout.depth.stride(0), *q.stride()[:3], *tiles[2:4],
        kv_heads, heads // kv_heads, size, max(16, triton.next_power_of_2(size)), layout.block_size, words, sliding_window,
        q.dtype != torch.float32 and k_cache.numel() < 2**31, *tiles[:2], num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if lse is not None:
        combine_kernel[triton.cdiv(rows * heads, COMBINED), batch](
            parts, lse, layout.context_lens, out, layout.first_column + rows, rows * heads, *tiles[2:4],
            size, max(16, triton.next_power_of_2(size)), sliding_window, COMBINED, tiles.columns, num_warps=1,
        )  # fmt: skip
    return out


# Chunks of different widths have different splits: they must not be compiled anew for each.
jit_for_splits = partial(jit, do_not_specialize=["min_split", "max_splits"])


@jit_for_splits
def tree_attention_kernel(
    q: tl.tensor, k_cache: tl.tensor, v_cache: tl.tensor, block_tables: tl.tensor, context_lens: tl.tensor, depth: tl.tensor,
    ancestors: tl.tensor, live: tl.tensor, sinks: tl.tensor, out: tl.tensor, lse: tl.tensor, scale: tl.tensor, inner_scale: tl.tensor,
    rows: tl.tensor, first_column: tl.tensor, table_stride: tl.tensor, depth_stride: tl.tensor,
    q_request: tl.tensor, q_row: tl.tensor, q_head: tl.tensor, min_split: tl.tensor, max_splits: tl.tensor,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, PADDED_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WORDS: tl.constexpr, WINDOW: tl.constexpr, SMALL: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """One program per (tile of rows and KV head, split, request); a row is one head of the group at one new row.

    Scores are raw * scale in powers of two, raw being q K^T, or its tanh where there is an inner scale (soft-cap).
    """
    tile, head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    split, request = tl.program_id(1), tl.program_id(2).to(tl.int64)
    context = tl.load(context_lens + request).to(tl.int32)
    begin, end, length = split_columns(context, first_column + rows, min_split, max_splits, COLUMNS, WINDOW)
    begin += split * length
    if begin >= end:
        return
    row = (tile * ROWS + tl.arange(0, ROWS)) // GROUP
    query_head = head * GROUP + (tile * ROWS + tl.arange(0, ROWS)) % GROUP
    is_live = row < rows
    if live is not None:
        is_live &= tl.load(live + request * rows + row, mask=is_live, other=0).to(tl.int1)
    last_row = tl.max(tl.where(is_live, row, -1), 0)
    end = tl.minimum(end, begin + length) if last_row >= 0 else begin
    if ancestors is None:
        end = tl.minimum(end, context + last_row + 1)

    size = tl.arange(0, PADDED_SIZE)
    q_offset = request * q_request + row * q_row + query_head * q_head
    queries = tl.load(q + q_offset[:, None] + size[None, :], mask=is_live[:, None] & (size < SIZE)[None, :], other=0.0)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if sinks is not None:
        highest = tl.where(split == 0, tl.load(sinks + query_head) * 1.4426950408889634, highest)  # log2(e)
        total += tl.where(split == 0, 1.0, 0.0)
    sums = tl.zeros([ROWS, PADDED_SIZE], tl.float32)
    table = block_tables + request * table_stride
    k_cache += head * SIZE
    v_cache += head * SIZE
    if WINDOW is not None:
        oldest = context - WINDOW + 1 + tl.load(depth + request * depth_stride + row, mask=is_live, other=0).to(tl.int32)

    # Tiles of committed columns alone need no mask, unless a window cuts them.
    tail = begin + tl.maximum(tl.minimum(end, context) - begin, 0) // COLUMNS * COLUMNS
    for start in range(begin, tail, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        offset = row_offsets(table, columns, None, KV_HEADS * SIZE, BLOCK_SIZE, SMALL)[:, None] + size[None, :]
        loaded = None if SIZE == PADDED_SIZE else (size < SIZE)[None, :]
        fill = None if SIZE == PADDED_SIZE else 0.0
        visible = None if WINDOW is None else columns[None, :] >= oldest[:, None]
        keys, values = tl.load(k_cache + offset, mask=loaded, other=fill), tl.load(v_cache + offset, mask=loaded, other=fill)
        highest, total, sums = attend(queries, keys, values, visible, highest, total, sums, scale, inner_scale)

    for start in range(tail, end, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        node = columns - context
        # What nobody wrote may be anything, and a mask does not stop a NaN of V.
        written = columns < end
        if live is not None:
            own = written & (node >= first_column)
            written &= (node < first_column) | tl.load(live + request * rows + node - first_column, mask=own, other=0).to(tl.int1)
        visible = written[None, :] & is_live[:, None] & sees(row, node, ancestors, request * rows + row, is_live, WORDS)
        if WINDOW is not None:
            node_depth = tl.load(depth + request * depth_stride + node, mask=(node >= 0) & (node < rows), other=0).to(tl.int32)
            visible &= tl.where(node < 0, columns, context + node_depth)[None, :] >= oldest[:, None]
        offset = row_offsets(table, columns, written, KV_HEADS * SIZE, BLOCK_SIZE, SMALL)[:, None] + size[None, :]
        loaded = written[:, None] & (size < SIZE)[None, :]
        keys, values = tl.load(k_cache + offset, mask=loaded, other=0.0), tl.load(v_cache + offset, mask=loaded, other=0.0)
        highest, total, sums = attend(queries, keys, values, visible, highest, total, sums, scale, inner_scale)

    divisor = tl.where(total == 0, 1.0, total)
    place = ((split * tl.num_programs(2) + request) * rows + row) * (KV_HEADS * GROUP) + query_head
    result = tl.where(is_live[:, None], sums / divisor[:, None], 0.0).to(out.dtype.element_ty)
    tl.store(out + place[:, None] * SIZE + size[None, :], result, mask=(row < rows)[:, None] & (size < SIZE)[None, :])
    if lse is not None:
        tl.store(lse + place, highest + tl.log2(divisor), mask=row < rows)


@jit
def split_columns(
    context: tl.tensor, new: tl.tensor, min_split: tl.tensor, max_splits: tl.tensor, COLUMNS: tl.constexpr, WINDOW: tl.constexpr
) -> tl.tensor:
    """The first column that a request's rows may see, one past the last, and the columns of one split, whole tiles."""
    begin = 0 if WINDOW is None else tl.maximum(context - WINDOW + 1, 0) // COLUMNS * COLUMNS
    end = context + new
    splits = tl.minimum(tl.maximum((end - begin) // min_split, 1), max_splits)
    return begin, end, tl.cdiv(tl.cdiv(end - begin, splits), COLUMNS) * COLUMNS


@jit
def row_offsets(
    table: tl.tensor, columns: tl.tensor, written: tl.tensor, WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, SMALL: tl.constexpr
) -> tl.tensor:
    """Where the cache's rows of ``WIDTH`` elements begin, [columns]: int32 where the cache is SMALL, else int64; only ``written`` ones
    are looked up, None: all are.
    """
    blocks = tl.load(table + columns // BLOCK_SIZE, mask=written, other=None if written is None else 0)
    if SMALL:
        blocks = blocks.to(tl.int32)
    return (blocks * BLOCK_SIZE + columns % BLOCK_SIZE) * WIDTH


@jit
def sees(row: tl.tensor, node: tl.tensor, ancestors: tl.tensor, place: tl.tensor, is_live: tl.tensor, WORDS: tl.constexpr) -> tl.tensor:
    """Which ``node`` [columns] each row sees: all before the context's end, then its ancestors or, without a tree, rows up to itself."""
    if ancestors is None:
        return node[None, :] <= row[:, None]
    found = tl.zeros([row.shape[0], node.shape[0]], tl.int32)
    for word in tl.static_range(WORDS):
        bit = node - 32 * word
        bit = tl.where((bit >= 0) & (bit < 32), 1 << tl.minimum(tl.maximum(bit, 0), 31), 0)
        found |= tl.load(ancestors + place * WORDS + word, mask=is_live, other=0)[:, None] & bit[None, :]
    return (found != 0) | (node < 0)[None, :]


@jit
def attend(
    queries: tl.tensor, keys: tl.tensor, values: tl.tensor, visible: tl.tensor,
    highest: tl.tensor, total: tl.tensor, sums: tl.tensor, scale: tl.tensor, inner_scale: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """One tile more of the running softmax: the highest score so far, the sum of the weights, and the weighted sum of the values."""
    raw = tl.dot(queries, tl.trans(keys), input_precision="ieee")
    if inner_scale is not None:
        raw = 2 * tl.sigmoid(2 * inner_scale * raw) - 1  # tanh
    if visible is not None:
        raw = tl.where(visible, raw, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(raw, 1) * scale)
    # A row that has seen nothing yet stays at weight 0 instead of exp(-inf + inf).
    shift = new_highest if visible is None else tl.where(new_highest == float("-inf"), 0.0, new_highest)
    weights = tl.exp2(raw * scale - shift[:, None])
    faded = tl.exp2(highest - shift)
    sums = tl.dot(weights.to(values.dtype), values, sums * faded[:, None], input_precision="ieee")
    return new_highest, total * faded + tl.sum(weights, 1), sums


@jit_for_splits
def combine_kernel(
    parts: tl.tensor, lse: tl.tensor, context_lens: tl.tensor, out: tl.tensor, new: tl.tensor, count: tl.tensor, min_split: tl.tensor,
    max_splits: tl.tensor, SIZE: tl.constexpr, PADDED_SIZE: tl.constexpr, WINDOW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """One program per (tile of a request's ``count`` outputs, request): the splits' results, weighted by their share of the softmax."""
    request = tl.program_id(1).to(tl.int64)
    context = tl.load(context_lens + request).to(tl.int32)
    begin, end, length = split_columns(context, new, min_split, max_splits, COLUMNS, WINDOW)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    size = tl.arange(0, PADDED_SIZE)
    mask = (row < count)[:, None] & (size < SIZE)[None, :]
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, PADDED_SIZE], tl.float32)
    for split in tl.range(0, tl.cdiv(end - begin, length), num_stages=4):
        place = (split * tl.num_programs(1) + request) * count + row
        part_lse = tl.load(lse + place, mask=row < count, other=float("-inf"))
        part = tl.load(parts + place[:, None] * SIZE + size[None, :], mask=mask, other=0.0)
        new_highest = tl.maximum(highest, part_lse)
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        faded, weight = tl.exp2(highest - shift), tl.exp2(part_lse - shift)
        sums = sums * faded[:, None] + part * weight[:, None]
        total = total * faded + weight
        highest = new_highest
    result = sums / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(out + (request * count + row)[:, None] * SIZE + size[None, :], result.to(out.dtype.element_ty), mask=mask)
