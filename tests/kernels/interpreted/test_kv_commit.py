"""Moving accepted rows in Triton's interpreter."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.check_tree_kernels import check_kv_commit


@given(st.data(), st.sampled_from([1, 3, 8]), st.integers(1, 3), st.sampled_from([(1, 3), (2, 16), (3, 80)]))
@settings(max_examples=20)
def test_equals_the_reference(data: st.DataObject, block_size: int, batch: int, heads: tuple[int, int]) -> None:
    nodes, max_depth = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 9))
    contexts = data.draw(st.lists(st.integers(0, 13), min_size=batch, max_size=batch))
    paths = []
    for _ in range(batch):
        later = data.draw(st.lists(st.integers(1, max(1, nodes - 1)), unique=True, max_size=min(max_depth, nodes - 1)))
        paths.append([0, *sorted(later), *[-1] * (max_depth - len(later))])
    check_kv_commit(contexts, torch.tensor(paths), nodes, block_size, 2, heads, torch.float32, "cpu")
