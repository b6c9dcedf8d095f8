"""Parent pointers -> ancestor bit words and depths."""

import torch
from torch import Tensor

MAX_NODES = 64  # bits in one int64 word


def tree_mask(parent: Tensor, max_depth: int) -> tuple[Tensor, Tensor]:
    """Ancestor words and depths of every node, by pointer doubling.

    parent: int64 [B, N], N <= 64; node 0 is the root and its own parent.
    max_depth: an upper bound of the depth; decides the number of rounds, ceil(log2(max_depth + 1)).
    Returns ancestors int64 [B, N] (bit j set: node j is an ancestor or the node itself) and depth int64 [B, N].
    """
    nodes = torch.arange(parent.shape[1], device=parent.device)
    ancestors = (torch.ones_like(nodes) << nodes).expand_as(parent)
    depth = (parent != nodes).long()
    jump = parent
    for _ in range(max(max_depth, 1).bit_length()):
        ancestors = ancestors | ancestors.gather(1, jump)
        depth = depth + depth.gather(1, jump)
        jump = jump.gather(1, jump)
    return ancestors, depth
