"""The pool of blocks, by itself: whatever requests do, no block has two meanings and none is lost."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from server.engine.kv_cache import PADDING_BLOCK, BlockPool
from server.engine.prefix_cache import extend_keys

BLOCK, BLOCKS, ROWS, LONGEST = 2, 9, 4, 12


def pool_of(blocks: int = BLOCKS) -> BlockPool:
    return BlockPool(blocks, BLOCK, ROWS, LONGEST, torch.device("cpu"))


def keys_of(tokens: list[int], salt: str | None = None) -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, tokens, BLOCK, salt)
    return keys


class PoolMachine(RuleBasedStateMachine):
    """Requests of few different tokens come, fill their blocks, fail and go. ``written``: what each block holds."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = pool_of()
        self.running: dict[int, tuple[list[int], int]] = {}  # row -> tokens, blocks filled
        self.written: dict[int, tuple[int, ...]] = {}  # block -> all tokens up to its end and the next one

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=LONGEST))
    def start(self, tokens: list[int]) -> None:
        keys = keys_of(tokens)
        prefix = []
        for key in keys:
            block = self.pool.find(key)
            if block is None:
                break
            prefix.append(block)
        owned = {block for row in self.running for block in self.blocks(row)}
        need = -(-len(tokens) // BLOCK) - len(prefix)
        row = self.pool.allocate(len(tokens), prefix)
        assert (row is not None) == (len(self.running) < ROWS and need <= BLOCKS - 1 - len(owned | set(prefix)))
        if row is None:
            return
        blocks = self.blocks(row)
        assert blocks[: len(prefix)] == prefix
        assert len(blocks) == -(-len(tokens) // BLOCK)
        assert not set(blocks[len(prefix) :]) & owned, "a block that another request owns was given away"
        for i, block in enumerate(prefix):
            assert self.written[block] == tuple(tokens[: (i + 1) * BLOCK + 1])
        for block in blocks[len(prefix) :]:
            self.written[block] = ()
        self.running[row] = tokens, len(prefix)

    def blocks(self, row: int) -> list[int]:
        return [block for block in self.pool.tables[row].tolist() if block != PADDING_BLOCK]

    def pick(self, which: int) -> int | None:
        return sorted(self.running)[which % len(self.running)] if self.running else None

    @rule(which=st.integers(0, ROWS))
    def fill(self, which: int) -> None:
        """The next block is full and gets its key."""
        row = self.pick(which)
        if row is None or self.running[row][1] == len(keys_of(self.running[row][0])):
            return
        tokens, filled = self.running[row]
        block = self.blocks(row)[filled]
        assert not self.written[block], "a full block was written again"
        self.written[block] = tuple(tokens[: (filled + 1) * BLOCK + 1])
        self.pool.set_key(row, filled, keys_of(tokens)[filled])
        self.running[row] = tokens, filled + 1

    @rule(which=st.integers(0, ROWS), failed=st.booleans())
    def leave(self, which: int, failed: bool) -> None:
        row = self.pick(which)
        if row is None:
            return
        blocks = self.blocks(row)
        others = {block for other in self.running if other != row for block in self.blocks(other)}
        if failed:
            self.pool.forget(row)
            assert set(self.pool.unnamed(row)) >= set(blocks) - others
        assert not set(self.pool.unnamed(row)) & others, "what is cleared belongs to this request alone"
        self.pool.release(row)
        del self.running[row]

    @invariant()
    def every_block_is_counted_once(self) -> None:
        pool = self.pool
        owned = {block for row in self.running for block in self.blocks(row)}
        free, kept = set(pool._free_blocks), set(pool._kept)
        assert len(free) == len(pool._free_blocks)
        assert sorted([*owned, *free, *kept]) == list(range(1, BLOCKS))
        assert pool.usage == len(owned) / (BLOCKS - 1)
        owners = [sum(block in self.blocks(row) for row in self.running) for block in range(1, BLOCKS)]
        assert pool._owners[1:] == owners
        assert kept <= set(pool._keys)
        assert not free & set(pool._keys)
        assert {key: block for block, key in pool._keys.items()} == pool._by_key


PoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


def test_a_key_is_the_whole_prefix_and_the_next_token() -> None:
    tokens = [1, 2, 3, 4, 5]
    first, second = keys_of(tokens)
    assert keys_of([*tokens, 6, 7])[:2] == [first, second]
    assert len(keys_of(tokens[:4])) == 1, "the token after the second block is not known"
    assert keys_of([1, 2, 9])[0] != first, "another token after the block"
    assert keys_of([9, 2, 3, 4, 5])[1] != second, "another token before the block"
    assert keys_of(tokens, "salt")[0] not in (first, keys_of(tokens, "other")[0], keys_of(tokens, "None")[0])
    assert keys_of(tokens, "None")[0] != first


def finished(pool: BlockPool, tokens: list[int]) -> list[bytes]:
    """A request that came, computed everything and went."""
    keys = keys_of(tokens)
    row = pool.allocate(len(tokens))
    assert row is not None
    for index, key in enumerate(keys):
        pool.set_key(row, index, key)
    pool.release(row)
    return keys


def test_blocks_are_taken_least_recently_used_first_and_ends_before_beginnings() -> None:
    pool = pool_of(8)  # seven for requests
    old, new = finished(pool, [1, 1, 1, 1, 1]), finished(pool, [2, 2, 2, 2, 2])  # two full blocks each, and one that is not
    assert pool.usage == 0

    def known(keys: list[bytes]) -> list[bool]:
        return [pool.find(key) is not None for key in keys]

    fresh = [pool.allocate(3 * BLOCK)]
    assert known(old) == known(new) == [True, True], "blocks without a key go first"
    fresh.append(pool.allocate(BLOCK))
    assert (known(old), known(new)) == ([True, False], [True, True]), "then the end of what was released first"
    again = pool.allocate(BLOCK, [block for block in [pool.find(old[0])] if block is not None])
    for row in (again, *fresh):
        assert row is not None
        pool.release(row)
    pool.allocate(6 * BLOCK)
    assert (known(old), known(new)) == ([True, False], [False, False]), "the old beginning was used again"


def test_what_is_forgotten_leaves_the_blocks_in_order() -> None:
    """Blocks that follow one another are read faster."""
    pool = pool_of(12)
    rows = [pool.allocate(2 * BLOCK, [], spare=0) for _ in range(3)]
    for row in (rows[1], rows[0], rows[2]):
        assert row is not None
        pool.release(row)
    pool.forget_all()
    row = pool.allocate(4 * BLOCK, [], spare=0)
    assert row is not None
    assert pool.tables[row, :4].tolist() == [1, 2, 3, 4]
