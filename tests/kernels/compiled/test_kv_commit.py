"""The kernel compiles, and moves 16 bytes at a time."""

from pathlib import Path

import pytest
import torch

from kernels import kv_commit
from tests.kernels.compile_only import SHARED_LIMIT, check_launches


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize(("depth", "kv_heads", "size"), [(8, 8, 128), (16, 2, 64), (63, 1, 256)])
def test_compiles(depth: int, kv_heads: int, size: int, capability: int, tmp_path: Path) -> None:
    k, v = (torch.empty(32, 100, 16, kv_heads, size, dtype=torch.bfloat16, device="meta") for _ in range(2))
    tables, contexts, path = (torch.empty(shape, dtype=torch.long, device="meta") for shape in ((4, 60), (4,), (4, depth + 1)))
    (ptx,) = check_launches(kv_commit, lambda: kv_commit.kv_commit_triton(k, v, tables, contexts, path), capability, tmp_path)
    assert "ld.global.v4" in ptx
    assert "st.global.v4" in ptx
