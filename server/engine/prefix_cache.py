"""Prompts that begin alike share the blocks of their beginning."""

import hashlib
from array import array
from itertools import takewhile

from server.engine.kv_cache import BlockPool
from server.engine.request import Request


class PrefixCache:
    """Finds the blocks that a new request may take over, and offers those that a request has filled.

    Row i of the draft's cache depends on token i + 1, so a block is known by its tokens, all before them, and the one after them. A
    hit is then right for target and draft, and leaves at least one token to compute, whose row gives the logits and the head's state.
    """

    def __init__(self, pool: BlockPool, enabled: bool) -> None:
        self.pool, self.enabled = pool, enabled

    def find(self, request: Request) -> list[int]:
        """The blocks, in order, that hold the beginning of what the request must compute; none if the prompt's own rows are asked for."""
        if not self.enabled or request.params.prompt_logprobs is not None:
            return []
        self._extend_keys(request)
        keys = request.block_keys[: (request.prefill_len - 1) // self.pool.block_size]  # the last row's state is the draft's
        blocks = map(self.pool.find, keys)
        return [block for block in takewhile(lambda block: block is not None, blocks) if block is not None]

    def offer(self, request: Request, rows: int) -> None:
        """Name the blocks that the first ``rows`` rows fill, which target and draft have written and which are known to be sound."""
        full = rows // self.pool.block_size if self.enabled else 0
        if full > request.num_offered:
            self._extend_keys(request)
            for index in range(request.num_offered, full):
                self.pool.set_key(request.row, index, request.block_keys[index])
            request.num_offered = full

    def _extend_keys(self, request: Request) -> None:
        extend_keys(request.block_keys, request.token_ids, self.pool.block_size, request.params.cache_salt)


def extend_keys(keys: list[bytes], tokens: list[int], block_size: int, salt: str | None) -> None:
    """Append the keys of all further blocks that ``tokens`` fill and follow with one token more.

    A key is a cryptographic hash of the key before and of ``block_size`` + 1 tokens: equal keys mean equal tokens from the first one
    on, whatever clients send. Requests of different salts share nothing.
    """
    for start in range(len(keys) * block_size, len(tokens) - block_size, block_size):
        before = keys[-1] if keys else hashlib.blake2b(repr(salt).encode()).digest()
        packed = array("q", tokens[start : start + block_size + 1]).tobytes()
        keys.append(hashlib.blake2b(before + packed).digest())
