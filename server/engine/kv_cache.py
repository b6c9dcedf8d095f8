"""The paged KV pool: blocks, block tables, and the tensors of target and draft."""

import torch
from torch import Tensor

from server.engine.config import EngineError

PADDING_BLOCK = 0  # takes the K and V of padding rows; never given to a request


class PagedTensors:
    """K and V of some layers, [layers, blocks, block, kv heads, head size] each."""

    def __init__(
        self, layers: int, blocks: int, block_size: int, kv_heads: int, head_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (layers, blocks, block_size, kv_heads, head_size)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor, live: Tensor | None) -> None:
        """Store k, v [T, kv heads, head size] at physical ``slots`` int64 [T].

        Padding rows (``live`` [B, N] False) store zeros: others read the padding block, masked, but a mask does not stop a NaN.
        """
        if live is not None:
            padding = ~live.flatten()[:, None, None]
            k, v = k.masked_fill(padding, 0), v.masked_fill(padding, 0)
        self.k[layer].view(-1, *k.shape[1:])[slots] = k
        self.v[layer].view(-1, *v.shape[1:])[slots] = v

    def clear(self, blocks: list[int]) -> None:
        self.k[:, blocks] = 0
        self.v[:, blocks] = 0


class BlockPool:
    """Which request owns which blocks. One row of ``tables`` per running request; target and draft share the tables."""

    def __init__(self, num_blocks: int, block_size: int, max_seqs: int, max_slots: int, device: torch.device) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.tables = torch.full((max_seqs, -(-max_slots // block_size)), PADDING_BLOCK, dtype=torch.long, device=device)
        self._free_blocks = list(range(num_blocks - 1, PADDING_BLOCK, -1))
        self._free_rows = list(range(max_seqs - 1, -1, -1))
        self._owned: dict[int, list[int]] = {}

    @property
    def usage(self) -> float:
        """Share of the blocks in use, 0..1."""
        return 1 - len(self._free_blocks) / (self.num_blocks - 1)

    @property
    def capacity(self) -> int:
        """Slots that a single request could get."""
        return min(self.num_blocks - 1, self.tables.shape[1]) * self.block_size

    def allocate(self, slots: int) -> int | None:
        """Reserve ``slots`` logical slots; return the row of ``tables``, or None when rows or blocks are short now."""
        count = -(-slots // self.block_size)
        if not self._free_rows or count > len(self._free_blocks):
            return None
        row = self._free_rows.pop()
        self._owned[row] = [self._free_blocks.pop() for _ in range(count)]
        self.tables[row] = PADDING_BLOCK
        self.tables[row, :count] = torch.tensor(self._owned[row], device=self.tables.device)
        return row

    def blocks(self, row: int) -> list[int]:
        return self._owned[row]

    def release(self, row: int) -> None:
        self._free_blocks += self._owned.pop(row)
        self._free_rows.append(row)


def choose_num_blocks(bytes_per_token: int, block_size: int, wanted_tokens: int, memory: int | None, device: torch.device) -> int:
    """Blocks that ``memory`` bytes hold. None: what ``wanted_tokens`` need, at most 4 GiB on CPU, 80 % of what is free on CUDA."""
    per_block = bytes_per_token * block_size
    if memory is None:
        limit = int(0.8 * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 4 << 30
        memory = min(limit, per_block * (-(-wanted_tokens // block_size) + 1))
    blocks = memory // per_block
    if blocks < 2:
        raise EngineError(f"kv_cache_memory of {memory} bytes holds {blocks} blocks of {per_block} bytes: at least 2 are needed")
    return int(blocks)
