"""The sampling and drafting kernels on a real GPU, against their references on it. Needs nothing beyond pytest and torch."""

import pytest
import torch

from tests.kernels.check_draft_level import check_best_nodes, check_draft_level, check_merge_pools
from tests.kernels.check_tree_verify import check_filter_cuts, check_noise, check_ties_infinities_and_nan, check_tree_verify

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(("rows", "vocab"), [(3, 1025), (64, 128_256)], ids=["small", "large"])
def test_noise(rows: int, vocab: int) -> None:
    check_noise(rows, vocab, "cuda")


@pytest.mark.parametrize("parts", ["", "f", "p", "b", "s", "fpbs"])
@pytest.mark.parametrize("sampled", [False, True])
def test_small_trees(parts: str, sampled: bool) -> None:
    for seed, dtype in enumerate(DTYPES):
        check_tree_verify(seed, 5, 9, 1100, dtype, parts, sampled, "cuda")


@pytest.mark.parametrize("parts", ["", "f", "fpbs"])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(("batch", "nodes"), [(1, 1), (1, 64), (8, 33), (16, 64)])
def test_large_trees(batch: int, nodes: int, sampled: bool, parts: str) -> None:
    check_tree_verify(batch + nodes, batch, nodes, 32_000 if parts else 128_256, torch.bfloat16, parts, sampled, "cuda")


@pytest.mark.parametrize("vocab", [300, 9000, 128_256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_filter_cuts(vocab: int, dtype: torch.dtype) -> None:
    for seed in range(5):
        check_filter_cuts(seed, vocab, dtype, "cuda")


@pytest.mark.parametrize("parts", ["", "f", "fpbs"])
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize(("vocab", "topk"), [(1300, 5), (32_000, 8), (128_256, 10)], ids=["small", "reduced", "whole"])
def test_draft_level(vocab: int, topk: int, reduced: bool, parts: str) -> None:
    for sampled in (False, True):
        check_draft_level(topk, 4, topk, vocab, topk, torch.bfloat16, parts, reduced, sampled, "cuda")


@pytest.mark.parametrize(("nodes", "node_price"), [(2, 0.0), (16, 0.0), (64, 0.0), (64, 0.3)])
@pytest.mark.parametrize(("topk", "levels"), [(4, 3), (8, 8), (64, 2)], ids=["small", "deep", "wide"])
def test_best_nodes(topk: int, levels: int, nodes: int, node_price: float) -> None:
    check_best_nodes(nodes + topk, 4, topk, levels, nodes, node_price, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_ties_infinities_and_nan(dtype: torch.dtype) -> None:
    check_ties_infinities_and_nan(dtype, "cuda")


@pytest.mark.parametrize(("topk", "levels"), [((4, 2), (3, 5)), ((8, 3), (8, 3)), ((6, 1), (7, 63))], ids=["small", "large", "chain"])
def test_merge_pools(topk: tuple[int, int], levels: tuple[int, int]) -> None:
    for seed in range(3):
        check_merge_pools(seed, 5, topk, levels, "cuda")
