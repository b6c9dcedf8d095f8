"""Where the new rows of a forward pass live in the paged cache, and which columns each of them sees."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class TreeLayout:
    """Where the rows of one forward pass live and what they may see; the same for every layer.

    Row i of request b is stored at logical slot ``context_lens[b] + i``; logical slot s lives in block ``block_tables[b, s // block]``.
    It sees the whole committed context, and of the new rows those named by its ancestor word (``ancestors`` given), or rows
    0..i (``ancestors`` None: a prefill chunk). Its position is ``context_lens[b] + depth[b, i]``: siblings share a position, so a
    sliding window is a matter of positions and not of slots. Rows with ``live`` False are padding: block 0 takes their K and V.
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

    @property
    def positions(self) -> Tensor:
        """int64 [B, N]"""
        return self.context_lens[:, None] + self.depth

    def slots(self) -> Tensor:
        """Physical slots of the new rows, int64 [B, N]; padding rows map to slot 0."""
        rows = torch.arange(self.depth.shape[1], device=self.depth.device) + self.first_column
        slots = physical_slots(self.block_tables, self.context_lens[:, None] + rows, self.block_size)
        return slots if self.live is None else torch.where(self.live, slots, 0)

    def num_blocks(self) -> int:
        """Blocks per request that hold any visible column."""
        return -(-(self.max_context + self.first_column + self.depth.shape[1]) // self.block_size)

    def mask(self, window: int | None, group: int, dtype: torch.dtype) -> Tensor:
        """Additive mask [B, 1, group * N, L] over the columns of the first ``num_blocks`` blocks, built once for all layers of a kind."""
        if (window, group) not in self._masks:
            mask = torch.zeros((), dtype=dtype, device=self.depth.device).where(self._visible(window), float("-inf"))
            self._masks[window, group] = mask[:, None].repeat(1, 1, group, 1)
        return self._masks[window, group]

    def _visible(self, window: int | None) -> Tensor:
        columns = torch.arange(self.num_blocks() * self.block_size, device=self.depth.device)
        node = columns - self.context_lens[:, None]  # [B, L], negative: committed context
        count = self.first_column + self.depth.shape[1]
        if self.ancestors is None:
            rows = torch.arange(self.depth.shape[1], device=self.depth.device)
            visible = node[:, None, :] <= rows[:, None]
        else:
            visible = (node < 0)[:, None, :]
            for first, word in zip(range(0, count, 64), self.ancestors.view(*self.depth.shape, -1).unbind(2), strict=False):
                bits = (word[:, :, None] >> (node - first).clamp(0, 63)[:, None, :]) & 1
                visible = visible | ((bits == 1) & ((node >= first) & (node < min(count, first + 64)))[:, None, :])
        if window is not None:
            # A column's position: its slot in the context, context + depth among the new rows.
            depth = self.depth.gather(1, node.clamp(0, self.depth.shape[1] - 1))
            position = torch.where(node < 0, columns, self.context_lens[:, None] + depth)
            visible = visible & (position[:, None, :] > (self.positions - window)[:, :, None])
        return visible


def physical_slots(block_tables: Tensor, logical: Tensor, block_size: int) -> Tensor:
    """Logical slots int64 [B, S] -> physical slots int64 [B, S]."""
    block = (logical // block_size).clamp(0, block_tables.shape[1] - 1)
    return block_tables.gather(1, block) * block_size + logical % block_size
