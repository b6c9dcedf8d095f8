"""Parent pointers -> ancestor bit words and depths."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kernels import cpu
from kernels.jit import jit, tl, triton

MAX_NODES = 64  # bits in one int64 word


def tree_mask(parent: Tensor, max_depth: int) -> tuple[Tensor, Tensor]:
    """Ancestor words and depths of every node, by pointer doubling.

    parent: int64 [B, N]; node 0 is the root and its own parent.
    max_depth: an upper bound of the depth; decides the number of rounds, ceil(log2(max_depth + 1)).
    Returns ancestors int64 [B, N] (bit j set: node j is an ancestor or the node itself) and depth int64 [B, N]. More than 64 nodes
    take ceil(N / 64) words each: ancestors is then int64 [B, N, words], node j being bit j % 64 of word j // 64.
    """
    run = tree_mask_triton if parent.is_cuda else tree_mask_cpu if cpu.library() else tree_mask_reference
    return run(parent, max_depth)


def tree_mask_reference(parent: Tensor, max_depth: int) -> tuple[Tensor, Tensor]:
    """``tree_mask`` in plain PyTorch."""
    nodes = torch.arange(parent.shape[1], device=parent.device)
    bit = torch.ones_like(nodes) << nodes % MAX_NODES
    words = [torch.where(nodes // MAX_NODES == word, bit, 0).expand_as(parent) for word in range(_words(parent))]
    depth = (parent != nodes).long()
    jump = parent
    for _ in range(_rounds(max_depth)):
        words = [word | word.gather(1, jump) for word in words]
        depth = depth + depth.gather(1, jump)
        jump = jump.gather(1, jump)
    return words[0] if len(words) == 1 else torch.stack(words, dim=-1), depth


def tree_mask_cpu(parent: Tensor, max_depth: int) -> tuple[Tensor, Tensor]:
    """``tree_mask`` in one call, for parents that come before their children."""
    (batch, nodes), words = parent.shape, _words(parent)
    ancestors = parent.new_empty((batch, nodes) if words == 1 else (batch, nodes, words))
    depth = parent.new_empty(batch, nodes)
    cpu.launch("tree_mask", None, parent.contiguous(), batch, nodes, words, ancestors, depth)
    return ancestors, depth


def tree_mask_triton(parent: Tensor, max_depth: int) -> tuple[Tensor, Tensor]:
    """``tree_mask`` in one launch, a program per tree."""
    batch, nodes = parent.shape
    words = _words(parent)
    parent = parent.contiguous()
    ancestors = parent.new_empty((batch, nodes) if words == 1 else (batch, nodes, words))
    depth = torch.empty_like(parent)
    block = triton.next_power_of_2(nodes)
    tree_mask_kernel[(batch,)](parent, ancestors, depth, nodes, _rounds(max_depth), words, block, num_warps=max(1, block // 32))
    return ancestors, depth


@partial(jit, do_not_specialize=["rounds"])  # texts are of any depth
def tree_mask_kernel(
    parent: tl.tensor, ancestors: tl.tensor, depth: tl.tensor, count: tl.tensor, rounds: tl.tensor,
    WORDS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Each round doubles how far every node sees; the words are doubled one after the other, over the same jumps."""
    node = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64) * count + node
    first_jump = tl.load(parent + row, mask=node < count, other=0).to(tl.int32)
    for word in tl.static_range(WORDS):
        jump = first_jump
        bits = tl.where(node // 64 == word, tl.full([BLOCK], 1, tl.int64) << (node % 64), 0)
        for _ in range(rounds):
            bits |= tl.gather(bits, jump, 0)
            jump = tl.gather(jump, jump, 0)
        tl.store(ancestors + row * WORDS + word, bits, mask=node < count)
    jump = first_jump
    steps = (jump != node).to(tl.int32)
    for _ in range(rounds):
        steps += tl.gather(steps, jump, 0)
        jump = tl.gather(jump, jump, 0)
    tl.store(depth + row, steps.to(tl.int64), mask=node < count)


def _words(parent: Tensor) -> int:
    return -(-parent.shape[1] // MAX_NODES)


def _rounds(max_depth: int) -> int:
    return max(max_depth, 1).bit_length()
