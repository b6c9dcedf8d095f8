"""The load rule where steps are replayed: all requests have trees of one size, out of a few, or nobody has any."""

from collections.abc import Mapping

from server.engine.budget import MAX_PROBE, PROBE, START_GAIN, STOP_GAIN, TRYING, LoadRule, Plan
from server.engine.costs import cost_of_trees
from server.engine.drafter import TreeShape
from server.engine.ngram import Draft
from server.engine.request import Request

_NEWS = 0.1  # The weight of a step's seconds in what is known of its kind.
_OUTLIER = 1.5  # They count no larger multiple of that: a graph may have been recorded meanwhile.


class FixedTreeRule(LoadRule):
    """Chooses the size of tree that makes the most tokens per second of the whole batch, by measured seconds of every size and by what
    the requests accept beside what is usual, which is learned as by ``LoadRule``.

    seconds: of a step, by batch size and number of nodes, 1 being plain decoding and alone where no tree can pay; acceptance: as in
    ``LoadRule``.
    """

    def __init__(self, shape: TreeShape, seconds: Mapping[int, Mapping[int, float]], acceptance: Mapping[int, float]) -> None:
        super().__init__(shape, {batch: cost_of_trees(of) for batch, of in seconds.items()}, acceptance)
        self._steps = {batch: dict(of) for batch, of in seconds.items()}

    def choose(self, requests: list[Request], guesses: list[Draft] | None = None) -> Plan:
        """Of texts alone, what a grammar demands is verified at any load; it is looked up later."""
        batch, steps = len(requests), self._steps[self._measured(len(requests))]
        able = [request for request in requests if request.max_draft_nodes > 0]
        worth = sum(map(self._worth_of, able))

        def gain(nodes: int) -> float:
            accepted = min(worth * self.usual(nodes), (nodes - 1) * len(able))
            return (batch + accepted) / steps[nodes] * steps[1] / batch

        nodes = max((n for n in steps if n > 1), key=gain, default=1)
        worthwhile = nodes > 1 and gain(nodes) >= (STOP_GAIN if self._drafting else START_GAIN)
        self._drafting = self._drafting + 1 if worthwhile else 0
        chosen = able if worthwhile else self._tried(able if nodes > 1 else [], batch)
        if worthwhile or not able or nodes == 1:
            self._interval, self._since_probe = PROBE, 0
        bound = [] if chosen else [request for request in able if request.matcher is not None]
        hoped = max(1.0, gain(nodes)) if worthwhile else 1.0
        lasting = worthwhile or (not chosen and self._since_probe + 1 < self._interval)
        behind = sum(request.num_pending for request in chosen)
        return Plan(self.shape.shrunk(nodes), chosen, hoped, batch, bound, lasting=lasting, apart=not worthwhile, rows=behind)

    def _tried(self, able: list[Request], batch: int) -> list[Request]:
        """The requests that draft now and then, to see whether it has become worth while: those whose draft caches are the least behind."""
        self._since_probe += 1
        if not able or self._since_probe < self._interval:
            return []
        self._interval, self._since_probe = min(2 * self._interval, MAX_PROBE), 0
        return sorted(able, key=lambda request: request.num_pending)[: max(TRYING, batch // TRYING)]

    def observe(self, plan: Plan, seconds: float | None) -> None:
        if plan.drafts:
            super().observe(plan, None)
        if seconds is None or not plan.batch or plan.copying or (plan.drafting and (plan.apart or plan.rows > plan.batch)):
            return  # or it says more of something else
        steps, nodes = self._steps[self._measured(plan.batch)], plan.shape.nodes if plan.drafts else 1
        steps[nodes] += (min(seconds, _OUTLIER * steps[nodes]) - steps[nodes]) * _NEWS
