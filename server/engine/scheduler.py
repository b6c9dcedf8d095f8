"""Who runs: first come, first served, within the rows and blocks that there are."""

from collections import deque

from server.engine.kv_cache import BlockPool
from server.engine.request import Request

PREFILL_ROWS = 512  # prompt tokens of one forward pass, padding included


class Scheduler:
    """Requests wait until the pool holds all that they can ever need, so a running request never runs out of blocks."""

    def __init__(self, pool: BlockPool, lookahead: int) -> None:
        self.pool, self.lookahead = pool, lookahead
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def slots(self, request: Request) -> int:
        """Slots that a request can need: its tokens and the tree nodes beyond them."""
        return request.max_len + self.lookahead

    def admit(self, now: float) -> None:
        """Move requests from waiting to running, in order, as far as the pool allows."""
        while self.waiting:
            row = self.pool.allocate(self.slots(self.waiting[0]))
            if row is None:
                return
            request = self.waiting.popleft()
            request.row, request.scheduled = row, now
            self.running.append(request)

    def next_prefill(self) -> tuple[list[Request], int]:
        """Requests whose next prompt chunk is computed now, and the chunk's width: at most PREFILL_ROWS rows, padding included."""
        batch: list[Request] = []
        width = 0
        for request in self.running:
            if request.prefilling:
                wanted = max(width, min(request.prompt_len - request.context_len, PREFILL_ROWS))
                if wanted * (len(batch) + 1) > PREFILL_ROWS:
                    break
                batch.append(request)
                width = wanted
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
