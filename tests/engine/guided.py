"""Drafts that hit: random trees that contain a request's true continuation to a random depth, among wrong siblings and dead nodes."""

import random
from collections.abc import Mapping, Sequence

import torch

from server.engine.batch import Placed
from server.engine.drafter import TreeShape
from server.engine.engine import Engine
from server.engine.request import Request
from server.engine.types import Tree
from tests.kernels.trees import words


def random_tree(rng: random.Random, truth: list[int], shape: TreeShape, vocabulary: Sequence[int]) -> tuple[list[int], list[int]]:
    """Tokens and parents of nodes 1..: some follow ``truth`` (the tokens after the root) as far as they happen to get."""
    tokens, parent, depth = [-2], [0], [0]
    children: list[dict[int, int]] = [{}]  # of every node: token -> node
    tip = 0
    for _ in range(shape.nodes - 1):
        node, kind = len(tokens), rng.random()
        extend = depth[tip] < min(shape.depth, len(truth))
        if extend and truth[depth[tip]] in children[tip]:  # a random sibling guessed right
            tip = children[tip][truth[depth[tip]]]
            extend = depth[tip] < min(shape.depth, len(truth))
        above, token = tip, truth[depth[tip]] if extend else -1
        if not extend or kind > 0.4:
            above = rng.choice([i for i in range(node) if depth[i] < shape.depth and tokens[i] != -1])
            token = rng.choice(vocabulary)
        if kind > 0.95 or token in children[above]:
            above, token = 0, -1
        else:
            children[above][token] = node
            if extend and kind <= 0.4:
                tip = node
        tokens.append(token)
        parent.append(above)
        depth.append(depth[above] + 1)
        children.append({})
    return tokens[1:], parent[1:]


class Guide:
    """Stands in for the proposer's ``propose``. ``futures``: prompt and output of every request, by id; a missing one is drafted at random.

    ``vocabulary``: what wrong nodes hold, any token by default.
    """

    def __init__(self, engine: Engine, futures: Mapping[str, list[int]], vocabulary: Sequence[int] = ()) -> None:
        self.proposer, self.futures, self.rng = engine.proposer, futures, random.Random(0)
        self.vocabulary = vocabulary or range(engine.vocab_size)
        self.scattered = 0  # drafted true paths whose node indices are not 0, 1, 2, ...
        assert engine.proposer.cache is not None
        self.cache = engine.proposer.cache
        engine.proposer.propose = self.propose  # type: ignore[method-assign]

    def propose(self, requests: list[Request], at: Placed, shape: TreeShape, *_: object) -> Tree:
        self.cache.sync(requests)
        tokens, parents = [], []
        for request in requests:
            assert request.context_len == len(request.token_ids) - 1
            truth = self.futures.get(request.request_id, [])[len(request.token_ids) :]
            drafted, parent = random_tree(self.rng, truth, shape, self.vocabulary)
            self.scattered += bool(truth and drafted and drafted[0] != truth[0] and truth[0] in drafted)
            tokens.append([request.token_ids[-1], *drafted])
            parents.append([0, *parent])
        ancestors, depth = words(parents)
        return Tree(torch.tensor(tokens), torch.tensor(parents), depth, ancestors)
