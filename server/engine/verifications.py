"""What a step verifies: the trees of those that draft, what texts propose, and the roots of the others."""

import math
from typing import NamedTuple

from kernels.noise import Noise
from kernels.sampling import SamplingBatch, has_kernel
from kernels.tree_layout import Rows, TreeLayout
from server.engine.ahead import Drafted, Passed
from server.engine.batch import Placed, placed
from server.engine.budget import Plan
from server.engine.drafter import TreeShape
from server.engine.grammar import constrain
from server.engine.kv_cache import BlockPool
from server.engine.ngram import Draft
from server.engine.pool import root_only, stacked, widened
from server.engine.proposer import Proposer
from server.engine.request import Request
from server.engine.sampling import batch_noise, batch_options
from server.engine.types import Tree

FEW_NODES = 8  # of a tree, which the head fills by itself: the target need not wait for what the host finds in texts


class Proposal(NamedTuple):
    """Trees of some requests; ``reach``: depth of the deepest node, at most.

    ``drafts``: what their texts proposed, to be learned from, None where nothing was looked up. ``by_head``: so many of the requests, the
    first ones, the head drafts for.
    """

    requests: list[Request]
    at: Placed
    tree: Tree
    reach: int
    options: SamplingBatch
    noise: Noise | None
    drafts: list[Draft] | None
    by_head: int


class Verification(NamedTuple):
    """A proposal, and the rows of the forward pass that verifies it."""

    proposal: Proposal
    rows: Rows
    passed: Passed | None = None  # where the forward pass was made ahead


