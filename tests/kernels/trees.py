"""Random trees, and what they mean written out as plain loops."""

import torch
from hypothesis import strategies as st
from torch import Tensor


def climb(parent: list[int], node: int) -> list[int]:
    """The path root .. node."""
    path = [node]
    while path[-1] != 0:
        path.append(parent[path[-1]])
    return path[::-1]


def words(parent: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ancestor words int64 [B, N], above 64 nodes [B, N, words], and depths int64 [B, N], by climbing."""
    paths = [[climb(tree, node) for node in range(len(tree))] for tree in parent]
    count = -(-len(parent[0]) // 64)
    bits = [[[sum(1 << j % 64 for j in path if j // 64 == word) for word in range(count)] for path in tree] for tree in paths]
    signed = [[[word - (1 << 64) if word >> 63 else word for word in node] for node in tree] for tree in bits]
    ancestors = torch.tensor(signed)
    return ancestors.squeeze(2) if count == 1 else ancestors, torch.tensor([[len(path) - 1 for path in tree] for tree in paths])


@st.composite
def parents(draw: st.DrawFn, max_nodes: int = 64) -> list[int]:
    """One tree in topological order, from chains to stars."""
    nodes = draw(st.one_of(st.integers(1, max_nodes), st.just(max_nodes)))
    reach = draw(st.sampled_from([1, 2, 5, 64]))  # how far back a parent may lie
    return [0, *(draw(st.integers(max(0, node - reach), node - 1)) for node in range(1, nodes))]


@st.composite
def forests(draw: st.DrawFn, max_batch: int = 4, max_nodes: int = 64) -> list[list[int]]:
    """Trees of one size; the smaller ones are filled with children of the root, as dead nodes are."""
    trees = draw(st.lists(parents(max_nodes), min_size=1, max_size=max_batch))
    width = max(map(len, trees))
    return [tree + [0] * (width - len(tree)) for tree in trees]
