"""The load rule: which requests of a step draft, and how much, from measured step costs and observed acceptance."""

import math
from bisect import bisect_left
from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

from server.engine.costs import MEASURED_ROWS, UNMEASURED, StepCost, powers_of_two
from server.engine.drafter import TreeShape
from server.engine.ngram import Draft
from server.engine.request import WARMEST, Request
from server.engine.texts import NOTHING, Text, TextRule, total

START_GAIN = 1.1  # expected speed-up over plain decoding from which on requests draft: estimates err by as much
STOP_GAIN = 1.0  # and below which they stop: a run of bad luck is not yet a reason
OPTIMISM = 1.15  # of the first estimate: it knows fixed trees alone, and a rule that never drafts never learns
PROBE, MAX_PROBE = 16, 256  # steps after which one of the requests that do not draft does so, to see whether it pays by now: so many that
PROBED_SHARE = 0.005  # such tries take no more of the time, as far as it is known what they cost
TRIES, TRYING = 12, 8  # drafts of a class until its estimate is trusted, by one in so many of a step's requests,
EAGER = 2  # which does so once in so many steps, whatever is expected of it
CHECK, FIRST_CHECKS = 64, (6, 16, 32)  # drafting steps of which one decodes plainly, to compare them; which do so before,
DOUBT, DOUBTFUL_CHECK = 1.25, 8  # and of how many where the expected speed-up is less: such a step loses little then
NEIGHBOURS, ENOUGH = 9, 5  # steps of the other kind that a step is compared with, and how many of them must be at hand
_LEARNING, _LARGEST = 0.4, 0.5  # weight of a comparison, and the most that it may say, as a logarithm: single steps are noisy
_UNKNOWN_GAIN_PER_DOUBLING = 0.4  # accepted tokens per doubling of the tree, for heads that bring no figures
_COOLING = 0.3  # share of the first estimate that each class of warmer requests loses: it is known at temperature 0
_OWN, _SHARED = 0.16, 0.05  # weight of what is new in an estimate of a request or of trees, and in one of a class of requests
_FADING = 0.005  # of an idle request's own estimate, per step, towards its class's
_REST = 7  # steps that a decision against drafting holds while the batch stays the same: it takes up to a fiftieth of a plain step


@dataclass
class Plan:
    """What one step of ``batch`` requests may draft, for whom, and what became of it.

    ``copying``: requests that have trees of what their own texts propose; ``guesses``: what was looked up, by request id, None where
    nothing was; ``expected`` and ``copied``: tokens that those trees were to bring, and that they brought; ``lasting``: the next step
    will probably draft as this one does; ``apart``: by graphs, those that draft have a forward pass of their own. Of those that the head
    drafts for, ``rows``: that their draft caches are behind, but for one each; ``nodes`` and ``levels`` of the shape by which trees were
    grown; ``drafts``: (request, drafted nodes, accepted nodes) of those that had a tree.
    """

    shape: TreeShape
    drafting: list[Request]
    gain: float = 1.0  # tokens per second over those of plain decoding, as expected
    batch: int = 0
    copying: list[Request] = field(default_factory=list)
    guesses: dict[str, Draft] | None = None
    expected: float = 0.0
    copied: int = 0
    lasting: bool = False
    apart: bool = False
    rows: int = 0
    nodes: int = 0
    levels: int = 0
    drafts: list[tuple[Request, int, int]] = field(default_factory=list)

    def guesses_of(self, requests: list[Request]) -> list[Draft] | None:
        """None where one of them has none: the plan was made without it."""
        found = [self.guesses.get(request.request_id) for request in requests] if self.guesses else [None]
        return None if None in found else found  # type: ignore[return-value]


class _Size(NamedTuple):
    """Trees as they turn out for one class of requests at one batch size, on average."""

    levels: float
    nodes: float  # drafted ones of a request
    gain: float  # accepted tokens of a request, if it accepted what the figures known beforehand say


