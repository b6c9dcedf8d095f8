"""What the device begins of the next step before the host knows this one's outcome, by graphs."""

import logging

import torch
from torch import Tensor

from kernels.tree_layout import Rows, TreeLayout
from server.engine.ahead import Drafted, Passed
from server.engine.begun import Begun, First
from server.engine.budget import Plan
from server.engine.costs import MAX_TREE_ROWS
from server.engine.drafter import draft_width
from server.engine.graphs import in_halves, power_of_two
from server.engine.host import on_device
from server.engine.kv_cache import BlockPool, PagedTensors
from server.engine.pool import root_only, widened
from server.engine.prompts import Computed, Prompts, fit_beside
from server.engine.proposer import Proposer
from server.engine.request import Request
from server.engine.target import Target
from server.engine.verifications import FEW_NODES, is_plain

logger = logging.getLogger(__name__)
FEW = 4  # times as many others do not wait while the head drafts for those that are new: a level takes as long for a few as for many


class NextStep:
    """Drafts and computes ahead. ``enabled``: target and head are replayed by graphs."""

    def __init__(self, target: Target, proposer: Proposer, pool: BlockPool, cache: PagedTensors) -> None:
        self.target, self.proposer, self.pool, self.cache, self.device = target, proposer, pool, cache, target.device

    @property
    def enabled(self) -> bool:
        return self.target.graphs is not None

    def may_begin(self, decoding: list[Request]) -> bool:
        """Whether there is a next step to begin. Graphs, which share their memory, would overwrite logits that are still to be read."""
        goes_on = any(request.num_output + 1 < request.params.max_tokens for request in decoding)
        return self.enabled and goes_on and not _read(decoding)

    def may_draft(self, begun: Begun, plan: Plan) -> bool:
        """Whether the head can draft before the host knows what is committed."""
        batch, nodes = begun.batch, begun.batch.tree.tokens.shape[1]
        # Of a shape that was larger the target may have gone ahead.
        fits = 1 < nodes <= draft_width(plan.shape)
        return not is_plain(plan) and fits and begun.kept is not None and self.proposer.guesses is not None and batch.by_head > 0

    def may_pass(self, requests: list[Request], plan: Plan) -> bool:
        """Whether the next step's forward pass can be made as well: it does not depend on texts or grammars."""
        by_texts = self.proposer.ngrams is not None and plan.shape.nodes > FEW_NODES
        return is_plain(plan) or not (by_texts or any(request.matcher is not None for request in requests))

    def fits(self, prompts: Prompts, computed: Computed | None, begun: Begun, plan: Plan) -> bool:
        """Whether prompts can be computed by the next step's forward pass, which is made as soon as this one's trees are verified."""
        trees = len(begun.batch.requests) + (len(computed.prompts.requests) if computed else 0)
        nodes, longest = 1 if is_plain(plan) else plan.shape.nodes, begun.rows.layout.max_context + begun.rows.tokens.shape[1]
        return fit_beside(prompts.rows, trees, nodes, longest, len(self.pool.tables))

    def draft(self, begun: Begun, plan: Plan) -> Drafted | None:
        """The device drafts for the next step while the host learns what became of this one."""
        batch = begun.batch
        assert begun.kept is not None
        options = batch.options._replace(allowed=None)
        return self.proposer.go_ahead(
            batch.requests, batch.at.rows, begun.rows.layout, begun.kept, begun.verdict, plan.shape, options, batch.noise
        )

    def begin(
        self, begun: list[Begun], first: First | None, computed: Computed | None, drafted: Drafted | None, late: Prompts | None,
        plan: Plan, passing: bool,
    ) -> tuple[Drafted | Passed | None, list[Request]]:  # fmt: skip
        """Begin with the next step, for which the head has ``drafted``: who is new joins those that draft, and the target goes ahead if
        ``passing``. Returns what is begun, and whose prompts the head has taken in.
        """
        ready, new, soon = drafted, list[Request](), True
        if first and computed and self._may_join(first, computed, begun, plan):
            # The head drafts for a few of them a step later, and nobody waits.
            soon = drafted is None or FEW * len(first.requests) > len(drafted.requests)
            if soon and self._take_in(first, computed):
                ready, new = self.proposer.join(first.requests, drafted, plan.shape, first.options, first.noise) or drafted, first.requests
            elif drafted and not soon:
                ready, new = drafted.and_new(first.requests), first.requests
        passed = self.pass_ahead(begun[0], first, ready, late, plan) if passing else None
        if not soon and first and computed and not self._take_in(first, computed):
            return None, []
        return passed or ready, new

    def _take_in(self, first: First, computed: Computed) -> bool:
        return self.proposer.take_in(computed, first.places, first.verdict.tokens[:, 0])

    def _may_join(self, first: First, computed: Computed, begun: list[Begun], plan: Plan) -> bool:
        """Where others draft by graphs, those with a first token are taken in by the head as well, before the host knows it."""
        drafts = self.enabled and self.proposer.drafter is not None and bool(plan.drafting) and not plan.apart and not is_plain(plan)
        few = len(first.places) * plan.shape.nodes <= MAX_TREE_ROWS
        return drafts and few and computed.features is not None and not any(_read(verification.batch.requests) for verification in begun)

    def pass_ahead(self, begun: Begun, first: First | None, drafted: Drafted | None, prompts: Prompts | None, plan: Plan) -> Passed | None:
        """The forward pass over what the next step verifies: what was ``drafted``, or by plain decoding the tokens that this one commits.
        Along with those of ``begun`` come requests with a ``first`` token, if they have drafted as well, and ``prompts``.
        """
        requests, plain = begun.batch.requests, is_plain(plan)
        if first and (plain or (drafted and len(drafted.requests) > len(requests))):
            requests = requests + first.requests
        rows = in_halves(len(requests)) * power_of_two(1 if plain else plan.shape.nodes)
        if rows > MAX_TREE_ROWS or (not plain and (drafted is None or drafted.requests != requests)):
            return None
        try:
            roots, lengths, tables = self._stands(begun, requests, first)
            tree = widened(self.proposer.trees(requests, roots, drafted.grown, plan.shape)) if drafted else root_only(roots)
            longest = begun.rows.layout.max_context + begun.batch.tree.tokens.shape[1]
            longest = max([longest, *(request.prefill_len for request in requests[len(begun.batch.requests) :])])
            layout = TreeLayout(tables, lengths, tree.depth, tree.ancestors, None, self.pool.block_size, longest)
            early = [] if prompts is None else [prompts.rows]
            results = self.target.forward_parts([*early, Rows(tree.tokens.clamp(min=0), layout)], self.cache)
            computed = None if prompts is None else Computed(prompts, *results[0])
            return Passed(requests, [], plan.shape, tree, drafted and drafted.grown, *results[-1], computed)
        except torch.AcceleratorError:
            raise
        except Exception:
            logger.exception("the next step's forward pass could not be made ahead; it is made in its turn")
            return None

    def _stands(self, begun: Begun, requests: list[Request], first: First | None) -> tuple[Tensor, Tensor, Tensor]:
        """Last tokens and lengths after this step, int64 [B], and block tables of the requests of ``begun`` and of those of ``first`` after
        them, which the host does not know yet.
        """
        layout, verdict = begun.rows.layout, begun.verdict
        roots = verdict.tokens.gather(1, verdict.num_accepted[:, None])[:, 0]
        lengths, tables = layout.context_lens + verdict.num_accepted + 1, layout.block_tables
        if first is None or len(requests) == len(roots):
            return roots, lengths, tables
        new = on_device([[request.row, request.prefill_len] for request in first.requests], self.device).t()
        return (
            torch.cat((roots, first.verdict.tokens[:, 0])), torch.cat((lengths, new[1])), torch.cat((tables, self.pool.tables[new[0]])),
        )  # fmt: skip


def _read(requests: list[Request]) -> bool:
    """Whether logits are looked at after the step."""
    return any(request.params.logprobs is not None for request in requests)
