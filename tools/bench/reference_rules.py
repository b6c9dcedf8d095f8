"""The rule by which other engines accept drafts at temperatures above 0, as a pure function of distributions and uniforms, and a decoder
for one request that uses it. No cache, no batch: what is counted is tokens per verification.

Recursive rejection of candidates that were drawn independently: Miao et al. (SpecInfer, 2023), algorithm 2. Of one candidate it is the
p/q rule of chains: Leviathan et al. (2023), algorithm 1; Chen et al. (2023), algorithm 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from drafts.eagle3 import Eagle3Head, feature_layers, rotated


def sample(probabilities: Tensor, uniform: Tensor) -> int:
    """The token whose share of the unit interval holds ``uniform``. probabilities float64 [V]."""
    cumulative = probabilities.cumsum(0)
    inside = torch.searchsorted(cumulative, uniform * cumulative[-1], right=True).clamp(max=len(probabilities) - 1)
    return int(inside)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """What to draw from after a rejection: the normalised positive part of p - q. p, q float64 [V]."""
    left = (p - q).clamp(min=0)
    return left / left.sum() if left.sum() > 0 else p


def recursive_rejection(p: Tensor, q: Tensor, paths: Sequence[Sequence[int]], uniforms: Tensor) -> list[int]:
    """The tokens that a verification of K paths of L tokens commits: the accepted part of one, and one more.

    p: float64 [K, L + 1, V], the target's distributions along each path; q: float64 [K, L, V], those that the paths were drawn from, each
    path independently; uniforms: float64 [K * L + 1] in [0, 1), independent of the draft. At every level the paths that begin as what is
    accepted are candidates, one after the other: a token is accepted with probability min(1, r / q), r being p at first and after each
    rejection the residual of r; when all are rejected, the next token is drawn from r.
    """
    numbers = iter(uniforms)
    left, accepted = list(range(len(paths))), list[int]()
    for level in range(q.shape[1]):
        rest = p[left[0], level]
        for path in left:
            token = paths[path][level]
            # The test uses up its number: conditional on rejection it is not uniform any more.
            if next(numbers) * q[path, level, token] < rest[token]:
                break
            rest = residual(rest, q[path, level])
        else:
            return [*accepted, sample(rest, uniforms[-1])]
        accepted.append(token)
        left = [other for other in left if paths[other][level] == token]
    return [*accepted, sample(p[left[0], -1], uniforms[-1])]


@dataclass
class ReferenceDecoder:
    """One request at a time, with ``paths`` chains of ``length`` drafted tokens drawn independently, verified by recursive rejection."""

    model: PreTrainedModel
    head: Eagle3Head
    temperature: float
    paths: int
    length: int
    uniforms: torch.Generator

    @torch.inference_mode()
    def acceptance(self, prompt: list[int], new: int) -> tuple[int, int]:
        """Tokens committed by verifications until ``new`` tokens or the end of sequence, and verifications."""
        eos = self.model.generation_config.eos_token_id
        ends = set(eos if isinstance(eos, list) else [eos])
        p, features = self._target([prompt])
        ids, committed, steps = [*prompt, sample(p[0, -1], self._uniforms(1)[0])], 0, 0
        while len(ids) - len(prompt) < new and not ends & set(ids[len(prompt) :]):
            drafted, q = self._draft(ids, features[0, : len(ids) - 1])
            p, features = self._target([ids + path for path in drafted])
            tokens = recursive_rejection(p[:, len(ids) - 1 :], q, drafted, self._uniforms(self.paths * self.length + 1))
            # The features of what was accepted are those of the path that it begins.
            path = next(i for i, path in enumerate(drafted) if path[: len(tokens) - 1] == tokens[:-1])
            features, ids = features[path : path + 1], ids + tokens
            committed, steps = committed + len(tokens), steps + 1
        return committed, steps

    def _uniforms(self, count: int) -> Tensor:
        return torch.rand(count, generator=self.uniforms, dtype=torch.float64)

    def _target(self, texts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Distributions float64 [K, T, V] and features [K, T, 3 H]."""
        out = self.model(torch.tensor(texts), output_hidden_states=True, use_cache=False)
        layers = feature_layers(self.model.config.num_hidden_layers)
        features = torch.cat([out.hidden_states[layer] for layer in layers], dim=-1)
        return (out.logits.double() / self.temperature).softmax(-1), features

    def _draft(self, ids: list[int], features: Tensor) -> tuple[list[list[int]], Tensor]:
        """Paths, and the distributions float64 [K, L, V] that they were drawn from; features of all tokens but the last."""
        head, count = self.head, len(features)
        keys: list[Tensor] = []
        values: list[Tensor] = []

        @rotated
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            """Causal attention of the newest rows over all rows so far, [T, heads, D]."""
            keys.append(k)
            values.append(v)
            k, v = torch.cat(keys), torch.cat(values)
            mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
            q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)

        warm = head.condition(min(self.temperature, 1.0))
        start = head(head.embed(torch.tensor(ids[1:])), head.combine(features), head.angles(torch.arange(count)), attend, warm)[-1:]
        drafted, laws = [], []
        for _ in range(self.paths):
            y, path = start, list[int]()
            for depth in range(self.length):
                own = (head.logits(y, warm)[0].double() / self.temperature).softmax(-1)
                law = torch.zeros(self.model.config.vocab_size, dtype=torch.float64)
                law[head.to_target_ids(torch.arange(len(own)))] = own
                path.append(sample(law, self._uniforms(1)[0]))
                laws.append(law)
                if depth + 1 < self.length:
                    y = head(head.embed(torch.tensor(path[-1:])), y, head.angles(torch.tensor([count + depth])), attend, warm)
            drafted.append(path)
            del keys[1:], values[1:]
        return drafted, torch.stack(laws).unflatten(0, (self.paths, self.length))
