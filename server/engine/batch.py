"""What requests are to tensors: rows of the block tables, last tokens, lengths, chunks of their texts."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.tree_layout import TreeLayout
from server.engine.host import on_device
from server.engine.kv_cache import BlockPool
from server.engine.request import Request


def table_rows(requests: list[Request], device: torch.device) -> Tensor:
    """Their rows of the block tables, int64 [B]."""
    return on_device([request.row for request in requests], device)


class Placed(NamedTuple):
    """Where decoding requests stand, int64 [B]: their rows of the block tables, last committed tokens (the roots of their trees) and
    committed lengths, and the longest of these; and those rows, int64 [B, M].
    """

    rows: Tensor
    roots: Tensor
    lengths: Tensor
    longest: int
    tables: Tensor


def placed(requests: list[Request], pool: BlockPool) -> Placed:
    lengths = [request.context_len for request in requests]
    rows, roots = [request.row for request in requests], [request.token_ids[-1] for request in requests]
    even = [0] * (len(requests) % 2)  # kernels are compiled anew for tensors that do not begin at multiples of 16 bytes
    in_order = on_device([rows + even, roots + even, lengths + even], pool.tables.device)[:, : len(requests)]  # in one transfer
    own_rows, last, committed = in_order.unbind(0)
    return Placed(own_rows, last, committed, max(lengths), pool.tables.index_select(0, own_rows))


def causal_chunk(
    pool: BlockPool, requests: list[Request], starts: list[int], chunks: list[list[int]], width: int | None = None
) -> tuple[Tensor, TreeLayout]:
    """Causal rows: padded tokens int64 [B, W] that begin at logical slots ``starts``, and their layout.

    ``width``: W, with a layout that always says which rows are live; None: that of the longest chunk.
    """
    device = pool.tables.device
    longest = max(map(len, chunks))
    tokens = on_device([chunk + [0] * ((width or longest) - len(chunk)) for chunk in chunks], device)
    depth = torch.arange(width or longest, device=device)
    live = None
    if width or any(len(chunk) < longest for chunk in chunks):
        live = depth < on_device(list(map(len, chunks)), device)[:, None]
    lengths = on_device(starts, device)
    tables = pool.tables[table_rows(requests, device)]
    return tokens, TreeLayout(tables, lengths, depth.expand(len(chunks), -1), None, live, pool.block_size, max(starts))
