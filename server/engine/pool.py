"""Nodes that were drafted, by whatever means, and of which the best become the trees of a step."""

import math
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.best_nodes import best_nodes
from kernels.merge_pools import merge_pools
from kernels.tree_mask import tree_mask
from server.engine.types import Tree

GROUP_ROWS = 24  # of a tree, that a forward pass on a CPU computes in the time of one more group


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


def by_width(tree: Tree) -> list[list[int]]:
    """The batch's places in groups of trees of like sizes, wherever that saves more than GROUP_ROWS rows of padding."""
    widths = (tree.tokens >= 0).sum(1).tolist()

    def split(places: list[int]) -> list[list[int]]:
        narrow, saved = max(
            ((cut, cut * (widths[places[-1]] - widths[places[cut - 1]])) for cut in range(1, len(places))),
            default=(0, 0),
            key=itemgetter(1),
        )
        return split(places[:narrow]) + split(places[narrow:]) if saved > GROUP_ROWS else [places]

    return split(sorted(range(len(widths)), key=widths.__getitem__))


def narrowed(tree: Tree, places: list[int]) -> Tree:
    """The trees at ``places`` of the batch, without the columns that are padding in all of them, which come last."""
    width = int((tree.tokens[places] >= 0).sum(1).max())
    return Tree(*(part[places, :width] for part in tree))


def widened(tree: Tree) -> Tree:
    """The trees with dead nodes up to a power of two, since graphs are recorded for every number of nodes."""
    batch, nodes = tree.tokens.shape
    more = torch.arange(nodes, 1 << (nodes - 1).bit_length(), device=tree.tokens.device).expand(batch, -1)
    if more.shape[1] == 0:
        return tree
    zero, one = torch.zeros_like(more), torch.ones_like(more)
    return Tree(*(torch.cat(pair, dim=1) for pair in zip(tree, (zero - 1, zero, one, one | one << more), strict=True)))


def root_only(roots: Tensor) -> Tree:
    """The tree of plain decoding: the last committed token alone."""
    tokens = roots[:, None]
    zero = torch.zeros_like(tokens)
    return Tree(tokens, zero, zero, torch.ones_like(tokens))
