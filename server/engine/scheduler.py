"""Who runs: first come, first served, within the rows and blocks that there are."""

from collections import deque

from server.engine.kv_cache import BlockPool
from server.engine.prefix_cache import PrefixCache
from server.engine.prompts import PIECE
from server.engine.request import Request
from server.engine.types import StepStats

PREFILL_ROWS = 512  # prompt tokens of one forward pass on a CPU, padding included,
GPU_PREFILL_ROWS = 2048  # and on a GPU, which computes many at once faster


class Scheduler:
    """First come, first served. A request runs when the pool has blocks for what it must compute first; when blocks run out later, the
    request that came last waits again and is computed anew. ``in_pieces``: prompts are padded to whole pieces, else to the longest.
    """

    def __init__(self, pool: BlockPool, prefix_cache: PrefixCache, lookahead: int, in_pieces: bool) -> None:
        self.pool, self.prefix_cache, self.lookahead, self.in_pieces = pool, prefix_cache, lookahead, in_pieces
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def admit(self, now: float, stats: StepStats) -> None:
        """Move requests from waiting to running, in order, while the pool has their blocks and one more for each that runs already."""
        while self.waiting:
            request = self.waiting[0]
            prefix = self.prefix_cache.find(request)
            row = self.pool.allocate(request.prefill_len + self.lookahead, prefix, spare=len(self.running))
            if row is None:
                return
            first_time = request.scheduled is None
            self.running.append(self.waiting.popleft())
            request.start(row, len(prefix), self.pool.block_size, now)
            if first_time and self.prefix_cache.enabled and request.params.prompt_logprobs is None:
                stats.prefix_cache_queries += request.prompt_len
                stats.prefix_cache_hits += request.num_cached_tokens

    def make_room(self) -> Request | None:
        """Give every decoding request the blocks that a step may write to. Returns the request to preempt where they are short: the one
        that came last, so that the first always goes on; then ask again.
        """
        for request in self.running:
            if not request.prefilling and not self.pool.grow(request.row, request.context_len + self.lookahead):
                return self.running[-1]
        return None

    def preempt(self, request: Request) -> None:
        """Let a running request wait again, ahead of all that came after it."""
        self.running.remove(request)
        self.pool.release(request.row)
        request.preempt()
        self.waiting.appendleft(request)

    def next_prefill(self) -> tuple[list[Request], int]:
        """Requests whose next prompt chunk is computed now, and the most tokens of a chunk; in all, padding included, so many rows as are
        computed at once.
        """
        most = GPU_PREFILL_ROWS if self.pool.tables.is_cuda else PREFILL_ROWS
        batch: list[Request] = []
        width = rows = 0
        for request in self.running:
            if request.prefilling:
                own = min(request.prefill_len - request.context_len, most)
                rows = rows + -(-own // PIECE) * PIECE if self.in_pieces else max(width, own) * (len(batch) + 1)
                if rows > most:
                    break
                batch.append(request)
                width = max(width, own)
        return batch, width

    def decoding(self) -> list[Request]:
        return [request for request in self.running if not request.prefilling]

    def remove(self, request: Request) -> None:
        """Forget a request, waiting or running; its row and blocks are free at once."""
        if request in self.running:
            self.running.remove(request)
            self.pool.release(request.row)
        elif request in self.waiting:
            self.waiting.remove(request)
