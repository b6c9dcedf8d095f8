"""The tree, attention and cache kernels on a real GPU, against their references on it. Needs nothing beyond pytest and torch.

Most of the time goes into compiling, so that there are few configurations and several of them are shared.
"""

import pytest
import torch

from kernels.tree_mask import tree_mask_reference
from tests.kernels.check_tree_kernels import AttentionCase, check_kv_commit, check_tree_mask, random_forest

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def trees(contexts: list[int], nodes: int, heads: tuple[int, int], size: int, dtype: torch.dtype, block_size: int = 16) -> AttentionCase:
    ancestors, depth = tree_mask_reference(random_forest(len(contexts), nodes), nodes)
    return AttentionCase.make(
        contexts, depth, ancestors, heads=heads, size=size, block_size=block_size, dtype=dtype, device="cuda"
    )  # fmt: skip


@pytest.mark.parametrize("nodes", [1, 33, 64, 65, 128])
def test_small_tree_mask(nodes: int) -> None:
    for reach in (1, 3, 64):
        check_tree_mask(random_forest(5, nodes, reach).cuda(), nodes)


@pytest.mark.parametrize(
    ("nodes", "heads", "size", "dtype", "block_size", "window", "softcap", "with_sinks"),
    [
        (32, (32, 8), 128, BF16, 16, None, None, False),
        (1, (32, 8), 128, BF16, 16, None, None, False),
        (9, (12, 2), 128, FP16, 48, 40, None, False),
        (100, (8, 4), 128, BF16, 16, 700, None, False),
        (64, (14, 2), 64, BF16, 16, None, None, True),
        (12, (8, 4), 256, BF16, 16, 700, 20.0, False),
        (33, (32, 32), 80, FP16, 1, None, None, False),
        (5, (8, 1), 96, FP32, 16, None, 20.0, True),
    ],
)
def test_trees(
    nodes: int, heads: tuple[int, int], size: int, dtype: torch.dtype, block_size: int,
    window: int | None, softcap: float | None, with_sinks: bool,
) -> None:  # fmt: skip
    trees([0, 63, 1500, 64], nodes, heads, size, dtype, block_size).check(window, softcap, with_sinks)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_small_trees(dtype: torch.dtype) -> None:
    trees([0, 300], 12, (4, 2), 64, dtype).check(with_sinks=True)


@pytest.mark.parametrize(("heads", "size", "window"), [((32, 8), 128, None), ((8, 4), 256, 300)])
def test_causal_chunks(heads: tuple[int, int], size: int, window: int | None) -> None:
    width, counts = 200, torch.tensor([200, 1, 0, 77])
    live = torch.arange(width) < counts[:, None]
    depth = torch.arange(width).expand(4, -1)
    AttentionCase.make([0, 1000, 5, 129], depth, None, live, heads=heads, size=size, dtype=BF16, device="cuda").check(window)


def test_first_column() -> None:
    ancestors = torch.tensor([[0b1_0000_0101, 0b10_0000_0010]] * 2)
    AttentionCase.make([0, 2000], torch.full((2, 2), 2), ancestors, first_column=8, size=128, dtype=BF16, device="cuda").check()


@pytest.mark.parametrize("nodes", [1, 32])
def test_long_contexts(nodes: int) -> None:
    trees([32_768, 9000], nodes, (32, 8), 128, BF16).check()


@pytest.mark.parametrize("nodes", [1, 32])
def test_neighbours_change_no_bit(nodes: int) -> None:
    trees([17, 5000, 300, 20_000], nodes, (32, 8), 128, BF16).check_neighbours()


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("depth", [1, 8, 31])
def test_small_kv_commit(depth: int, dtype: torch.dtype) -> None:
    """Rows move by one slot and by many, so that most places are read and written."""
    steps = torch.tensor([[1] * depth, [2] * depth, [1, *[3] * (depth - 1)]])
    path = torch.cat((torch.zeros(3, 1, dtype=torch.long), steps.cumsum(1)), dim=1)
    path[2, 1 + depth // 2 :] = -1
    for heads in ((8, 128), (1, 80)):
        check_kv_commit([0, 700, 33], path, 3 * depth + 1, 16, 4, heads, dtype, "cuda")