class LoadRule:
    """Decides at every step who drafts, and what a level and a node must be worth.

    Of a request it is known how many drafted tokens it accepts, beside what is usual for trees of such sizes (its worth), from its own
    steps and those of its class (``warmth``); of a step, what it costs with m of n requests drafting. Those m requests draft that make
    the most tokens per second of the whole batch; at a load that leaves no room nobody does, and nothing is computed for it, but for one
    request now and then. Within a tree, time has the price of the tokens that the batch commits in it as things go: a level or a node
    that is expected to bring less is left out.

    What a request's own text proposes costs nothing to make, and is known before it is decided: it is verified where that is expected to
    pay, and the head drafts only where it brings more.

    Costs are modelled. Clocks correct the model in one point, what drafting steps cost beside plain ones: whenever a step follows several
    of the other kind, their seconds are compared, so that what slows the machine as a whole says nothing.

    ``costs``: by batch size; ``acceptance``: tokens per verification by number of nodes of a fixed tree, which are usual; ``head``: there
    is one.
    """

    def __init__(self, shape: TreeShape, costs: Mapping[int, StepCost], acceptance: Mapping[int, float], head: bool = True) -> None:
        self.shape, self.costs, self.head = shape, dict(costs), head
        self._batches = sorted(costs)
        self._between: dict[int, StepCost] = {}
        self._usual = {nodes: tokens - 1 for nodes, tokens in acceptance.items()}
        self._sizes = {(batch, warmth): self._first_size(batch, warmth) for batch in self._batches for warmth in range(WARMEST + 1)}
        self._worth: dict[int, float] = {}  # accepted tokens beside the usual ones, by class
        self._tries: Counter[int] = Counter()  # drafts seen, by class
        self._interval, self._since_probe = PROBE, 0
        self._drafting = 0  # steps in a row, since it was expected to pay
        self._rest, self._batch = 0, 0  # further steps that such a batch decodes plainly,
        self._last = Plan(shape, [])  # as this one
        self._texts = TextRule(START_GAIN)
        self._bias: defaultdict[int, float] = defaultdict(float)  # by batch size: logarithm of drafting steps' seconds over the model's
        self._recent: deque[tuple[tuple[int, bool], float]] = deque(maxlen=NEIGHBOURS)  # the same of single steps

    def lookup_price(self, requests: list[Request]) -> float | None:
        """Tokens that a node of a request's text must bring in the next step; None where texts are not to be looked up for it."""
        return self._texts.price(len(requests), self._cost(len(requests)), requests)

    def choose(self, requests: list[Request], guesses: list[Draft] | None = None, coming: int = 0) -> Plan:
        """Who of the step's requests drafts, with the largest tree and its prices; ``guesses``: what their texts propose, if looked up;
        ``coming``: requests whose prompts are computed, who will share what costs are compared for: to begin with a request pays later.
        """
        batch = len(requests) + coming
        texts = {} if guesses is None else self._texts.gains(requests, guesses, self._cost(len(requests)))
        rests, known = self._rests(requests, batch), None
        if guesses is not None:
            known = {request.request_id: draft for request, draft in zip(requests, guesses, strict=True)}
        if rests and not texts:
            return Plan(self._last.shape, [], self._last.gain, len(requests), guesses=known)
        cost = self._cost(batch)
        tokens, nodes = total(texts)
        speed = (batch + tokens) / (cost.plain + self._texts.seconds(batch, cost, nodes))
        chosen: list[Request] = []
        left_out: list[Request] = []
        if self.head and not rests:
            able = sorted((r for r in requests if r.max_draft_nodes > 0), key=lambda r: self._advantage(r, texts), reverse=True)
            best, faster = self._best(able, batch, (STOP_GAIN if self._drafting else START_GAIN) * speed, texts)
            speed = faster if best else speed
            if best or not texts:  # a text that is better for once says nothing of the head
                self._drafting = self._drafting + 1 if best else 0
            if best and self._checks(speed * cost.plain / batch):
                left_out = able[:best]
            else:
                chosen = self._trusted(able[:best], batch) + self._probe(able[best:], batch)
            self._rest, self._batch = 0 if best or chosen or texts else _REST, batch
        level = self._cost(len(chosen)).level if chosen else 0.0
        plan = Plan(self._priced(batch, speed, level), chosen, speed * cost.plain / batch, len(requests), guesses=known)
        if not chosen and not texts:
            self._last = Plan(plan.shape, [], plan.gain)
        plan.rows = sum(r.num_pending - 1 for r in chosen)
        if texts:
            others = {r.request_id for r in chosen + left_out}
            plan.copying = [r for r in requests if r.request_id in texts and r.request_id not in others]
            plan.expected = sum(texts[r.request_id].tokens for r in plan.copying)
        return plan

    def _checks(self, gain: float) -> bool:
        """Whether those that should draft decode plainly in this step, so that clocks can compare."""
        every = CHECK if gain > DOUBT else DOUBTFUL_CHECK
        return self._drafting % every == every - 1 or self._drafting in FIRST_CHECKS

    def _rests(self, requests: list[Request], batch: int) -> bool:
        """Whether an earlier decision against drafting still holds."""
        known = batch == self._batch and self._tries[requests[0].warmth] >= TRIES
        if not (self._rest and known and self._since_probe < self._interval - 1):
            return False
        self._rest, self._since_probe = self._rest - 1, self._since_probe + 1
        return True

    def _advantage(self, request: Request, texts: dict[str, Text]) -> float:
        """Of the head's trees over what the request's text proposes, in tokens."""
        return self._worth_of(request) * self._sizes[self._batches[0], request.warmth].gain - texts.get(request.request_id, NOTHING).tokens

    def usual(self, nodes: int) -> float:
        """Drafted tokens that trees of so many nodes have accepted where the figures known beforehand were measured."""
        return _interpolate(self._usual, nodes)

    def _priced(self, batch: int, speed: float, level: float) -> TreeShape:
        """The largest tree at prices of ``speed`` tokens per second; ``level``: seconds of one."""
        return self.shape._replace(level_price=speed * level, node_price=speed * self._cost(batch).node / batch)

    def _best(self, able: list[Request], batch: int, speed: float, texts: dict[str, Text]) -> tuple[int, float]:
        """How many of the requests, the best first, should draft, and the tokens per second then; 0 where that is not over ``speed``."""
        best, worth, late = 0, 0.0, 0.0
        tokens, nodes = total(texts)
        for count, request in enumerate(able, 1):
            size, text = self._sizes[self._kind_of(able, count)], texts.get(request.request_id, NOTHING)
            worth, late = worth + self._worth_of(request), late + self._late(request)
            tokens, nodes = tokens - text.tokens, nodes - text.nodes
            accepted = min(worth * size.gain, size.nodes * count)
            seconds = self._seconds(batch, count, size, accepted + late) + self._texts.seconds(batch, self._cost(batch), nodes)
            faster = (batch + tokens + accepted) / seconds
            if faster > speed:
                best, speed = count, faster
        return best, speed

    def _trusted(self, chosen: list[Request], batch: int) -> list[Request]:
        """Of a class that is hardly known a few alone, since a request's first draft costs its prompt."""
        kept, of_class = [], Counter[int]()
        for request in chosen:
            of_class[request.warmth] += 1
            if self._tries[request.warmth] >= TRIES or of_class[request.warmth] <= max(1, batch // TRYING):
                kept.append(request)
        return kept

    def _probe(self, idle: list[Request], batch: int) -> list[Request]:
        """The request that drafts all the same, now and then: the one whose draft cache is the least behind."""
        if not idle:
            self._since_probe = 0
            return []
        self._since_probe += 1
        unknown = [request for request in idle if self._tries[request.warmth] < TRIES]
        if unknown and self._since_probe >= EAGER:
            self._since_probe = 0
            return [min(unknown, key=lambda request: request.num_pending)]
        chosen = min(idle, key=lambda request: request.num_pending)
        size, plain = self._sizes[self._kind_of([chosen], 1)], self._cost(batch).plain
        accepted = min(self._worth_of(chosen) * size.gain, size.nodes)
        loss = self._seconds(batch, 1, size, chosen.num_pending) / plain - (batch + accepted) / batch  # in plain steps
        self._interval = int(min(max(loss / PROBED_SHARE, PROBE), MAX_PROBE))
        if self._since_probe < self._interval:
            return []
        faded = min(1.0, _FADING * self._interval)
        for request in idle:
            request.worth = self._worth_of(request) + (self._shared_worth(request) - self._worth_of(request)) * faded
        self._since_probe = 0
        return [chosen]

    def observe(self, plan: Plan, seconds: float | None) -> None:
        """Learn from a step; ``seconds`` None where it had other work as well."""
        size = self._measured(plan.batch)
        if plan.copying:
            if not any(request.matcher for request in plan.copying):
                self._texts.learn(plan.expected, plan.copied)
            seconds = None  # which says as much of the texts
        if not plan.drafting:
            if seconds is not None and plan.batch:
                self._compare(size, False, math.log(seconds / self._cost(plan.batch).plain))
            return
        count = len(plan.drafting)
        kind = self._kind_of(plan.drafting, count)
        gains = [self.usual(1 + drafted) for _, drafted, _ in plan.drafts]
        new = _Size(plan.levels, sum(drafted for _, drafted, _ in plan.drafts) / count, sum(gains) / count)
        # With few of the batch, or with a prompt to catch up with, it would say more of other things.
        if seconds is not None and 4 * count >= plan.batch and plan.rows <= MEASURED_ROWS * count:
            self._compare(size, True, math.log(seconds / self._seconds(plan.batch, count, new, plan.rows)))
        tree = self._sizes[kind] = _Size(*(old + (now - old) * _OWN for old, now in zip(self._sizes[kind], new, strict=True)))
        for fewer in self._batches[: self._batches.index(kind[0])]:
            if self._sizes[fewer, kind[1]].nodes < tree.nodes:  # which fewer requests can afford as well
                self._sizes[fewer, kind[1]] = tree
        self._learn_worth(plan, gains, tree.gain)

    def _learn_worth(self, plan: Plan, gains: list[float], least: float) -> None:
        """``gains``: accepted tokens of the plan's drafts that were usual; ``least``: no less counts as what such trees are good for."""
        for (request, _, accepted), gain in zip(plan.drafts, gains, strict=True):
            own, shared, scale = self._worth_of(request), self._shared_worth(request), max(gain, least)
            request.worth = own + (accepted - own * gain) / scale * _OWN
            self._worth[request.warmth] = shared + (accepted - shared * gain) / scale * max(_SHARED, 1 / (2 + self._tries[request.warmth]))
        self._tries.update(request.warmth for request in plan.drafting)

    def _compare(self, size: int, drafting: bool, said: float) -> None:
        """Learn from what a step took over what the model says of it, as a logarithm."""
        others = [other for kind, other in self._recent if kind == (size, not drafting)]
        if len(others) >= ENOUGH:
            surprise = min(max(said - median(others), -_LARGEST), _LARGEST)
            self._bias[size] += surprise * _LEARNING * (1 if drafting else -1)
        self._recent.append(((size, drafting), said))

    def _worth_of(self, request: Request) -> float:
        return self._shared_worth(request) if request.worth is None else request.worth

    def _shared_worth(self, request: Request) -> float:
        return self._worth.get(request.warmth, OPTIMISM * (1 - _COOLING * request.warmth))

    def _late(self, request: Request) -> float:
        """Of the rows that a request's draft cache is far behind, those of one step: they must pay until the request ends."""
        behind = request.num_pending - self.shape.nodes
        if behind <= 0:
            return 0.0
        accepted = self._worth_of(request) * self._sizes[self._batches[0], request.warmth].gain
        return behind / max(1.0, (request.params.max_tokens - request.num_output) / (1 + accepted))

    def _kind_of(self, requests: list[Request], count: int) -> tuple[int, int]:
        """Which trees are like those of the first ``count`` requests: as many, as measured, and of the class of the one in the middle."""
        return self._measured(count), requests[count // 2].warmth

    def _first_size(self, batch: int, warmth: int) -> _Size:
        """The best fixed tree by the figures known beforehand."""
        trees = [self.shape.shrunk(nodes) for nodes in powers_of_two(self.shape.nodes) if nodes > 1]
        cooled, cost = 1 - _COOLING * warmth, self.costs[batch]

        def speed(tree: TreeShape) -> float:
            return (1 + cooled * self.usual(tree.nodes)) / cost.tree(tree.depth, tree.nodes)

        tree = max(trees, key=speed, default=self.shape)
        return _Size(tree.depth, tree.nodes - 1, self.usual(tree.nodes))

    def _seconds(self, batch: int, drafting: int, size: _Size, rows: float) -> float:
        """Seconds of a step of ``batch`` requests of which ``drafting`` have trees of that size and draft caches ``rows`` behind."""
        own, cost = self._cost(drafting), self._cost(batch)
        draft = max(0.0, own.tree(1, 1) - own.plain) + own.level * max(0.0, size.levels - 1) + own.row * rows
        trees = max(0.0, cost.text - own.text)  # of a step with any: for all its requests, not those alone that draft
        model = cost.plain + draft + trees + cost.node / batch * size.nodes * drafting
        return model * math.exp(self._bias[self._measured(batch)])

    def _cost(self, batch: int) -> StepCost:
        """As measured, or between the measured sizes before and after it."""
        if batch not in self._between:
            above = self._measured(batch)
            below = max((size for size in self._batches if size <= batch), default=above)
            share = (batch - below) / (above - below) if above > below and self.costs[above].base < UNMEASURED else 1.0
            pairs = zip(self.costs[below], self.costs[above], strict=True)
            self._between[batch] = StepCost(*(first + (second - first) * share for first, second in pairs))
        return self._between[batch]

    def _measured(self, batch: int) -> int:
        """The measured batch size that stands for ``batch``: the next larger one."""
        return self._batches[min(bisect_left(self._batches, batch), len(self._batches) - 1)]


def default_acceptance(nodes: int) -> dict[int, float]:
    """A cautious guess for heads without calibration."""
    return {n: 1 + _UNKNOWN_GAIN_PER_DOUBLING * math.log2(n) for n in powers_of_two(nodes)}


def _interpolate(points: Mapping[int, float], x: int) -> float:
    """Piecewise linear; beyond the ends the nearest value."""
    below = max((p for p in points if p <= x), default=min(points))
    above = min((p for p in points if p >= x), default=max(points))
    if below == above:
        return points[above]
    return points[below] + (points[above] - points[below]) * (x - below) / (above - below)
