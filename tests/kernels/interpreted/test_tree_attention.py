"""Attention over the paged cache in Triton's interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.check_tree_kernels import AttentionCase
from tests.kernels.trees import forests, words

HEADS = st.sampled_from([(1, 1), (4, 4), (4, 2), (4, 1), (6, 2)])
DTYPES = st.sampled_from([torch.float32, torch.float16])  # the two have tiles of different sizes
CONTEXTS = st.sampled_from([0, 1, 15, 16, 17, 31, 32, 33, 64, 70])


@given(forests(max_batch=2, max_nodes=12), st.data())
@settings(max_examples=20)
def test_trees(forest: list[list[int]], data: st.DataObject) -> None:
    contexts = data.draw(st.lists(CONTEXTS, min_size=len(forest), max_size=len(forest)))
    ancestors, depth = words(forest)
    case = AttentionCase.make(
        contexts, depth, ancestors, heads=data.draw(HEADS), size=data.draw(st.sampled_from([8, 16, 24])),
        block_size=data.draw(st.sampled_from([1, 3, 16, 48])), dtype=data.draw(DTYPES),
    )  # fmt: skip
    case.check(data.draw(st.sampled_from([None, 1, 2, 5, 40])), data.draw(st.sampled_from([None, 0.5, 5.0])), data.draw(st.booleans()))


@pytest.mark.parametrize("nodes", [1, 64, 65, 128])
def test_full_trees(nodes: int) -> None:
    """A random tree and a chain."""
    generator = torch.Generator().manual_seed(nodes)
    tree = [0, *(int(torch.randint(0, node, (), generator=generator)) for node in range(1, nodes))]
    ancestors, depth = words([tree, [max(0, node - 1) for node in range(nodes)]])
    AttentionCase.make([37, 0], depth, ancestors, heads=(2, 1), dtype=torch.float16).check(window=9)


@given(st.lists(st.tuples(CONTEXTS, st.integers(0, 20)), min_size=1, max_size=2), HEADS, st.sampled_from([None, 1, 7, 50]), DTYPES)
@settings(max_examples=15)
def test_causal_chunks_of_uneven_length(
    chunks: list[tuple[int, int]], heads: tuple[int, int], window: int | None, dtype: torch.dtype
) -> None:
    contexts, counts = [list(part) for part in zip(*chunks, strict=True)]
    width = max(1, *counts)
    live = torch.arange(width) < torch.tensor(counts)[:, None]
    depth = torch.arange(width).expand(len(chunks), -1)
    AttentionCase.make(contexts, depth, None, live, heads=heads, block_size=5, dtype=dtype).check(window)


def test_a_chunk_of_several_row_tiles() -> None:
    AttentionCase.make([40], torch.arange(150)[None], None, heads=(2, 2)).check()


@pytest.mark.parametrize("first_column", [3, 12, 62])
def test_first_column(first_column: int) -> None:
    """Rows of a later level see some of the earlier levels' rows, which lie before them."""
    generator = torch.Generator().manual_seed(first_column)
    seen = torch.randint(0, 1 << first_column, (2, 1), generator=generator)
    AttentionCase.make([20, 0], torch.full((2, 1), 3), seen | 1 << first_column, first_column=first_column).check()


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_long_contexts_are_split_and_combined(window: int | None, with_sinks: bool) -> None:
    ancestors, depth = words([[0, 0, 1, 1, 2]] * 3)
    AttentionCase.make([255, 1030, 3], depth, ancestors, heads=(2, 1)).check(window, with_sinks=with_sinks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("chunk", [False, True])
def test_neighbours_change_no_bit(chunk: bool, dtype: torch.dtype) -> None:
    ancestors, depth = (None, torch.arange(6).expand(3, -1)) if chunk else words([[0, 0, 1, 1, 2, 4]] * 3)
    AttentionCase.make([100, 700, 9], depth, ancestors, heads=(2, 1), dtype=dtype).check_neighbours()
