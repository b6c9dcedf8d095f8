"""What a step verifies: the trees of those that draft, what texts propose, and the roots of the others."""

import math
from typing import NamedTuple

from kernels.noise import Noise
from kernels.sampling import SamplingBatch
from kernels.tree_layout import TreeLayout
from server.engine.ahead import Drafted, Passed
from server.engine.batch import Placed, placed
from server.engine.budget import Plan
from server.engine.drafter import TreeShape
from server.engine.grammar import constrain
from server.engine.kv_cache import BlockPool
from server.engine.ngram import Draft
from server.engine.pool import by_width, narrowed, root_only, widened
from server.engine.proposer import Proposer
from server.engine.request import Request
from server.engine.sampling import batch_noise, batch_options
from server.engine.target import Rows
from server.engine.types import Tree

FEW_NODES = 4  # of a tree, which the head fills by itself: texts would raise what is committed by a few percent (demo pair)


class Verification(NamedTuple):
    """What one forward pass verifies of some requests; ``reach``: depth of the deepest node, at most.

    ``drafts``: what their texts proposed, to be learned from, None where nothing was looked up. ``places``: of the requests among those
    that the head drafts for, None where it does not.
    """

    requests: list[Request]
    at: Placed
    tree: Tree
    reach: int
    options: SamplingBatch
    noise: Noise | None
    drafts: list[Draft] | None
    rows: Rows
    places: list[int] | None
    passed: Passed | None = None  # where the forward pass was made ahead


