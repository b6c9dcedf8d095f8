"""Prompts in chunks: their rows of a forward pass, and what these leave behind."""

from torch import Tensor

from server.engine.batch import causal_chunk
from server.engine.host import on_device
from server.engine.kv_cache import BlockPool
from server.engine.logprobs import token_logprobs
from server.engine.request import Request
from server.engine.target import Rows
from server.engine.types import TokenLogprob


def prompt_rows(pool: BlockPool, requests: list[Request], chunks: list[list[int]]) -> Rows:
    """The next chunk of every prompt; the logits of its last row, or of all where some request wants them."""
    tokens, layout = causal_chunk(pool, requests, [request.context_len for request in requests], chunks)
    if any(request.prompt_alternatives is not None for request in requests):
        return Rows(tokens, layout)
    return Rows(tokens, layout, last_rows(tokens, chunks))


def last_rows(tokens: Tensor, chunks: list[list[int]]) -> Tensor:
    """The flat row of every chunk's last token, int64 [B]; tokens [B, W]."""
    return on_device([i * tokens.shape[1] + len(chunk) - 1 for i, chunk in enumerate(chunks)], tokens.device)


def extend(requests: list[Request], chunks: list[list[int]], logits: Tensor, features: Tensor | None) -> None:
    """Note what the chunks have computed; logits as ``prompt_rows`` asked for them."""
    width = max(map(len, chunks))
    reports: list[list[TokenLogprob]] = [[] for _ in requests]
    for i, (request, chunk) in enumerate(zip(requests, chunks, strict=True)):
        if request.prompt_alternatives is not None:
            following = request.token_ids[request.context_len + 1 : request.context_len + len(chunk) + 1]
            reports[i] = token_logprobs(logits[i * width :][: len(following)], following, request.prompt_alternatives)
    # Only now, when nothing can fail any more, are requests changed.
    for i, (request, chunk) in enumerate(zip(requests, chunks, strict=True)):
        request.prompt_logprobs += reports[i]
        if features is not None:
            request.pending.append(features[i, : len(chunk)])
        request.context_len += len(chunk)
