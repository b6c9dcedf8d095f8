"""Moving accepted rows: a copy made before any write is the reference."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.kv_commit import kv_commit


@given(st.data(), st.sampled_from([1, 2, 3, 8]), st.integers(1, 3))
def test_equals_copying_from_a_snapshot(data: st.DataObject, block_size: int, batch: int) -> None:
    nodes = data.draw(st.integers(1, 64))
    max_depth = data.draw(st.integers(1, 9))
    contexts = data.draw(st.lists(st.integers(0, 13), min_size=batch, max_size=batch))
    paths = []
    for _ in range(batch):
        later = data.draw(st.lists(st.integers(1, max(1, nodes - 1)), unique=True, max_size=min(max_depth, nodes - 1)))
        paths.append([0, *sorted(later)])  # parents precede children, so indices increase along a path
    per_request = -(-(max(contexts) + nodes) // block_size)
    tables = (torch.randperm(batch * per_request) + 1).view(batch, per_request)
    k, v = (torch.randn(2, batch * per_request + 1, block_size, 2, 3) for _ in range(2))
    expected_k, expected_v = k.clone(), v.clone()

    def place(request: int, slot: int) -> tuple[int, int]:
        return int(tables[request, slot // block_size]), slot % block_size

    for request, (context, path) in enumerate(zip(contexts, paths, strict=True)):
        for depth, node in enumerate(path):
            source, target = place(request, context + node), place(request, context + depth)
            expected_k[:, target[0], target[1]] = k[:, source[0], source[1]]
            expected_v[:, target[0], target[1]] = v[:, source[0], source[1]]
    padded = torch.tensor([path + [-1] * (max_depth + 1 - len(path)) for path in paths])
    kv_commit(k, v, tables, torch.tensor(contexts), padded)
    assert torch.equal(k, expected_k)
    assert torch.equal(v, expected_v)


def test_sources_that_are_also_destinations() -> None:
    """Path 0, 2, 3, 4: node 2 goes where node 1 was, node 3 where node 2 was. A chain of copies would repeat a row."""
    k = torch.arange(8.0).view(1, 4, 2, 1, 1)
    v = -k.clone()
    kv_commit(k, v, torch.tensor([[3, 1, 2]]), torch.tensor([1]), torch.tensor([[0, 2, 3, 4, -1, -1]]))
    # Logical slots 0..5 were 6, 7, 2, 3, 4, 5; slots 1..4 become the rows of nodes 0, 2, 3, 4.
    assert k.flatten()[[6, 7, 2, 3, 4, 5]].tolist() == [6, 7, 3, 4, 5, 5]
    assert torch.equal(v, -k)
    assert k.flatten()[:2].tolist() == [0, 1]


def test_nothing_accepted_moves_nothing() -> None:
    k, v = torch.randn(2, 3, 4, 2, 5), torch.randn(2, 3, 4, 2, 5)
    before = k.clone(), v.clone()
    kv_commit(k, v, torch.tensor([[1], [2]]), torch.tensor([0, 2]), torch.tensor([[0, -1, -1], [0, -1, -1]]))
    assert torch.equal(k, before[0])
    assert torch.equal(v, before[1])
