"""Parallel acceptance: which nodes survive, and the token after them. One rule for every temperature."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kernels import cpu
from kernels.filter_cuts import filter_cuts_triton
from kernels.jit import jit, tl, triton
from kernels.noise import Noise, gumbel_tile
from kernels.sampling import OptionPointers, SamplingBatch, TreePointers, adjust, apply_options, has_kernel, load_options

PROGRAMS = 4096  # that keep every multiprocessor busy; where no noise is made anew in each, four times as many


def select_tokens(logits: Tensor, options: SamplingBatch, noise: Noise | None, tokens: Tensor, depth: Tensor, ancestors: Tensor) -> Tensor:
    """The target's own token after every node: argmax(logits after all options + noise of the token's position).

    logits [B, N, V]; noise: its depth d is for tokens that follow a node of depth d; None when all requests are greedy. With Gumbel
    noise the argmax is an exact sample of the softmax (Gumbel-max). Returns int64 [B, N].
    """
    return _select(logits, options, noise, tokens, depth, ancestors)[0]


def _select(
    logits: Tensor, options: SamplingBatch, noise: Noise | None, tokens: Tensor, depth: Tensor, ancestors: Tensor
) -> tuple[Tensor, Tensor]:
    """``select_tokens``, and the scores of those tokens, float32 [B, N]: NaN where any token's is."""
    scores = apply_options(logits, options, tokens, depth, ancestors)
    if noise is not None:
        first = noise.depths * torch.arange(len(scores), device=scores.device)
        drawn = noise.values.flatten(0, 1).index_select(0, (first[:, None] + depth).flatten())  # whole rows, one memcpy each
        scores = drawn.view_as(scores).add_(scores)
    # On a CPU torch's argmax takes ten times as long as numpy's. Both take a NaN for the largest value, and of equal ones the first.
    best = scores.argmax(-1) if scores.is_cuda else torch.from_numpy(scores.detach().numpy().argmax(-1))
    return best, scores.gather(2, best[:, :, None]).squeeze(2)


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


