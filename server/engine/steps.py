"""The device side of a step: prompt chunks, and draft -> verify -> commit for every decoding request, in one forward pass."""

import logging

from torch import Tensor

from kernels.kv_commit import kv_commit
from kernels.noise import Noise
from kernels.sampling import SamplingBatch
from kernels.tree_layout import Rows
from kernels.tree_verify import tree_verify
from server.engine.ahead import Drafted, Passed
from server.engine.begun import Begun, First
from server.engine.budget import Plan
from server.engine.config import EngineError
from server.engine.grammar import constrain
from server.engine.graphs import Graphs
from server.engine.host import fetch, on_device
from server.engine.kv_cache import BlockPool, PagedTensors
from server.engine.logprobs import token_logprobs
from server.engine.next_step import NextStep
from server.engine.pool import root_only
from server.engine.prompts import Computed, Prompts, extend, fit_beside, prompt_rows
from server.engine.proposer import Proposer
from server.engine.request import Piece, Request
from server.engine.target import Target, spread
from server.engine.types import RequestOutput, StepStats, Tree, Verdict
from server.engine.verifications import Proposal, Verification, Verifications, is_plain

logger = logging.getLogger(__name__)


class Steps:
    """The device side of the engine. ``graphs``: replays target and head, see ``use_graphs``."""

    def __init__(self, target: Target, proposer: Proposer, pool: BlockPool, cache: PagedTensors) -> None:
        self.target, self.proposer, self.pool, self.cache, self.device = target, proposer, pool, cache, target.device
        self.verifications = Verifications(proposer, pool, target.vocab_size)
        self.next = NextStep(target, proposer, pool, cache)
        self.graphs: Graphs | None = None
        self.ahead: Drafted | Passed | None = None  # what the last step began of the next one
        self.was_in_vain = False  # that prompts waited for the next step's pass

    def use_graphs(self, graphs: Graphs | None, prompt_graphs: Graphs | None) -> None:
        """Replay what has fixed sizes: then requests draft together or not at all, and nothing waits for the device in between."""
        self.graphs = self.target.graphs = graphs
        self.target.prompt_graphs = prompt_graphs
        self.verifications.fixed = graphs is not None
        if self.proposer.drafter:
            self.proposer.drafter.graphs, self.proposer.drafter.row_graphs = graphs, prompt_graphs

    def run(self, requests: list[Request], outputs: list[RequestOutput], width: int, plan: Plan, stats: StepStats) -> None:
        """One forward pass: a chunk of at most ``width`` tokens for requests that compute their prompts, a verification for the others.

        What requests gain is added to ``outputs``. If it raises, requests without an output there can be run again.
        """
        ahead, self.ahead = self.ahead, None
        prefilling = [request for request in requests if request.prefilling]
        decoding = [request for request in requests if not request.prefilling]
        computed = ahead.prompts.of(prefilling) if isinstance(ahead, Passed) and ahead.prompts else None
        left = [request for request in prefilling if computed is None or request not in computed.prompts.requests]
        batches = self.verifications.of(decoding, plan, ahead) if decoding else []
        begun, prompts, computed = self._compute(batches, left, width, computed)
        lasting = plan.lasting and len(begun) == 1 and len(begun[0].batch.requests) == len(decoding) and self.next.may_begin(decoding)
        drafting = lasting and self.next.may_draft(begun[0], plan)
        passing = lasting and (drafting or is_plain(plan)) and self.next.may_pass(requests, plan)
        may_wait = passing and not self.was_in_vain
        late = prompts if prompts and may_wait and self.next.fits(prompts, computed, begun[0], plan) else None
        if prompts and not (computed or late):
            # After the trees, so that the host learns what became of these meanwhile.
            computed = Computed(prompts, *self.target.forward_parts([prompts.rows], self.cache)[0])
        first = self._first_tokens(computed) if computed else None
        # What belongs to the next step comes last.
        drafted = self.next.draft(begun[0], plan) if drafting else None
        ready, new = self.next.begin(begun, first, computed, drafted, late, plan, passing)
        self.was_in_vain = late is not None and not isinstance(ready, Passed)
        # Nothing above changes a request but the head's state, which costs a draft; nothing below one without adding its output. So what
        # fails can be tried again alone.
        for verification in begun:
            outputs += self._settle(verification, drafted, plan, stats)
        told = first.answer() if first else []
        if computed:
            extend(computed, new)
            stats.prompt_tokens += sum(map(len, computed.prompts.chunks))
        if first:
            outputs += self._commit(first.requests, first.verdict, told[0], told[1], first.logits, stats)
        if isinstance(ready, Passed):
            ready = ready._replace(lengths=[request.context_len for request in ready.requests])
        self.ahead = ready

    def _compute(
        self, batches: list[Verification], left: list[Request], width: int, computed: Computed | None
    ) -> tuple[list[Begun], Prompts | None, Computed | None]:
        """Begin the verifications. Returns as well the next chunks of the prompts of ``left``, where they were not computed along with
        trees, and what is computed of prompts: ``computed``, or these.
        """
        if batches and (passed := batches[0].passed):
            begun = [self._begin(batches[0], passed.logits, passed.features)]
            return begun, self._next_chunks(left, width), computed
        prompts, rows = self._next_chunks(left, width), [batch.rows for batch in batches]
        early = [prompts.rows] if prompts and not computed and self._fit_beside(prompts, rows) else []
        results = self.target.forward_parts([*early, *rows], self.cache) if early or rows else []
        if prompts and early:
            computed, prompts = Computed(prompts, *results.pop(0)), None
        return [self._begin(batch, *result) for batch, result in zip(batches, results, strict=True)], prompts, computed

    def _next_chunks(self, requests: list[Request], width: int) -> Prompts | None:
        return prompt_rows(self.pool, requests, width, self.graphs is not None) if requests else None

    def _fit_beside(self, prompts: Prompts, trees: list[Rows]) -> bool:
        """Whether prompts are computed by the forward pass of this step's trees: a CPU computes all rows together."""
        if self.graphs is None or len(trees) != 1:
            return self.graphs is None
        batch, nodes = trees[0].tokens.shape
        return fit_beside(prompts.rows, batch, nodes, trees[0].layout.max_context, len(self.pool.tables))

    def _first_tokens(self, computed: Computed) -> First | None:
        """The token after every prompt that is complete now; one that was preempted has it already."""
        prompts, logits = computed.prompts, computed.logits
        complete = [
            i
            for i, (request, chunk) in enumerate(zip(prompts.requests, prompts.chunks, strict=True))
            if request.context_len + len(chunk) == request.prefill_len and not request.num_output
        ]
        if not complete:
            return None
        done = [prompts.requests[i] for i in complete]
        wanted = complete if prompts.rows.keep is not None else prompts.last_rows(complete)
        last = logits.index_select(0, on_device(wanted, self.device))[:, None]  # a list as an index would wait for the device
        options, noise = self.verifications.sampling(done, 0)
        roots = on_device([request.token_ids[-1] for request in done], self.device)
        tree, options = constrain(done, root_only(roots), options, self.target.vocab_size)
        verdict, healthy = _verify(tree, 0, last, options, noise)
        return First(done, complete, last, verdict, options, noise, fetch(verdict.tokens, healthy))

    def _begin(self, verification: Verification, logits: Tensor, features: Tensor | None) -> Begun:
        """Give the device what is to be done with a verification's results; logits [B * N, V], or of the rows that were to be kept."""
        (batch, rows, _), tree = verification, verification.proposal.tree
        is_tree = tree.tokens.shape[1] > 1
        # What is given to graphs, and what kernels are compiled for, has one size for all trees of as many nodes.
        depth = batch.reach if self.graphs is None else tree.tokens.shape[1] - 1
        places = rows.keep
        if places is not None and any(request.params.logprobs is not None for request in batch.requests):
            logits, places = spread(logits, tree.tokens.numel(), places), None
        logits = logits if places is not None else logits.unflatten(0, tree.tokens.shape)
        verdict, healthy = _verify(tree, depth, logits, batch.options, batch.noise, places)
        if is_tree:  # what survived moves to the front of the cache
            kv_commit(self.cache.k, self.cache.v, rows.layout.block_tables, rows.layout.context_lens, verdict.path)
        drafted = (tree.tokens >= 0).sum(1) - 1 if is_tree else verdict.num_accepted  # none
        answer = fetch(verdict.tokens, healthy, drafted, verdict.num_accepted)
        is_told = batch.by_head and is_tree and (self.graphs is not None or self.proposer.learned is not None)
        learn = self.proposer.tell(batch.requests[: batch.by_head], verdict) if is_told else None
        kept = None if features is None else self._kept(features, verdict)
        return Begun(batch, rows, logits, verdict, answer, learn, kept)

    def _settle(self, begun: Begun, drafted: Drafted | None, plan: Plan, stats: StepStats) -> list[RequestOutput]:
        """Wait for the outcome, and keep it; ``drafted``: the next step's trees of these requests."""
        batch, kept = begun.batch, begun.kept
        tokens, whole, nodes, accepted = begun.answer()
        if batch.tree.tokens.shape[1] > 1:
            self._record(batch, nodes, accepted, plan, stats)
        if begun.learn is not None:
            begun.learn()
        # Whose draft caches have been brought up to what is committed now.
        extended = [drafted is not None and request.num_pending == 0 for request in batch.requests]
        if kept is not None:
            flat, width = kept.flatten(0, 1), kept.shape[1]
            for i, request in enumerate(batch.requests):
                if not extended[i]:
                    request.pending.append(Piece(flat, i * width, i * width + accepted[i] + 1))
        outputs = self._commit(batch.requests, begun.verdict, tokens, whole, begun.logits, stats)
        for request, is_extended in zip(batch.requests, extended, strict=True):
            if is_extended:
                request.draft_len = request.context_len
        self.proposer.learn_texts(batch.drafts, [output.token_ids for output in outputs])
        stats.emitted += [len(output.token_ids) for output in outputs]
        return outputs

    def _record(self, batch: Proposal, drafted: list[int], accepted: list[int], plan: Plan, stats: StepStats) -> None:
        for i, (request, nodes, kept) in enumerate(zip(batch.requests, drafted, accepted, strict=True)):
            if nodes:
                request.speculation.record(nodes, kept, min(batch.reach, nodes))  # others may reach deeper
                stats.drafts.append((nodes, kept))
                if i < batch.by_head:
                    plan.drafts.append((request, nodes, kept))
                else:
                    plan.copied += kept
        stats.tree_nodes = max(stats.tree_nodes, batch.tree.tokens.shape[1])
        if batch.by_head:
            stats.draft_levels = plan.levels

    def _kept(self, features: Tensor, verdict: Verdict) -> Tensor:
        """The features of the accepted nodes, for the draft cache, [B, D + 1, 3 * H]."""
        if features.shape[1] == 1:
            return features.clone() if self.graphs is not None else features  # the next step overwrites them
        return features.gather(1, verdict.path.clamp(min=0)[:, :, None].expand(-1, -1, features.shape[2]))

    def _commit(
        self, requests: list[Request], verdict: Verdict, tokens: list[list[int]], healthy: list[bool], logits: Tensor, stats: StepStats
    ) -> list[RequestOutput]:
        """Append the committed tokens to every request; a request that goes wrong here fails alone."""
        outputs = []
        for i, (request, ok) in enumerate(zip(requests, healthy, strict=True)):
            committed = [token for token in tokens[i] if token >= 0]
            try:
                if not ok:
                    raise FloatingPointError("the target's logits are NaN")
                read = request.params.logprobs
                logprobs = None if read is None else token_logprobs(logits[i][verdict.path[i, : len(committed)]], committed, read)
                output = request.commit(committed, logprobs)
            except Exception as error:
                if not isinstance(error, EngineError):  # which the client is told
                    logger.exception("request %s failed", request.request_id)
                output = RequestOutput.failed(request.request_id, error)
            request.context_len = len(request.token_ids) - 1
            stats.generation_tokens += len(output.token_ids)
            outputs.append(output)
        return outputs


def _verify(
    tree: Tree, max_depth: int, logits: Tensor, options: SamplingBatch, noise: Noise | None, places: Tensor | None = None
) -> tuple[Verdict, Tensor]:
    """The verdict, and which requests' logits are free of NaN, bool [B]; logits [B, N, V], or [K, V] of the nodes ``places``."""
    *verdict, healthy = tree_verify(logits, options, noise, *tree, max_depth, places)
    return Verdict(*verdict), healthy
