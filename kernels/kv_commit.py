"""Moves the K and V rows of accepted nodes to the front of the new rows."""

from __future__ import annotations

from torch import Tensor

from kernels import cpu
from kernels.jit import jit, tl, triton
from kernels.tree_layout import physical_slots


def kv_commit(k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor, path: Tensor) -> None:
    """For every layer, the row of node ``path[b, d]`` becomes logical slot ``context_lens[b] + d``. RoPE needs no change.

    k_cache, v_cache: [layers, blocks, block, Hkv, D], contiguous, changed in place; block_tables int64 [B, M]; context_lens int64 [B];
    path: int64 [B, D + 1], increasing, -1 padded. All rows are read before any is written, since the two sets overlap.
    """
    run = kv_commit_triton if k_cache.is_cuda else kv_commit_cpu if cpu.serves(k_cache) else kv_commit_reference
    run(k_cache, v_cache, block_tables, context_lens, path)


def kv_commit_reference(k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor, path: Tensor) -> None:
    """``kv_commit`` in plain PyTorch."""
    block_size = k_cache.shape[2]
    depth = (path >= 0).cumsum(1) - 1
    source = physical_slots(block_tables, context_lens[:, None] + path.clamp(min=0), block_size)
    target = physical_slots(block_tables, context_lens[:, None] + depth, block_size)
    # Padding entries copy the last accepted row onto itself: its source is that row's old place, so read and write agree.
    source = source.gather(1, depth)
    for cache in (k_cache, v_cache):
        rows = cache.view(cache.shape[0], -1, cache.shape[3] * cache.shape[4])
        rows[:, target.flatten()] = rows[:, source.flatten()]


def kv_commit_cpu(k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor, path: Tensor) -> None:
    """``kv_commit`` in one call."""
    layers, blocks, block_size, kv_heads, size = k_cache.shape
    cpu.launch(
        "kv_commit", k_cache.dtype, k_cache, v_cache, layers, blocks * block_size, kv_heads * size, block_tables, block_tables.stride(0),
        block_tables.shape[1], context_lens.contiguous(), path.contiguous(), *path.shape, block_size,
    )  # fmt: skip


def kv_commit_triton(k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor, path: Tensor) -> None:
    """``kv_commit`` in one launch, a program per slice of a request's rows in a layer."""
    layers, blocks, block_size, kv_heads, size = k_cache.shape
    batch, length = path.shape
    depths = triton.next_power_of_2(length)
    columns = min(triton.next_power_of_2(kv_heads * size), max(64, 4096 // depths))
    kv_commit_kernel[triton.cdiv(kv_heads * size, columns), layers, batch](
        k_cache, v_cache, block_tables, context_lens, path.contiguous(), length, block_tables.stride(0), blocks,
        block_size, kv_heads * size, depths, columns,
    )  # fmt: skip


@jit
def kv_commit_kernel(
    k_cache: tl.tensor, v_cache: tl.tensor, block_tables: tl.tensor, context_lens: tl.tensor, path: tl.tensor,
    length: tl.tensor, table_stride: tl.tensor, blocks: tl.tensor,
    BLOCK_SIZE: tl.constexpr, WIDTH: tl.constexpr, DEPTHS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """One program per (slice of a row's ``WIDTH`` elements, layer, request)."""
    layer, request = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    depth = tl.arange(0, DEPTHS)
    node = tl.load(path + request * length + depth, mask=depth < length, other=-1)
    moved = node > depth  # a row's index is at least its depth
    context = tl.load(context_lens + request)
    table = block_tables + request * table_stride
    source, target = context + node, context + depth
    source_slots = tl.load(table + source // BLOCK_SIZE, mask=moved, other=0) * BLOCK_SIZE + source % BLOCK_SIZE
    target_slots = tl.load(table + target // BLOCK_SIZE, mask=moved, other=0) * BLOCK_SIZE + target % BLOCK_SIZE
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = layer * blocks * BLOCK_SIZE * WIDTH
    read = first + source_slots[:, None] * WIDTH + column[None, :]
    write = first + target_slots[:, None] * WIDTH + column[None, :]
    mask = moved[:, None] & (column < WIDTH)[None, :]
    keys, values = tl.load(k_cache + read, mask=mask), tl.load(v_cache + read, mask=mask)
    tl.debug_barrier()  # other threads may still read what this one writes
    tl.store(k_cache + write, keys, mask=mask)
    tl.store(v_cache + write, values, mask=mask)
