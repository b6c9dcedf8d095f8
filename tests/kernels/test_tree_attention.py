"""Attention over the paged cache against plain softmax attention of every node over its own root path."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.tree_attention import tree_attention
from kernels.tree_layout import TreeLayout, physical_slots
from tests.kernels.trees import climb, forests, words

SCALE = 0.3


@dataclass
class Case:
    """A paged cache full of noise in which some slots belong to some requests, in shuffled blocks."""

    q: Tensor
    k: Tensor
    v: Tensor
    layout: TreeLayout

    @classmethod
    def make(
        cls, contexts: list[int], depth: Tensor, ancestors: Tensor | None, block_size: int = 4, heads: int = 4, kv_heads: int = 2,
        live: Tensor | None = None, first_column: int = 0, rows_before: int = 0,
    ) -> "Case":  # fmt: skip
        generator = torch.Generator().manual_seed(sum(contexts) + block_size)
        batch, rows = depth.shape
        per_request = -(-(max(contexts) + first_column + rows) // block_size) + 1
        blocks = 1 + batch * per_request
        tables = (torch.randperm(blocks - 1, generator=generator) + 1).view(batch, per_request)
        layout = TreeLayout(tables, torch.tensor(contexts), depth, ancestors, live, block_size, max(contexts), first_column)
        shape = (blocks, block_size, kv_heads, 8)
        k, v = (torch.randn(shape, generator=generator) for _ in range(2))
        return cls(torch.randn(batch, rows, heads, 8, generator=generator), k, v, layout)

    def column(self, request: int, slot: int) -> tuple[Tensor, Tensor]:
        block = int(self.layout.block_tables[request, slot // self.layout.block_size])
        return self.k[block, slot % self.layout.block_size], self.v[block, slot % self.layout.block_size]

    def naive(
        self, request: int, row: int, slots: list[int], positions: list[int], window: int | None = None, softcap: float | None = None
    ) -> Tensor:
        """Attention of one row over ``slots``, which lie at ``positions``; the row's own slot is the last."""
        kept = [slot for slot, position in zip(slots, positions, strict=True) if window is None or positions[-1] - position < window]
        keys, values = (torch.stack(part).double() for part in zip(*(self.column(request, slot) for slot in kept), strict=True))
        group = self.q.shape[2] // keys.shape[1]
        out = []
        for head in range(self.q.shape[2]):
            scores = keys[:, head // group] @ self.q[request, row, head].double() * SCALE
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out.append(scores.softmax(0) @ values[:, head // group])
        return torch.stack(out).float()


def check_tree(
    forest: list[list[int]], contexts: list[int], window: int | None = None, softcap: float | None = None, **options: int
) -> None:
    ancestors, depth = words(forest)
    case = Case.make(contexts, depth, ancestors, **options)
    ours = tree_attention(case.q, case.k, case.v, case.layout, SCALE, window, softcap)
    for request, (parent, context) in enumerate(zip(forest, contexts, strict=True)):
        for node in range(len(parent)):
            path = climb(parent, node)
            slots = [*range(context), *(context + j for j in path)]
            expected = case.naive(request, node, slots, list(range(context + len(path))), window, softcap)
            torch.testing.assert_close(ours[request, node], expected, rtol=1e-4, atol=1e-5)


@given(forests(max_batch=3, max_nodes=12), st.data())
def test_every_node_sees_its_context_and_its_path(forest: list[list[int]], data: st.DataObject) -> None:
    contexts = data.draw(st.lists(st.integers(0, 21), min_size=len(forest), max_size=len(forest)))
    window = data.draw(st.sampled_from([None, 1, 2, 3, 7, 100]))
    softcap = data.draw(st.sampled_from([None, 0.5, 5.0]))
    heads, kv_heads = data.draw(st.sampled_from([(4, 4), (4, 2), (4, 1), (1, 1), (6, 3)]))
    check_tree(forest, contexts, window, softcap, block_size=data.draw(st.sampled_from([1, 2, 3, 4, 16])), heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize("context", [0, 3, 4, 5, 8])
@pytest.mark.parametrize("window", [None, 2, 5])
def test_sixty_four_nodes_across_block_boundaries(context: int, window: int | None) -> None:
    generator = torch.Generator().manual_seed(context)
    parent = [0, *(int(torch.randint(0, node, (), generator=generator)) for node in range(1, 64))]
    check_tree([parent, [0, *range(63)]], [context, 0], window, block_size=4)


def test_window_counts_positions_and_not_slots() -> None:
    """Five siblings share a position: the last one's window of two still reaches the root."""
    check_tree([[0, 0, 0, 0, 0, 0]], [3], window=2)


@given(
    st.lists(st.tuples(st.integers(0, 19), st.integers(1, 9)), min_size=1, max_size=3),
    st.sampled_from([None, 1, 3, 50]),
    st.sampled_from([1, 4, 5]),
)
def test_causal_chunks_with_padding_rows(chunks: list[tuple[int, int]], window: int | None, block_size: int) -> None:
    """A chunk of a prompt: row i sees the context and rows 0..i; rows past a request's own count do not disturb."""
    contexts, counts = [list(part) for part in zip(*chunks, strict=True)]
    width = max(counts)
    live = torch.arange(width) < torch.tensor(counts)[:, None]
    case = Case.make(contexts, torch.arange(width).expand(len(chunks), -1), None, block_size=block_size, live=live)
    ours = tree_attention(case.q, case.k, case.v, case.layout, SCALE, window)
    for request, (context, count) in enumerate(chunks):
        for row in range(count):
            slots = list(range(context + row + 1))
            torch.testing.assert_close(ours[request, row], case.naive(request, row, slots, slots, window), rtol=1e-4, atol=1e-5)


def test_rows_land_in_the_blocks_of_the_table_and_padding_rows_in_block_zero() -> None:
    tables = torch.tensor([[3, 1], [2, 4]])
    live = torch.tensor([[True, True, True], [True, False, False]])
    layout = TreeLayout(tables, torch.tensor([1, 3]), torch.arange(3).expand(2, -1), None, live, 2, 3)
    assert layout.slots.tolist() == [[3 * 2 + 1, 1 * 2, 1 * 2 + 1], [4 * 2 + 1, 0, 0]]
    assert layout.positions.tolist() == [[1, 2, 3], [3, 4, 5]]


@given(st.integers(1, 3), st.integers(1, 4), st.lists(st.integers(0, 9), min_size=1, max_size=3), st.sampled_from([1, 4]))
def test_first_column_lets_a_level_see_the_levels_before_it(levels: int, topk: int, contexts: list[int], block_size: int) -> None:
    """Drafting: each level's rows follow those of the level before; ancestor words name rows of all levels."""
    generator = torch.Generator().manual_seed(levels * 7 + topk)
    rows: list[list[int]] = []  # ancestors of every row, itself included, over all levels
    for row in range(levels * topk):
        above = int(torch.randint(0, topk, (), generator=generator)) + (row // topk - 1) * topk
        rows.append([*(rows[above] if row >= topk else []), row])
    first = (levels - 1) * topk
    own = rows[first:]
    ancestors = torch.tensor([[sum(1 << j for j in path) for path in own]] * len(contexts))
    depth = torch.full((len(contexts), topk), levels - 1)
    case = Case.make(contexts, depth, ancestors, block_size=block_size, first_column=first)
    ours = tree_attention(case.q, case.k, case.v, case.layout, SCALE)
    for request, context in enumerate(contexts):
        for row, path in enumerate(own):
            slots = [*range(context), *(context + j for j in path)]
            torch.testing.assert_close(ours[request, row], case.naive(request, row, slots, slots), rtol=1e-4, atol=1e-5)
        logical = torch.arange(context + first, context + first + topk)[None]
        own_slots = physical_slots(case.layout.block_tables[request, None], logical, block_size)
        assert torch.equal(case.layout.slots[request], own_slots[0])


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_low_precision_stays_close(softcap: float | None) -> None:
    ancestors, depth = words([[0, 0, 1, 1, 2]])
    case = Case.make([6], depth, ancestors)
    exact = tree_attention(case.q, case.k, case.v, case.layout, SCALE, None, softcap)
    fresh = Case.make([6], depth, ancestors).layout
    rough = tree_attention(case.q.bfloat16(), case.k.bfloat16(), case.v.bfloat16(), fresh, SCALE, None, softcap)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).abs().max() < 0.05


def test_physical_slots() -> None:
    tables = torch.tensor([[5, 2, 9]])
    assert physical_slots(tables, torch.tensor([[0, 3, 4, 7, 11]]), 4).tolist() == [[20, 23, 8, 11, 39]]


@pytest.mark.parametrize("first", [1, 7])
def test_blocks_that_follow_one_another_are_read_where_they_lie(first: int) -> None:
    """Of a single request, with the bits that any other order of blocks gives."""
    ancestors, depth = words([[0, 0, 1, 1]])
    case = Case.make([9], depth, ancestors)
    count = case.layout.num_blocks
    k, v = (torch.full((20, *cache.shape[1:]), float("nan")) for cache in (case.k, case.v))
    run = torch.arange(first, first + count)
    for ours, cache in ((k, case.k), (v, case.v)):
        ours[run] = cache[case.layout.block_tables[0, :count]]
    layout = replace(case.layout, block_tables=run[None], _masks={})
    assert (layout.only_run, replace(layout, block_tables=run.flip(0)[None], _masks={}).only_run) == (first, None)
    assert replace(layout, block_tables=run.repeat(2, 1), _masks={}).only_run is None
    expected = tree_attention(
        case.q, case.k, case.v, replace(case.layout, block_tables=case.layout.block_tables.repeat(1, 1), _masks={}), SCALE
    )
    assert torch.equal(tree_attention(case.q, k, v, layout, SCALE), expected)
    part = layout.part(2, 2, ancestors[:, 2:])
    assert part.only_run == first
    assert torch.equal(tree_attention(case.q[:, 2:], k, v, part, SCALE), expected[:, 2:])
