"""Pointer doubling against climbing from every node."""

import pytest
import torch
from hypothesis import given

from kernels.tree_mask import MAX_NODES, tree_mask
from tests.kernels.trees import forests, words


@given(forests(max_nodes=128))
def test_equals_climbing(forest: list[list[int]]) -> None:
    ancestors, depth = words(forest)
    ours = tree_mask(torch.tensor(forest), int(depth.max()))
    assert torch.equal(ours[0], ancestors)
    assert torch.equal(ours[1], depth)


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5, 8, 9, 16, 17, 33, MAX_NODES])
def test_chain_with_the_exact_depth_bound(nodes: int) -> None:
    chain = [[0, *range(nodes - 1)]]
    ancestors, depth = tree_mask(torch.tensor(chain), nodes - 1)
    assert depth[0].tolist() == list(range(nodes))
    assert [word & (2**64 - 1) for word in ancestors[0].tolist()] == [2 ** (i + 1) - 1 for i in range(nodes)]


@given(forests(max_batch=2, max_nodes=128))
def test_a_looser_depth_bound_changes_nothing(forest: list[list[int]]) -> None:
    exact = tree_mask(torch.tensor(forest), int(words(forest)[1].max()))
    loose = tree_mask(torch.tensor(forest), 2 * MAX_NODES)
    assert torch.equal(exact[0], loose[0])
    assert torch.equal(exact[1], loose[1])
