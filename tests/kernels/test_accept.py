"""Acceptance by bit tests against walking down from the root."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.tree_verify import accept
from tests.kernels.trees import climb, parents, words

VOCAB = 4


def walk(parent: list[int], tokens: list[int], target: list[int]) -> list[int]:
    """The nodes that follow the target from the root, one child after another."""
    path = [0]
    while True:
        right = [node for node in range(1, len(parent)) if parent[node] == path[-1] and tokens[node] == target[path[-1]]]
        if not right:
            return path
        path.append(right[0])


@st.composite
def drafts(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    """parent, tokens (siblings differ; what finds no free token is dead) and the target's token after every node."""
    parent = draw(parents())
    tokens = [0]
    for node in range(1, len(parent)):
        taken = {tokens[other] for other in range(1, node) if parent[other] == parent[node]}
        free = sorted(set(range(VOCAB)) - taken)
        dead = not free or tokens[parent[node]] == -1 or draw(st.integers(0, 9)) == 0
        tokens.append(-1 if dead else draw(st.sampled_from(free)))
    parent = [0 if token == -1 else up for up, token in zip(parent, tokens, strict=True)]
    # Mostly a target that agrees with some child, so that long paths occur.
    target = []
    for node in range(len(parent)):
        children = [tokens[child] for child in range(1, len(parent)) if parent[child] == node and tokens[child] >= 0]
        agree = children and draw(st.integers(0, 4)) > 0
        target.append(draw(st.sampled_from(children)) if agree else draw(st.integers(0, VOCAB - 1)))
    return parent, tokens, target


@given(st.lists(drafts(), min_size=1, max_size=4))
def test_equals_walking(cases: list[tuple[list[int], list[int], list[int]]]) -> None:
    width = max(len(parent) for parent, _, _ in cases)
    rows = [
        (parent + [0] * (width - len(parent)), tokens + [-1] * (width - len(parent)), target + [0] * (width - len(parent)))
        for parent, tokens, target in cases
    ]
    parent, tokens, target = (torch.tensor(part) for part in zip(*rows, strict=True))
    ancestors, depth = words([row[0] for row in rows])
    max_depth = max(1, int(depth.max()))
    path, accepted, committed = accept(target, tokens, parent, depth, ancestors, max_depth)
    assert path.shape == committed.shape == (len(cases), max_depth + 1)
    for i, row in enumerate(rows):
        expected = walk(*row)
        padding = [-1] * (max_depth + 1 - len(expected))
        assert path[i].tolist() == expected + padding
        assert int(accepted[i]) == len(expected) - 1
        assert committed[i].tolist() == [row[2][node] for node in expected] + padding


def test_sixty_four_nodes_in_a_chain_all_right() -> None:
    parent = torch.tensor([[0, *range(63)]])
    ancestors, depth = words(parent.tolist())
    tokens = torch.arange(64)[None]
    path, accepted, committed = accept(tokens + 1, tokens, parent, depth, ancestors, 63)
    assert path[0].tolist() == list(range(64))
    assert accepted.tolist() == [63]
    assert committed[0].tolist() == list(range(1, 65))


def test_the_last_of_sixty_four_nodes_can_win() -> None:
    parent = torch.zeros(1, 64, dtype=torch.long)
    ancestors, depth = words(parent.tolist())
    tokens = torch.arange(64)[None]
    target = torch.full((1, 64), 63)
    path, accepted, committed = accept(target, tokens, parent, depth, ancestors, 5)
    assert path.tolist() == [[0, 63, -1, -1, -1, -1]]
    assert accepted.tolist() == [1]
    assert committed.tolist() == [[63, 63, -1, -1, -1, -1]]


def test_a_right_node_below_a_wrong_one_does_not_survive() -> None:
    parent = torch.tensor([[0, 0, 1, 2]])
    ancestors, depth = words(parent.tolist())
    path, accepted, committed = accept(torch.tensor([[1, 5, 6, 7]]), torch.tensor([[0, 9, 5, 6]]), parent, depth, ancestors, 3)
    assert path.tolist() == [[0, -1, -1, -1]]
    assert accepted.tolist() == [0]
    assert committed.tolist() == [[1, -1, -1, -1]]
    assert climb([0, 0, 1, 2], 3) == [0, 1, 2, 3]


def test_dead_nodes_never_survive() -> None:
    parent = torch.zeros(1, 3, dtype=torch.long)
    ancestors, depth = words(parent.tolist())
    for wanted in range(3):
        _, accepted, _ = accept(torch.full((1, 3), wanted), torch.tensor([[0, -1, -1]]), parent, depth, ancestors, 2)
        assert accepted.tolist() == [0]
