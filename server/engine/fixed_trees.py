"""The load rule where steps are replayed: all requests have trees of one shape, out of a few, or nobody has any."""

from collections import Counter, defaultdict
from collections.abc import Mapping

from server.engine.budget import MAX_PROBE, PROBE, START_GAIN, STOP_GAIN, TRYING, LoadRule, Plan
from server.engine.costs import cost_of_trees, tree_shapes
from server.engine.drafter import TreeShape
from server.engine.ngram import Draft
from server.engine.request import Request

SHALLOW = 0.92  # of what deep trees accept, that shallow ones of as many nodes are taken to accept before they are compared
COMPARING, OTHERS = 32, 3  # drafting steps of which two draft by another shape, one of the next best ones in turn,
NEAR = 0.8  # which must be expected to make so much of the tokens per second
_GUESSED, _MOST_SEEN = 32, 512  # drafts that the first guess of a factor is worth, and that count at most
_LEAST_GAIN, _LEAST_FACTOR, _LARGEST_FACTOR = 0.5, 0.3, 3.0
_NEWS = 0.1  # The weight of a step's seconds in what is known of its kind.
_FORGETTING = 0.01  # A share of what is known of the other shapes beside it, per step: they may have been seen in a bad moment.
_OUTLIER = 1.5  # They count no larger multiple of that: a graph may have been recorded meanwhile.


