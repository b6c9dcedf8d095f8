"""The device side of a step: prompt chunks, and draft -> verify -> commit for every decoding request, in one forward pass."""

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.kv_commit import kv_commit
from kernels.noise import Noise
from kernels.sampling import SamplingBatch
from kernels.tree_layout import TreeLayout
from kernels.tree_verify import tree_verify
from server.engine.ahead import Drafted, Passed
from server.engine.batch import Placed, placed
from server.engine.budget import Plan
from server.engine.config import EngineError
from server.engine.drafter import TreeShape
from server.engine.grammar import constrain
from server.engine.graphs import Graphs
from server.engine.host import fetch
from server.engine.kv_cache import BlockPool, PagedTensors
from server.engine.logprobs import token_logprobs
from server.engine.ngram import Draft
from server.engine.pool import by_width, narrowed, root_only, widened
from server.engine.prompts import extend, last_rows, prompt_rows
from server.engine.proposer import Proposer
from server.engine.request import Request
from server.engine.sampling import batch_noise, batch_options
from server.engine.target import Rows, Target
from server.engine.types import RequestOutput, StepStats, Tree, Verdict

logger = logging.getLogger(__name__)


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


class Begun(NamedTuple):
    """A verification that the device is at work on; ``answer`` waits for it, ``learn`` then learns from its guesses.

    logits [B, N, V]; ``kept``: features of the nodes on the verdict's paths, [B, D + 1, 3 * H]; ``ahead``: the next step's begin.
    """

    batch: Verification
    logits: Tensor
    verdict: Verdict
    answer: Callable[[], list[list]]
    learn: Callable[[], None] | None
    kept: Tensor | None
    ahead: Drafted | Passed | None


