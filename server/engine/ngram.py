"""Drafts without a model: what followed when a request's last tokens stood in its text before (prompt lookup), what its grammar demands."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from server.engine.pool import Pool

if TYPE_CHECKING:
    from server.engine.request import Request

SHORTEST, LONGEST = 2, 8  # tokens of a match; longer ones are as good as LONGEST
OCCURRENCES = 16  # that are compared, the newest ones
FOLLOWED = 4  # of them, the longest matches
BRANCHES = 3  # children of a node
LEARNING = 8  # lookups of which one is for learning
DEMANDED = LONGEST + 1  # in place of a match's length: a grammar allows no other text
LOW, HIGH = 0.01, 0.99  # of a rate
_FLOOR = math.log(0.02)  # below this probability of survival a path is not followed further
_HEADSTART = 10  # observations that the first guess of a rate is worth
_FORGETTING = 1e-3  # of a rate per observation, at least: texts change
Kind = tuple[int, int, int]  # of a guess: warmth of the request, tokens that match before it, siblings ahead of it


class NgramIndex:
    """Places of every ``SHORTEST`` tokens in a text that only grows: a chain per n-gram, newest first."""

    def __init__(self) -> None:
        self._newest: dict[tuple[int, ...], int] = {}  # n-gram -> place of the token after it
        self._before = [-1] * SHORTEST  # place -> the place before it with the same n-gram, -1: none

    def matches(self, token_ids: Sequence[int]) -> list[tuple[int, int]]:
        """What equals the end of ``token_ids``: (length, place after it), longest first, of one length the newest first."""
        for place in range(len(self._before), len(token_ids)):
            ngram = tuple(token_ids[place - SHORTEST : place])
            self._before.append(self._newest.get(ngram, -1))
            self._newest[ngram] = place
        found: list[tuple[int, int]] = []
        place, end = self._newest.get(tuple(token_ids[-SHORTEST:]), -1), len(token_ids)
        while place >= 0 and len(found) < OCCURRENCES:
            length = SHORTEST
            while length < min(LONGEST, place) and token_ids[place - length - 1] == token_ids[end - length - 1]:
                length += 1
            found.append((length, place))
            place = self._before[place]
        return sorted(found, key=lambda match: -match[0])


class Rates:
    """How often guesses come true whose parent did, by kind; learned from every committed text, whatever was proposed."""

    def __init__(self) -> None:
        self._rates: dict[Kind, float] = {}
        self._seen: dict[Kind, int] = {}

    def __getitem__(self, kind: Kind) -> float:
        """A cautious guess where nothing was observed."""
        _, length, rank = kind
        return self._rates.get(kind, 0.05 if rank else 0.1 * length)

    def observe(self, kind: Kind, right: bool) -> None:
        seen = self._seen[kind] = self._seen.get(kind, _HEADSTART) + 1
        rate = self[kind] + (right - self[kind]) * max(1 / seen, _FORGETTING)
        self._rates[kind] = min(max(rate, LOW), HIGH)


class Draft:
    """Guesses for one request. Node 0 is its last committed token, node i > 0 has entry i - 1 of the lists; parents come first."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.scores: list[float] = []  # log-probability that the path survives
        self.kinds: list[Kind] = []
        self.children: list[dict[int, int]] = [{}]  # of every node, by token
        self.depth = 0

    def add(self, parent: int, token: int, score: float, kind: Kind) -> int:
        self.tokens.append(token)
        self.parents.append(parent)
        self.scores.append(score)
        self.kinds.append(kind)
        self.children.append({})
        self.children[parent][token] = len(self.tokens)
        return len(self.tokens)

    def follow(self, path: Sequence[int], length: int, warmth: int, rates: Rates, price: float = 0.0) -> None:
        """Add what is new of ``path``, which followed a match of ``length`` tokens. Every right guess makes the match longer.

        ``price``: probability of survival that a node must have.
        """
        node, score = 0, 0.0
        for depth, token in enumerate(path, 1):
            below = self.children[node].get(token)
            if below is None:
                kind = (warmth, min(length + depth - 1, LONGEST), len(self.children[node]))
                survival = math.exp(score) * rates[kind]
                if kind[2] == BRANCHES or score < _FLOOR or survival < price:
                    return
                below = self.add(node, token, math.log(survival), kind)
                self.depth = max(self.depth, depth)
            node, score = below, self.scores[below - 1]

    def demand(self, path: Sequence[int], warmth: int, rates: Rates) -> None:
        """Begin with what a grammar demands; its text is certain, and how that is cut into tokens nearly so."""
        kind, node, score = (warmth, DEMANDED, 0), 0, 0.0
        for token in path:
            score += math.log(rates[kind])
            node = self.add(node, token, score, kind)
        self.depth = len(path)

    @property
    def demanded(self) -> bool:
        """Whether it begins with what a grammar leaves no choice of."""
        return bool(self.kinds) and self.kinds[0][1] == DEMANDED

    def worth(self, price: float) -> tuple[float, int]:
        """Tokens that the proposed nodes are expected to bring, and how many nodes they are; those alone that bring ``price`` each."""
        survival = [math.exp(score) for score in self.scores if score > -math.inf]
        bought = [tokens for tokens in survival if tokens >= price]
        return sum(bought), len(bought)

    def proposed(self) -> tuple[list[float], list[int], list[int]]:
        """Scores, tokens and parents of the nodes that ``keep`` has left."""
        if -math.inf not in self.scores:
            return self.scores, self.tokens, self.parents
        kept = [place for place, score in enumerate(self.scores) if score > -math.inf]
        renamed = {0: 0} | {place + 1: i for i, place in enumerate(kept, 1)}
        return [self.scores[i] for i in kept], [self.tokens[i] for i in kept], [renamed[self.parents[i]] for i in kept]

    def keep(self, nodes: int) -> None:
        """Propose the best ``nodes`` alone; of equal scores the first, so that a kept node's parent is kept."""
        for place in sorted(range(len(self.scores)), key=self.scores.__getitem__, reverse=True)[nodes:]:
            self.scores[place] = -math.inf


