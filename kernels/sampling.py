"""Sampling options on logits, for every node of every tree along the node's own path."""

from typing import NamedTuple

import torch
from torch import Tensor


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


class SamplingBatch(NamedTuple):
    """The options of all requests of a batch. A field is None where no request of the batch uses it, and then costs nothing."""

    temperature: Tensor  # float32 [B], 1 where the request is greedy
    filters: Filters | None
    penalties: Penalties | None
    bias: Bias | None
    bans: Bans | None


def apply_options(logits: Tensor, options: SamplingBatch, tokens: Tensor, depth: Tensor, ancestors: Tensor) -> Tensor:
    """Logits after every option: bias and bans, penalties, temperature, filters; never written in place.

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
    if options.penalties is not None:
        logits = _penalise(logits, options.penalties, tokens, ancestors)
    logits = logits / options.temperature[:, None, None]
    return logits if options.filters is None else apply_filters(logits, options.filters)


def _ban(logits: Tensor, bans: Bans, depth: Tensor) -> Tensor:
    active = (depth < bans.until_depth[:, None])[:, :, None] & (bans.ids >= 0)[:, None]  # [B, N, S]
    values = torch.zeros((), dtype=logits.dtype, device=logits.device).where(~active, float("-inf"))
    return logits.scatter_add(2, bans.ids.clamp(min=0)[:, None].expand_as(values), values)


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
    """top-k, then top-p, then min-p on logits [B, N, V] that the temperature has already divided.

    top_k keeps the k largest and their ties; top_p the fewest largest that reach the mass; min_p what is at least that share of
    the largest probability. At least one token always stays.
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    threshold = ordered.gather(2, (filters.top_k - 1).clamp(0, logits.shape[2] - 1)[:, None, None].expand(-1, logits.shape[1], 1))
    ordered = ordered.masked_fill(ordered < threshold, float("-inf"))
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    # The running sum may round up to 1 before the end: a request without top_p must not notice.
    removed = (before >= filters.top_p[:, None, None]) & (filters.top_p < 1)[:, None, None]
    removed |= probabilities < filters.min_p[:, None, None] * probabilities[:, :, :1]
    removed[:, :, 0] = False
    ordered = ordered.masked_fill(removed, float("-inf"))
    return torch.empty_like(ordered).scatter_(2, order, ordered)
