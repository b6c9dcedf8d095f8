"""What the device does for the next step of some requests before the host knows how their texts go on.

Nobody looks at it for those that end meanwhile, not even whether it is NaN: that stays without consequence since attention on a GPU
loads no slot that the request has not written.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from server.engine.drafter import Grown, TreeShape
from server.engine.host import on_device
from server.engine.pool import Pool
from server.engine.prompts import Computed
from server.engine.request import Request
from server.engine.types import Tree

IMPROBABLE = -1e9  # score of a guess that nobody has made, and that no NaN has prevented


class Drafted(NamedTuple):
    """The head has drafted."""

    requests: list[Request]
    grown: Grown

    def of(self, requests: list[Request]) -> Grown | None:
        """The same of ``requests``, nothing for those that are new; None where most are.

        At times it was grown for another shape than the step's, and may be deeper than that one's trees.
        """
        index = _places(requests, self.requests)
        if index == list(range(len(self.requests))):
            return self.grown
        if 2 * index.count(-1) > len(index):
            return None
        device = self.grown.pool.scores.device
        chosen, new = on_device([max(place, 0) for place in index], device), on_device([place < 0 for place in index], device)
        pool, levels, (tokens, scores) = self.grown.at(chosen)
        pool = pool._replace(scores=pool.scores.masked_fill(new[:, None], float("-inf")))
        return Grown(pool, levels, (tokens, scores.masked_fill(new, IMPROBABLE)))

    def beside(self, others: "Drafted | None") -> "Drafted":
        """Together with what was drafted of ``others`` for a shape of as many nodes and levels."""
        if others is None:
            return self
        (tokens, scores), (their_tokens, their_scores) = self.grown.guesses, others.grown.guesses
        pool = Pool(*map(torch.cat, zip(others.grown.pool, self.grown.pool, strict=True)))
        guesses = torch.cat((their_tokens, tokens)), torch.cat((their_scores, scores))
        return Drafted(others.requests + self.requests, Grown(pool, self.grown.levels, guesses))

    def and_new(self, requests: list[Request]) -> "Drafted":
        """Beside ``requests`` whose turn to draft is a step later."""
        (scores, tokens, parents), more = self.grown.pool, (0, 0, 0, len(requests))
        pool = Pool(F.pad(scores, more, value=float("-inf")), F.pad(tokens, more), F.pad(parents, more))
        best, their_scores = self.grown.guesses
        guesses = F.pad(best, more[2:]), F.pad(their_scores, more[2:], value=IMPROBABLE)
        return Drafted(self.requests + requests, Grown(pool, self.grown.levels, guesses))


class Passed(NamedTuple):
    """The target has computed what the next step verifies: trees, for plain decoding of a node each. logits [B * N, V]; features
    [B, N, 3 * H].

    ``shape``: what the trees were drafted by, ``grown``: all that was, None for plain decoding; ``lengths``: where the requests must stand
    by then; ``prompts``: computed along with the trees.
    """

    requests: list[Request]
    lengths: list[int]
    shape: TreeShape
    tree: Tree
    grown: Grown | None
    logits: Tensor
    features: Tensor | None
    prompts: Computed | None = None

    def of(self, requests: list[Request]) -> "Passed | None":
        """Of those of ``requests`` that it holds; the others' turn is a step later. None where it holds less than half of them."""
        known = [place for place in _places(requests, self.requests) if place >= 0]
        index = [place for place in known if self.requests[place].context_len == self.lengths[place]]
        if not index or 2 * len(index) < len(requests):
            return None
        if index == list(range(len(self.requests))):
            return self
        chosen = on_device(index, self.logits.device)
        tree, features = Tree(*(part[chosen] for part in self.tree)), None if self.features is None else self.features[chosen]
        logits = self.logits.unflatten(0, self.tree.tokens.shape)[chosen].flatten(0, 1)
        return self._replace(
            requests=[self.requests[i] for i in index], lengths=[self.lengths[i] for i in index], tree=tree,
            grown=self.grown and self.grown.at(chosen), logits=logits, features=features,
        )  # fmt: skip


def _places(requests: list[Request], known: list[Request]) -> list[int]:
    """Of ``requests`` among the ``known`` ones, -1: not there."""
    places = {id(request): place for place, request in enumerate(known)}
    return [places.get(id(request), -1) for request in requests]
