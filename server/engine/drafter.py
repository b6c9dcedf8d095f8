"""Drafts with an EAGLE-3 head, and keeps the head's cache true."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from drafts.eagle3 import Condition, Eagle3Head
from kernels import cpu
from kernels.draft_level import draft_level
from kernels.noise import Noise, NoiseKey
from kernels.rope_store import rope_store
from kernels.sampling import SamplingBatch, has_kernel
from kernels.tree_attention import tree_attention
from kernels.tree_layout import TreeLayout, physical_slots
from server.engine.cpu_layout import joined
from server.engine.graphs import Graphs, graph_context
from server.engine.kv_cache import PagedTensors
from server.engine.pool import Pool
from server.engine.types import Verdict

LEAST_WIDTH = 4  # see ``draft_width``
REPLAYED_ROWS = 2048  # by which the draft cache is brought up to date by graphs, at most


class TreeShape(NamedTuple):
    """How much to draft, at most: ``nodes`` verified (root included), ``depth`` levels, ``topk`` nodes expanded a level. Without levels
    there are nodes of the request's own text alone.

    The prices are what one more level of all requests, and one more node of one, must bring in expected tokens; 0 takes all.
    """

    nodes: int
    depth: int
    topk: int
    level_price: float = 0.0
    node_price: float = 0.0

    @property
    def lookahead(self) -> int:
        """Slots after the committed context that verification or drafting writes to, without what is begun ahead."""
        return max(self.nodes, self.expanded)

    @property
    def expanded(self) -> int:
        """Drafted nodes whose children are drafted too."""
        return (self.depth - 1) * self.topk

    def shrunk(self, nodes: int) -> "TreeShape":
        """The shape for fewer nodes: no level and no branch that they could not fill."""
        return self._replace(nodes=nodes, depth=min(self.depth, max(1, nodes - 1)), topk=max(1, min(self.topk, nodes // 2)))


def draft_width(shape: TreeShape) -> int:
    """Rows of a request by which ``go_on`` brings draft caches up: enough for any tree of so many nodes, whatever was copied beside the
    head, and for all trees that the target may have gone ahead of.
    """
    return max(LEAST_WIDTH, 1 << max(shape.depth, shape.nodes - 1).bit_length())


@dataclass(frozen=True, eq=False)
class Told:
    """What the head is told of requests: ``temperature`` float32 [B], clamped to [0, 1]."""

    head: Eagle3Head
    temperature: Tensor

    @cached_property
    def condition(self) -> Condition:
        return self.head.condition(self.temperature[:, None])


class Grown(NamedTuple):
    """What the head drafted for a batch; ``levels``: by how many the trees were grown, the roots' children included."""

    pool: Pool
    levels: int
    guesses: tuple[Tensor, Tensor]  # the best tokens after the roots, int64 [B], and their scores float32 [B]: -inf where the head is NaN

    @classmethod
    def of(cls, levels: tuple[Pool, ...]) -> "Grown":
        pool = Pool(*(torch.cat(part, dim=1) for part in zip(*levels, strict=True)))  # a copy: graphs share their memory
        return cls(pool, len(levels), (pool.tokens[:, 0], pool.scores[:, 0]))

    def at(self, places: Tensor) -> "Grown":
        """Of the requests at ``places``, int64 [B']."""
        tokens, scores = self.guesses
        return Grown(Pool(*(part[places] for part in self.pool)), self.levels, (tokens[places], scores[places]))


