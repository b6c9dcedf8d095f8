"""Sampling options on logits, for every node of every tree along the node's own path."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.jit import jit, tl


class Filters(NamedTuple):
    """Which tokens may be drawn, per request. ``top_k`` V, ``top_p`` 1 and ``min_p`` 0 keep everything."""

    top_k: Tensor  # int64 [B]
    top_p: Tensor  # float32 [B]
    min_p: Tensor  # float32 [B]


class Penalties(NamedTuple):
    """Penalties with what they count, per request; neutral rows are 0, 0, 1."""

    presence: Tensor  # float32 [B]
    frequency: Tensor  # float32 [B]
    repetition: Tensor  # float32 [B]
    output_counts: Tensor  # int32 [B, V], how often each token was generated, node 0 included
    prompt_tokens: Tensor  # bool [B, V]


class Bias(NamedTuple):
    """Values added to single logits, padded with (0, 0.0)."""

    ids: Tensor  # int64 [B, K]
    values: Tensor  # float32 [B, K]


class Bans(NamedTuple):
    """Tokens that may not be drawn by nodes shallower than ``until_depth`` (min_tokens), padded with -1."""

    ids: Tensor  # int64 [B, S]
    until_depth: Tensor  # int64 [B]


class Allowed(NamedTuple):
    """Which tokens a request's grammar allows after each node of its tree, one bit per token (token t: bit t % 32 of word t // 32)."""

    rows: Tensor  # int64 [B], the request's place in ``words``, -1 for requests without a grammar
    words: Tensor  # int32 [G, N, ceil(V / 32)]


class SamplingBatch(NamedTuple):
    """The options of all requests of a batch. A field is None where no request of the batch uses it, and then costs nothing."""

    temperature: Tensor | None  # float32 [B], 1 where the request is greedy
    filters: Filters | None
    penalties: Penalties | None
    bias: Bias | None
    bans: Bans | None
    allowed: Allowed | None = None


def has_kernel(options: SamplingBatch) -> bool:
    """Whether the CPU's kernels know these options: temperature alone."""
    return all(part is None for part in options[1:])


def apply_options(logits: Tensor, options: SamplingBatch, tokens: Tensor, depth: Tensor, ancestors: Tensor) -> Tensor:
    """Logits after every option: bias, bans and grammar, penalties, temperature, filters; never written in place.

    logits [B, N, V] of the token that follows each node; tokens, depth, ancestors int64 [B, N]: the tree, whose node 0 is already
    counted in the penalties. Returns float32, so that rounding does not depend on which options the rest of the batch uses; a token
    that may not be drawn becomes -inf.
    """
    logits = logits.float()
    if options.bias is not None:
        count = options.bias.ids.shape[1]
        shape = (*logits.shape[:2], count)
        logits = logits.scatter_add(2, options.bias.ids[:, None].expand(shape), options.bias.values.float()[:, None].expand(shape))
    if options.bans is not None:
        logits = _ban(logits, options.bans, depth)
    if options.allowed is not None:
        logits = _forbid(logits, options.allowed)
    if options.penalties is not None:
        logits = _penalise(logits, options.penalties, tokens, ancestors)
    if options.temperature is not None:
        logits = logits / options.temperature[:, None, None]
    return logits if options.filters is None else apply_filters(logits, options.filters)


def _ban(logits: Tensor, bans: Bans, depth: Tensor) -> Tensor:
    active = (depth < bans.until_depth[:, None])[:, :, None] & (bans.ids >= 0)[:, None]  # [B, N, S]
    values = torch.zeros((), dtype=logits.dtype, device=logits.device).where(~active, float("-inf"))
    return logits.scatter_add(2, bans.ids.clamp(min=0)[:, None].expand_as(values), values)