class Steps:
    """The device side of the engine. ``graphs``: replays target and head, see ``use_graphs``."""

    def __init__(self, target: Target, proposer: Proposer, pool: BlockPool, cache: PagedTensors) -> None:
        self.target, self.proposer, self.pool, self.cache, self.device = target, proposer, pool, cache, target.device
        self.graphs: Graphs | None = None
        self.ahead: Drafted | Passed | None = None  # what the last step began of the next one

    def use_graphs(self, graphs: Graphs | None) -> None:
        """Replay what has fixed sizes: then requests draft together or not at all, and nothing waits for the device in between."""
        self.graphs = self.target.graphs = graphs
        if self.proposer.drafter:
            self.proposer.drafter.graphs = graphs

    def run(self, requests: list[Request], outputs: list[RequestOutput], width: int, plan: Plan, stats: StepStats) -> None:
        """One forward pass: a chunk of at most ``width`` tokens for requests that compute their prompts, a verification for the others.

        What requests gain is added to ``outputs``. If it raises, requests without an output there can be run again.
        """
        ahead, self.ahead = self.ahead, None
        prefilling = [request for request in requests if request.prefilling]
        decoding = [request for request in requests if not request.prefilling]
        chunks = [request.token_ids[request.context_len : min(request.prefill_len, request.context_len + width)] for request in prefilling]
        prompts = [prompt_rows(self.pool, prefilling, chunks)] if prefilling else []
        batches = self._verifications(decoding, plan, ahead) if decoding else []
        rows = [batch.rows for batch in batches if batch.passed is None]
        # A CPU computes all rows together. By graphs the device is at work on trees while the host launches what prompts need one by one.
        early = [] if self.graphs else prompts
        results = self.target.forward_parts([*early, *rows], self.cache) if early or rows else []
        verified = [(batch.passed.logits, batch.passed.features) for batch in batches if batch.passed] or results[len(early) :]
        lasting = plan.lasting and len(batches) == 1 and len(batches[0].requests) == len(decoding)
        begun = [self._begin(batch, *result, plan, lasting) for batch, result in zip(batches, verified, strict=True)]
        prompted = results[: len(early)] or (self.target.forward_parts(prompts, self.cache) if prompts else [])
        first = self._first_tokens(prefilling, chunks, prompts[0], prompted[0][0]) if prefilling else None
        answer = fetch(first[1].tokens, first[2]) if first else None
        # Nothing above changes a request, and nothing below one without adding its output, so that a failure can be tried again alone.
        for verification in begun:
            outputs += self._settle(verification, plan, stats)
        told = answer() if answer else None
        if prefilling:
            extend(prefilling, chunks, *prompted[0])
            stats.prompt_tokens += sum(map(len, chunks))
        if first is not None and told is not None:
            outputs += self._commit(first[0], first[1], told[0], told[1], first[3], stats)

    def _first_tokens(
        self, requests: list[Request], chunks: list[list[int]], rows: Rows, logits: Tensor
    ) -> tuple[list[Request], Verdict, Tensor, Tensor] | None:
        """The token after every prompt that is complete now; one that was preempted has it already."""
        complete = [
            i
            for i, (request, chunk) in enumerate(zip(requests, chunks, strict=True))
            if request.context_len + len(chunk) == request.prefill_len and not request.num_output
        ]
        if not complete:
            return None
        done = [requests[i] for i in complete]
        last = (logits if rows.keep is not None else logits[last_rows(rows.tokens, chunks)])[complete, None]  # [B, 1, V]
        options, noise = self._sampling(done, 0)
        tree, options = constrain(done, root_only(placed(done, self.device).roots), options, self.target.vocab_size)
        return done, *_verify(tree, 0, last, options, noise), last

    def _verifications(self, requests: list[Request], plan: Plan, ahead: Drafted | Passed | None) -> list[Verification]:
        """Trees for those that draft, the roots alone for the others, but for text that a grammar demands."""
        if plan.drafting and plan.shape.nodes > 1 and self.graphs is not None:
            return self._draft(requests, plan, ahead if isinstance(ahead, Drafted) else None)
        passed = ahead.of(requests) if isinstance(ahead, Passed) and _is_plain(plan) else None
        if passed is not None:
            batch = self._plain(passed.requests, placed(passed.requests, self.device), plan.guesses_of(passed.requests))
            return [batch._replace(passed=passed)]
        drafting, copying = (set(map(id, chosen)) if plan.shape.nodes > 1 else set() for chosen in (plan.drafting, plan.copying))
        by_head = [request for request in requests if id(request) in drafting]
        by_text = [request for request in requests if id(request) in copying]
        quiet = [request for request in requests if id(request) not in drafting and id(request) not in copying]
        return [
            *(self._draft(by_head, plan) if by_head else []),
            *(self._copy(by_text, plan) if by_text else []),
            *([self._plain(quiet, placed(quiet, self.device), plan.guesses_of(quiet))] if quiet else []),
        ]

    def _begin(self, batch: Verification, logits: Tensor, features: Tensor | None, plan: Plan, lasting: bool) -> Begun:
        """Give the device what is to be done with a verification's results; logits [B * N, V].

        ``lasting``: the next step will probably be of this kind, for these requests.
        """
        logits, tree = logits.unflatten(0, batch.tree.tokens.shape), batch.tree
        verdict, healthy = _verify(tree, batch.reach, logits, batch.options, batch.noise)
        layout, is_tree = batch.rows.layout, tree.tokens.shape[1] > 1
        if is_tree:  # what survived moves to the front of the cache
            kv_commit(self.cache.k, self.cache.v, layout.block_tables, layout.context_lens, verdict.path)
        drafted = (tree.tokens >= 0).sum(1) - 1 if is_tree else verdict.num_accepted
        answer = fetch(verdict.tokens, healthy, drafted, verdict.num_accepted)
        is_told = batch.places is not None and is_tree and (self.graphs is not None or self.proposer.learned is not None)
        learn = self.proposer.tell(batch.requests, batch.places or [], verdict) if is_told else None
        kept = None if features is None else self._kept(features, verdict)
        ahead = self._go_ahead(batch, kept, verdict, plan) if lasting else None
        return Begun(batch, logits, verdict, answer, learn, kept, ahead)

    def _settle(self, begun: Begun, plan: Plan, stats: StepStats) -> list[RequestOutput]:
        """Wait for the outcome, and keep it."""
        batch, kept = begun.batch, begun.kept
        tokens, whole, nodes, accepted = begun.answer()
        if batch.tree.tokens.shape[1] > 1:
            self._record(batch, nodes, accepted, plan, stats)
        if begun.learn is not None:
            begun.learn()
        in_step = {id(request) for request in batch.requests if isinstance(begun.ahead, Drafted) and request.num_pending == 0}
        for i, request in enumerate(batch.requests):
            if kept is not None and id(request) not in in_step:
                request.pending.append(kept[i, : accepted[i] + 1])
        outputs = self._commit(batch.requests, begun.verdict, tokens, whole, begun.logits, stats)
        for request in batch.requests:
            if id(request) in in_step:
                request.draft_len = request.context_len
        if self.proposer.ngrams is not None and batch.drafts is not None:
            self.proposer.ngrams.learn(batch.drafts, [output.token_ids for output in outputs])
        stats.emitted += [len(output.token_ids) for output in outputs]
        self.ahead = begun.ahead
        return outputs

    def _go_ahead(self, batch: Verification, features: Tensor | None, verdict: Verdict, plan: Plan) -> Drafted | Passed | None:
        """With graphs the device begins with the next step while the host learns what became of this one; features: as ``_kept``."""
        requests = batch.requests
        read = any(request.params.logprobs is not None for request in requests)  # graphs would overwrite these logits
        if self.graphs is None or read or all(request.num_output + 1 >= request.params.max_tokens for request in requests):
            return None
        if _is_plain(plan):
            return self._pass_ahead(batch, verdict)
        if features is None or self.proposer.guesses is None or batch.places is None or batch.tree.tokens.shape[1] == 1:
            return None
        options = batch.options._replace(allowed=None)
        return self.proposer.go_ahead(requests, batch.at.rows, batch.rows.layout, features, verdict, plan.shape, options, batch.noise)

    def _pass_ahead(self, batch: Verification, verdict: Verdict) -> Passed | None:
        """The forward pass over the tokens that a step of plain decoding commits."""
        layout = batch.rows.layout
        following = replace(layout, context_lens=layout.context_lens + 1, max_context=layout.max_context + 1, _masks={})
        try:
            [(logits, features)] = self.target.forward_parts([Rows(verdict.tokens.clamp(min=0), following)], self.cache)
            return Passed(batch.requests, [request.context_len + 1 for request in batch.requests], logits, features)
        except torch.AcceleratorError:
            raise
        except Exception:
            logger.exception("the next step's forward pass could not be made ahead; it is made in its turn")
            return None

    def _draft(self, requests: list[Request], plan: Plan, ahead: Drafted | None = None) -> list[Verification]:
        """Trees for the requests; of one node each when there is nothing worth drafting. On a CPU, trees of like sizes go together."""
        at = placed(requests, self.device)
        if plan.shape.nodes > 1 and plan.shape.depth > 0:
            self.proposer.begin(requests)
        shape = plan.shape if self.graphs else _allowed(requests, plan.shape)
        # The device waits for what is looked up here: not for what hardly finds a place beside the head's nodes.
        price = 1 / shape.nodes if self.graphs and self.proposer.drafter else 0.0
        drafts = plan.guesses_of(requests) or self.proposer.look_up(requests, shape.nodes, price)
        reach = max([shape.depth, *(draft.depth for draft in drafts or ())])
        options, noise = self._sampling(requests, reach)
        tree = self.proposer.propose(requests, at, shape, options, noise, drafts, ahead)
        plan.levels = self.proposer.levels if self.proposer.drafter else 1
        if self.graphs is None and not self.proposer.drafted(requests, tree):
            return [self._plain(requests, at, drafts)]
        groups = self._groups(tree)
        if len(groups) == 1:
            return [self._verification(requests, at, tree, reach, options, noise, drafts, groups[0])]
        return [self._part(requests, tree, drafts, places, places) for places in groups]

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
            return [self._verification(requests, at, tree, reach, *self._sampling(requests, reach), drafts, None)]
        return [self._part(requests, tree, drafts, places, None) for places in groups]

    def _groups(self, tree: Tree) -> list[list[int]]:
        """The places of the batch whose trees go together; all of them in order, or by width in several groups."""
        together = self.graphs is not None or self.device.type == "cuda"
        groups = [] if together else by_width(tree)
        return groups if len(groups) > 1 else [list(range(len(tree.tokens)))]

    def _part(
        self, requests: list[Request], tree: Tree, drafts: list[Draft] | None, group: list[int], places: list[int] | None
    ) -> Verification:
        """The ``group`` of the batch; ``places`` as in ``Verification``."""
        members, part = [requests[i] for i in group], narrowed(tree, group)
        reach = int(part.depth.max())
        own = [drafts[i] for i in group] if drafts else None
        return self._verification(members, placed(members, self.device), part, reach, *self._sampling(members, reach), own, places)

    def _plain(self, requests: list[Request], at: Placed, drafts: list[Draft] | None) -> Verification:
        """The roots alone; ``drafts`` are not verified, and yet it is learned whether they would have come true."""
        return self._verification(requests, at, root_only(at.roots), 0, *self._sampling(requests, 0), drafts, None)

    def _sampling(self, requests: list[Request], reach: int) -> tuple[SamplingBatch, Noise | None]:
        """Options of the requests, and the noise of trees of depth ``reach``."""
        vocab_size = self.target.vocab_size
        return batch_options(requests, vocab_size, self.device), batch_noise(requests, reach + 1, vocab_size, self.device)

    def _verification(
        self, requests: list[Request], at: Placed, tree: Tree, reach: int, options: SamplingBatch, noise: Noise | None,
        drafts: list[Draft] | None, places: list[int] | None,
    ) -> Verification:  # fmt: skip
        tree, options = constrain(requests, widened(tree) if self.graphs else tree, options, self.target.vocab_size)
        # Padding costs nothing on a GPU, where finding it would make the host wait.
        live = None if self.graphs is not None or self.device.type == "cuda" else tree.tokens >= 0
        if live is not None and bool(live.all()):
            live = None
        tables = self.pool.tables[at.rows]
        layout = TreeLayout(tables, at.lengths, tree.depth, tree.ancestors, live, self.pool.block_size, at.longest)
        return Verification(requests, at, tree, reach, options, noise, drafts, Rows(tree.tokens.clamp(min=0), layout), places)

    def _record(self, batch: Verification, drafted: list[int], accepted: list[int], plan: Plan, stats: StepStats) -> None:
        for request, nodes, kept in zip(batch.requests, drafted, accepted, strict=True):
            if nodes:
                request.speculation.record(nodes, kept, batch.reach)
                stats.drafts.append((nodes, kept))
                if batch.places is not None:
                    plan.drafts.append((request, nodes, kept))
        stats.tree_nodes = max(stats.tree_nodes, batch.tree.tokens.shape[1])
        if batch.places is not None:
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


def _allowed(requests: list[Request], shape: TreeShape) -> TreeShape:
    """The shape for no more nodes than some request may have."""
    most = max(request.max_draft_nodes for request in requests)
    return shape.shrunk(most + 1) if most < shape.nodes - 1 else shape


def _verify(tree: Tree, max_depth: int, logits: Tensor, options: SamplingBatch, noise: Noise | None) -> tuple[Verdict, Tensor]:
    """The verdict, and which requests' logits are free of NaN, bool [B]; logits [B, N, V]."""
    *verdict, healthy = tree_verify(logits, options, noise, *tree, max_depth)
    return Verdict(*verdict), healthy


def _is_plain(plan: Plan) -> bool:
    """Whether nobody verifies more than a root."""
    return plan.shape.nodes == 1 or not (plan.drafting or plan.copying)
