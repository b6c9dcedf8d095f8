"""silu(gate) * up."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cpu
from kernels.jit import jit, tl, triton


def gated_silu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate and up side by side; [..., 2 * I] -> [..., I]. Has no gradient where gradients are off."""
    if gate_up.is_cuda and gate_up.is_contiguous() and not torch.is_grad_enabled():
        return gated_silu_triton(gate_up)
    if cpu.serves(gate_up):
        return gated_silu_cpu(gate_up)
    return gated_silu_reference(gate_up)


def gated_silu_reference(gate_up: Tensor) -> Tensor:
    """``gated_silu`` in plain PyTorch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gated_silu_cpu(gate_up: Tensor) -> Tensor:
    """``gated_silu`` in one call."""
    gate_up, size = gate_up.contiguous(), gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], size)
    cpu.launch("gated_silu", out.dtype, gate_up, out.numel() // size, size, out)
    return out


def gated_silu_triton(gate_up: Tensor) -> Tensor:
    """``gated_silu`` in one launch."""
    size = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], size)
    block = min(1024, triton.next_power_of_2(size))
    gated_silu_kernel[triton.cdiv(size, block), out.numel() // size](gate_up, out, size, block, num_warps=4)
    return out


@jit
def gated_silu_kernel(gate_up: tl.tensor, out: tl.tensor, SIZE: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """One program per (tile of the outputs, row)."""
    row = tl.program_id(1).to(tl.int64)
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < SIZE
    gate = tl.load(gate_up + row * 2 * SIZE + entry, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * SIZE + SIZE + entry, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + entry, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)
