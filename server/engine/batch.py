"""What requests are to tensors: rows of the block tables, last tokens, lengths, chunks of their texts."""

import torch
from torch import Tensor

from kernels.tree_layout import TreeLayout
from server.engine.host import on_device
from server.engine.kv_cache import BlockPool
from server.engine.request import Request


def table_rows(requests: list[Request], device: torch.device) -> Tensor:
    """Their rows of the block tables, int64 [B]."""
    return on_device([request.row for request in requests], device)


def last_tokens(requests: list[Request], device: torch.device) -> Tensor:
    """The roots of their trees, int64 [B]."""
    return on_device([request.token_ids[-1] for request in requests], device)


def context_lens(requests: list[Request], device: torch.device) -> tuple[Tensor, int]:
    """Committed lengths, int64 [B], and the longest."""
    lengths = [request.context_len for request in requests]
    return on_device(lengths, device), max(lengths)


def causal_chunk(pool: BlockPool, requests: list[Request], starts: list[int], chunks: list[list[int]]) -> tuple[Tensor, TreeLayout]:
    """Causal rows: padded tokens int64 [B, W] that begin at logical slots ``starts``, and their layout."""
    device = pool.tables.device
    width = max(map(len, chunks))
    tokens = on_device([chunk + [0] * (width - len(chunk)) for chunk in chunks], device)
    depth = torch.arange(width, device=device)
    live = None
    if any(len(chunk) < width for chunk in chunks):
        live = depth < on_device(list(map(len, chunks)), device)[:, None]
    lengths = on_device(starts, device)
    tables = pool.tables[table_rows(requests, device)]
    return tokens, TreeLayout(tables, lengths, depth.expand(len(chunks), -1), None, live, pool.block_size, max(starts))
