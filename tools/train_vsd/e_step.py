"""E-step: the paths that an M-step learns from, in two forms with one result.

``target_rows`` takes the target's own text: by the identity in ``m_step.acceptance`` it stands for draft paths filtered by
verification, at no cost beyond the teacher's pass. ``PathSampler`` lets the head draft S paths from an anchor and verifies them with the
engine's tree-masked forward pass over a cached prefix: the general form, which any acceptance law and utility can use.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from drafts.eagle3 import Eagle3Head
from kernels.noise import gumbel_noise
from kernels.tree_layout import TreeLayout
from kernels.tree_mask import tree_mask
from server.engine.target import Target
from tools.train_vsd.data import Batch
from tools.train_vsd.m_step import SIGMA, Law, Paths
from tools.train_vsd.unroll import unroll

BLOCK = 16  # tokens per cache block
MAX_TREE = 128  # nodes that tree attention takes


class PathBatch(NamedTuple):
    """M paths of K steps with what the target says of them. Paths of one anchor are neighbours."""

    states: Tensor  # [M, K, H], of the head along the paths, differentiable
    tokens: Tensor  # int64 [M, K], draft ids; -1: outside the draft's vocabulary
    live: Tensor  # bool [M, K], False past the end of the text
    chosen: Tensor  # bool [M, K], the token is what the target commits there
    rows: Tensor  # int64 [M, K], which row of p each step is compared with
    p: Tensor  # float32 [R, Vd], the target's distributions
    temperature: Tensor  # float32 [M], which the path is verified at
    group: int
    drawn_by_target: bool
    noise: Tensor | None = None  # float32 [R, Vd] that sampled text was drawn with, where the objective wants it

    def part(self, index: Tensor, greedy: bool) -> Paths:
        """The paths at ``index`` int64 [m], all of them greedy or none."""
        noise = None if greedy or self.noise is None else self.noise[self.rows[index]]
        return Paths(self.tokens[index], self.live[index], self.chosen[index], greedy, self.group, self.drawn_by_target, noise)


def target_rows(head: Eagle3Head, batch: Batch, features: Tensor, p: Tensor, depth: int) -> PathBatch:
    """Every chain of the batch with the text after it as its path; ``p`` [chains, Vd] as the teacher returns it."""
    states = torch.stack(unroll(head, batch, features, depth), dim=2)  # [B, A, K, H]
    device = states.device
    ahead = torch.arange(states.shape[1], device=device)
    alive = ahead < batch.chains[:, None]
    step = ahead[:, None] + torch.arange(depth, device=device)  # [A, K]
    inside = torch.minimum(step, batch.chains[:, None, None] - 1)  # [B, A, K], clamped to the text
    first_row = (batch.chains.cumsum(0) - batch.chains)[:, None, None]
    tokens = batch.tokens.gather(1, (batch.first[:, None, None] + 2 + inside).flatten(1)).view_as(inside)
    live = (step < batch.chains[:, None, None])[alive]
    return PathBatch(
        states[alive], draft_ids(head, tokens[alive]), live, live, (first_row + inside)[alive], p,
        batch.temperature[:, None].expand_as(alive)[alive], 1, True,
    )  # fmt: skip


def of_draft(head: Eagle3Head, values: Tensor) -> Tensor:
    """values [..., V] by target id -> [..., Vd] by draft id."""
    if head.d2t is None:
        return values
    return values[..., head.to_target_ids(torch.arange(head.config.draft_vocab_size, device=values.device))]


def text_noise(head: Eagle3Head, batch: Batch) -> Tensor:
    """The noise that the batch's sampled text was drawn with, float32 [chains, Vd] in the order of the teacher's rows; 0 in greedy rows."""
    ahead = torch.arange(int(batch.chains.max()), device=batch.tokens.device)
    row, column = (ahead < batch.chains[:, None]).nonzero(as_tuple=True)
    noise = torch.zeros(len(row), head.config.draft_vocab_size, device=row.device)
    sampled = batch.temperature[row] > 0
    row, position = row[sampled], (batch.first[row] + column + 2)[sampled]
    noise[sampled] = of_draft(head, gumbel_noise(batch.seed[row], position, head.config.vocab_size))
    return noise


def draft_ids(head: Eagle3Head, tokens: Tensor) -> Tensor:
    """Target ids -> the head's own, -1 where its vocabulary lacks them; same shape."""
    if head.d2t is None:
        return tokens
    table = torch.full((head.config.vocab_size,), -1, device=tokens.device)
    own = torch.arange(head.config.draft_vocab_size, device=tokens.device)
    table[head.to_target_ids(own)] = own
    return table[tokens]


