"""The kernel compiles for one word and for two."""

from pathlib import Path

import pytest
import torch

from kernels import tree_mask
from tests.kernels.compile_only import SHARED_LIMIT, check_launches


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize("nodes", [32, 100])
def test_compiles(nodes: int, capability: int, tmp_path: Path) -> None:
    parent = torch.zeros(4, nodes, dtype=torch.long)
    check_launches(tree_mask, lambda: tree_mask.tree_mask_triton(parent, 8), capability, tmp_path)
