"""What lies between the q, k, v matrix and attention: RoPE on q and k, and k and v to their places in the paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import cpu
from kernels.jit import jit, tl, triton

HEADS_PER_PROGRAM = 8


def store_kv(k_cache: Tensor, v_cache: Tensor, slots: Tensor, k: Tensor, v: Tensor, live: Tensor | None) -> None:
    """Store k, v [T, Hkv, D] at physical ``slots`` int64 [T] of one layer's caches, [blocks, block, Hkv, D].

    Padding rows (``live`` [T] False) store zeros: others read the padding block, masked, but a mask does not stop a NaN.
    """
    if live is not None:
        padding = ~live.flatten()[:, None, None]
        k, v = k.masked_fill(padding, 0), v.masked_fill(padding, 0)
    k_cache.flatten(0, 1).index_copy_(0, slots, k)
    v_cache.flatten(0, 1).index_copy_(0, slots, v)


def rope_store(
    qk: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, live: Tensor | None, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    """Rotate q and k, store k and v as ``store_kv`` does, and return q [T, Hq, D].

    qk [T, Hq + Hkv, D] and v [T, Hkv, D], whose heads lie one after the other; cos, sin [T, 1, D], the sines of the first half of a
    head negative (the caller makes them so): rotation is x * cos + (x2, x1) * sin over the halves x1 and x2 of a head.
    """
    run = rope_store_triton if qk.is_cuda else rope_store_cpu if cpu.serves(qk) else rope_store_reference
    return run(qk, v, cos, sin, slots, live, k_cache, v_cache)


def rope_store_reference(
    qk: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, live: Tensor | None, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    """``rope_store`` in plain PyTorch."""
    qk = torch.addcmul(qk * cos, qk.roll(qk.shape[-1] // 2, dims=-1), sin)
    heads = qk.shape[1] - v.shape[1]
    store_kv(k_cache, v_cache, slots, qk[:, heads:], v, live)
    return qk[:, :heads]


def rope_store_cpu(
    qk: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, live: Tensor | None, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    """``rope_store`` in one call."""
    assert cos.dtype == v.dtype == k_cache.dtype == qk.dtype
    rows, kv_heads, size = v.shape
    heads = qk.shape[1] - kv_heads
    q = qk.new_empty(rows, heads, size)
    cpu.launch(
        "rope_store", qk.dtype, qk, qk.stride(0), v, v.stride(0), cos.contiguous(), sin.contiguous(), None, slots.contiguous(),
        None if live is None else live.contiguous(), rows, heads, kv_heads, size, k_cache, v_cache, q,
    )  # fmt: skip
    return q


def rope_store_triton(
    qk: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, live: Tensor | None, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    """``rope_store`` in one launch."""
    rows, kv_heads, size = v.shape
    heads = qk.shape[1] - kv_heads
    q = qk.new_empty(rows, heads, size)
    rope_store_kernel[rows, triton.cdiv(heads + 2 * kv_heads, HEADS_PER_PROGRAM)](
        qk, v, cos.contiguous(), sin.contiguous(), slots, None if live is None else live.contiguous(), k_cache, v_cache, q,
        qk.stride(0), v.stride(0), heads, kv_heads, size // 2, triton.next_power_of_2(size // 2), HEADS_PER_PROGRAM, num_warps=2,
    )  # fmt: skip
    return q


@jit
def rope_store_kernel(
    qk: tl.tensor, v: tl.tensor, cos: tl.tensor, sin: tl.tensor, slots: tl.tensor, live: tl.tensor, k_cache: tl.tensor,
    v_cache: tl.tensor, q: tl.tensor, qk_row: tl.tensor, v_row: tl.tensor,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr,
) -> None:  # fmt: skip
    """One program per (row, ``COUNT`` heads of q, k and v in this order)."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
    half = tl.arange(0, BLOCK)
    inside = (half < HALF)[None, :]
    rotated, is_v = (head < HEADS + KV_HEADS)[:, None], (head >= HEADS + KV_HEADS) & (head < HEADS + 2 * KV_HEADS)
    source = row * qk_row + head[:, None] * (2 * HALF) + half[None, :]
    x1 = tl.load(qk + source, mask=rotated & inside, other=0.0).to(tl.float32)
    x2 = tl.load(qk + source + HALF, mask=rotated & inside, other=0.0).to(tl.float32)
    angle = row * (2 * HALF) + half
    cos1 = tl.load(cos + angle, mask=half < HALF, other=0.0).to(tl.float32)[None, :]
    cos2 = tl.load(cos + angle + HALF, mask=half < HALF, other=0.0).to(tl.float32)[None, :]
    sin1 = tl.load(sin + angle, mask=half < HALF, other=0.0).to(tl.float32)[None, :]
    sin2 = tl.load(sin + angle + HALF, mask=half < HALF, other=0.0).to(tl.float32)[None, :]
    y1, y2 = (x1 * cos1 + x2 * sin1).to(q.dtype.element_ty), (x2 * cos2 + x1 * sin2).to(q.dtype.element_ty)
    place = (row * HEADS + head[:, None]) * (2 * HALF) + half[None, :]
    is_q = (head < HEADS)[:, None] & inside
    tl.store(q + place, y1, mask=is_q)
    tl.store(q + place + HALF, y2, mask=is_q)

    slot = tl.load(slots + row)
    if live is not None:
        alive = tl.load(live + row).to(tl.int1)
        y1, y2 = tl.where(alive, y1, 0.0).to(q.dtype.element_ty), tl.where(alive, y2, 0.0).to(q.dtype.element_ty)
    is_k = ((head >= HEADS) & (head < HEADS + KV_HEADS))[:, None] & inside
    place = (slot * KV_HEADS + head[:, None] - HEADS) * (2 * HALF) + half[None, :]
    tl.store(k_cache + place, y1, mask=is_k)
    tl.store(k_cache + place + HALF, y2, mask=is_k)
    is_v = is_v[:, None] & inside
    source = row * v_row + (head[:, None] - HEADS - KV_HEADS) * (2 * HALF) + half[None, :]
    v1, v2 = tl.load(v + source, mask=is_v, other=0.0), tl.load(v + source + HALF, mask=is_v, other=0.0)
    if live is not None:
        v1, v2 = tl.where(alive, v1, 0.0).to(v1.dtype), tl.where(alive, v2, 0.0).to(v2.dtype)
    place = (slot * KV_HEADS + head[:, None] - HEADS - KV_HEADS) * (2 * HALF) + half[None, :]
    tl.store(v_cache + place, v1, mask=is_v)
    tl.store(v_cache + place + HALF, v2, mask=is_v)