class Drafter:
    """A head with its cache. ``state`` [1 + rows, H]: what each request's last committed draft row returned; the first is nobody's, for
    graphs to fill up a batch. ``graphs``: replays what is drafted; ``row_graphs``: what brings the cache up to date, in sizes for prompts
    and over memory of its own, since what the target has gone ahead of is still to be read then.
    """

    def __init__(self, head: Eagle3Head, blocks: int, block_size: int, max_seqs: int) -> None:
        config = head.config
        weight = head.fc.weight
        self.head, self.block_size = head, block_size
        self.cache = PagedTensors(1, blocks, block_size, config.num_key_value_heads, config.head_dim, weight.dtype, weight.device)
        self.graphs: Graphs | None = None
        self.row_graphs: Graphs | None = None
        self.state = torch.zeros(1 + max_seqs, config.hidden_size, dtype=weight.dtype, device=weight.device)
        self._scale = config.head_dim**-0.5
        self._joined = joined(head)
        self._target_ids = None if head.d2t is None else head.to_target_ids(torch.arange(config.draft_vocab_size, device=weight.device))

    def states(self, places: Tensor) -> Tensor:
        """What drafting begins from, [B, H]; places int64 [B]."""
        return self.state[places]

    def _forward(
        self, tokens: Tensor, hidden: Tensor, angles: Tensor, slots: Tensor, layout: TreeLayout, condition: Condition
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """States and logits of drafted rows, int64 [B, N], whose keys and values go to ``slots`` int64 [B, N]; angles [2, B, N, 1, D]."""
        keys, values = self.cache.k[0], self.cache.v[0]
        if self._joined is not None and cpu.serves(hidden):
            return self._joined.run(self.head.table, tokens, hidden, angles, slots, layout, *condition, keys, values)

        def attend(qk: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            qk, v, cos, sin = (part.flatten(0, 1) for part in (qk, v, cos, sin))
            q = rope_store(qk, v, cos, sin, slots.flatten(), None, keys, values)
            return tree_attention(q.unflatten(0, tokens.shape), keys, values, layout, self._scale)

        y = self.head(self.head.embed(tokens), hidden, angles, attend, condition)
        return y, self.head.logits(y, condition)

    @property
    def catches_up_at_once(self) -> bool:
        """Whether ``catch_up`` can be called in the place of ``extend``."""
        return self._joined is not None and self.graphs is None and cpu.serves(self.state)

    def catch_up(self, features: Tensor, tokens: Tensor, rows: Tensor, starts: Tensor, ends: Tensor, tables: Tensor, told: Told) -> None:
        """``extend`` in one call on a CPU, for requests with ``rows`` of the block ``tables``, at logical slots ``starts`` to ``ends``,
        int64 [B] each.
        """
        assert self._joined is not None
        hidden = self.head.combine(features.to(self.state.dtype))
        self._joined.catch_up(
            self.head.table, hidden, tokens, self.head.rope, rows, starts, ends, tables, self.block_size, told.condition.shift,
            self.cache.k[0], self.cache.v[0], self.state,
        )  # fmt: skip

    def extend(
        self, places: Tensor, features: Tensor, tokens: Tensor, positions: Tensor, slots: Tensor, last: Tensor, block_tables: Tensor,
        lengths: Tensor, temperature: Tensor, max_context: int,
    ) -> None:  # fmt: skip
        """Write draft rows from the target's true features, and keep the state of every request's last one.

        places int64 [B]: the requests' places in ``state``, one more than their rows. Of all requests' rows of the draft together, one
        request after the other: features [M, 3 * H]; tokens int64 [M]: the token after each feature; positions and physical slots int64
        [M]. last int64 [B]: each request's last row, which alone goes beyond keys and values, at logical slot ``lengths`` int64 [B] of at
        most ``max_context``; temperature float32 [B]: the requests', clamped to [0, 1].
        """
        features = features.to(self.state.dtype)
        if self.row_graphs is None or len(tokens) > REPLAYED_ROWS:
            self._extend(places, features, tokens, positions, slots, last, block_tables, lengths, temperature, max_context)
            return
        self.write(features, tokens, positions, slots)
        rows = (part.index_select(0, last) for part in (features, tokens, positions, slots))
        context = graph_context(max_context)
        self.row_graphs.run(self._keep_states, places, *rows, block_tables, lengths, temperature, max_context=context)

    def _extend(
        self, places: Tensor, features: Tensor, tokens: Tensor, positions: Tensor, slots: Tensor, last: Tensor, block_tables: Tensor,
        lengths: Tensor, temperature: Tensor, max_context: int,
    ) -> None:  # fmt: skip
        keys, values = self.cache.k[0], self.cache.v[0]
        layout = TreeLayout(block_tables, lengths, torch.zeros_like(lengths)[:, None], None, None, self.block_size, max_context)

        def attend(qk: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            q = rope_store(qk, v, cos, sin, slots, None, keys, values)
            return tree_attention(q[last, None], keys, values, layout, self._scale)[:, 0]

        hidden = self.head.combine(features)
        angles, condition = self.head.angles(positions), self.head.condition(temperature)
        self.state[places] = self.head(self.head.embed(tokens), hidden, angles, attend, condition, last)

    def _keep_states(
        self, places: Tensor, features: Tensor, tokens: Tensor, positions: Tensor, slots: Tensor, block_tables: Tensor, lengths: Tensor,
        temperature: Tensor, max_context: int,
    ) -> None:  # fmt: skip
        """``_extend`` by a row of every request, as a function for graphs."""
        last = torch.arange(len(places), device=places.device)
        self._extend(places, features, tokens, positions, slots, last, block_tables, lengths, temperature, max_context)

    def write(self, features: Tensor, tokens: Tensor, positions: Tensor, slots: Tensor) -> None:
        """Of draft rows keys and values alone; arguments as ``extend`` has them."""
        features = features.to(self.state.dtype)
        if self.row_graphs is None or len(tokens) > REPLAYED_ROWS:
            self._write(features, tokens, positions, slots)
        else:
            self.row_graphs.run(self._write, features, tokens, positions, slots)

    def _write(self, features: Tensor, tokens: Tensor, positions: Tensor, slots: Tensor) -> None:
        qk, v, _ = self.head.project(self.head.embed(tokens), self.head.combine(features))
        cos, sin = self.head.angles(positions)
        rope_store(qk, v, cos, sin, slots, None, self.cache.k[0], self.cache.v[0])

    def grow(
        self, rows: Tensor, block_tables: Tensor, context_lens: Tensor, max_context: int, shape: TreeShape, options: SamplingBatch,
        noise: Noise | None, sigma: Tensor, told: Told, limits: Tensor | None,
    ) -> Grown:  # fmt: skip
        """The nodes of one tree per request (EAGLE-2): those after the best ``topk`` nodes of every level.

        A node's score is the product over its path of softmax((log q + noise) / sigma), the drafted survival probability: with the
        request's own noise the draft guesses the very token that verification will draw.
        sigma float32 [B, shape.depth]: drafting temperatures of the levels; limits int64 [B]: most drafted nodes of each request, where
        0 is all that counts here.
        """
        arguments = rows + 1, block_tables, context_lens, options
        if self._joined is not None and self.graphs is None and has_kernel(options) and cpu.serves(self.state):
            return self._grown(*arguments, noise, sigma, told, limits, shape)
        if self.graphs is None:
            return Grown.of(self._levels(*arguments, noise, sigma, told.temperature, limits, shape, max_context))
        return Grown.of(
            self.graphs.run(
                self._static_levels, *arguments, _key(noise, rows), sigma, told.temperature, limits,
                shape=shape, max_context=graph_context(max_context),
            )
        )  # fmt: skip

    def _grown(
        self, rows: Tensor, block_tables: Tensor, context_lens: Tensor, options: SamplingBatch, noise: Noise | None, sigma: Tensor,
        told: Told, limits: Tensor | None, shape: TreeShape,
    ) -> Grown:  # fmt: skip
        """``_levels`` in one call."""
        assert self._joined is not None
        head, vocab = self.head, self.head.config.vocab_size
        start = None if limits is None else torch.where(limits == 0, float("-inf"), 0.0)
        pool, levels = self._joined.grow(
            head.table, self.states(rows), head.rope, *told.condition, block_tables, context_lens, self.block_size,
            None if noise is None else noise.key, vocab, self._target_ids, options.temperature, sigma, start, shape.topk,
            (shape.level_price, shape.node_price), self.cache.k[0], self.cache.v[0],
        )  # fmt: skip
        scores, tokens, parents = pool
        return Grown(Pool(scores, tokens, parents), levels, (tokens[:, 0], scores[:, 0]))

    def go_on(
        self, rows: Tensor, features: Tensor, verdict: Verdict, block_tables: Tensor, context_lens: Tensor, max_context: int,
        shape: TreeShape, options: SamplingBatch, noise: Noise | None, sigma: Tensor, temperature: Tensor,
    ) -> Grown:  # fmt: skip
        """``extend`` by what a verification has accepted, and ``grow`` from there, by graphs, while the host does not know the verdict.

        features [B, D + 1, 3 * H] of the nodes of the verdict's paths; context_lens and noise: as they were for the verification.
        """
        assert self.graphs is not None
        width = draft_width(shape)
        more = width - features.shape[1]
        features, tokens = F.pad(features, (0, 0, 0, more)), F.pad(verdict.tokens, (0, more), value=-1)
        return Grown.of(
            self.graphs.run(
                self._go_on, rows + 1, features, tokens, verdict.num_accepted, block_tables, context_lens, options,
                _key(noise, rows), sigma, temperature, shape=shape, max_context=graph_context(max_context + width),
            )
        )  # fmt: skip

    def _go_on(
        self, rows: Tensor, features: Tensor, tokens: Tensor, accepted: Tensor, block_tables: Tensor, context_lens: Tensor,
        options: SamplingBatch, key: NoiseKey, sigma: Tensor, temperature: Tensor, shape: TreeShape, max_context: int,
    ) -> tuple[Pool, ...]:  # fmt: skip
        """``go_on``; ``rows`` are places in ``state``. What is no accepted row comes to slots that are written before they are read."""
        width = tokens.shape[1]
        positions = context_lens[:, None] + torch.arange(width, device=rows.device)
        slots = physical_slots(block_tables, positions, self.block_size)
        last = torch.arange(len(rows), device=rows.device) * width + accepted
        features, tokens, ends = features.flatten(0, 1), tokens.clamp(min=0).flatten(), context_lens + accepted
        self._extend(rows, features, tokens, positions.flatten(), slots.flatten(), last, block_tables, ends, temperature, max_context)
        key = key._replace(positions=key.positions + accepted + 1)
        return self._static_levels(rows, block_tables, ends + 1, options, key, sigma, temperature, None, shape, max_context)

    def _static_levels(
        self, rows: Tensor, block_tables: Tensor, context_lens: Tensor, options: SamplingBatch, key: NoiseKey, sigma: Tensor,
        temperature: Tensor, limits: Tensor | None, shape: TreeShape, max_context: int,
    ) -> tuple[Pool, ...]:  # fmt: skip
        """``_levels`` as a function for graphs; without prices, which would make it depend on values."""
        assert shape.level_price == shape.node_price == 0
        noise = Noise(key, shape.depth, self.head.config.vocab_size)
        return self._levels(rows, block_tables, context_lens, options, noise, sigma, temperature, limits, shape, max_context)

    def _levels(
        self, rows: Tensor, block_tables: Tensor, context_lens: Tensor, options: SamplingBatch, noise: Noise | None, sigma: Tensor,
        temperature: Tensor, limits: Tensor | None, shape: TreeShape, max_context: int,
    ) -> tuple[Pool, ...]:  # fmt: skip
        """The nodes of every level; ``rows`` are places in ``state``."""
        topk, sigma = shape.topk, sigma.t().contiguous()
        y, condition = self.states(rows)[:, None], self.head.condition(temperature[:, None])
        logits = self.head.logits(y, condition)
        start = torch.zeros_like(temperature) if limits is None else torch.where(limits == 0, float("-inf"), 0.0)
        level = draft_level(logits, options, noise, 0, sigma[0], self._target_ids, start[:, None], topk)
        ancestors = torch.zeros_like(level.best)
        levels = [Pool(level.scores, level.tokens, ancestors)]
        first = 1  # of the last level's places in the pool; the root has place 0
        each_child = ancestors.new_ones(topk)
        expanded_scores = torch.zeros_like(level.best_scores[:, :1])
        for depth in range(1, shape.depth):
            width = _worthwhile(level.best_scores, expanded_scores, shape)
            if width == 0:
                break
            if depth == 1:  # often there is no further level
                expanded = torch.arange(shape.expanded, device=rows.device)
                depths = (expanded // topk).expand(len(rows), -1)
                layout = TreeLayout(block_tables, context_lens, depths, None, None, self.block_size, max_context)
                slots, angles = _by_level(layout.slots, topk), self.head.angles(_by_level(layout.positions, topk))
                own_bits = torch.ones_like(expanded) << expanded
            # The rows to expand: scores, places in the last level, its rows above them, tokens, states, expanded rows they descend from.
            expanded_scores, best, source, tokens = (part[:, :width] for part in level[2:])
            hidden = y.gather(1, source[:, :, None].expand(-1, -1, y.shape[2]))
            rows_before = (depth - 1) * topk
            ancestors = ancestors.gather(1, source) | own_bits[rows_before : rows_before + width]
            own = angles[:, depth - 1, :, :width], slots[depth - 1, :, :width], layout.part(rows_before, width, ancestors)
            y, logits = self._forward(tokens, hidden, *own, condition)
            level = draft_level(logits, options, noise, depth, sigma[depth], self._target_ids, expanded_scores, topk)
            parents = torch.add(best[:, :, None], each_child, alpha=first).flatten(1)  # first + best, once for every child
            levels.append(Pool(level.scores, level.tokens, parents))
            first += levels[-2].scores.shape[1]
        return tuple(levels)


def _worthwhile(scores: Tensor, parents: Tensor, shape: TreeShape) -> int:
    """How many of a level's nodes to expand, 0 where the next level would not pay.

    scores float32 [B, k], best first; parents float32 [B, p]: scores of the nodes that they are children of. The next level is
    expected to look like this one, but that as much less of it survives as this one lost; of it a tree takes the nodes that are worth
    their price. The one width for all requests keeps the batch rectangular: column i is worth what it brings all of them.
    """
    if shape.level_price == shape.node_price == 0:
        return scores.shape[1]
    survival = [[math.exp(score) for score in row] for row in scores.tolist()]
    worth = [own for row in survival for own in row if own >= shape.node_price]
    above = sum(math.exp(score) for row in parents.tolist() for score in row)
    kept = min(1.0, sum(worth) / above) if above else 0.0
    bought = sum(max(0.0, own * kept - shape.node_price) for own in worth)
    tokens = map(sum, zip(*survival, strict=True))
    return sum(own >= shape.node_price * len(survival) for own in tokens) if bought >= shape.level_price else 0


def _by_level(rows: Tensor, topk: int) -> Tensor:
    """[B, L * topk] -> [L, B, topk]: those of a level lie together, and no level has to copy its own."""
    return rows.unflatten(1, (-1, topk)).transpose(0, 1).contiguous()


def _key(noise: Noise | None, rows: Tensor) -> NoiseKey:
    """The noise's, or that of no noise at all: what is recorded serves greedy and other requests."""
    return noise.key if noise else NoiseKey(torch.zeros_like(rows), torch.zeros_like(rows), torch.zeros_like(rows, dtype=torch.bool))
