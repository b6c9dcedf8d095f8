"""One level of drafting, the choice of the best nodes and the merging of two sets of them in Triton's interpreter."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.check_draft_level import check_best_nodes, check_draft_level, check_merge_pools

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@given(
    st.integers(0, 10**6), st.integers(1, 3), st.sampled_from([5, 90, 1300]), st.integers(1, 5), DTYPES, st.sampled_from(["", "f", "fpbs"]),
    st.booleans(), st.booleans(),
)  # fmt: skip
@settings(max_examples=20)
def test_draft_level(seed: int, rows: int, vocab: int, topk: int, dtype: torch.dtype, parts: str, reduced: bool, sampled: bool) -> None:
    check_draft_level(seed, 2, rows, vocab, topk, dtype, parts, reduced, sampled, "cpu")


@given(
    st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.sampled_from([2, 5, 16, 64]),
    st.sampled_from([0.0, 0.3]),
)  # fmt: skip
@settings(max_examples=20)
def test_best_nodes(seed: int, batch: int, topk: int, levels: int, nodes: int, node_price: float) -> None:
    check_best_nodes(seed, batch, topk, levels, nodes, node_price, "cpu")


@given(
    st.integers(0, 10**6), st.integers(1, 3), st.tuples(st.integers(1, 5), st.integers(1, 3)),
    st.tuples(st.integers(1, 4), st.integers(1, 9)),
)  # fmt: skip
@settings(max_examples=30)
def test_merge_pools(seed: int, batch: int, topk: tuple[int, int], levels: tuple[int, int]) -> None:
    check_merge_pools(seed, batch, topk, levels, "cpu")
