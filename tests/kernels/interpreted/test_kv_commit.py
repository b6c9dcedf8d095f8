"""The kernel against its reference."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.kv_commit import kv_commit_reference, kv_commit_triton


@given(st.data(), st.sampled_from([1, 3, 8]), st.integers(1, 3), st.sampled_from([(1, 3), (2, 16), (3, 80)]))
@settings(max_examples=20)
def test_equals_the_reference(data: st.DataObject, block_size: int, batch: int, heads: tuple[int, int]) -> None:
    nodes, max_depth = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 9))
    contexts = data.draw(st.lists(st.integers(0, 13), min_size=batch, max_size=batch))
    paths = []
    for _ in range(batch):
        later = data.draw(st.lists(st.integers(1, max(1, nodes - 1)), unique=True, max_size=min(max_depth, nodes - 1)))
        paths.append([0, *sorted(later), *[-1] * (max_depth - len(later))])
    per_request = -(-(max(contexts) + nodes) // block_size)
    generator = torch.Generator().manual_seed(nodes)
    tables = (torch.randperm(batch * per_request, generator=generator) + 1).view(batch, per_request)
    k, v = (torch.randn(2, batch * per_request + 1, block_size, *heads, generator=generator) for _ in range(2))
    expected = k.clone(), v.clone()
    kv_commit_reference(*expected, tables, torch.tensor(contexts), torch.tensor(paths))
    kv_commit_triton(k, v, tables, torch.tensor(contexts), torch.tensor(paths))
    assert torch.equal(k, expected[0])
    assert torch.equal(v, expected[1])