def tree_verify_reference(
    logits: Tensor,
    options: SamplingBatch,
    noise: Noise | None,
    tokens: Tensor,
    parent: Tensor,
    depth: Tensor,
    ancestors: Tensor,
    max_depth: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``tree_verify`` in plain PyTorch."""
    target, best = _select(logits, options, noise, tokens, depth, ancestors)
    return *accept(target, tokens, parent, depth, ancestors, max_depth), ~best.isnan().any(1)


@jit
def _largest(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """NaN where either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@partial(jit, do_not_specialize=["per_program"])  # it depends on the batch, and one for all batches is as fast
def tile_best_kernel(
    logits: tl.tensor, stride_b: tl.tensor, stride_n: tl.tensor, sampling: tl.tuple, tree: tl.tuple, cuts: tl.tensor, noise: tl.tuple,
    best: tl.tensor, best_id: tl.tensor, vocab: tl.tensor, per_program: tl.tensor, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One program per (tile of the vocabulary, group of nodes, request): the best score of each node in the tile, and its token.

    The noise of a depth is made once for all following nodes of that depth: trees list their nodes level by level. One warp per
    program keeps the reduction of a node's tile free of barriers; other programs hide its loads. best, best_id [B, tiles, N].
    """
    tile, b = tl.program_id(0), tl.program_id(2)
    begin = tl.program_id(1) * per_program
    end = tl.minimum(begin + per_program, tree.nodes)
    ids = tile * BLOCK + tl.arange(0, BLOCK)
    inside = ids < vocab
    values = load_options(sampling, b, ids, vocab)
    gumbel = tl.zeros([BLOCK], tl.float32)
    drawn_depth = tl.full([], -1, tl.int64)
    sampled = False
    if noise is not None:
        sampled = tl.load(noise.sampled + b) != 0
    out = (b * tl.num_programs(0) + tile) * tree.nodes
    for node in range(begin, end):
        row = b.to(tl.int64) * stride_b + node * stride_n
        scores = tl.load(logits + row + ids, mask=inside, other=float("-inf")).to(tl.float32)
        scores = adjust(scores, sampling, values, tree, b, node, ids)
        if cuts is not None:
            scores = tl.where(scores < tl.load(cuts + b * tree.nodes + node), float("-inf"), scores)
        if noise is not None:
            depth = tl.load(tree.depth + b * tree.nodes + node)
            if sampled & (depth != drawn_depth):
                gumbel = gumbel_tile(tl.load(noise.seeds + b), tl.load(noise.positions + b) + depth, tile * BLOCK, BLOCK)
                drawn_depth = depth
            scores += gumbel
        top = tl.reduce(scores, 0, _largest)
        tl.store(best + out + node, top)
        tl.store(best_id + out + node, tl.minimum(tl.min(tl.where(scores == top, ids, vocab)), vocab - 1))  # none equals NaN


@jit
def accept_kernel(
    best: tl.tensor, best_id: tl.tensor, tokens: tl.tensor, parent: tl.tensor, depth: tl.tensor, ancestors: tl.tensor, path: tl.tensor,
    accepted: tl.tensor, committed: tl.tensor, healthy: tl.tensor, tiles: tl.tensor, nodes: tl.tensor, max_depth: tl.tensor,
    NODES: tl.constexpr, DEPTHS: tl.constexpr, CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    """One program per request: the best tile of every node, then the bit tests of ``accept``."""
    b = tl.program_id(0)
    node = tl.arange(0, NODES)
    inside = node < nodes
    top = tl.full([NODES], float("-inf"), tl.float32)
    target = tl.full([NODES], 2**31 - 1, tl.int32)
    valid = inside
    for first in range(0, tiles, CHUNK):
        tile = first + tl.arange(0, CHUNK)
        place = (b * tiles + tile[:, None]) * nodes + node[None, :]
        mask = (tile < tiles)[:, None] & inside[None, :]
        value = tl.load(best + place, mask=mask, other=float("-inf"))
        invalid = value != value
        valid = valid & (tl.max(invalid.to(tl.int32), 0) == 0)
        value = tl.where(invalid, float("inf"), value)
        token = tl.load(best_id + place, mask=mask, other=2**31 - 1)
        chunk_top = tl.max(value, 0)
        chunk_token = tl.min(tl.where(value == chunk_top[None, :], token, 2**31 - 1), 0)
        target = tl.where(chunk_top > top, chunk_token, tl.where(chunk_top == top, tl.minimum(target, chunk_token), target))
        top = tl.maximum(top, chunk_top)
    tl.store(healthy + b, tl.sum((inside & ~valid).to(tl.int32)) == 0)

    own = tl.load(tokens + b * nodes + node, mask=inside, other=-1)
    up = tl.load(parent + b * nodes + node, mask=inside, other=0)
    level = tl.load(depth + b * nodes + node, mask=inside, other=0)
    word = tl.load(ancestors + b * nodes + node, mask=inside, other=0)
    wanted = tl.sum(tl.where(up[:, None] == node[None, :], target[None, :], 0), 1)
    right = inside & ((own == wanted) | (node == 0))
    right_bits = tl.sum(right.to(tl.int64) << node)
    survives = inside & ((right_bits & word) == word)
    # The deepest survivor; of several, which only a tree with equal siblings has, the first.
    winner = NODES - 1 - tl.max(tl.where(survives, level * NODES + NODES - 1 - node, -1)) % NODES
    winner_word = tl.sum(tl.where(node == winner, word, 0))
    on_path = ((winner_word >> node) & 1) == 1
    step = tl.arange(0, DEPTHS)
    at_step = on_path[None, :] & (level[None, :] == step[:, None])
    reached = tl.max(at_step.to(tl.int32), 1) == 1
    chosen = tl.sum(tl.where(at_step, node[None, :], 0), 1)
    following = tl.sum(tl.where(at_step, target[None, :], 0), 1)
    place = b * (max_depth + 1) + step
    tl.store(path + place, tl.where(reached, chosen, -1), mask=step <= max_depth)
    tl.store(committed + place, tl.where(reached, following, -1), mask=step <= max_depth)
    tl.store(accepted + b, tl.sum(tl.where(node == winner, level, 0)))


def tree_verify_triton(
    logits: Tensor,
    options: SamplingBatch,
    noise: Noise | None,
    tokens: Tensor,
    parent: Tensor,
    depth: Tensor,
    ancestors: Tensor,
    max_depth: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``tree_verify`` in two kernels, three where a request filters. Reads the logits once, and writes [B, V / BLOCK, N]."""
    batch, nodes, vocab = logits.shape
    device = logits.device
    tokens, parent, depth, ancestors = (part.contiguous() for part in (tokens, parent, depth, ancestors))
    tree = TreePointers(tokens, parent, depth, nodes)
    pointers = OptionPointers.of(options, logits)
    cuts = filter_cuts_triton(logits, pointers, tree)
    # What a program keeps per token beside scores and noise takes registers.
    kept = any(part is not None for part in (pointers.bias, pointers.banned, pointers.counts))
    block = min(256 if kept else 512, triton.next_power_of_2(vocab))
    tiles = triton.cdiv(vocab, block)
    per_program = triton.cdiv(nodes, min(nodes, triton.cdiv(PROGRAMS if noise else 4 * PROGRAMS, batch * tiles)))
    best = torch.empty(batch, tiles, nodes, device=device)
    best_id = torch.empty(batch, tiles, nodes, dtype=torch.int32, device=device)
    tile_best_kernel[tiles, triton.cdiv(nodes, per_program), batch](
        logits,
        *logits.stride()[:2],
        pointers,
        tree,
        cuts,
        noise and noise.key,
        best,
        best_id,
        vocab,
        per_program,
        BLOCK=block,
        num_warps=1,
        enable_fp_fusion=False,
    )
    path, committed = (torch.empty(batch, max_depth + 1, dtype=torch.long, device=device) for _ in range(2))
    accepted = torch.empty(batch, dtype=torch.long, device=device)
    healthy = torch.empty(batch, dtype=torch.bool, device=device)
    accept_kernel[(batch,)](
        best, best_id, tokens, parent, depth, ancestors, path, accepted, committed, healthy, tiles, nodes, max_depth,
        NODES=triton.next_power_of_2(nodes), DEPTHS=triton.next_power_of_2(max_depth + 1), CHUNK=128, num_warps=16,
    )  # fmt: skip
    return path, accepted, committed, healthy


def tree_verify_cpu(
    logits: Tensor,
    options: SamplingBatch,
    noise: Noise | None,
    tokens: Tensor,
    parent: Tensor,
    depth: Tensor,
    ancestors: Tensor,
    max_depth: int,
    places: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``tree_verify`` in one call, for options of ``has_kernel`` and up to 64 nodes."""
    batch, nodes = tokens.shape
    logits, vocab = logits.contiguous(), logits.shape[-1]
    path, committed = (torch.empty(batch, max_depth + 1, dtype=torch.long) for _ in range(2))
    accepted, healthy = torch.empty(batch, dtype=torch.long), torch.empty(batch, dtype=torch.bool)
    cpu.launch(
        "tree_verify", logits.dtype, logits, places, logits.numel() // vocab, vocab, options.temperature,
        *((None, None, None) if noise is None else (part.contiguous() for part in noise.key)),
        *(part.contiguous() for part in (tokens, parent, depth, ancestors)), batch, nodes, max_depth, path, accepted, committed, healthy,
    )  # fmt: skip
    return path, accepted, committed, healthy


def tree_verify(
    logits: Tensor,
    options: SamplingBatch,
    noise: Noise | None,
    tokens: Tensor,
    parent: Tensor,
    depth: Tensor,
    ancestors: Tensor,
    max_depth: int,
    places: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``select_tokens`` and ``accept`` in one, arguments as there; logits float32, bfloat16 or float16.

    ``places`` int64 [K], on a CPU: logits [K, V] are those of these nodes of the flat batch, and the others are dead.
    Returns path, number of accepted nodes, committed tokens, and which requests' logits are free of NaN, bool [B]; the verdict of
    the others means nothing.
    """
    arguments = options, noise, tokens, parent, depth, ancestors, max_depth
    if not logits.is_cuda and has_kernel(options) and cpu.serves(logits):
        return tree_verify_cpu(logits, *arguments, places)
    if places is not None:
        logits = logits.new_zeros(tokens.numel(), logits.shape[1]).index_copy_(0, places, logits).unflatten(0, tokens.shape)
    return (tree_verify_triton if logits.is_cuda else tree_verify_reference)(logits, *arguments)