class Candidates(NamedTuple):
    """A batch's guesses as tensors on the host; ``depth``: of the deepest."""

    pool: Pool
    depth: int

    @classmethod
    def of(cls, drafts: list[Draft] | None, width: int = 0) -> "Candidates | None":
        """What the drafts propose, padded to ``width`` nodes at least; None where that is nothing."""
        proposed = [draft.proposed() for draft in drafts or ()]
        most = max((len(tokens) for _, tokens, _ in proposed), default=0)
        if drafts is None or most == 0:
            return None
        columns = (
            torch.tensor([values + [padding] * (max(most, width) - len(values)) for values in column])
            for column, padding in zip(zip(*proposed, strict=True), (-math.inf, -1, 0), strict=True)
        )
        return cls(Pool(*columns), max(draft.depth for draft in drafts))


class Ngrams:
    """Looks up the drafts of a batch, and learns what they are worth."""

    def __init__(self) -> None:
        self.rates = Rates()
        self._lookups = 0

    def find(self, requests: Sequence["Request"], nodes: int, price: float = 0.0) -> list[Draft]:
        """Guesses for trees of ``nodes`` nodes, root included, whose survival is as likely as ``price``; infinite: those alone that a
        grammar demands.

        One lookup in LEARNING looks at no price: rates that are too low for it may rise.
        """
        self._lookups += 1
        price = 0.0 if price < math.inf and self._lookups % LEARNING == 0 else price
        return [self._draft(request, min(nodes - 1, request.max_draft_nodes), price) for request in requests]

    def _draft(self, request: "Request", limit: int, price: float) -> Draft:
        ids, warmth = request.token_ids, request.warmth
        hopeless = self.rates[warmth, LONGEST, 0] < price
        matches = [] if limit <= 0 or hopeless else request.ngrams.matches(ids)[:FOLLOWED]
        draft = Draft()
        if limit > 0 and request.matcher is not None:
            draft.demand(request.matcher.demanded()[:limit], warmth, self.rates)
        for length, place in matches:
            if self.rates[warmth, min(length, LONGEST), 0] < price:
                continue
            path = ids[place : place + limit]
            while len(path) < limit:  # the match overlaps what follows it: the text repeats itself
                path += path[: limit - len(path)]
            draft.follow(path, length, warmth, self.rates, price)
        draft.keep(limit)
        return draft

    def learn(self, drafts: Sequence[Draft], committed: Sequence[Sequence[int]]) -> None:
        """Compare the guesses with the tokens that each request got, whether they were proposed or not."""
        for draft, tokens in zip(drafts, committed, strict=True):
            node = 0
            for token in tokens:
                for guess, below in draft.children[node].items():
                    self.rates.observe(draft.kinds[below - 1], guess == token)
                if token not in draft.children[node]:
                    break
                node = draft.children[node][token]


class FullDrafts(Ngrams):
    """Stands in while step costs are measured: guesses as many as a tree holds, whatever the text, all of the next token: deeper ones would
    have noise made for positions that a real text needs anyhow.
    """

    def _draft(self, request: "Request", limit: int, price: float) -> Draft:
        draft = Draft()
        for token in range(limit):
            draft.add(0, token, 0.0, (0, LONGEST, 0))
        draft.depth = min(limit, 1)
        return draft
