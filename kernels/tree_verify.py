"""Parallel acceptance: which nodes survive, and the token after them. One rule for every temperature."""

import torch
from torch import Tensor

from kernels.sampling import SamplingBatch, apply_options


def select_tokens(logits: Tensor, options: SamplingBatch, noise: Tensor | None, tokens: Tensor, depth: Tensor, ancestors: Tensor) -> Tensor:
    """The target's own token after every node: argmax(logits after all options + noise of the token's position).

    logits [B, N, V]; noise float32 [B, depths, V], row d for tokens that follow a node of depth d, zero rows for greedy requests,
    None when all are greedy. With Gumbel noise the argmax is an exact sample of the softmax (Gumbel-max). Returns int64 [B, N].
    """
    scores = apply_options(logits, options, tokens, depth, ancestors)
    if noise is not None:
        batch = torch.arange(len(scores), device=scores.device)[:, None]
        scores = scores.float() + noise[batch, depth]
    return scores.argmax(-1)


def accept(
    target: Tensor, tokens: Tensor, parent: Tensor, depth: Tensor, ancestors: Tensor, max_depth: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The deepest node all of whose path the target would have generated itself.

    target int64 [B, N]: the target's token after every node. A node is right when it equals the target's token after its parent,
    and survives when every node of its path is right; siblings differ, so one path survives.
    Returns path int64 [B, max_depth + 1] (node indices from the root, -1 padded), the number of accepted nodes int64 [B] (root not
    counted), and the committed tokens int64 [B, max_depth + 1]: the target's token after every node of the path, -1 padded.
    """
    nodes = torch.arange(tokens.shape[1], device=tokens.device)
    right = (tokens == target.gather(1, parent)) | (nodes == 0)
    right_bits = (right.long() << nodes).sum(1, keepdim=True)
    survives = (right_bits & ancestors) == ancestors
    winner = torch.where(survives, depth, -1).argmax(1, keepdim=True)
    on_path = ((ancestors.gather(1, winner) >> nodes) & 1).bool()
    path = torch.full((len(tokens), max_depth + 2), -1, device=tokens.device)
    path.scatter_(1, torch.where(on_path, depth, max_depth + 1), nodes.expand_as(depth))
    path = path[:, :-1]
    committed = torch.where(path >= 0, target.gather(1, path.clamp(min=0)), -1)
    return path, depth.gather(1, winner).squeeze(1), committed


def tree_verify(
    logits: Tensor,
    options: SamplingBatch,
    noise: Tensor | None,
    tokens: Tensor,
    parent: Tensor,
    depth: Tensor,
    ancestors: Tensor,
    max_depth: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``select_tokens`` and ``accept`` in one: path, number of accepted nodes, committed tokens. Arguments as there."""
    target = select_tokens(logits, options, noise, tokens, depth, ancestors)
    return accept(target, tokens, parent, depth, ancestors, max_depth)
