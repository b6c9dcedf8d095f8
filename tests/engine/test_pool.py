"""Trees of a batch in groups of like sizes."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.tree_mask import tree_mask
from server.engine.pool import GROUP_ROWS, Pool, best_tree, by_width, narrowed
from server.engine.types import Tree

NODES = 16


def batch(widths: list[int]) -> Tree:
    """Trees of so many live nodes, chains of two branches."""
    width = max(widths)
    node = torch.arange(width)
    live = node < torch.tensor(widths)[:, None]
    parent = (node - 2).clamp(min=0).where(live, 0)
    ancestors, depth = tree_mask(parent, width)
    tokens = torch.where(live, node + 100 * torch.arange(len(widths))[:, None], -1)
    return Tree(tokens, parent, depth, ancestors)


@given(st.lists(st.integers(1, NODES), min_size=1, max_size=40))
def test_groups_save_padding(widths: list[int]) -> None:
    groups = by_width(batch(widths))
    assert sorted(place for group in groups for place in group) == list(range(len(widths)))
    padded = sum(len(group) * max(widths[place] for place in group) for group in groups)
    assert padded <= len(widths) * max(widths) - (len(groups) - 1) * GROUP_ROWS, "each group saves more than it costs"
    for group in groups:
        own = sorted(widths[place] for place in group)
        assert all(cut * (own[-1] - own[cut - 1]) <= GROUP_ROWS for cut in range(1, len(own))), "none is left that would"


def test_batches_of_one_size_stay_whole() -> None:
    assert by_width(batch([7] * 32)) == [list(range(32))]
    assert by_width(batch([1, 16])) == [[0, 1]]
    assert by_width(batch([16, *[2] * 31])) == [list(range(1, 32)), [0]]


@given(st.lists(st.integers(1, NODES), min_size=2, max_size=8), st.data())
def test_narrowed_trees_are_the_same_trees(widths: list[int], data: st.DataObject) -> None:
    tree = batch(widths)
    places = data.draw(st.lists(st.integers(0, len(widths) - 1), min_size=1, unique=True))
    part = narrowed(tree, places)
    assert part.tokens.shape == (len(places), max(widths[place] for place in places))
    for row, place in enumerate(places):
        for ours, whole in zip(part, tree, strict=True):
            assert torch.equal(ours[row, : widths[place]], whole[place, : widths[place]])


@given(st.data())
def test_dead_nodes_come_last(data: st.DataObject) -> None:
    """Which is why a narrowed tree loses none that live."""
    scores = torch.tensor([data.draw(st.lists(st.sampled_from([-0.5, -1.5, float("-inf")]), min_size=9, max_size=9)) for _ in range(4)])
    pool = Pool(scores, torch.arange(9).expand(4, 9), torch.zeros(4, 9, dtype=torch.long))
    tree = best_tree(torch.full((4,), 50), pool, 7, 0.0, 1)
    live = tree.tokens >= 0
    assert live.sum(1).tolist() == [1 + min(6, int(own)) for own in scores.isfinite().sum(1)]
    assert not (live[:, 1:] & ~live[:, :-1]).any()
