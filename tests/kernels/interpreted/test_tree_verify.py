"""The noise, the filters and the verification in Triton's interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.sampling import SamplingBatch
from kernels.tree_verify import tree_verify_triton
from tests.kernels.check_tree_verify import check_filter_cuts, check_noise, check_ties_infinities_and_nan, check_tree_verify

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@pytest.mark.parametrize("vocab", [1, 3, 1025, 5000])
def test_noise(vocab: int) -> None:
    check_noise(3, vocab, "cpu")


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(2, 9), st.sampled_from([5, 60, 1100]), DTYPES, st.booleans())
@settings(max_examples=15)
def test_tree_verify_without_options(seed: int, batch: int, nodes: int, vocab: int, dtype: torch.dtype, sampled: bool) -> None:
    check_tree_verify(seed, batch, nodes, vocab, dtype, "", sampled, "cpu")


@given(st.integers(0, 10**6), st.sampled_from([7, 60, 1030]), DTYPES, st.sampled_from(["f", "p", "b", "s", "g", "fpbsg"]), st.booleans())
@settings(max_examples=15)
def test_tree_verify_with_options(seed: int, vocab: int, dtype: torch.dtype, parts: str, sampled: bool) -> None:
    check_tree_verify(seed, 2, 5, vocab, dtype, parts, sampled, "cpu")


@given(st.integers(0, 10**6), st.sampled_from([4, 300, 5000]), DTYPES)
@settings(max_examples=10)
def test_filter_cuts(seed: int, vocab: int, dtype: torch.dtype) -> None:
    check_filter_cuts(seed, vocab, dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ties_infinities_and_nan(dtype: torch.dtype) -> None:
    check_ties_infinities_and_nan(dtype, "cpu")


def test_sixty_four_nodes_in_a_chain() -> None:
    parent = torch.tensor([[0, *range(63)]])
    ancestors = torch.tensor([[(1 << node + 1) - 1 - (1 << 64 if node == 63 else 0) for node in range(64)]])
    tokens = torch.arange(64)[None]
    logits = torch.nn.functional.one_hot(tokens + 1, 65).float()
    options = SamplingBatch(torch.ones(1), None, None, None, None)
    path, accepted, committed, _ = tree_verify_triton(logits, options, None, tokens, parent, tokens, ancestors, 63)
    assert path[0].tolist() == list(range(64))
    assert accepted.tolist() == [63]
    assert committed[0].tolist() == list(range(1, 65))
