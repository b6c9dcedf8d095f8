"""The kernels of a decoder layer against their references on one device: the CPU, also for Triton's interpreter, or a GPU."""

from collections.abc import Callable

import torch

from kernels.gated_silu import gated_silu_reference, gated_silu_triton
from kernels.linear import gated_linear_reference, gated_linear_triton, linear_reference, linear_triton
from kernels.rms_norm import rms_norm_reference, rms_norm_triton
from kernels.rope_store import rope_store_reference, rope_store_triton

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def check_rms_norm(rows: int, size: int, dtype: torch.dtype, device: str, run: Callable = rms_norm_triton) -> None:
    generator = torch.Generator().manual_seed(rows + size)
    x, delta = (10 * torch.randn(2, rows, size, generator=generator).to(device, dtype) for _ in range(2))
    x[0, 0] = delta[0, 0] = 0
    weight = torch.randn(size, generator=generator).to(device, dtype)
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    total, normed = run(x, delta, weight, 1e-5)
    torch.testing.assert_close(total, x + delta, **close)  # the interpreter cuts bfloat16 off instead of rounding
    expected = rms_norm_reference(total.float(), weight.float(), 1e-5)
    torch.testing.assert_close(normed.float(), expected, **close)
    same, alone = run(total, None, weight, 1e-5)
    assert same is total
    assert torch.equal(alone, normed)


def check_gated_silu(rows: int, size: int, dtype: torch.dtype, device: str, run: Callable = gated_silu_triton) -> None:
    gate_up = 4 * torch.randn(rows, 2 * size, generator=torch.Generator().manual_seed(size)).to(device, dtype)
    expected = gated_silu_reference(gate_up.float())
    torch.testing.assert_close(run(gate_up).float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def check_rope_store(
    rows: int, heads: tuple[int, int], size: int, dtype: torch.dtype, padded: bool, device: str, kernel: Callable = rope_store_triton
) -> None:
    """q, k and v lie in one matrix, as models have them; the last row is padding where there is any, and holds NaN."""
    generator = torch.Generator().manual_seed(rows + size)
    blocks, block_size = 1 + rows, 4
    qkv = torch.randn(rows, heads[0] + 2 * heads[1], size, generator=generator).to(device, dtype)
    angles = torch.randn(rows, 1, size // 2, generator=generator).repeat(1, 1, 2).to(device)
    slots = (torch.randperm(rows * block_size, generator=generator)[:rows] + block_size).to(device)
    live = None
    if padded:
        live = torch.arange(rows, device=device) < rows - 1
        slots[-1], qkv[-1] = 0, torch.nan
    results = []
    for run, kind in ((kernel, dtype), (rope_store_reference, torch.float32)):
        caches = [torch.full((blocks, block_size, heads[1], size), 7.0, device=device, dtype=kind) for _ in range(2)]
        own = qkv.to(kind)
        cos, sin = angles.cos().to(kind), angles.sin().to(kind)
        q = run(own[:, : sum(heads)], own[:, sum(heads) :], cos, sin, slots, live, *caches)
        results.append([part.float() for part in (q[:-1] if padded else q, *caches)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def check_linear(rows: int, outputs: int, size: int, dtype: torch.dtype, biased: bool, device: str) -> None:
    """Against float64; and every row is what it is alone, or among as many as fill one tile."""
    generator = torch.Generator().manual_seed(rows + outputs + size)
    x = torch.randn(rows, 1, size, generator=generator).to(device, dtype)
    weight = (torch.randn(2 * outputs, size, generator=generator) / size**0.5).to(device, dtype)
    bias = torch.randn(2 * outputs, generator=generator).to(device, dtype) if biased else None
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    ours, gated = linear_triton(x, weight, bias), gated_linear_triton(x, weight, bias)
    exact = x.double(), weight.double(), None if bias is None else bias.double()
    torch.testing.assert_close(ours.double(), linear_reference(*exact), **close)
    torch.testing.assert_close(gated.double(), gated_linear_reference(*exact), **close)
    fewest = 1 if rows <= 16 else 17  # rows of one tile
    assert torch.equal(linear_triton(x[-fewest:], weight, bias), ours[-fewest:])
    assert torch.equal(gated_linear_triton(x[-fewest:], weight, bias), gated[-fewest:])
