"""What the requests' own texts propose, which costs nothing to make, weighed against what its rows cost."""

from collections.abc import Mapping
from typing import NamedTuple

from server.engine.costs import StepCost
from server.engine.ngram import Draft
from server.engine.request import Request

LOOKUP_SECONDS, LOOKUP_SHARE = 8e-6, 0.003  # of one request's text, and of a plain step: what lookups in vain may take
BELIEF, FADING = 20.0, 0.98  # tokens by which texts are believed at first, no step counting more; what it leaves of what was seen before,
PARDON = 0.003  # and what a step in which texts were not verified takes of the disbelief


class Text(NamedTuple):
    """Tokens that nodes of a text are expected to bring, and how many nodes they are."""

    tokens: float
    nodes: int


NOTHING = Text(0.0, 0)


def total(texts: Mapping[str, Text]) -> Text:
    return Text(sum(text.tokens for text in texts.values()), sum(text.nodes for text in texts.values()))


class TextRule:
    """Whose text is worth its rows. ``needed``: the speed-up over plain decoding that texts must promise together.

    Texts are verified where they promise much, which is more often where too much is promised: what became of it corrects them all
    together, but for what a grammar demands.
    """

    def __init__(self, needed: float) -> None:
        self.needed = needed
        self._unread = 0  # further steps in which nothing is looked up
        self._promised, self._kept = BELIEF, BELIEF

    @property
    def truth(self) -> float:
        """Accepted tokens for one that was promised."""
        return min(1.0, self._kept / self._promised)

    def learn(self, expected: float, accepted: int) -> None:
        """Tokens that the nodes of a step were expected to bring, as ``gains`` has them, and those that they brought."""
        promised = expected / self.truth
        weight = min(1.0, BELIEF / promised) if promised else 0.0
        self._promised, self._kept = self._promised * FADING + promised * weight, self._kept * FADING + accepted * weight

    def price(self, batch: int, cost: StepCost, requests: list[Request]) -> float | None:
        """Tokens that a node must bring; None in a step in which nothing is to be looked up: as long as texts propose nothing, that
        takes LOOKUP_SHARE of plain steps' time, unless a grammar may demand something.
        """
        if self._unread and not any(request.matcher for request in requests):
            self._unread -= 1
            return None
        return self._price(cost)

    def gains(self, requests: list[Request], guesses: list[Draft], cost: StepCost) -> dict[str, Text]:
        """What requests gain by nodes that are worth their price, by request id; where all together do not pay, those alone whose text
        a grammar demands.
        """
        batch, price = len(requests), self._price(cost)
        found = ((r.request_id, draft, self._text(draft, price)) for r, draft in zip(requests, guesses, strict=True) if draft.tokens)
        bought = [(name, draft, text) for name, draft, text in found if text.nodes]
        texts = {name: text for name, _, text in bought}
        tokens, nodes = total(texts)
        if nodes and (batch + tokens) * cost.plain >= self.needed * batch * (cost.plain + self.seconds(batch, cost, nodes)):
            self._unread = 0
            return texts
        if nodes:
            self._kept += (self._promised - self._kept) * PARDON
        self._unread = int(LOOKUP_SECONDS * batch / (LOOKUP_SHARE * cost.plain))
        return {name: text for name, draft, text in bought if draft.demanded}

    def _text(self, draft: Draft, price: float) -> Text:
        tokens, nodes = draft.worth(price)
        return Text(tokens if draft.demanded else tokens * self.truth, nodes)

    def _price(self, cost: StepCost) -> float:
        return self.needed * cost.node / cost.plain

    @staticmethod
    def seconds(batch: int, cost: StepCost, nodes: int) -> float:
        """What a step of ``batch`` requests takes longer for so many nodes of texts in all."""
        return cost.text + cost.node / batch * nodes if nodes else 0.0
