"""Grows one draft tree per request with an EAGLE-3 head, and keeps the head's cache true."""

from typing import NamedTuple

import torch
from torch import Tensor

from drafts.eagle3 import Eagle3Head
from kernels.noise import Noise
from kernels.sampling import SamplingBatch, apply_options
from kernels.tree_attention import TreeLayout, tree_attention
from kernels.tree_mask import tree_mask
from server.engine.kv_cache import PagedTensors
from server.engine.types import Tree


class TreeShape(NamedTuple):
    """How much to draft: ``nodes`` verified (root included), ``depth`` levels, ``topk`` nodes expanded a level."""

    nodes: int
    depth: int
    topk: int

    @property
    def lookahead(self) -> int:
        """Slots after the committed context that verification or drafting writes to."""
        return max(self.nodes, (self.depth - 1) * self.topk)

    def shrunk(self, nodes: int) -> "TreeShape":
        """The shape for fewer nodes: no level and no branch that they could not fill."""
        return TreeShape(nodes, max(1, min(self.depth, nodes - 1)), max(1, min(self.topk, nodes - 1)))


class _Level(NamedTuple):
    """The rows that a level expands."""

    tokens: Tensor  # int64 [B, k], target ids
    scores: Tensor  # float32 [B, k], cumulative log-probability
    hidden: Tensor  # [B, k, H], recycled state of the parents
    ancestors: Tensor  # int64 [B, k], over the expanded rows, without themselves
    pool_index: Tensor  # int64 [B, k], the rows' own places in the pool


