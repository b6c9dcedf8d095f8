"""Moves the K and V rows of accepted nodes to the front of the new rows."""

from torch import Tensor

from kernels.tree_attention import physical_slots


def kv_commit(k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor, path: Tensor) -> None:
    """For every layer, the row of node ``path[b, d]`` becomes logical slot ``context_lens[b] + d``. RoPE needs no change.

    k_cache, v_cache: [layers, blocks, block, Hkv, D], changed in place; block_tables int64 [B, M]; context_lens int64 [B];
    path: int64 [B, D + 1], -1 padded. All rows are read before any is written, since the two sets overlap.
    """
    block_size = k_cache.shape[2]
    depth = (path >= 0).cumsum(1) - 1
    source = physical_slots(block_tables, context_lens[:, None] + path.clamp(min=0), block_size)
    target = physical_slots(block_tables, context_lens[:, None] + depth, block_size)
    # Padding entries copy the last accepted row onto itself: its source is that row's old place, so read and write agree.
    source = source.gather(1, depth)
    for cache in (k_cache, v_cache):
        rows = cache.view(cache.shape[0], -1, cache.shape[3] * cache.shape[4])
        rows[:, target.flatten()] = rows[:, source.flatten()]
