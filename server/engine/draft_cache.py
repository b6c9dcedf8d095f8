"""The rows of running requests in the draft head's cache, which follows what is committed."""

import logging
import time
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from kernels.tree_mask import MAX_NODES
from server.engine.drafter import Drafter, Told
from server.engine.host import on_device
from server.engine.kv_cache import BlockPool
from server.engine.request import Piece, Request

logger = logging.getLogger(__name__)
MAX_PENDING_BYTES = 8 << 20  # features per request that may wait for the draft cache while speculation is off,
PENDING_ROWS = 4  # and rows of them by graphs, where a step that drafts should not have to catch up first


class DraftCache:
    """Brings it up to date with the target's true features, which requests keep meanwhile (``Request.pending``)."""

    def __init__(self, drafter: Drafter, pool: BlockPool) -> None:
        self.drafter, self.pool, self.device = drafter, pool, pool.tables.device
        self._unbounded = 0  # further steps after which no request can have more rows that wait than it may, but for prompts
        # Batches stay as they are for many steps.
        self._told = lru_cache(maxsize=16)(lambda temperatures: Told(drafter.head, on_device([*temperatures], self.device, torch.float32)))

    def sync(self, requests: list[Request]) -> None:
        """Bring the draft cache up to the committed tokens, with the target's true features."""
        behind = [request for request in requests if request.pending]
        if not behind:
            return
        # A request that ended may have fewer tokens than were accepted.
        features = [rows for request in behind for rows in _first(request.pending, request.num_pending)]
        self.extend(behind, [request.context_len for request in behind], features, None)
        for request in behind:
            request.draft_len = request.context_len
            request.pending.clear()

    def extend(self, requests: list[Request], ends: list[int], features: list[Tensor], newest: Tensor | None) -> None:
        """Bring the draft caches up to ``ends``; features: pieces of all rows in order; newest int64 [B]: the tokens at the ends, where the
        host does not know them.
        """
        if newest is None and self.drafter.catches_up_at_once:
            starts = [request.draft_len for request in requests]
            tokens = [
                token for request, start, end in zip(requests, starts, ends, strict=True) for token in _following(request, start, end)
            ]
            rows, first, behind = on_device([[request.row for request in requests], starts, ends], self.device).unbind(0)
            own = on_device(tokens, self.device)
            self.drafter.catch_up(torch.cat(features), own, rows, first, behind, self.pool.tables, self.told(requests))
            return
        entries = self._entries(requests, ends)
        last = [end - 1 for end in accumulate(end - request.draft_len for request, end in zip(requests, ends, strict=True))]
        rows, last_rows, lengths = on_device([[request.row for request in requests], last, ends], self.device)
        following = entries[1] if newest is None else entries[1].index_copy(0, last_rows, newest)
        self.drafter.extend(
            rows + 1, torch.cat(features), following, entries[0], entries[2], last_rows, self.pool.tables[rows], lengths - 1,
            self.told(requests).temperature, max(ends) - 1,
        )  # fmt: skip

    def _entries(self, requests: list[Request], ends: list[int]) -> Tensor:
        """Positions, next tokens and physical slots of the rows between the draft caches and ``ends``, int64 [3, M]."""
        positions, tokens, slots = list[int](), list[int](), list[int]()
        for request, end in zip(requests, ends, strict=True):
            first = request.draft_len
            positions += range(first, end)
            tokens += _following(request, first, end)
            slots += self.pool.slots(request.row, first, end - first)
        return on_device([positions, tokens, slots], self.device)

    def sync_seconds(self, requests: list[Request], rows: int) -> float:
        """How long it takes when each request is so many rows behind; nothing true is left of them in its draft cache."""
        self.sync(requests)
        for request in requests:
            behind = min(rows, request.draft_len)
            request.draft_len -= behind
            request.pending.append(Piece(torch.zeros(behind, self.drafter.head.fc.in_features, device=self.device), 0, behind))
        start = time.perf_counter()
        self.sync(requests)
        self.drafter.state[0].tolist()  # wait for the device
        return time.perf_counter() - start

    def complete_blocks(self, request: Request) -> None:
        """Before a request leaves: bring its draft cache up to date if that fills a block."""
        if request.context_len // self.pool.block_size > request.draft_len // self.pool.block_size:
            try:
                self.sync([request])
            except Exception:
                logger.exception("the draft cache of %s was not completed", request.request_id)

    def bound(self, requests: list[Request]) -> None:
        """While speculation is off, features wait, since many rows at once cost little; this keeps their memory bounded. Who has half as
        many as may wait goes along, so that it is seldom. By graphs few wait, and keys and values follow closely.
        """
        if self.drafter.graphs is not None:
            self._write_all_but_last([request for request in requests if request.num_pending > PENDING_ROWS])
            return
        if self._unbounded:
            self._unbounded -= 1
            return
        most = MAX_PENDING_BYTES // (self.drafter.head.fc.in_features * self.drafter.state.itemsize)
        longest = max((request.num_pending for request in requests), default=0)
        if longest > most:
            self.sync([request for request in requests if request.num_pending > most // 2])
        self._unbounded = max(0, most - longest) // MAX_NODES

    def _write_all_but_last(self, requests: list[Request]) -> None:
        """Bring keys and values of the draft caches up to all pending rows but the last, from which drafting would start."""
        if not requests:
            return
        ends = [request.context_len - 1 for request in requests]
        entries = self._entries(requests, ends)
        features = [rows for request in requests for rows in _first(request.pending, request.num_pending - 1)]
        self.drafter.write(torch.cat(features), entries[1], entries[0], entries[2])
        for request in requests:
            _keep_last(request)

    def told(self, requests: list[Request]) -> Told:
        return self._told(tuple(map(told_temperature, requests)))


def _following(request: Request, start: int, end: int) -> list[int]:
    """The token after each of the positions ``start`` .. ``end``, 0 where the host does not know it."""
    own = request.token_ids[start + 1 : end + 1]
    return own + [0] * (end - start - len(own))


def _keep_last(request: Request) -> None:
    whole, first, end = request.pending[-1]
    last = Piece(whole, first, end) if end == first + 1 else Piece(whole[end - 1 : end].clone(), 0, 1)  # not all rows that it is one of
    request.pending[:] = [last]
    request.draft_len = request.context_len - 1


def _first(pieces: list[Piece], count: int) -> Iterator[Tensor]:
    """The first ``count`` rows of all pieces together."""
    for piece in pieces:
        if count == 0:
            return
        yield piece.rows(count)
        count -= min(count, piece.end - piece.first)


def told_temperature(request: Request) -> float:
    """The temperature that the head is told of."""
    return 0.0 if request.params.greedy else min(request.params.temperature, 1.0)
