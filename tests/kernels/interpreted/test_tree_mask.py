"""The kernel against its reference."""

import pytest
import torch
from hypothesis import given, settings

from kernels.tree_mask import tree_mask_reference, tree_mask_triton
from tests.kernels.trees import forests


def check(forest: list[list[int]], max_depth: int) -> None:
    parent = torch.tensor(forest)
    for ours, expected in zip(tree_mask_triton(parent, max_depth), tree_mask_reference(parent, max_depth), strict=True):
        assert torch.equal(ours, expected)


@given(forests(max_nodes=128))
@settings(max_examples=25)
def test_equals_the_reference(forest: list[list[int]]) -> None:
    check(forest, 127)


@pytest.mark.parametrize("nodes", [1, 2, 3, 32, 33, 63, 64, 65, 127, 128])
def test_chains_and_stars(nodes: int) -> None:
    check([[0, *range(nodes - 1)], [0] * nodes], nodes - 1)
