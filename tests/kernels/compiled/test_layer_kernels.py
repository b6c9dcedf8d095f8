"""The small kernels between a layer's matrix products compile, and move 16 bytes at a time."""

from pathlib import Path

import pytest
import torch

from kernels import gated_silu, linear, rms_norm, rope_store
from tests.kernels.compile_only import SHARED_LIMIT, check_launches


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize("size", [4096, 16384])
def test_rms_norm(size: int, capability: int, tmp_path: Path) -> None:
    (ptx,) = check_launches(
        rms_norm, lambda: rms_norm.rms_norm_triton(empty(8, size), empty(8, size), empty(size), 1e-5), capability, tmp_path
    )
    assert "ld.global.v4" in ptx
    assert "st.global.v4" in ptx


@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_gated_silu(capability: int, tmp_path: Path) -> None:
    (ptx,) = check_launches(gated_silu, lambda: gated_silu.gated_silu_triton(empty(8, 2 * 14336)), capability, tmp_path)
    assert "ld.global.v4" in ptx
    assert "st.global.v4" in ptx


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize("live", [False, True])
def test_rope_store(live: bool, capability: int, tmp_path: Path) -> None:
    qkv, caches = empty(8, 48, 128), [empty(50, 16, 8, 128) for _ in range(2)]
    rows = empty(8, dtype=torch.bool) if live else None
    slots = empty(8, dtype=torch.long)
    (ptx,) = check_launches(
        rope_store,
        lambda: rope_store.rope_store_triton(qkv[:, :40], qkv[:, 40:], empty(8, 1, 128), empty(8, 1, 128), slots, rows, *caches),
        capability,
        tmp_path,
    )
    assert "ld.global.v" in ptx
    assert "st.global.v" in ptx


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize("rows", [1, 32])
@pytest.mark.parametrize(("outputs", "size"), [(28_672, 4096), (6144, 4096), (4096, 14_336)])
def test_linear(outputs: int, size: int, rows: int, capability: int, tmp_path: Path) -> None:
    x, weight = empty(rows, size), empty(outputs, size)
    for launch in (lambda: linear.linear_triton(x, weight, None), lambda: linear.gated_linear_triton(x, weight, None)):
        (ptx,) = check_launches(linear, launch, capability, tmp_path)
        assert "cp.async.cg.shared.global" in ptx  # 16 bytes at a time
        assert "mma" in ptx