class Verifications:
    """Makes them. ``fixed``: what they hold has few sizes, since graphs replay it."""

    def __init__(self, proposer: Proposer, pool: BlockPool, vocab_size: int) -> None:
        self.proposer, self.pool, self.vocab_size, self.device = proposer, pool, vocab_size, proposer.device
        self.fixed = False

    def of(self, requests: list[Request], plan: Plan, ahead: Drafted | Passed | None) -> list[Verification]:
        """Trees for those that draft, the roots alone for the others, but for text that a grammar demands. On a CPU all go together.
        What has been computed ahead is verified, whatever the plan is by now, but where a root is not enough.
        """
        passed = ahead.of(requests) if isinstance(ahead, Passed) and (ahead.grown or is_plain(plan)) else None
        if passed is not None:
            return [self._verification(self._passed(passed, plan))._replace(passed=passed)]
        if plan.drafting and plan.shape.nodes > 1 and self.fixed and not plan.apart:
            return [self._verification(self._draft(requests, plan, ahead if isinstance(ahead, Drafted) else None))]
        drafting = {id(request) for request in plan.drafting if plan.shape.nodes > 1}
        copying = {id(request) for request in plan.copying if plan.shape.nodes > 1}
        by_head = [request for request in requests if id(request) in drafting]
        by_text = [request for request in requests if id(request) in copying]
        quiet = [request for request in requests if id(request) not in drafting and id(request) not in copying]
        proposals = [
            *([self._draft(by_head, plan)] if by_head else []),
            *([self._copy(by_text, plan)] if by_text else []),
            *([self._plain(quiet, placed(quiet, self.pool), plan.guesses_of(quiet))] if quiet else []),
        ]
        if not self.fixed and self.device.type == "cpu" and len(proposals) > 1 and all(map(_is_ragged, proposals)):
            proposals = [self._together(proposals)]
        return [self._verification(proposal) for proposal in proposals]

    def _draft(self, requests: list[Request], plan: Plan, ahead: Drafted | None = None) -> Proposal:
        """Trees for the requests; of one node each when there is nothing worth drafting."""
        at = placed(requests, self.pool)
        if plan.shape.nodes > 1 and plan.shape.depth > 0:
            self.proposer.begin(requests)
        shape = plan.shape if self.fixed else _allowed(requests, plan.shape)
        drafts = plan.guesses_of(requests) or self.proposer.look_up(requests, shape.nodes, self._price(shape))
        reach = max([shape.depth, ahead.grown.levels if ahead else 0, *(draft.depth for draft in drafts or ())])
        options, noise = self.sampling(requests, reach)
        tree = self.proposer.propose(requests, at, shape, options, noise, drafts, ahead)
        plan.nodes, plan.levels = shape.nodes, self.proposer.levels if self.proposer.drafter else 1
        if not self.fixed and not self.proposer.drafted(requests, tree):
            return self._plain(requests, at, drafts)
        return Proposal(requests, at, tree, reach, options, noise, drafts, len(requests))

    def _passed(self, passed: Passed, plan: Plan) -> Proposal:
        """What the target has computed ahead."""
        requests, at = passed.requests, placed(passed.requests, self.pool)
        self.proposer.drew(passed.grown)
        if passed.grown is None:
            return self._plain(requests, at, plan.guesses_of(requests))
        plan.nodes, plan.levels = passed.shape.nodes, passed.grown.levels
        return Proposal(requests, at, passed.tree, plan.levels, *self.sampling(requests, plan.levels), None, len(requests))

    def _price(self, shape: TreeShape) -> float:
        """Of what texts propose beside the head. By graphs the device waits while it is looked up: not for what hardly finds a place."""
        if not self.fixed or self.proposer.drafter is None:
            return 0.0
        return 1 / shape.nodes if shape.nodes > FEW_NODES else math.inf

    def _copy(self, requests: list[Request], plan: Plan) -> Proposal:
        """Trees of what the requests' own texts propose, which costs nothing to make; if the rule has not looked, what grammars demand."""
        drafts = plan.guesses_of(requests) or self.proposer.look_up(requests, plan.shape.nodes, math.inf)
        at = placed(requests, self.pool)
        tree = self.proposer.copy(at.roots, plan.shape, drafts)
        if tree.tokens.shape[1] == 1:
            return self._plain(requests, at, drafts)
        reach = max(draft.depth for draft in drafts or ())
        return Proposal(requests, at, tree, reach, *self.sampling(requests, reach), drafts, 0)

    def _plain(self, requests: list[Request], at: Placed, drafts: list[Draft] | None) -> Proposal:
        """The roots alone; ``drafts`` are not verified, and yet it is learned whether they would have come true."""
        return Proposal(requests, at, root_only(at.roots), 0, *self.sampling(requests, 0), drafts, 0)

    def _together(self, proposals: list[Proposal]) -> Proposal:
        """One of all: what a verification costs beside its rows is worth many rows of a CPU's."""
        requests = [request for proposal in proposals for request in proposal.requests]
        looked_up = any(proposal.drafts is not None for proposal in proposals)
        drafts = [draft for proposal in proposals for draft in proposal.drafts or [Draft() for _ in proposal.requests]]
        reach = max(proposal.reach for proposal in proposals)
        return Proposal(
            requests, placed(requests, self.pool), stacked([proposal.tree for proposal in proposals]), reach,
            *self.sampling(requests, reach), drafts if looked_up else None, proposals[0].by_head,
        )  # fmt: skip

    def sampling(self, requests: list[Request], reach: int) -> tuple[SamplingBatch, Noise | None]:
        """Options of the requests, and the noise of trees of depth ``reach``."""
        return batch_options(requests, self.vocab_size, self.device), batch_noise(requests, reach + 1, self.vocab_size, self.device)

    def _verification(self, proposal: Proposal) -> Verification:
        requests, at, tree = proposal[:3]
        tree, options = constrain(requests, widened(tree) if self.fixed else tree, proposal.options, self.vocab_size)
        # Padding costs nothing on a GPU, where finding it would make the host wait, and roots are never padding.
        live = None if self.fixed or self.device.type == "cuda" or tree.tokens.shape[1] == 1 else tree.tokens >= 0
        if live is not None and bool(live.all()):
            live = None
        layout = TreeLayout(at.tables, at.lengths, tree.depth, tree.ancestors, live, self.pool.block_size, at.longest)
        rows = Rows(tree.tokens.clamp(min=0), layout, None if live is None else layout.live_rows)
        return Verification(proposal._replace(tree=tree, options=options), rows)


def _allowed(requests: list[Request], shape: TreeShape) -> TreeShape:
    """The shape for no more nodes than some request may have."""
    most = max(request.max_draft_nodes for request in requests)
    return shape.shrunk(most + 1) if most < shape.nodes - 1 else shape


def _is_ragged(proposal: Proposal) -> bool:
    """Whether dead nodes cost its verification nothing."""
    return has_kernel(proposal.options) and all(r.params.logprobs is None and r.matcher is None for r in proposal.requests)


def is_plain(plan: Plan) -> bool:
    """Whether nobody verifies more than a root."""
    return plan.shape.nodes == 1 or not (plan.drafting or plan.copying)