class Verifications:
    """Makes them. ``fixed``: what they hold has few sizes, since graphs replay it."""

    def __init__(self, proposer: Proposer, pool: BlockPool, vocab_size: int) -> None:
        self.proposer, self.pool, self.vocab_size, self.device = proposer, pool, vocab_size, proposer.device
        self.fixed = False

    def of(self, requests: list[Request], plan: Plan, ahead: Drafted | Passed | None) -> list[Verification]:
        """Trees for those that draft, the roots alone for the others, but for text that a grammar demands."""
        if plan.drafting and plan.shape.nodes > 1 and self.fixed and not plan.apart:
            return self._draft(requests, plan, ahead if isinstance(ahead, Drafted) else None)
        passed = ahead.of(requests) if isinstance(ahead, Passed) and is_plain(plan) else None
        if passed is not None:
            batch = self._plain(passed.requests, placed(passed.requests, self.device), plan.guesses_of(passed.requests))
            return [batch._replace(passed=passed)]
        drafting = {id(request) for request in plan.drafting if plan.shape.nodes > 1}
        copying = {id(request) for request in plan.copying if plan.shape.nodes > 1}
        by_head = [request for request in requests if id(request) in drafting]
        by_text = [request for request in requests if id(request) in copying]
        quiet = [request for request in requests if id(request) not in drafting and id(request) not in copying]
        return [
            *(self._draft(by_head, plan) if by_head else []),
            *(self._copy(by_text, plan) if by_text else []),
            *([self._plain(quiet, placed(quiet, self.device), plan.guesses_of(quiet))] if quiet else []),
        ]

    def _draft(self, requests: list[Request], plan: Plan, ahead: Drafted | None = None) -> list[Verification]:
        """Trees for the requests; of one node each when there is nothing worth drafting. On a CPU, trees of like sizes go together."""
        at = placed(requests, self.device)
        if plan.shape.nodes > 1 and plan.shape.depth > 0:
            self.proposer.begin(requests)
        shape = plan.shape if self.fixed else _allowed(requests, plan.shape)
        drafts = plan.guesses_of(requests) or self.proposer.look_up(requests, shape.nodes, self._price(shape))
        reach = max([shape.depth, ahead.grown.levels if ahead else 0, *(draft.depth for draft in drafts or ())])
        options, noise = self.sampling(requests, reach)
        tree = self.proposer.propose(requests, at, shape, options, noise, drafts, ahead)
        plan.levels = self.proposer.levels if self.proposer.drafter else 1
        if not self.fixed and not self.proposer.drafted(requests, tree):
            return [self._plain(requests, at, drafts)]
        groups = self._groups(tree)
        if len(groups) == 1:
            return [self._verification(requests, at, tree, reach, options, noise, drafts, groups[0])]
        return [self._part(requests, tree, drafts, places, places) for places in groups]

    def _price(self, shape: TreeShape) -> float:
        """Of what texts propose beside the head. By graphs the device waits while it is looked up: not for what hardly finds a place."""
        if not self.fixed or self.proposer.drafter is None:
            return 0.0
        return 1 / shape.nodes if shape.nodes > FEW_NODES else math.inf

    def _copy(self, requests: list[Request], plan: Plan) -> list[Verification]:
        """Trees of what the requests' own texts propose, which costs nothing to make; if the rule has not looked, what grammars demand."""
        drafts = plan.guesses_of(requests) or self.proposer.look_up(requests, plan.shape.nodes, math.inf)
        at = placed(requests, self.device)
        tree = self.proposer.copy(at.roots, plan.shape, drafts)
        if tree.tokens.shape[1] == 1:
            return [self._plain(requests, at, drafts)]
        groups = self._groups(tree)
        if len(groups) == 1:
            reach = max(draft.depth for draft in drafts or ())
            return [self._verification(requests, at, tree, reach, *self.sampling(requests, reach), drafts, None)]
        return [self._part(requests, tree, drafts, places, None) for places in groups]

    def _groups(self, tree: Tree) -> list[list[int]]:
        """The places of the batch whose trees go together; all of them in order, or by width in several groups."""
        together = self.fixed or self.device.type == "cuda"
        groups = [] if together else by_width(tree)
        return groups if len(groups) > 1 else [list(range(len(tree.tokens)))]

    def _part(
        self, requests: list[Request], tree: Tree, drafts: list[Draft] | None, group: list[int], places: list[int] | None
    ) -> Verification:
        """The ``group`` of the batch; ``places`` as in ``Verification``."""
        members, part = [requests[i] for i in group], narrowed(tree, group)
        reach = int(part.depth.max())
        own = [drafts[i] for i in group] if drafts else None
        return self._verification(members, placed(members, self.device), part, reach, *self.sampling(members, reach), own, places)

    def _plain(self, requests: list[Request], at: Placed, drafts: list[Draft] | None) -> Verification:
        """The roots alone; ``drafts`` are not verified, and yet it is learned whether they would have come true."""
        return self._verification(requests, at, root_only(at.roots), 0, *self.sampling(requests, 0), drafts, None)

    def sampling(self, requests: list[Request], reach: int) -> tuple[SamplingBatch, Noise | None]:
        """Options of the requests, and the noise of trees of depth ``reach``."""
        return batch_options(requests, self.vocab_size, self.device), batch_noise(requests, reach + 1, self.vocab_size, self.device)

    def _verification(
        self, requests: list[Request], at: Placed, tree: Tree, reach: int, options: SamplingBatch, noise: Noise | None,
        drafts: list[Draft] | None, places: list[int] | None,
    ) -> Verification:  # fmt: skip
        tree, options = constrain(requests, widened(tree) if self.fixed else tree, options, self.vocab_size)
        # Padding costs nothing on a GPU, where finding it would make the host wait.
        live = None if self.fixed or self.device.type == "cuda" else tree.tokens >= 0
        if live is not None and bool(live.all()):
            live = None
        tables = self.pool.tables[at.rows]
        layout = TreeLayout(tables, at.lengths, tree.depth, tree.ancestors, live, self.pool.block_size, at.longest)
        return Verification(requests, at, tree, reach, options, noise, drafts, Rows(tree.tokens.clamp(min=0), layout), places)


def _allowed(requests: list[Request], shape: TreeShape) -> TreeShape:
    """The shape for no more nodes than some request may have."""
    most = max(request.max_draft_nodes for request in requests)
    return shape.shrunk(most + 1) if most < shape.nodes - 1 else shape


def is_plain(plan: Plan) -> bool:
    """Whether nobody verifies more than a root."""
    return plan.shape.nodes == 1 or not (plan.drafting or plan.copying)
