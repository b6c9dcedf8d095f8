"""Where the new rows of a forward pass live in the paged cache, and which columns each of them sees."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Words(NamedTuple):
    """A layout as native/attention.h has it, int64 [16], and the tensors whose addresses are in it."""

    own: Tensor
    parts: tuple[Tensor | None, ...]


@dataclass
class TreeLayout:
    """Where the rows of one forward pass live and what they may see; the same for every layer.

    Row i of request b is stored at logical slot ``context_lens[b] + i``; logical slot s lives in block ``block_tables[b, s // block]``.
    It sees the whole committed context, and of the new rows those named by its ancestor word (``ancestors`` given), or rows
    0..i (``ancestors`` None: a prefill chunk). Its position is ``context_lens[b] + depth[b, i]``: siblings share a position, so a
    sliding window is a matter of positions and not of slots. Rows with ``live`` False are padding: block 0 takes their K and V.
    A window needs the depths of all rows since the context, and thus ``first_column`` 0.
    """

    block_tables: Tensor  # int64 [B, M]
    context_lens: Tensor  # int64 [B]
    depth: Tensor  # int64 [B, N]
    ancestors: Tensor | None  # int64 [B, N], or [B, N, words] as in ``tree_mask``
    live: Tensor | None  # bool [B, N], None: all
    block_size: int
    max_context: int  # >= context_lens.max(), known on the host so that nothing waits for the device
    first_column: int = 0  # new rows start so many slots after the context; before them lie earlier rows of the same tree (drafting)
    _masks: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)

    @cached_property
    def positions(self) -> Tensor:
        """int64 [B, N]"""
        return self.context_lens[:, None] + self.depth

    @cached_property
    def slots(self) -> Tensor:
        """Physical slots of the new rows, int64 [B, N]; padding rows map to slot 0."""
        rows = torch.arange(self.depth.shape[1], device=self.depth.device) + self.first_column
        slots = physical_slots(self.block_tables, self.context_lens[:, None] + rows, self.block_size)
        return slots if self.live is None else torch.where(self.live, slots, 0)

    @cached_property
    def num_blocks(self) -> int:
        """Blocks per request that hold any visible column."""
        needed = -(-(self.max_context + self.first_column + self.depth.shape[1]) // self.block_size)
        return min(needed, self.block_tables.shape[1])

    @cached_property
    def only_run(self) -> int | None:
        """The first of ``num_blocks`` blocks that follow one another, if there is one request and its blocks do; on a CPU alone."""
        if len(self.block_tables) > 1:
            return None
        first, *others = self.block_tables[0, : self.num_blocks].tolist()
        return first if others == list(range(first + 1, first + self.num_blocks)) else None

    @cached_property
    def live_rows(self) -> Tensor:
        """The live ones of the flat B * N rows, int64 [R]."""
        assert self.live is not None
        return self.live.flatten().nonzero()[:, 0]

    @cached_property
    def live_counts(self) -> tuple[Tensor, Tensor]:
        """Of each request's live rows the first among ``live_rows``, and how many they are, int64 [B] each."""
        assert self.live is not None
        counts = self.live.sum(1)
        return counts.cumsum(0) - counts, counts

    @cached_property
    def words(self) -> "Words":
        """For the CPU's kernels."""
        depth = self.depth if self.depth.stride(1) == 1 else self.depth.contiguous()
        ancestors = None if self.ancestors is None else self.ancestors.contiguous()
        rows = (None, None, None) if self.live is None else (*self.live_counts, self.live_rows)
        parts = self.block_tables, self.context_lens.contiguous(), depth, ancestors, *rows
        bits = 0 if ancestors is None else ancestors.numel() // depth.numel()
        sizes = self.block_tables.stride(0), self.block_tables.shape[1], depth.stride(0), bits, *depth.shape
        addresses = [0 if part is None else part.data_ptr() for part in parts]
        return Words(torch.tensor([*addresses, *sizes, self.block_size, self.first_column, 0]), parts)

    @cached_property
    def columns(self) -> Tensor:
        """Columns of the first ``num_blocks`` blocks, counted from the end of each context, int64 [B, L]: negative ones are committed."""
        columns = torch.arange(self.num_blocks * self.block_size, device=self.depth.device)
        return columns - self.context_lens[:, None]

    def part(self, first: int, count: int, ancestors: Tensor) -> "TreeLayout":
        """Rows ``first`` to ``first + count`` alone, the rows before them being in the cache already; ancestors int64 [B, count]."""
        rows = slice(first, first + count)
        part = TreeLayout(
            self.block_tables, self.context_lens, self.depth[:, rows], ancestors, None, self.block_size, self.max_context, first
        )
        part.columns, part.num_blocks = self.columns, self.num_blocks
        return part

    def mask(self, window: int | None, group: int, dtype: torch.dtype) -> Tensor:
        """Additive mask [B, 1, group * N, L] over the columns of the first ``num_blocks`` blocks, built once for all layers of a kind."""
        if (window, group) not in self._masks:
            visible = self._visible(window)
            mask = torch.zeros((), dtype=dtype, device=visible.device).where(visible, float("-inf"))
            self._masks[window, group] = mask[:, None, None].expand(-1, 1, group, -1, -1).flatten(2, 3)
        return self._masks[window, group]

    def _visible(self, window: int | None) -> Tensor:
        node = self.columns
        if self.ancestors is None:
            rows = torch.arange(self.depth.shape[1], device=self.depth.device)
            visible = node[:, None] <= rows[:, None]
        else:
            visible = (node < 0)[:, None]
            for first, word in zip(range(0, 128, 64), self.ancestors.view(*self.depth.shape, -1).unbind(2), strict=False):
                # Words have no bit beyond the last row; a shift past the word would read its last bit, which 64 rows may set.
                bits = (word[:, :, None] >> (node - first).clamp(0, 63)[:, None]) & ((node >= first) & (node < first + 64))[:, None]
                visible = visible | bits.bool()
        if window is not None:
            # A column's position: its slot in the context, context + depth among the new rows.
            depth = self.depth.gather(1, node.clamp(0, self.depth.shape[1] - 1))
            position = self.context_lens[:, None] + torch.where(node < 0, node, depth)
            visible = visible & (position[:, None] > (self.positions - window)[:, :, None])
        return visible


class Rows(NamedTuple):
    """New rows of some requests in one forward pass; their K and V go to the layout's slots."""

    tokens: Tensor  # int64 [B, N]
    layout: TreeLayout
    keep: Tensor | None = None  # the flat rows int64 [K], ascending and live, whose logits are wanted; None: all


def physical_slots(block_tables: Tensor, logical: Tensor, block_size: int) -> Tensor:
    """Logical slots int64 [B, S] -> physical slots int64 [B, S]."""
    block = (logical // block_size).clamp(0, block_tables.shape[1] - 1)
    return block_tables.gather(1, block) * block_size + logical % block_size
