"""The load rule where steps are replayed: all requests have trees of one shape, out of a few, or nobody has any."""

from collections import defaultdict
from collections.abc import Mapping

from server.engine.budget import MAX_PROBE, PROBE, START_GAIN, STOP_GAIN, TRYING, LoadRule, Plan
from server.engine.costs import cost_of_trees
from server.engine.drafter import TreeShape
from server.engine.ngram import Draft
from server.engine.request import Request

SHALLOW_SHARE = 0.92  # of what deep trees accept, that shallow ones of as many nodes are taken to accept before they are compared
COMPARING = 32  # drafting steps of which one drafts by the other number of levels, to compare
_CERTAIN = 128  # drafts compared at once that count as much as all that was known of the share
_LEAST_SHARE, _LEAST_GAIN = 0.3, 0.5
_NEWS = 0.1  # The weight of a step's seconds in what is known of its kind.
_OUTLIER = 1.5  # They count no larger multiple of that: a graph may have been recorded meanwhile.


class FixedTreeRule(LoadRule):
    """Chooses the shape of tree that makes the most tokens per second of the whole batch, by measured seconds of every shape and by what
    the requests accept beside what is usual, which is learned as by ``LoadRule``; and by what shallow trees accept beside deep ones.

    seconds: of a step, by batch size and shape, that of one node being plain decoding and alone where no tree can pay; acceptance: as in
    ``LoadRule``.
    """

    def __init__(self, shape: TreeShape, seconds: Mapping[int, Mapping[TreeShape, float]], acceptance: Mapping[int, float]) -> None:
        super().__init__(shape, {batch: cost_of_trees(of) for batch, of in seconds.items()}, acceptance)
        self._steps = {batch: dict(of) for batch, of in seconds.items()}
        self._plain = shape.shrunk(1)
        self._shares: defaultdict[int, float] = defaultdict(lambda: SHALLOW_SHARE)  # of shallow trees, by class of requests
        self._favourite = self._plain
        self._probes: defaultdict[int, tuple[int, int]] = defaultdict(lambda: (PROBE, 0))  # by batch size: as in ``LoadRule``

    def choose(self, requests: list[Request], guesses: list[Draft] | None = None) -> Plan:
        """Of texts alone, what a grammar demands is verified at any load; it is looked up later."""
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
        worth: defaultdict[int, float] = defaultdict(float)
        for request in able:
            worth[request.warmth] += self._worth_of(request)

        def gain(shape: TreeShape) -> float:
            shallow = self._is_shallow(shape, shape.depth)
            accepted = sum(total * self._gain(shape.nodes, shallow, warmth) for warmth, total in worth.items())
            return (batch + min(accepted, (shape.nodes - 1) * len(able))) / batch * steps[self._plain] / steps[shape]

        return {shape: gain(shape) for shape in steps if shape.nodes > 1}

    def _gain(self, nodes: int, shallow: bool, warmth: int) -> float:
        """Tokens that trees of so many nodes accept of such requests if these accept what is usual."""
        return self.usual(nodes) * (self._shares[warmth] if shallow else 1.0)

    def _is_shallow(self, shape: TreeShape, levels: int) -> bool:
        return levels < self.shape.shrunk(shape.nodes).depth

    def _varied(self, best: TreeShape, gains: Mapping[TreeShape, float]) -> TreeShape:
        """Now and then the shape of as many nodes with the other number of levels."""
        others = [shape for shape in gains if shape.nodes == best.nodes and shape != best]
        return others[0] if others and self._drafting % COMPARING == COMPARING - 1 else best

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
        steps, shape = self._steps[self._measured(plan.batch)], plan.shape if plan.drafts else self._plain
        steps[shape] += (min(seconds, _OUTLIER * steps[shape]) - steps[shape]) * _NEWS

    def _learn(self, plan: Plan) -> None:
        """From what was accepted of trees that a step of another shape may have begun."""
        shallow = self._is_shallow(plan.shape, plan.levels)
        if shallow == self._is_shallow(self._favourite, self._favourite.depth):
            gains = [self._gain(1 + drafted, shallow, request.warmth) for request, drafted, _ in plan.drafts]
            self._learn_worth(plan, gains, _LEAST_GAIN)
            return
        for warmth in {request.warmth for request, _, _ in plan.drafts}:
            self._compare_depths([draft for draft in plan.drafts if draft[0].warmth == warmth], warmth, shallow)

    def _compare_depths(self, drafts: list[tuple[Request, int, int]], warmth: int, shallow: bool) -> None:
        """Learn from trees of the other number of levels."""
        deep = sum(self._worth_of(request) * self.usual(1 + drafted) for request, drafted, _ in drafts)
        ratio = max(sum(accepted for _, _, accepted in drafts) / max(deep, _LEAST_GAIN), _LEAST_SHARE)
        known = self._shares[warmth]
        said = min(max(ratio if shallow else known / ratio, _LEAST_SHARE), 1.0)
        self._shares[warmth] = known + (said - known) * len(drafts) / (len(drafts) + _CERTAIN)
