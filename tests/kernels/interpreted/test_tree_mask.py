"""Parent pointers to words and depths in Triton's interpreter."""

import pytest
import torch
from hypothesis import given, settings

from tests.kernels.check_tree_kernels import check_tree_mask
from tests.kernels.trees import forests


@given(forests(max_nodes=128))
@settings(max_examples=25)
def test_equals_the_reference(forest: list[list[int]]) -> None:
    check_tree_mask(torch.tensor(forest), 127)


@pytest.mark.parametrize("nodes", [1, 2, 3, 32, 33, 63, 64, 65, 127, 128])
def test_chains_and_stars(nodes: int) -> None:
    check_tree_mask(torch.tensor([[0, *range(nodes - 1)], [0] * nodes]), nodes - 1)