class Drafter:
    """A head with its cache. ``state`` [rows, H]: what each request's last committed draft row returned."""

    def __init__(self, head: Eagle3Head, blocks: int, block_size: int, max_seqs: int) -> None:
        config = head.config
        weight = head.lm_head.weight
        self.head, self.block_size = head, block_size
        self.cache = PagedTensors(1, blocks, block_size, config.num_key_value_heads, config.head_dim, weight.dtype, weight.device)
        self.state = torch.zeros(max_seqs, config.hidden_size, dtype=weight.dtype, device=weight.device)
        self._scale = config.head_dim**-0.5
        self._target_ids = None if head.d2t is None else head.to_target_ids(torch.arange(config.draft_vocab_size, device=weight.device))

    def _forward(self, tokens: Tensor, hidden: Tensor, layout: TreeLayout) -> Tensor:
        slots = layout.slots().flatten()

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.cache.write(0, slots, k.flatten(0, 1), v.flatten(0, 1), layout.live)
            return tree_attention(q, self.cache.k[0], self.cache.v[0], layout, self._scale)

        positions = layout.positions.clamp(max=len(self.head.rope) - 1)
        return self.head(self.head.embed(tokens), hidden, positions, attend)

    def extend(self, rows: Tensor, features: Tensor, tokens: Tensor, counts: Tensor, layout: TreeLayout) -> None:
        """Write draft rows from the target's true features, and keep the last row's state.

        rows int64 [B]: places in ``state``; features [B, W, 3 * H]; tokens int64 [B, W]: the token after each feature;
        counts int64 [B]: valid entries of W; layout: a causal chunk that starts at each request's draft length.
        """
        y = self._forward(tokens, self.head.combine(features.to(self.state.dtype)), layout)
        self.state[rows] = y[torch.arange(len(rows), device=y.device), counts - 1]

    def grow(
        self, rows: Tensor, roots: Tensor, block_tables: Tensor, context_lens: Tensor, max_context: int, shape: TreeShape,
        options: SamplingBatch, noise: Noise | None, sigma: Tensor,
    ) -> Tree:  # fmt: skip
        """One tree per request (EAGLE-2): expand the best ``topk`` nodes of every level, keep the best ``nodes`` - 1 of all.

        A node's score is the product over its path of softmax((log q + noise) / sigma), the drafted survival probability: with the
        request's own noise the draft guesses the very token that verification will draw.
        roots int64 [B]: last committed tokens; sigma float32 [B]: drafting temperatures.
        """
        batch, topk = len(rows), shape.topk
        draft_noise = None if noise is None else noise.values
        if draft_noise is not None and self._target_ids is not None:
            draft_noise = draft_noise[:, :, self._target_ids]
        hidden = self.state[rows][:, None]
        scores, tokens = self._children(hidden, draft_noise, 0, topk, options, sigma)
        pool = [(scores.flatten(1), tokens.flatten(1), torch.zeros_like(tokens.flatten(1)))]
        level = _Level(
            tokens[:, 0], scores[:, 0], hidden.expand(-1, topk, -1), torch.zeros_like(tokens[:, 0]),
            torch.arange(1, topk + 1, device=roots.device).expand(batch, -1),
        )  # fmt: skip
        for depth in range(1, shape.depth):
            y, ancestors = self._expand(level, depth, block_tables, context_lens, max_context)
            scores, tokens = self._children(y, draft_noise, depth, topk, options, sigma)
            scores = scores + level.scores[:, :, None]
            first = 1 + topk + (depth - 1) * topk * topk
            pool.append((scores.flatten(1), tokens.flatten(1), level.pool_index.repeat_interleave(topk, dim=1)))
            best, chosen = scores.flatten(1).topk(topk, dim=1)
            source = chosen // topk
            level = _Level(
                tokens.flatten(1).gather(1, chosen), best, y.gather(1, source[:, :, None].expand(-1, -1, y.shape[2])),
                ancestors.gather(1, source), first + chosen,
            )  # fmt: skip
        return _best_nodes(roots, pool, shape)

    def _expand(self, level: _Level, depth: int, block_tables: Tensor, context_lens: Tensor, max_context: int) -> tuple[Tensor, Tensor]:
        """Run the head on a level's rows; return their states [B, k, H] and ancestor words over the expanded rows, themselves included."""
        topk = level.tokens.shape[1]
        first = (depth - 1) * topk
        own = torch.ones_like(level.tokens) << (first + torch.arange(topk, device=level.tokens.device))
        ancestors = level.ancestors | own
        layout = TreeLayout(
            block_tables,
            context_lens,
            torch.full_like(level.tokens, depth - 1),
            ancestors,
            None,
            self.block_size,
            max_context,
            first_column=first,
        )
        return self._forward(level.tokens, level.hidden, layout), ancestors

    def _children(
        self, y: Tensor, noise: Tensor | None, depth: int, topk: int, options: SamplingBatch, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The ``topk`` most likely survivors after each row: log-scores float32 and target ids int64, both [B, R, topk]."""
        logits = self.head.logits(y).float()
        if self._target_ids is not None:  # these options speak of target ids
            options = options._replace(bias=None, bans=None, penalties=None)
        # Penalties count the committed text alone here: a guess need not be exact.
        none = torch.zeros(logits.shape[:2], dtype=torch.long, device=logits.device)
        logits = apply_options(logits, options, none, none + depth, none)
        if noise is not None:
            logits = logits + noise[:, depth, None]
        scores = (logits / sigma[:, None, None]).log_softmax(-1)
        best, ids = torch.nan_to_num(scores, nan=float("-inf")).topk(topk, dim=-1)
        return best, self.head.to_target_ids(ids)


def _best_nodes(roots: Tensor, pool: list[tuple[Tensor, Tensor, Tensor]], shape: TreeShape) -> Tree:
    """Keep the best nodes of the pool (scores, tokens, parent's pool index; index 0 is the root), parents before children.

    A child never scores above its parent, and a stable sort keeps the parent first where they tie: a kept node's parent is kept.
    """
    scores, tokens, parents = (torch.cat(part, dim=1) for part in zip(*pool, strict=True))
    count = min(shape.nodes - 1, scores.shape[1])
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
    kept = order.sort(dim=1).values
    parent = torch.searchsorted(kept + 1, parents.gather(1, kept))
    parent = torch.where(parents.gather(1, kept) == 0, 0, parent + 1)
    alive = scores.gather(1, kept) > float("-inf")
    root = roots[:, None]
    parent = torch.cat((torch.zeros_like(root), torch.where(alive, parent, 0)), dim=1)
    nodes = torch.cat((root, torch.where(alive, tokens.gather(1, kept), -1)), dim=1)
    ancestors, depth = tree_mask(parent, shape.depth)
    return Tree(nodes, parent, depth, ancestors)


def root_only(roots: Tensor) -> Tree:
    """The tree of plain decoding: the last committed token alone."""
    tokens = roots[:, None]
    zero = torch.zeros_like(tokens)
    return Tree(tokens, zero, zero, torch.ones_like(tokens))
