"""RMSNorm, in the fewest operations that a device has for it."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cpu
from kernels.jit import jit, tl, triton


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; x [..., H], weight [H]. Has no gradient where gradients are off."""
    if x.is_cuda and x.is_contiguous() and not torch.is_grad_enabled():
        return rms_norm_triton(x, None, weight, eps)[1]
    if cpu.serves(x) and weight.dtype == x.dtype:
        return rms_norm_cpu(x, None, weight, eps)[1]
    return rms_norm_reference(x, weight, eps)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta, and ``rms_norm`` of it; x, delta [..., H]. Has no gradients where gradients are off."""
    if x.is_cuda and x.is_contiguous() and not torch.is_grad_enabled():
        return rms_norm_triton(x, delta, weight, eps)
    if cpu.serves(x) and weight.dtype == delta.dtype == x.dtype:
        return rms_norm_cpu(x, delta, weight, eps)
    total = x + delta
    return total, rms_norm_reference(total, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``rms_norm`` in plain PyTorch. On a CPU torch's own is a chain of slower operations; written in place, ours has no gradient."""
    if x.is_cuda or torch.is_grad_enabled():
        return F.rms_norm(x, weight.shape, weight, eps)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=None if x.dtype == torch.float32 else torch.float32)
    normed = (x * torch.addcmul(_constant(eps), norm, norm, value=1 / x.shape[-1]).rsqrt_()).mul_(weight)
    return normed if normed.dtype == x.dtype else normed.to(x.dtype)


@lru_cache
def _constant(value: float) -> Tensor:
    """Operations on Python numbers make such a tensor every time."""
    return torch.tensor(value)


def rms_norm_cpu(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``add_rms_norm`` in one call; ``delta`` None adds nothing."""
    x, delta = x.contiguous(), None if delta is None else delta.contiguous()
    total, out, size = x if delta is None else torch.empty_like(x), torch.empty_like(x), x.shape[-1]
    cpu.launch("add_rms_norm", x.dtype, x, delta, weight, eps, x.numel() // size, size, total, out)
    return total, out


def rms_norm_triton(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``add_rms_norm`` in one launch; ``delta`` None adds nothing."""
    total = x if delta is None else torch.empty_like(x)
    out, size = torch.empty_like(x), x.shape[-1]
    block = triton.next_power_of_2(size)
    delta = None if delta is None else delta.contiguous()
    rms_norm_kernel[(x.numel() // size,)](x, delta, weight, total, out, eps, size, block, num_warps=min(8, max(1, block // 512)))
    return total, out


@jit
def rms_norm_kernel(
    x: tl.tensor, delta: tl.tensor, weight: tl.tensor, total: tl.tensor, out: tl.tensor, eps: tl.tensor,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One program per row. The sum is rounded before it is normed, as it is where it is stored first."""
    entry = tl.arange(0, BLOCK)
    inside = entry < SIZE
    place = tl.program_id(0).to(tl.int64) * SIZE + entry
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if delta is not None:
        values = (values + tl.load(delta + place, mask=inside, other=0.0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + place, values, mask=inside)
        values = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values) / SIZE + eps)
    normed = values * scale * tl.load(weight + entry, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, normed.to(out.dtype.element_ty), mask=inside)
