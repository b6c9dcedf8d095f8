"""Nodes that were drafted, by whatever means, and of which the best become the trees of a step."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.best_nodes import best_nodes
from kernels.merge_pools import merge_pools
from kernels.tree_mask import tree_mask
from server.engine.types import Tree


class Pool(NamedTuple):
    """M drafted nodes per request, in the form of ``best_nodes``: parents come first, siblings differ, no child scores above its parent."""

    scores: Tensor  # float32 [B, M], log-probability that the path survives; -inf: a node that cannot be
    tokens: Tensor  # int64 [B, M]
    parents: Tensor  # int64 [B, M], the parent's place in the pool, counted from 1 on; 0: the root

    def to(self, device: torch.device) -> "Pool":
        return Pool(*(part.to(device, non_blocking=True) for part in self))


def merge(pool: Pool, others: Pool, levels: int) -> Pool:
    """One pool of both, see ``merge_pools``; ``levels``: how deep the shallower of them is."""
    return Pool(*merge_pools(*pool, *others, levels))


def limited(scores: Tensor, limits: Tensor | None) -> Tensor:
    """Scores float32 [B, M] without all but the best ``limits`` of every request, int64 [B]; None: no limits."""
    if limits is None:
        return scores
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return scores.masked_fill(rank >= limits[:, None], float("-inf"))


def best_tree(roots: Tensor, pool: Pool, nodes: int, node_price: float, depth: int) -> Tree:
    """The best nodes as trees, see ``best_nodes``; ``depth``: of the deepest node. None whose survival is less likely than its price."""
    if node_price > 0:
        pool = pool._replace(scores=pool.scores.masked_fill(pool.scores < math.log(node_price), float("-inf")))
    tokens, parent = best_nodes(roots, *pool, nodes, node_price)
    ancestors, depths = tree_mask(parent, depth)
    return Tree(tokens, parent, depths, ancestors)


def widened(tree: Tree) -> Tree:
    """The trees with dead nodes up to a power of two, since graphs are recorded for every number of nodes."""
    return _padded(tree, 1 << (tree.tokens.shape[1] - 1).bit_length())


def stacked(trees: list[Tree]) -> Tree:
    """All trees, without the columns that are padding in all of them, which come last."""
    widths = [int((tree.tokens >= 0).sum(1).max()) for tree in trees]
    padded = (_padded(Tree(*(part[:, :width] for part in tree)), max(widths)) for tree, width in zip(trees, widths, strict=True))
    return Tree(*map(torch.cat, zip(*padded, strict=True)))


def _padded(tree: Tree, nodes: int) -> Tree:
    """The trees with dead nodes up to ``nodes``."""
    batch, own = tree.tokens.shape
    more = torch.arange(own, nodes, device=tree.tokens.device).expand(batch, -1)
    if more.shape[1] == 0:
        return tree
    zero, one = torch.zeros_like(more), torch.ones_like(more)
    return Tree(*(torch.cat(pair, dim=1) for pair in zip(tree, (zero - 1, zero, one, one | one << more), strict=True)))


def root_only(roots: Tensor) -> Tree:
    """The tree of plain decoding: the last committed token alone."""
    tokens = roots[:, None]
    zero = torch.zeros_like(tokens)
    return Tree(tokens, zero, zero, torch.ones_like(tokens))
