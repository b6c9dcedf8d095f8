"""tree_mask, tree_attention and kv_commit against their references on one device: the CPU for the interpreter's tests, or a GPU."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from kernels.kv_commit import kv_commit_reference, kv_commit_triton
from kernels.tree_attention import tree_attention_reference, tree_attention_triton
from kernels.tree_layout import TreeLayout, physical_slots
from kernels.tree_mask import tree_mask_reference, tree_mask_triton

TOLERANCE = {torch.float32: 5e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}


def random_forest(batch: int, nodes: int, reach: int = 64) -> Tensor:
    """Parents int64 [B, N] in topological order, each at most ``reach`` nodes back."""
    generator = torch.Generator().manual_seed(batch + nodes + reach)
    node = torch.arange(nodes)
    back = torch.randint(1, reach + 1, (batch, nodes), generator=generator)
    return (node - back).clamp(min=0)


def shuffled_tables(batch: int, per_request: int, generator: torch.Generator) -> Tensor:
    """Block tables int64 [B, per_request] over all blocks but block 0."""
    return (torch.randperm(batch * per_request, generator=generator) + 1).view(batch, per_request)


def check_tree_mask(parent: Tensor, max_depth: int, run: Callable = tree_mask_triton) -> None:
    for ours, expected in zip(run(parent, max_depth), tree_mask_reference(parent, max_depth), strict=True):
        assert torch.equal(ours, expected)


@dataclass
class AttentionCase:
    """Random queries over a cache that is NaN in every slot without a row that somebody may see."""

    q: Tensor
    k: Tensor
    v: Tensor
    layout: TreeLayout
    kernel: Callable = tree_attention_triton

    @classmethod
    def make(
        cls, contexts: list[int], depth: Tensor, ancestors: Tensor | None, live: Tensor | None = None, first_column: int = 0,
        heads: tuple[int, int] = (4, 2), size: int = 16, block_size: int = 16, dtype: torch.dtype = torch.float32, device: str = "cpu",
        kernel: Callable = tree_attention_triton,
    ) -> "AttentionCase":  # fmt: skip
        generator = torch.Generator().manual_seed(sum(contexts) + depth.numel())
        batch, rows = depth.shape
        per_request = -(-(max(contexts) + first_column + rows) // block_size)
        tables = shuffled_tables(batch, per_request, generator)
        layout = TreeLayout(tables, torch.tensor(contexts), depth, ancestors, live, block_size, max(contexts), first_column)
        k, v = (torch.randn(1 + batch * per_request, block_size, heads[1], size, generator=generator) for _ in range(2))
        written = torch.zeros(len(k) * block_size, dtype=torch.bool)
        for request, context in enumerate(contexts):
            logical = torch.arange(context + first_column)[None]
            written[physical_slots(tables[request, None], logical, block_size)] = True
        written[layout.slots.flatten()] = True
        written[0] = False  # where padding rows go, which nobody may see
        for cache in (k, v):
            cache.view(-1, heads[1], size)[~written] = torch.nan
        q = torch.randn(batch, heads[0], rows, size, generator=generator).transpose(1, 2)  # as models have it
        parts = {part.name: getattr(layout, part.name) for part in fields(layout) if not part.name.startswith("_")}
        moved = {name: part.to(device) if isinstance(part, Tensor) else part for name, part in parts.items()}
        return cls(*(part.to(device, dtype) for part in (q, k, v)), TreeLayout(**moved), kernel)

    def run(self, window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None) -> Tensor:
        return self.kernel(self.q, self.k, self.v, self.layout, 1.2 * self.q.shape[3] ** -0.5, window, softcap, sinks)

    def check(self, window: int | None = None, softcap: float | None = None, with_sinks: bool = False) -> None:
        heads, size = self.q.shape[2:]
        sinks = torch.linspace(-2, 3, heads, device=self.q.device) if with_sinks else None
        ours = self.run(window, softcap, sinks).float()
        clean = (cache.nan_to_num(0.0).float() for cache in (self.k, self.v))
        expected = tree_attention_reference(self.q.float(), *clean, self.layout, 1.2 * size**-0.5, window, softcap, sinks)
        if self.layout.live is not None:
            expected[~self.layout.live] = 0
        tolerance = TOLERANCE[self.q.dtype]
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)

    def check_neighbours(self) -> None:
        """A request alone and in its batch: the same bits, whether or not the batch's longest request has more splits."""
        together = self.run()
        for i, context in enumerate(self.layout.context_lens.tolist()):
            own = {name: getattr(self.layout, name)[i, None] for name in ("block_tables", "context_lens", "depth")}
            ancestors = None if self.layout.ancestors is None else self.layout.ancestors[i, None]
            layout = replace(self.layout, ancestors=ancestors, max_context=context, _masks={}, **own)
            alone = AttentionCase(self.q[i, None], self.k, self.v, layout, self.kernel).run()
            assert torch.equal(alone[0], together[i])


def check_kv_commit(
    contexts: list[int], path: Tensor, nodes: int, block_size: int, layers: int, heads: tuple[int, int], dtype: torch.dtype, device: str,
    run: Callable = kv_commit_triton,
) -> None:  # fmt: skip
    """path: int64 [B, D + 1] over ``nodes`` nodes."""
    generator = torch.Generator().manual_seed(nodes)
    per_request = -(-(max(contexts) + nodes) // block_size)
    tables = shuffled_tables(len(contexts), per_request, generator)
    shape = (layers, 1 + tables.numel(), block_size, *heads)
    k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    expected = k.clone(), v.clone()
    others = tables.to(device), torch.tensor(contexts, device=device), path.to(device)
    kv_commit_reference(*expected, *others)
    run(k, v, *others)
    assert torch.equal(k, expected[0])
    assert torch.equal(v, expected[1])
