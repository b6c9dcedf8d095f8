"""Trees of several batches as one."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.tree_mask import tree_mask
from server.engine.pool import Pool, best_tree, stacked
from server.engine.types import Tree

NODES = 16


def batch(widths: list[int], spare: int = 0) -> Tree:
    """Trees of so many live nodes, chains of two branches, with columns to spare."""
    width = max(widths) + spare
    node = torch.arange(width)
    live = node < torch.tensor(widths)[:, None]
    parent = (node - 2).clamp(min=0).where(live, 0)
    ancestors, depth = tree_mask(parent, width)
    tokens = torch.where(live, node + 100 * torch.arange(len(widths))[:, None], -1)
    return Tree(tokens, parent, depth, ancestors)


@given(st.lists(st.lists(st.integers(1, NODES), min_size=1, max_size=4), min_size=1, max_size=3))
def test_stacked_trees_are_the_same_trees(widths: list[list[int]]) -> None:
    trees = [batch(own, spare=i) for i, own in enumerate(widths)]
    whole = stacked(trees)
    assert whole.tokens.shape == (sum(map(len, widths)), max(map(max, widths)))
    places = [(tree, row, width) for tree, own in zip(trees, widths, strict=True) for row, width in enumerate(own)]
    for place, (tree, row, width) in enumerate(places):
        for ours, expected in zip(whole, tree, strict=True):
            assert torch.equal(ours[place, :width], expected[row, :width])
        assert (whole.tokens[place, width:] == -1).all()
        assert (whole.ancestors[place] >> torch.arange(whole.tokens.shape[1]) & 1).all(), "every node is its own ancestor"


@given(st.data())
def test_dead_nodes_come_last(data: st.DataObject) -> None:
    """Which is why columns can be left out."""
    scores = torch.tensor([data.draw(st.lists(st.sampled_from([-0.5, -1.5, float("-inf")]), min_size=9, max_size=9)) for _ in range(4)])
    pool = Pool(scores, torch.arange(9).expand(4, 9), torch.zeros(4, 9, dtype=torch.long))
    tree = best_tree(torch.full((4,), 50), pool, 7, 0.0, 1)
    live = tree.tokens >= 0
    assert live.sum(1).tolist() == [1 + min(6, int(own)) for own in scores.isfinite().sum(1)]
    assert not (live[:, 1:] & ~live[:, :-1]).any()