class FixedTreeRule(LoadRule):
    """Chooses the shape of tree that makes the most tokens per second of the whole batch, by measured seconds of every shape and by what
    the requests accept beside what is usual, which is learned as by ``LoadRule``. A class of requests may accept more of some shape than
    that says, or less: a factor, which is learned by drafting by another shape now and then.

    seconds: of a step, by batch size and shape, that of one node being plain decoding and alone where no tree can pay; acceptance: as in
    ``LoadRule``.
    """

    def __init__(self, shape: TreeShape, seconds: Mapping[int, Mapping[TreeShape, float]], acceptance: Mapping[int, float]) -> None:
        super().__init__(shape, {batch: cost_of_trees(of) for batch, of in seconds.items()}, acceptance)
        self._first = {batch: dict(of) for batch, of in seconds.items()}
        self._steps = {batch: dict(of) for batch, of in seconds.items()}
        self._plain = shape.shrunk(1)
        self._shapes = {(of.nodes, of.depth): of for of in tree_shapes(shape)}
        self._parts = {
            of: [part for part in self._shapes.values() if part.nodes <= of.nodes and part.depth <= of.depth]
            for of in self._shapes.values()
        }
        self._gain = {of: self.usual(of.nodes) for of in self._shapes.values()}  # accepted tokens that are usual
        self._priors = {of: SHALLOW if of.depth < shape.shrunk(of.nodes).depth else 1.0 for of in self._shapes.values()}
        self._factors: dict[tuple[int, TreeShape], float] = {}  # by class of requests
        self._seen: Counter[tuple[int, TreeShape]] = Counter()  # drafts that they were learned from
        self._favourite = self._plain
        self._probes: defaultdict[int, tuple[int, int]] = defaultdict(
            lambda: (PROBE, 0)
        )  # by batch size: steps between tries, and since the last

    def choose(self, requests: list[Request], guesses: list[Draft] | None = None, coming: int = 0) -> Plan:
        """Of texts alone, what a grammar demands is verified wherever trees were timed; it is looked up later. ``coming`` changes nothing:
        trees have a size that is recorded for as many requests as there are.
        """
        batch, size = len(requests), self._measured(len(requests))
        able = [request for request in requests if request.max_draft_nodes > 0]
        gains = self._gains(able, batch, self._steps[size])
        best = max(gains, key=gains.__getitem__, default=self._plain)
        worthwhile = bool(gains) and gains[best] >= (STOP_GAIN if self._drafting else START_GAIN)
        self._drafting = self._drafting + 1 if worthwhile else 0
        if worthwhile or not able or not gains:
            self._probes.pop(size, None)
        chosen = able if worthwhile else self._tried(able if gains else [], batch, size)
        bound = [] if chosen else [request for request in able if request.matcher is not None]
        interval, since = self._probes[size]
        lasting = worthwhile or (not chosen and since + 1 < interval)
        self._favourite, shape = best, self._varied(best, gains) if worthwhile else best
        behind = sum(request.num_pending for request in chosen)
        hoped = max(1.0, gains[best]) if worthwhile else 1.0
        return Plan(shape, chosen, hoped, batch, bound, lasting=lasting, apart=not worthwhile, rows=behind)

    def _gains(self, able: list[Request], batch: int, steps: Mapping[TreeShape, float]) -> dict[TreeShape, float]:
        """Of every shape of tree, the tokens per second of the batch over those of plain decoding."""
        shared = {request.warmth: self._shared_worth(request) for request in {request.warmth: request for request in able}.values()}
        worth = dict.fromkeys(shared, 0.0)
        for request in able:
            worth[request.warmth] += shared[request.warmth] if request.worth is None else request.worth

        def gain(shape: TreeShape) -> float:
            accepted = self._gain[shape] * sum(total * self._factor(warmth, shape) for warmth, total in worth.items())
            return (batch + min(accepted, (shape.nodes - 1) * len(able))) / batch * steps[self._plain] / steps[shape]

        return {shape: gain(shape) for shape in steps if shape.nodes > 1}

    def _factor(self, warmth: int, shape: TreeShape) -> float:
        """What such requests accept of trees of the shape, over what is usual for so many nodes and what they accept otherwise: no fewer
        tokens than of trees that are a part of it.
        """
        known = (self._gain[part] * self._factors.get((warmth, part), self._priors[part]) for part in self._parts[shape])
        return max(known) / self._gain[shape] if self._gain[shape] else 1.0

    def _varied(self, best: TreeShape, gains: Mapping[TreeShape, float]) -> TreeShape:
        """The best shape, or now and then another one: for two steps, since the trees of the first were begun by the step before."""
        turn, step = divmod(self._drafting, COMPARING)
        near = [shape for shape, gain in gains.items() if shape != best and gain >= NEAR * gains[best]]
        others = sorted(near, key=gains.__getitem__, reverse=True)[:OTHERS]
        return others[turn % len(others)] if others and step >= COMPARING - 2 else best

    def _tried(self, able: list[Request], batch: int, size: int) -> list[Request]:
        """The requests that draft now and then, to see whether it has become worth while: those whose draft caches are the least behind."""
        interval, since = self._probes[size]
        if not able or since + 1 < interval:
            self._probes[size] = interval, since + 1
            return []
        self._probes[size] = min(2 * interval, MAX_PROBE), 0
        return sorted(able, key=lambda request: request.num_pending)[:TRYING]

    def observe(self, plan: Plan, seconds: float | None) -> None:
        if plan.drafts:
            self._learn(plan)
        if seconds is None or not plan.batch or plan.copying or (plan.drafting and (plan.apart or plan.rows > plan.batch)):
            return  # or it says more of something else
        size, shape = self._measured(plan.batch), self._verified(plan) if plan.drafts else self._plain
        steps, first = self._steps[size], self._first[size]
        if shape not in steps:
            return
        steps[shape] += (min(seconds, _OUTLIER * steps[shape]) - steps[shape]) * _NEWS
        for other in steps.keys() - {shape}:  # what slowed the machine when they were seen is forgotten
            steps[other] += (first[other] * steps[shape] / first[shape] - steps[other]) * _FORGETTING

    def _verified(self, plan: Plan) -> TreeShape | None:
        """The shape of the step's trees, which a step before may have begun; None where they were grown by one and chosen by another."""
        return self._shapes.get((plan.nodes, plan.levels))

    def _learn(self, plan: Plan) -> None:
        """From what was accepted of trees that were begun and verified by the same shape."""
        shape = self._verified(plan)
        if shape is None:
            return
        if shape == self._favourite:
            gains = [self.usual(1 + drafted) * self._factor(request.warmth, shape) for request, drafted, _ in plan.drafts]
            self._learn_worth(plan, gains, _LEAST_GAIN)
            return
        for warmth in {request.warmth for request, _, _ in plan.drafts}:
            self._compare_shapes([draft for draft in plan.drafts if draft[0].warmth == warmth], warmth, shape)

    def _compare_shapes(self, drafts: list[tuple[Request, int, int]], warmth: int, shape: TreeShape) -> None:
        """Learn from trees of a shape that is not the favourite."""
        expected = sum(self._worth_of(request) * self.usual(1 + drafted) for request, drafted, _ in drafts)
        said = sum(accepted for _, _, accepted in drafts) / max(expected, _LEAST_GAIN)
        said = min(max(said, _LEAST_FACTOR), _LARGEST_FACTOR)
        seen = self._seen[warmth, shape] = min(self._seen[warmth, shape] + len(drafts), _MOST_SEEN)
        known = self._factor(warmth, shape)
        self._factors[warmth, shape] = known + (said - known) * len(drafts) / (_GUESSED + seen)
