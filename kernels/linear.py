"""Matrix products of few rows, as decoding has them: as fast as the weights can be read."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.gated_silu import gated_silu, gated_silu_reference
from kernels.jit import compute_capability, jit, tl, triton

FEW_ROWS = 32  # with more, the vendor's library is as fast; so it is for matrices with fewer outputs than inputs: too few programs
PROGRAMS = 128  # about one for every multiprocessor of a large GPU


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """``layer(x)``, but for hooks; x [..., K] -> [..., N]. On a GPU a row's result is the same in all batches of up to 16 rows, and in all
    of 17 to FEW_ROWS.
    """
    return linear_triton(x, layer.weight, layer.bias) if _few(layer, x) else layer.forward(x)


def gated_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """silu(gate) * up of ``layer(x)``, which has them side by side; x [..., K] -> [..., N / 2]. Otherwise as ``linear``."""
    return gated_linear_triton(x, layer.weight, layer.bias) if _few(layer, x) else gated_silu(layer.forward(x))


def _few(layer: nn.Linear, x: Tensor) -> bool:
    few = x.is_cuda and x.numel() <= FEW_ROWS * layer.in_features and layer.in_features <= layer.out_features
    return few and x.itemsize == 2 and not torch.is_grad_enabled()


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias in plain PyTorch; x [..., K], weight [N, K], bias [N] -> [..., N]."""
    return F.linear(x, weight, bias)


def gated_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """silu(gate) * up in plain PyTorch, of the first and the second half of x W^T + bias; weight [2 * N, K], bias [2 * N]."""
    return gated_silu_reference(F.linear(x, weight, bias))


def linear_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``linear_reference`` in one launch, for at most FEW_ROWS rows."""
    return _launch(x, weight, bias, gated=False)


def gated_linear_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``gated_linear_reference`` in one launch, for at most FEW_ROWS rows."""
    return _launch(x, weight, bias, gated=True)


class Tiles(NamedTuple):
    """A program's outputs, the entries of a row that it reads at a time, and how many such loads run ahead."""

    outputs: int
    chunk: int
    stages: int


def choose_tiles(outputs: int, size: int, gated: bool, capability: int) -> Tiles:
    """The more outputs a program has, the less often x is read; but every multiprocessor should have work."""
    roomy = capability // 10 in (9, 10)  # elsewhere shared memory is less than half as large
    chunk = min(128 if roomy and not gated else 64, max(16, triton.next_power_of_2(size)))
    if gated or triton.cdiv(outputs, 128) < PROGRAMS:
        return Tiles(64, chunk, 4 if gated or not roomy else 5)
    return Tiles(128, chunk, 4 if roomy else 3)


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool) -> Tensor:
    size = weight.shape[1]
    rows, outputs = x.numel() // size, weight.shape[0] // (1 + gated)
    tiles = choose_tiles(outputs, size, gated, compute_capability(x.device))
    out = x.new_empty(*x.shape[:-1], outputs)
    linear_kernel[(triton.cdiv(outputs, tiles.outputs),)](
        x.contiguous(), weight, bias, out, rows, outputs, size, 16 if rows <= 16 else 32, *tiles[:2], size % tiles.chunk == 0, gated,
        num_warps=4, num_stages=tiles.stages,
    )  # fmt: skip
    return out


@jit
def linear_kernel(
    x: tl.tensor, weight: tl.tensor, bias: tl.tensor, out: tl.tensor, rows: tl.tensor, outputs: tl.tensor, size: tl.tensor,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr, GATED: tl.constexpr,
) -> None:  # fmt: skip
    """One program per tile of outputs, which it computes for all rows; x [rows, size], weight [outputs, size], twice as many if GATED."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row, entry = tl.arange(0, ROWS), tl.arange(0, CHUNK)
    is_output, is_row = output < outputs, row < rows
    own = weight + output[:, None].to(tl.int64) * size + entry[None, :]
    of_x = x + row[None, :] * size + entry[:, None]
    sums = tl.zeros([OUTPUTS, ROWS], tl.float32)
    up_sums = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for first in range(0, size, CHUNK):
        inside = is_output[:, None] if EVEN else is_output[:, None] & (first + entry < size)[None, :]
        inside_x = is_row[None, :] if EVEN else is_row[None, :] & (first + entry < size)[:, None]
        inputs = tl.load(of_x + first, mask=inside_x, other=0.0)
        sums = tl.dot(tl.load(own + first, mask=inside, other=0.0), inputs, sums, input_precision="ieee")
        if GATED:
            up = tl.load(own + outputs.to(tl.int64) * size + first, mask=inside, other=0.0)
            up_sums = tl.dot(up, inputs, up_sums, input_precision="ieee")
    if bias is not None:
        sums += tl.load(bias + output, mask=is_output, other=0.0).to(tl.float32)[:, None]
        if GATED:
            up_sums += tl.load(bias + outputs + output, mask=is_output, other=0.0).to(tl.float32)[:, None]
    if GATED:
        gate = sums.to(out.dtype.element_ty).to(tl.float32)
        sums = gate * tl.sigmoid(gate) * up_sums.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row[None, :] * outputs + output[:, None], sums.to(out.dtype.element_ty), mask=is_output[:, None] & is_row[None, :])
