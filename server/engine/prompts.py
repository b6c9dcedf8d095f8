"""Prompts in chunks: their rows of a forward pass, and what these leave behind."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from kernels.tree_layout import Rows
from server.engine.batch import causal_chunk
from server.engine.costs import MAX_TREE_ROWS
from server.engine.graphs import LEAST_CONTEXT, power_of_two
from server.engine.host import on_device
from server.engine.kv_cache import BlockPool
from server.engine.logprobs import token_logprobs
from server.engine.request import Piece, Request
from server.engine.types import TokenLogprob

PIECE = 16  # rows of a prompt that are an entry of a graph's batch
BESIDE, LEAST_ROWS = 4, 128  # times as many entries as requests, and rows at least, are recorded for trees with prompts along with them


class Prompts(NamedTuple):
    """The next chunk of every prompt. ``firsts``: the flat row of ``rows`` that each begins with; its others follow."""

    requests: list[Request]
    chunks: list[list[int]]
    firsts: list[int]
    rows: Rows

    def last_rows(self, places: Sequence[int]) -> list[int]:
        """The flat row of the last token of the chunks at ``places``."""
        return [self.firsts[i] + len(self.chunks[i]) - 1 for i in places]


def prompt_rows(pool: BlockPool, requests: list[Request], width: int, in_pieces: bool) -> Prompts:
    """The next chunk of every prompt, of at most ``width`` tokens; the logits of its last row, or of all where some request wants them.

    ``in_pieces``: every PIECE rows are an entry of the batch, which sees those before it as its context, so that graphs need few sizes.
    """
    chunks = [request.token_ids[request.context_len : min(request.prefill_len, request.context_len + width)] for request in requests]
    size = PIECE if in_pieces else max(map(len, chunks))
    entries = [(i, begin) for i, chunk in enumerate(chunks) for begin in range(0, len(chunk), size)]
    tokens, layout = causal_chunk(
        pool, [requests[i] for i, _ in entries], [requests[i].context_len + begin for i, begin in entries],
        [chunks[i][begin : begin + size] for i, begin in entries], PIECE if in_pieces else None,
    )  # fmt: skip
    firsts = [entry * size for entry, (_, begin) in enumerate(entries) if begin == 0]
    prompts = Prompts(requests, chunks, firsts, Rows(tokens, layout))
    if any(request.prompt_alternatives is not None for request in requests):
        return prompts
    last = on_device(prompts.last_rows(range(len(chunks))), tokens.device)
    return prompts._replace(rows=Rows(tokens, layout, last))


class Computed(NamedTuple):
    """Prompts, and what a forward pass over them returned: logits [P, V] of every prompt's last row, or of all rows."""

    prompts: Prompts
    logits: Tensor
    features: Tensor | None

    def of(self, requests: list[Request]) -> "Computed | None":
        """Of those of ``requests``; None where there are none. Logits of last rows alone."""
        index = [i for i, request in enumerate(self.prompts.requests) if request in requests]
        if len(index) == len(self.prompts.requests):
            return self
        if not index:
            return None
        whose, chunks, firsts, rows = self.prompts
        prompts = Prompts([whose[i] for i in index], [chunks[i] for i in index], [firsts[i] for i in index], rows)
        return self._replace(prompts=prompts, logits=self.logits.index_select(0, on_device(index, self.logits.device)))


def most_entries(nodes: int, max_seqs: int) -> int:
    """Of the largest graph for trees of ``nodes`` nodes, a power of two."""
    return min(max(BESIDE * power_of_two(max_seqs), LEAST_ROWS // nodes), MAX_TREE_ROWS // nodes)


def fit_beside(prompts: Rows, trees: int, nodes: int, longest: int, max_seqs: int) -> bool:
    """Whether prompts in pieces are computed along with so many trees of ``nodes`` nodes and contexts of at most ``longest`` tokens. It
    spares a pass, for which the whole model is read, and is done by graphs that were recorded at start.
    """
    nodes = power_of_two(nodes)
    entries = trees + len(prompts.tokens) * (PIECE // nodes)
    context = max(prompts.layout.max_context + PIECE, longest)
    return prompts.keep is not None and nodes <= PIECE and entries <= most_entries(nodes, max_seqs) and context <= LEAST_CONTEXT


def extend(computed: Computed, joined: list[Request]) -> None:
    """Note what the chunks have computed; ``joined``: whose draft caches have it."""
    prompts, logits, features = computed
    reports: list[list[TokenLogprob]] = [[] for _ in prompts.requests]
    for i, (request, chunk, first) in enumerate(zip(prompts.requests, prompts.chunks, prompts.firsts, strict=True)):
        if request.prompt_alternatives is not None:
            following = request.token_ids[request.context_len + 1 : request.context_len + len(chunk) + 1]
            reports[i] = token_logprobs(logits[first:][: len(following)], following, request.prompt_alternatives)
    tapped = None if features is None else features.flatten(0, 1)
    # Only now, when nothing can fail any more, are requests changed.
    for request, chunk, first, report in zip(prompts.requests, prompts.chunks, prompts.firsts, reports, strict=True):
        request.prompt_logprobs += report
        request.context_len += len(chunk)
        if request in joined:
            request.pending.clear()
            request.draft_len = request.context_len
        elif tapped is not None:
            request.pending.append(Piece(tapped, first, first + len(chunk)))