def _forbid(logits: Tensor, allowed: Allowed) -> Tensor:
    constrained = (allowed.rows >= 0).nonzero().squeeze(1)
    ids = torch.arange(logits.shape[2], device=logits.device)
    bits = (allowed.words[allowed.rows[constrained]][:, :, ids // 32] >> (ids % 32)) & 1
    return logits.index_copy(0, constrained, logits[constrained].masked_fill(bits == 0, float("-inf")))


def _penalise(logits: Tensor, penalties: Penalties, tokens: Tensor, ancestors: Tensor) -> Tensor:
    """Presence and frequency count generated tokens, repetition also the prompt's; drafted ancestors count as generated."""
    nodes = torch.arange(tokens.shape[1], device=tokens.device)
    on_path = ((ancestors[:, :, None] >> nodes) & 1) * (nodes > 0)  # [B, N, N], node 0 is counted already
    counts = penalties.output_counts[:, None].expand(-1, tokens.shape[1], -1).clone()
    counts.scatter_add_(2, tokens.clamp(min=0)[:, None].expand_as(on_path), on_path.to(counts.dtype))
    generated = counts > 0
    repeated = generated | penalties.prompt_tokens[:, None]
    factor = penalties.repetition[:, None, None]
    logits = torch.where(repeated, torch.where(logits > 0, logits / factor, logits * factor), logits)
    return logits - penalties.frequency[:, None, None] * counts - penalties.presence[:, None, None] * generated


def apply_filters(logits: Tensor, filters: Filters) -> Tensor:
    """top-k, then top-p, then min-p on logits [B, N, V] that the temperature has already divided; what they remove becomes -inf.

    top_k keeps the k largest; top_p what has less than that mass strictly above it; min_p what is at least that share of the largest
    probability. Equal logits stay or go together, and at least one token stays.
    """
    return logits.masked_fill(logits < filter_cuts(logits, filters)[:, :, None], float("-inf"))


def filter_cuts(logits: Tensor, filters: Filters) -> Tensor:
    """The smallest logit of every row that passes the filters, float32 [B, N]. Arguments as for ``apply_filters``."""
    top_k, top_p, min_p = (option[:, None, None] for option in filters)
    ordered = logits.sort(dim=-1, descending=True).values
    cut = ordered.gather(2, (top_k - 1).clamp(0, logits.shape[2] - 1).expand(-1, logits.shape[1], 1))
    probabilities = ordered.masked_fill(ordered < cut, float("-inf")).softmax(-1)
    above = probabilities.cumsum(-1) - probabilities
    # The running sum may round up to 1 before the end: a request without top_p must not notice.
    kept = ((above < top_p) | (top_p >= 1)) & (probabilities >= min_p * probabilities[:, :, :1])
    last = (kept.sum(2, keepdim=True) - 1).clamp(min=0)
    return torch.maximum(cut, ordered.gather(2, last)).squeeze(2)


class TreePointers(NamedTuple):
    """What the kernels read of a tree; None where no option of the batch looks at it."""

    tokens: Tensor | None  # int64 [B, N]
    parent: Tensor | None  # int64 [B, N]
    depth: Tensor | None  # int64 [B, N]
    nodes: int  # N


class OptionPointers(NamedTuple):
    """What the kernels read of a ``SamplingBatch``: one value per request or per (request, token); None for unused parts."""

    temperature: Tensor | None  # float32 [B]
    filters: Filters | None
    bias: Tensor | None  # float32 [B, V]
    banned: Tensor | None  # int8 [B, V]
    until_depth: Tensor | None  # int64 [B]
    counts: Tensor | None  # int32 [B, V]
    prompt_tokens: Tensor | None  # bool [B, V]
    presence: Tensor | None  # float32 [B]
    frequency: Tensor | None  # float32 [B]
    repetition: Tensor | None  # float32 [B]
    allowed_rows: Tensor | None  # int64 [B]
    allowed_words: Tensor | None  # int32 [G, N, allowed_width]
    allowed_width: int

    @classmethod
    def of(cls, options: SamplingBatch, logits: Tensor) -> OptionPointers:
        """Bias and bans become dense, [B, V]: a tile of the vocabulary then reads them once for all nodes of its request.

        logits [B, N, V]: what they will be applied to.
        """
        bias = banned = None
        batch, vocab_size, device = logits.shape[0], logits.shape[2], logits.device
        if options.bias is not None:
            bias = torch.zeros(batch, vocab_size, device=device).scatter_add_(1, options.bias.ids, options.bias.values.float())
        if options.bans is not None:
            ids = options.bans.ids
            banned = torch.zeros(batch, vocab_size, dtype=torch.int8, device=device)
            banned.scatter_add_(1, ids.clamp(min=0), (ids >= 0).to(torch.int8))
        until_depth = None if options.bans is None else options.bans.until_depth
        counts = prompt_tokens = presence = frequency = repetition = None
        if options.penalties is not None:
            counts, prompt_tokens = options.penalties.output_counts, options.penalties.prompt_tokens
            presence, frequency, repetition = (column.contiguous() for column in options.penalties[:3])
        rows, words = (None, None) if options.allowed is None else (part.contiguous() for part in options.allowed)
        return cls(
            options.temperature, options.filters, bias, banned, until_depth, counts, prompt_tokens, presence, frequency, repetition,
            rows, words, 0 if words is None else words.shape[2],
        )  # fmt: skip


@jit
def load_options(options: tl.tuple, b: tl.tensor, ids: tl.tensor, vocab: tl.tensor) -> tl.tensor:
    """What the options say of the tokens ``ids`` [BLOCK] of request b: bias, bans, counts, prompt tokens; zero where unused."""
    inside = ids < vocab
    row = b.to(tl.int64) * vocab
    bias = tl.load(options.bias + row + ids, mask=inside, other=0.0) if options.bias is not None else 0.0
    banned = tl.load(options.banned + row + ids, mask=inside, other=0) if options.banned is not None else 0
    counts = tl.load(options.counts + row + ids, mask=inside, other=0) if options.counts is not None else 0
    in_prompt = tl.load(options.prompt_tokens + row + ids, mask=inside, other=0) if options.counts is not None else 0
    return bias, banned, counts, in_prompt


@jit
def adjust(
    logits: tl.tensor, options: tl.tuple, values: tl.tuple, tree: tl.tuple, b: tl.tensor, node: tl.tensor, ids: tl.tensor
) -> tl.tensor:
    """Logits float32 [BLOCK] of the tokens ``ids`` after ``node`` with every option but the filters, as ``apply_options`` makes them.

    values: from ``load_options``; tree: a TreePointers.
    """
    bias, banned, counts, in_prompt = values
    if options.bias is not None:
        logits = logits + bias
    if options.banned is not None:
        banning = tl.load(tree.depth + b * tree.nodes + node) < tl.load(options.until_depth + b)
        logits = tl.where(banning & (banned != 0), float("-inf"), logits)
    if options.allowed_rows is not None:
        row = tl.load(options.allowed_rows + b)
        place = (tl.maximum(row, 0) * tree.nodes + node) * options.allowed_width + ids // 32
        word = tl.load(options.allowed_words + place, mask=ids // 32 < options.allowed_width, other=0)
        logits = tl.where((row < 0) | (((word >> (ids % 32)) & 1) != 0), logits, float("-inf"))
    if options.counts is not None:
        ancestor = tl.full([], 0, tl.int64) + node
        while ancestor > 0:
            counts += (ids == tl.load(tree.tokens + b * tree.nodes + ancestor)).to(tl.int32)
            ancestor = tl.load(tree.parent + b * tree.nodes + ancestor)
        factor = tl.load(options.repetition + b)
        penalised = tl.where(logits > 0, logits / factor, logits * factor)
        logits = tl.where((counts > 0) | (in_prompt != 0), penalised, logits)
        logits = logits - tl.load(options.frequency + b) * counts - tl.where(counts > 0, tl.load(options.presence + b), 0.0)
    if options.temperature is not None:
        logits = logits * (1.0 / tl.load(options.temperature + b))
    return logits