class PathSampler:
    """Draws ``paths`` draft paths at each of ``anchors`` random anchors of every row, and verifies them.

    ``target`` shares its weights with the teacher. Under the noise law a sampled row's paths are drawn from
    softmax((log q + noise) / sigma), with the noise that its text was generated with; otherwise from q.
    """

    def __init__(self, target: Target, paths: int, anchors: int, law: Law, sigma: float = SIGMA) -> None:
        self.target, self.paths, self.anchors, self.law, self.sigma = target, paths, anchors, law, sigma

    def __call__(self, head: Eagle3Head, batch: Batch, features: Tensor, depth: int, generator: torch.Generator) -> PathBatch:
        """``generator``: what anchors and paths are drawn with, on the batch's device."""
        device, rows = batch.tokens.device, len(batch.tokens)
        draws = torch.rand(rows, self.anchors, generator=generator, device=device)
        # From the last anchor to the first: a tree overwrites the cache behind its own anchor only.
        anchors = batch.first[:, None] + (draws * batch.chains[:, None]).long().sort(descending=True).values
        starts = anchors.repeat_interleave(self.paths, dim=1)
        noise = self._noise(batch, anchors, depth)  # [B, n, K, V]
        condition = head.condition(batch.temperature.clamp(max=1)[:, None])
        drawn: list[Tensor] = []

        def draw(k: int, states: Tensor) -> Tensor:
            log_q = head.logits(states.detach(), condition).float() / batch.divisor()[:, None, None]
            if noise is not None:
                shared = (log_q + of_draft(head, noise[:, :, k - 1]).repeat_interleave(self.paths, dim=1)) / self.sigma
                log_q = torch.where(batch.temperature[:, None, None] > 0, shared, log_q)
            q = log_q.softmax(-1).flatten(0, 1)
            drawn.append(head.to_target_ids(torch.multinomial(q, 1, generator=generator)).view(rows, -1))
            return drawn[-1]

        states = unroll(head, batch, features, depth, starts, draw)
        draw(depth, states[-1])
        tokens = torch.stack(drawn, dim=2)  # [B, n * S, K]
        logits, index = self._verify(batch, anchors, tokens.unflatten(1, (self.anchors, self.paths)))
        logits /= batch.divisor(1 / head.config.temperature_sharpness).repeat_interleave(len(logits) // rows)[:, None]
        return self._collect(head, batch, torch.stack(states, dim=2), tokens, logits, index, noise)

    def _noise(self, batch: Batch, anchors: Tensor, depth: int) -> Tensor | None:
        """Of the token at each step of each anchor, [B, n, K, V]; zero for greedy rows. None where the law knows no noise."""
        if self.law != "noise" or bool((batch.temperature == 0).all()):
            return None
        positions = (anchors[:, :, None] + 2 + torch.arange(depth, device=anchors.device)).flatten()
        seeds = batch.seed.repeat_interleave(self.anchors * depth)
        noise = gumbel_noise(seeds, positions, self.target.vocab_size).view(*anchors.shape, depth, -1)
        return noise * (batch.temperature > 0)[:, None, None, None]

    @torch.no_grad()
    def _verify(self, batch: Batch, anchors: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Target logits of every tree node, [nodes, V], row-major by request, and which node each step of ``tokens`` [B, n, S, K] is
        compared with, int64 [B, n * S, K]."""
        rows, length = batch.tokens.shape
        device = batch.tokens.device
        blocks = -(-(length + MAX_TREE) // BLOCK)
        tables = 1 + torch.arange(rows * blocks, device=device).view(rows, blocks)
        cache = self.target.new_cache(1 + rows * blocks, BLOCK)
        zero = torch.zeros(rows, dtype=torch.long, device=device)
        chunk = TreeLayout(tables, zero, torch.arange(length, device=device).expand(rows, -1), None, None, BLOCK, 0)
        self.target.forward(batch.tokens, chunk, cache, keep=torch.zeros(1, dtype=torch.long, device=device))
        logits: list[Tensor] = []
        index = torch.empty(tokens.shape, dtype=torch.long)
        for n in range(anchors.shape[1]):
            tries = [split_tries(paths, MAX_TREE) for paths in tokens[:, n].tolist()]
            for turn in range(max(map(len, tries))):
                chosen = [(row, trie[turn]) for row, trie in enumerate(tries) if turn < len(trie)]
                nodes = max(len(trie.tokens) for _, trie in chosen)
                trees, parents = torch.zeros(rows, nodes, dtype=torch.long), torch.zeros(rows, nodes, dtype=torch.long)
                offset = sum(part.shape[1] for part in logits)
                for row, trie in chosen:
                    trees[row, 1 : len(trie.tokens)] = torch.tensor(trie.tokens[1:])
                    parents[row, : len(trie.parents)] = torch.tensor(trie.parents)
                    index[row, n, trie.first : trie.first + len(trie.places)] = offset + torch.tensor(trie.places)
                root = batch.tokens.gather(1, anchors[:, n, None] + 1)
                trees = torch.cat((root, trees[:, 1:].to(device)), dim=1)
                ancestors, depth = tree_mask(parents.to(device), tokens.shape[-1])
                layout = TreeLayout(tables, anchors[:, n] + 1, depth, ancestors, None, BLOCK, int(anchors[:, n].max()) + 1)
                logits.append(self.target.forward(trees, layout, cache)[0].float().unflatten(0, trees.shape))
        total = sum(part.shape[1] for part in logits)
        index += torch.arange(rows)[:, None, None, None] * total
        return torch.cat(logits, dim=1).flatten(0, 1), index.flatten(1, 2).to(device)

    def _collect(
        self, head: Eagle3Head, batch: Batch, states: Tensor, tokens: Tensor, logits: Tensor, index: Tensor, noise: Tensor | None
    ) -> PathBatch:
        choice = logits.argmax(-1)[index]  # [B, n * S, K]
        if noise is not None:
            choice = torch.stack([
                torch.stack([(logits[rows] + drawn).argmax(-1) for rows, drawn in zip(of_row.split(self.paths), noises, strict=True)])
                for of_row, noises in zip(index, noise, strict=True)
            ]).view_as(choice)  # fmt: skip
        p = of_draft(head, logits.softmax(-1))
        temperature = batch.temperature[:, None].expand(tokens.shape[:2]).flatten()
        paths = draft_ids(head, tokens).flatten(0, 1)
        return PathBatch(
            states.flatten(0, 1), paths, torch.ones_like(paths, dtype=torch.bool), (choice == tokens).flatten(0, 1),
            index.flatten(0, 1), p, temperature, self.paths, False,
        )  # fmt: skip


class Trie(NamedTuple):
    """Paths from number ``first`` on, merged into a tree with node 0 as its root. ``places``: per path, the nodes whose distribution
    its steps are compared with, that is their parents."""

    tokens: list[int]
    parents: list[int]
    first: int
    places: list[list[int]]


def split_tries(paths: list[list[int]], max_nodes: int) -> list[Trie]:
    """As few trees of at most ``max_nodes`` nodes as taking the paths in order allows. A path's last token is no node: nothing
    follows it."""
    tries: list[Trie] = []
    nodes: dict[tuple[int, ...], int] = {}
    for number, path in enumerate(paths):
        if not tries or len(tries[-1].tokens) + len(path) - 1 > max_nodes:
            tries.append(Trie([-1], [0], number, []))
            nodes = {(): 0}
        trie = tries[-1]
        places = [0]
        for k in range(1, len(path)):
            prefix = tuple(path[:k])
            if prefix not in nodes:
                nodes[prefix] = len(trie.tokens)
                trie.tokens.append(path[k - 1])
                trie.parents.append(places[-1])
            places.append(nodes[prefix])
        trie.places.append(places)
    return tries
