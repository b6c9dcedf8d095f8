"""Training-time test (EAGLE-3, section 3.1): the head drafts every chain of a batch in parallel, as serving would one by one.

Step 0 is a causal pass over rows with the target's true features. At step k each chain takes one more token of the text, its own
state of step k - 1 in place of a feature, RoPE position i + k, and attends to the true rows up to i and to its own later rows.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from drafts.eagle3 import Eagle3Head, rotated
from tools.train_vsd.data import Batch

NextTokens = Callable[[int, Tensor], Tensor]
"""(k, states of step k - 1 [B, A, H]) -> the target ids [B, A] that the chains read at step k."""


def unroll(
    head: Eagle3Head, batch: Batch, features: Tensor, steps: int, starts: Tensor | None = None, next_tokens: NextTokens | None = None
) -> list[Tensor]:
    """The head's states, one [B, A, H] per step, for ``head.logits``. ``features``: [B, T, 3 * H_t] at the batch's tokens.

    Without more arguments the chains are those of the batch and follow its text. ``starts`` int64 [B, A]: index of the true feature
    that each chain starts from instead; ``next_tokens``: what they read instead.
    """
    index = batch.starts() if starts is None else starts
    length = batch.tokens.shape[1]
    attention = ChainAttention(index)
    embeddings = head.embed(batch.tokens)
    angles = head.angles(torch.arange(length - 1, device=index.device))
    condition = head.condition(batch.temperature.clamp(max=1)[:, None])
    y = head(embeddings[:, 1:], head.combine(features[:, :-1]), angles, rotated(attention.prefix), condition)
    states = [_take(y, index)]
    for k in range(1, steps):
        following = (index + k + 1).clamp(max=length - 1)
        read = _take(embeddings, following) if next_tokens is None else head.embed(next_tokens(k, states[-1]))
        states.append(head(read, states[-1], head.angles(index + k), rotated(attention.chain), condition))
    return states


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """rows [B, T, H], index [B, A] -> [B, A, H]."""
    return rows.gather(1, index[:, :, None].expand(-1, -1, rows.shape[-1]))


class ChainAttention:
    """Attention for one batch of chains; remembers keys and values from step to step. q [B, A, Hq, D], k and v [B, A, Hkv, D], rotated."""

    def __init__(self, index: Tensor) -> None:
        self.index = index  # [B, A]
        self.true_keys = self.true_values = index.new_empty(0)  # [B, Hkv, T, D] after the first step
        self.hidden = index.new_empty(0)  # bool [B, 1, A, 1, T], rows that a chain must not see
        self.own: list[tuple[Tensor, Tensor]] = []  # per later step

    def prefix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Step 0: causal over all rows of the text; q [B, T, Hq, D]."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        self.true_keys, self.true_values = k, v
        later = torch.arange(k.shape[2], device=k.device) > self.index[:, :, None]
        self.hidden = later[:, None, :, None, :]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    def chain(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """A later step: the true rows up to the chain's start, and the chain's own rows."""
        self.own.append((k, v))
        b, a, heads, d = q.shape
        kv_heads = k.shape[2]
        q = (q * d**-0.5).view(b, a, kv_heads, heads // kv_heads, d).transpose(1, 2)  # [B, Hkv, A, G, D]
        scores = (q.flatten(2, 3) @ self.true_keys.transpose(2, 3)).unflatten(2, (a, -1)).masked_fill(self.hidden, float("-inf"))
        own = [(q * key.transpose(1, 2).unsqueeze(3)).sum(-1, keepdim=True) for key, _ in self.own]
        weights = torch.cat((scores, *own), dim=-1).softmax(-1)  # [B, Hkv, A, G, T + steps]
        mixed = (weights[..., : scores.shape[-1]].flatten(2, 3) @ self.true_values).unflatten(2, (a, -1))
        for column, (_, value) in enumerate(self.own, start=scores.shape[-1]):
            mixed = mixed + weights[..., column, None] * value.transpose(1, 2).unsqueeze(3)
        return mixed.transpose(1, 2).reshape(b, a, heads, d)
