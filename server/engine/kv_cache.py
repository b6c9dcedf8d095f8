"""The paged KV pool: blocks, block tables, and the tensors of target and draft."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.rope_store import store_kv
from server.engine.config import EngineError
from server.engine.host import on_device

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
        """``store_kv`` in the caches of ``layer``."""
        store_kv(self.k[layer], self.v[layer], slots, k, v, live)

    def clear(self, blocks: list[int]) -> None:
        self.k[:, blocks] = 0
        self.v[:, blocks] = 0


class BlockPool:
    """Which requests own which blocks, and what the blocks hold.

    One row of ``tables`` per running request; target and draft share the tables. A block with a key is full and never written again:
    several rows may own it. Without an owner it is kept until a block is needed, the one that was released first going first.
    """

    def __init__(self, num_blocks: int, block_size: int, max_seqs: int, max_slots: int, device: torch.device) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.tables = torch.full((max_seqs, -(-max_slots // block_size)), PADDING_BLOCK, dtype=torch.long, device=device)
        self._free_rows = list(range(max_seqs - 1, -1, -1))
        self._owned: dict[int, list[int]] = {}
        self._owners = [0] * num_blocks
        self._free_blocks = list(range(num_blocks - 1, PADDING_BLOCK, -1))  # without a key
        self._kept: dict[int, None] = {}  # with a key and without an owner, in the order of their release
        self._keys: dict[int, bytes] = {}
        self._by_key: dict[bytes, int] = {}

    @property
    def usage(self) -> float:
        """Share of the blocks that requests own, 0..1."""
        return 1 - self.available / (self.num_blocks - 1)

    @property
    def capacity(self) -> int:
        """Slots that a single request could get."""
        return min(self.num_blocks - 1, self.tables.shape[1]) * self.block_size

    @property
    def available(self) -> int:
        """Blocks that nobody owns."""
        return len(self._free_blocks) + len(self._kept)

    def find(self, key: bytes) -> int | None:
        """The block that holds what ``key`` stands for."""
        return self._by_key.get(key)

    def allocate(self, slots: int, prefix: Sequence[int] = (), spare: int = 0) -> int | None:
        """Reserve ``slots`` logical slots that begin with the blocks ``prefix``, found a moment ago, and leave ``spare`` blocks.

        Returns the row of ``tables``, or None when rows or blocks are short now.
        """
        fresh = -(-slots // self.block_size) - len(prefix)
        if not self._free_rows or fresh + spare > self.available - sum(block in self._kept for block in prefix):
            return None
        for block in prefix:
            self._kept.pop(block, None)
        row = self._free_rows.pop()
        owned = self._owned[row] = [*prefix, *(self._take() for _ in range(fresh))]
        for block in owned:
            self._owners[block] += 1
        self.tables[row] = PADDING_BLOCK
        self.tables[row, : len(owned)] = on_device(owned, self.tables.device)
        return row

    def grow(self, row: int, slots: int) -> bool:
        """Let ``row`` have ``slots`` logical slots in all; False, and nothing changed, when blocks are short now."""
        owned = self._owned[row]
        missing = -(-slots // self.block_size) - len(owned)
        if missing > self.available:
            return False
        for _ in range(missing):
            block = self._take()
            self._owners[block] += 1
            self.tables[row, len(owned)].fill_(block)  # an assignment would wait for the device
            owned.append(block)
        return True

    def _take(self) -> int:
        if self._free_blocks:
            return self._free_blocks.pop()
        block = next(iter(self._kept))
        del self._kept[block], self._by_key[self._keys.pop(block)]
        return block

    def slots(self, row: int, first: int, count: int) -> list[int]:
        """The physical slots of a row's ``count`` logical ones from ``first`` on."""
        size, found = self.block_size, list[int]()
        for block in self._owned[row][first // size : -(-(first + count) // size)]:
            found += range(block * size, (block + 1) * size)
        return found[first % size : first % size + count]

    def set_key(self, row: int, index: int, key: bytes) -> None:
        """Say what a row's block number ``index`` holds. A key that another block has already is not given twice."""
        block = self._owned[row][index]
        if key not in self._by_key and block not in self._keys:
            self._keys[block], self._by_key[key] = key, block

    def forget(self, row: int) -> None:
        """Take the keys of all blocks that this row alone owns."""
        for block in self._owned[row]:
            if self._owners[block] == 1 and block in self._keys:
                del self._by_key[self._keys.pop(block)]

    def forget_all(self) -> None:
        """Take all keys, of blocks that nobody owns as well."""
        self._free_blocks = sorted((*self._free_blocks, *self._kept), reverse=True)  # as at first: what follows one another is read faster
        for found in (self._kept, self._keys, self._by_key):
            found.clear()

    def unnamed(self, row: int) -> list[int]:
        """The row's blocks without a key."""
        return [block for block in self._owned[row] if block not in self._keys]

    def release(self, row: int) -> None:
        """The row's end is the first to be kept no longer: what comes before it serves more requests."""
        for block in reversed(self._owned.pop(row)):
            self._owners[block] -= 1
            if self._owners[block] == 0 and block in self._keys:
                self._kept[block] = None
            elif self._owners[block] == 0:
                self._free_blocks.append(block)
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
