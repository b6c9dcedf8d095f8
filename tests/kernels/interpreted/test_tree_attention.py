"""The kernel against its reference. Slots that hold no row that anybody may see are NaN for the kernel."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.tree_attention import tree_attention_reference, tree_attention_triton
from kernels.tree_layout import TreeLayout, physical_slots
from tests.kernels.trees import forests, words


@dataclass
class Case:
    q: Tensor
    k: Tensor
    v: Tensor
    layout: TreeLayout

    @classmethod
    def make(
        cls, contexts: list[int], depth: Tensor, ancestors: Tensor | None, live: Tensor | None = None, first_column: int = 0,
        heads: tuple[int, int] = (4, 2), size: int = 16, block_size: int = 16, dtype: torch.dtype = torch.float32,
    ) -> "Case":  # fmt: skip
        generator = torch.Generator().manual_seed(sum(contexts) + depth.numel())
        batch, rows = depth.shape
        per_request = -(-(max(contexts) + first_column + rows) // block_size)
        blocks = 1 + batch * per_request
        tables = (torch.randperm(blocks - 1, generator=generator) + 1).view(batch, per_request)
        layout = TreeLayout(tables, torch.tensor(contexts), depth, ancestors, live, block_size, max(contexts), first_column)
        k, v = (torch.randn(blocks, block_size, heads[1], size, generator=generator) for _ in range(2))
        written = torch.zeros(blocks * block_size, dtype=torch.bool)
        for request, context in enumerate(contexts):
            logical = torch.arange(context + first_column)[None]
            written[physical_slots(tables[request, None], logical, block_size)] = True
        written[layout.slots.flatten()] = True
        written[0] = False  # what padding rows write is not theirs to see either
        for cache in (k, v):
            cache.view(-1, heads[1], size)[~written] = torch.nan
        q = torch.randn(batch, heads[0], rows, size, generator=generator).transpose(1, 2)  # as models have it
        return cls(q.to(dtype), k.to(dtype), v.to(dtype), layout)

    def run(self, window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None) -> Tensor:
        return tree_attention_triton(self.q, self.k, self.v, self.layout, 0.3, window, softcap, sinks)

    def check(self, window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None) -> None:
        ours = self.run(window, softcap, sinks).float()
        clean = (cache.nan_to_num(0.0).float() for cache in (self.k, self.v))
        expected = tree_attention_reference(self.q.float(), *clean, self.layout, 0.3, window, softcap, sinks)
        if self.layout.live is not None:
            expected[~self.layout.live] = 0
        tolerance = 1e-5 if self.q.dtype == torch.float32 else 5e-3
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


HEADS = st.sampled_from([(1, 1), (4, 4), (4, 2), (4, 1), (6, 2)])
DTYPES = st.sampled_from([torch.float32, torch.float16])  # the two have tiles of different sizes
CONTEXTS = st.sampled_from([0, 1, 15, 16, 17, 31, 32, 33, 64, 70])


@given(forests(max_batch=2, max_nodes=12), st.data())
@settings(max_examples=20)
def test_trees(forest: list[list[int]], data: st.DataObject) -> None:
    contexts = data.draw(st.lists(CONTEXTS, min_size=len(forest), max_size=len(forest)))
    ancestors, depth = words(forest)
    heads = data.draw(HEADS)
    case = Case.make(
        contexts, depth, ancestors, heads=heads, size=data.draw(st.sampled_from([8, 16, 24])),
        block_size=data.draw(st.sampled_from([1, 3, 16, 48])), dtype=data.draw(DTYPES),
    )  # fmt: skip
    sinks = data.draw(st.sampled_from([None, torch.linspace(-2, 3, heads[0])]))
    case.check(data.draw(st.sampled_from([None, 1, 2, 5, 40])), data.draw(st.sampled_from([None, 0.5, 5.0])), sinks)


@pytest.mark.parametrize("nodes", [1, 64, 65, 128])
def test_full_trees(nodes: int) -> None:
    """Two trees of up to two words, random and a chain."""
    generator = torch.Generator().manual_seed(nodes)
    tree = [0, *(int(torch.randint(0, node, (), generator=generator)) for node in range(1, nodes))]
    ancestors, depth = words([tree, [max(0, node - 1) for node in range(nodes)]])
    Case.make([37, 0], depth, ancestors, heads=(2, 1), dtype=torch.float16).check(window=9)


@given(st.lists(st.tuples(CONTEXTS, st.integers(0, 20)), min_size=1, max_size=2), HEADS, st.sampled_from([None, 1, 7, 50]), DTYPES)
@settings(max_examples=15)
def test_causal_chunks_of_uneven_length(
    chunks: list[tuple[int, int]], heads: tuple[int, int], window: int | None, dtype: torch.dtype
) -> None:
    contexts, counts = [list(part) for part in zip(*chunks, strict=True)]
    width = max(1, *counts)
    live = torch.arange(width) < torch.tensor(counts)[:, None]
    Case.make(contexts, torch.arange(width).expand(len(chunks), -1), None, live, heads=heads, block_size=5, dtype=dtype).check(window)


def test_a_chunk_of_several_row_tiles() -> None:
    Case.make([40], torch.arange(150)[None], None, heads=(2, 2)).check()


@pytest.mark.parametrize("first_column", [3, 12, 62])
def test_first_column(first_column: int) -> None:
    """Rows of a later level see some of the earlier levels' rows, which lie before them."""
    generator = torch.Generator().manual_seed(first_column)
    seen = torch.randint(0, 1 << first_column, (2, 1), generator=generator)
    Case.make([20, 0], torch.full((2, 1), 3), seen | 1 << first_column, first_column=first_column).check()


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("sinks", [None, torch.tensor([1.0, -1.0])])
def test_long_contexts_are_split_and_combined(window: int | None, sinks: Tensor | None) -> None:
    ancestors, depth = words([[0, 0, 1, 1, 2]] * 3)
    Case.make([255, 1030, 3], depth, ancestors, heads=(2, 1)).check(window, sinks=sinks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("chunk", [False, True])
def test_neighbours_change_no_bit(chunk: bool, dtype: torch.dtype) -> None:
    """A request alone and beside longer ones: the same bits, whether or not its batch has more splits."""
    contexts = [100, 700, 9]
    ancestors, depth = (None, torch.arange(6).expand(3, -1)) if chunk else words([[0, 0, 1, 1, 2, 4]] * 3)
    case = Case.make(contexts, depth, ancestors, heads=(2, 1), dtype=dtype)
    together = case.run()
    for i, context in enumerate(contexts):
        layout = replace(
            case.layout, block_tables=case.layout.block_tables[i, None], context_lens=torch.tensor([context]), depth=depth[i, None],
            ancestors=None if ancestors is None else ancestors[i, None], max_context=context,
        )  # fmt: skip
        alone = Case(case.q[i, None], case.k, case.v, layout).run()
        assert torch.equal(alone[0], together[i])
