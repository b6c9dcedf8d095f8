"""The device side of a step: prompt chunks, and draft -> verify -> commit for every decoding request, in one forward pass."""

import logging
from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from drafts.eagle3 import DraftTemperature
from kernels.kv_commit import kv_commit
from kernels.noise import Noise
from kernels.sampling import SamplingBatch
from kernels.tree_layout import TreeLayout
from kernels.tree_verify import tree_verify
from server.engine.budget import Plan
from server.engine.calibration import LearnedSigma
from server.engine.draft_temperature import level_sigmas
from server.engine.drafter import Drafter, TreeShape
from server.engine.grammar import constrain
from server.engine.kv_cache import BlockPool, PagedTensors
from server.engine.logprobs import token_logprobs
from server.engine.ngram import Candidates, Ngrams
from server.engine.pool import best_tree, root_only
from server.engine.request import Request
from server.engine.sampling import batch_noise, batch_options
from server.engine.target import Rows, Target
from server.engine.types import RequestOutput, StepStats, TokenLogprob, Tree, Verdict

logger = logging.getLogger(__name__)


class Verification(NamedTuple):
    """What one forward pass verifies of some requests; ``reach``: depth of the deepest node, at most."""

    requests: list[Request]
    tree: Tree
    reach: int
    options: SamplingBatch
    noise: Noise | None
    guesses: Candidates | None
    rows: Rows


MAX_PENDING_BYTES = 8 << 20  # features per request that may wait for the draft cache while speculation is off


class Steps:
    """The device side of the engine. ``sigma``: drafting temperatures by request temperature and level; ``learned`` moves them.

    ``ngrams``: drafts from the requests' own text, beside the head's or without a head.
    """

    def __init__(self, target: Target, drafter: Drafter | None, pool: BlockPool, cache: PagedTensors, sigma: DraftTemperature) -> None:
        self.target, self.drafter, self.pool, self.cache, self.sigma = target, drafter, pool, cache, sigma
        self.learned: LearnedSigma | None = None
        self.ngrams: Ngrams | None = None
        self.failed_drafts = 0  # since the engine last looked
        self.device = target.device

    def run(self, requests: list[Request], outputs: list[RequestOutput], width: int, plan: Plan, stats: StepStats) -> None:
        """One forward pass: a chunk of at most ``width`` tokens for requests that compute their prompts, a verification for the others.

        What requests gain is added to ``outputs``. If it raises, requests without an output there can be run again.
        """
        prefilling = [request for request in requests if request.prefilling]
        decoding = [request for request in requests if not request.prefilling]
        chunks = [request.token_ids[request.context_len : min(request.prefill_len, request.context_len + width)] for request in prefilling]
        prompts = [self._prompt_rows(prefilling, chunks)] if prefilling else []
        batches = self._verifications(decoding, plan) if decoding else []
        results = self.target.forward_parts([*prompts, *(batch.rows for batch in batches)], self.cache)
        first = self._first_tokens(prefilling, chunks, prompts[0], results[0][0]) if prefilling else None
        verdicts = [
            _verify(batch.tree, batch.reach, logits.unflatten(0, batch.tree.tokens.shape), batch.options, batch.noise)
            for batch, (logits, _) in zip(batches, results[len(prompts) :], strict=True)
        ]
        # Nothing above changes a request, so that a failure can be tried again for each one alone.
        if prefilling:
            self._extend(prefilling, chunks, *results[0], stats)
        if first is not None:
            outputs += self._commit(*first, stats)
        for batch, (logits, features), (verdict, healthy) in zip(batches, results[len(prompts) :], verdicts, strict=True):
            outputs += self._settle(batch, logits, features, verdict, healthy, plan, stats)

    def _prompt_rows(self, requests: list[Request], chunks: list[list[int]]) -> Rows:
        """The next chunk of every prompt; the logits of its last row, or of all where some request wants them."""
        tokens, layout = self._chunk([request.row for request in requests], [request.context_len for request in requests], chunks)
        if any(request.prompt_alternatives is not None for request in requests):
            return Rows(tokens, layout)
        return Rows(tokens, layout, self._last_rows(tokens, chunks))

    def _last_rows(self, tokens: Tensor, chunks: list[list[int]]) -> Tensor:
        return torch.tensor([i * tokens.shape[1] + len(chunk) - 1 for i, chunk in enumerate(chunks)], device=self.device)

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
        last = (logits if rows.keep is not None else logits[self._last_rows(rows.tokens, chunks)])[complete, None]  # [B, 1, V]
        options = batch_options(done, self.target.vocab_size, self.device)
        noise = batch_noise(done, 1, self.target.vocab_size, self.device)
        tree, options = constrain(done, root_only(self._roots(done)), options, self.target.vocab_size)
        return done, *_verify(tree, 0, last, options, noise), last

    def _extend(self, requests: list[Request], chunks: list[list[int]], logits: Tensor, features: Tensor | None, stats: StepStats) -> None:
        """Note what the chunks have computed; logits as ``_prompt_rows`` asked for them."""
        width = max(map(len, chunks))
        reports: list[list[TokenLogprob]] = [[] for _ in requests]
        for i, (request, chunk) in enumerate(zip(requests, chunks, strict=True)):
            if request.prompt_alternatives is not None:
                following = request.token_ids[request.context_len + 1 : request.context_len + len(chunk) + 1]
                reports[i] = token_logprobs(logits[i * width :][: len(following)], following, request.prompt_alternatives)
        # Only now, when nothing can fail any more, are requests changed.
        for i, (request, chunk) in enumerate(zip(requests, chunks, strict=True)):
            request.prompt_logprobs += reports[i]
            if features is not None:
                request.pending.append(features[i, : len(chunk)])
            request.context_len += len(chunk)
            stats.prompt_tokens += len(chunk)

    def _verifications(self, requests: list[Request], plan: Plan) -> list[Verification]:
        """Trees for those that draft, the roots alone for the others."""
        chosen = set(map(id, plan.drafting)) if plan.shape.nodes > 1 else set()
        drafting = [request for request in requests if id(request) in chosen]
        plain = [request for request in requests if id(request) not in chosen]
        return [*([self._draft(drafting, plan)] if drafting else []), *([self._plain(plain)] if plain else [])]

    def _settle(
        self, batch: Verification, logits: Tensor, features: Tensor | None, verdict: Verdict, healthy: Tensor, plan: Plan, stats: StepStats
    ) -> list[RequestOutput]:
        """Keep what was verified; logits [B * N, V]."""
        if batch.tree.tokens.shape[1] > 1:
            self._accept(batch, verdict, plan, stats)
        if features is not None:
            self._remember(batch.requests, features, verdict)
        outputs = self._commit(batch.requests, verdict, healthy, logits.unflatten(0, batch.tree.tokens.shape), stats)
        if self.ngrams is not None and batch.guesses is not None:
            self.ngrams.learn(batch.guesses, [output.token_ids for output in outputs])
        stats.emitted += [len(output.token_ids) for output in outputs]
        return outputs

    def _draft(self, requests: list[Request], plan: Plan) -> Verification:
        """Trees for the requests; of one node each when there is nothing worth drafting."""
        shape = _allowed(requests, plan.shape)
        guesses = self._look_up(requests, shape)
        reach = max(shape.depth, guesses.depth if guesses else 0)
        options = batch_options(requests, self.target.vocab_size, self.device)
        noise = batch_noise(requests, reach + 1, self.target.vocab_size, self.device)
        tree = self._propose(requests, shape, options, noise, guesses)
        plan.levels = self.drafter.levels if self.drafter else 1
        tree, options = constrain(requests, tree, options, self.target.vocab_size)
        if not self._drafted(requests, tree):
            return self._plain(requests, guesses)
        return self._verification(requests, tree, reach, options, noise, guesses)

    def _drafted(self, requests: list[Request], tree: Tree) -> bool:
        """Whether there is anything to verify. A head whose guess is NaN is not asked for that request again."""
        live = (tree.tokens[:, 1:] >= 0).any()
        if self.drafter is None or self.drafter.guesses is None:
            return bool(live)
        found, *lost = torch.cat((live[None], self.drafter.guesses[1].isneginf())).tolist()  # one wait for the device
        for request, nan in zip(requests, lost, strict=True):
            if nan:
                logger.warning("the draft head's logits for request %s are NaN; it decodes plainly", request.request_id)
                request.draft_failed = True
                self.failed_drafts += 1
        return bool(found)

    def _plain(self, requests: list[Request], guesses: Candidates | None = None) -> Verification:
        options = batch_options(requests, self.target.vocab_size, self.device)
        noise = batch_noise(requests, 1, self.target.vocab_size, self.device)
        tree, options = constrain(requests, root_only(self._roots(requests)), options, self.target.vocab_size)
        return self._verification(requests, tree, 0, options, noise, guesses)

    def _verification(
        self, requests: list[Request], tree: Tree, reach: int, options: SamplingBatch, noise: Noise | None, guesses: Candidates | None
    ) -> Verification:
        context_lens, max_context = self._context(requests)
        # Padding costs nothing on a GPU, where finding it would make the host wait.
        live = None if self.device.type == "cuda" else tree.tokens >= 0
        if live is not None and bool(live.all()):
            live = None
        tables = self.pool.tables[self._rows(requests)]
        layout = TreeLayout(tables, context_lens, tree.depth, tree.ancestors, live, self.pool.block_size, max_context)
        return Verification(requests, tree, reach, options, noise, guesses, Rows(tree.tokens.clamp(min=0), layout))

    def _accept(self, batch: Verification, verdict: Verdict, plan: Plan, stats: StepStats) -> None:
        """Move what survived to the front of the cache, and learn from it."""
        layout = batch.rows.layout
        kv_commit(self.cache.k, self.cache.v, layout.block_tables, layout.context_lens, verdict.path)
        counts = torch.stack(((batch.tree.tokens >= 0).sum(1) - 1, verdict.num_accepted), dim=1).tolist()
        for request, (drafted, accepted) in zip(batch.requests, counts, strict=True):
            if drafted:
                request.speculation.record(drafted, accepted, batch.reach)
                stats.drafts.append((drafted, accepted))
                plan.drafts.append((request, drafted, accepted))
        stats.draft_levels, stats.tree_nodes = plan.levels, batch.tree.tokens.shape[1]
        self._learn(batch.requests, verdict)

    def sync_draft(self, requests: list[Request]) -> None:
        """Bring the draft cache up to the committed tokens, with the target's true features."""
        groups = defaultdict(list)
        for request in requests:
            if request.pending:
                # Rows are padded to the longest of a pass: a fresh prompt beside seven tokens each would cost eight prompts.
                groups[max(8, request.num_pending).bit_length()].append(request)
        for group in groups.values():
            self._extend_draft(group)

    def _extend_draft(self, requests: list[Request]) -> None:
        if self.drafter is None:
            return
        # A request that ended may have fewer tokens than were accepted.
        features = [torch.cat(request.pending)[: request.num_pending] for request in requests]
        following = [r.token_ids[r.draft_len + 1 : r.draft_len + 1 + len(f)] for r, f in zip(requests, features, strict=True)]
        tokens, layout = self._chunk([request.row for request in requests], [request.draft_len for request in requests], following)
        counts = torch.tensor(list(map(len, features)), device=self.device)
        self.drafter.extend(
            self._rows(requests), pad_sequence(features, batch_first=True), tokens, counts, layout, self._temperature(requests)
        )
        for request, rows in zip(requests, features, strict=True):
            request.draft_len += len(rows)
            request.pending.clear()

    def complete_draft_blocks(self, request: Request) -> None:
        """Before a request leaves: bring its draft cache up to date if that fills a block."""
        if request.context_len // self.pool.block_size > request.draft_len // self.pool.block_size:
            try:
                self.sync_draft([request])
            except Exception:
                logger.exception("the draft cache of %s was not completed", request.request_id)

    def bound_pending(self, requests: list[Request]) -> None:
        """While speculation is off, features wait, since many rows at once cost little; this keeps their memory bounded."""
        self.sync_draft([r for r in requests if r.pending and r.num_pending * r.pending[0][0].nbytes > MAX_PENDING_BYTES])

    def _look_up(self, requests: list[Request], shape: TreeShape) -> Candidates | None:
        """What the requests' own text proposes; None when nothing is to be drafted, or when it fails."""
        if self.ngrams is None or shape.nodes == 1:
            return None
        try:
            guesses = self.ngrams.find(requests, shape.nodes)
            return guesses if self.drafter else guesses.worthwhile(shape.level_price, shape.node_price)
        except Exception:
            logger.exception("looking up n-grams failed; this step drafts without them")
            return None

    def _propose(
        self, requests: list[Request], shape: TreeShape, options: SamplingBatch, noise: Noise | None, guesses: Candidates | None
    ) -> Tree:
        """The draft's trees; the roots alone when there is nothing to draft, or when drafting fails: a draft is never needed."""
        roots = self._roots(requests)
        if shape.nodes == 1:
            return root_only(roots)
        try:
            if self.drafter is None:
                return _ngram_tree(roots, shape, guesses)
            self.sync_draft(requests)
            context_lens, max_context = self._context(requests)
            rows, sigma, temperature = self._rows(requests), self._sigma(requests, shape.depth), self._temperature(requests)
            tables = self.pool.tables[rows]
            limits = self._limits(requests, shape)
            return self.drafter.grow(
                rows, roots, tables, context_lens, max_context, shape, options, noise, sigma, temperature, limits, guesses
            )
        except Exception:
            logger.exception("drafting failed; this step decodes plainly")
            self.failed_drafts += 1
            if self.drafter is not None:
                self.drafter.guesses = None
            return root_only(roots)

    def _temperature(self, requests: list[Request]) -> Tensor:
        """What the head is told, float32 [B]: 0 for greedy requests, 1 from temperature 1 on."""
        params = [request.params for request in requests]
        return torch.tensor([0.0 if p.greedy else min(p.temperature, 1.0) for p in params], device=self.device)

    def _learn(self, requests: list[Request], verdict: Verdict) -> None:
        """Compare the best first guesses with the target's tokens there, which are known whatever was accepted."""
        if self.learned is None or self.drafter is None or self.drafter.guesses is None:
            return
        tokens, scores = self.drafter.guesses
        told = zip(self._temperature(requests).tolist(), scores.exp().tolist(), (tokens == verdict.tokens[:, 0]).tolist(), strict=True)
        for temperature, predicted, right in told:
            if predicted > 0:  # else nothing was to be drafted
                self.learned.observe(temperature, predicted, right)
        self.sigma = self.learned.points

    def _sigma(self, requests: list[Request], levels: int) -> Tensor:
        """Drafting temperatures, float32 [levels, B]."""
        sigmas = [level_sigmas(self.sigma, request.params.temperature, levels) for request in requests]
        return torch.tensor(list(zip(*sigmas, strict=True)), device=self.device)

    def _remember(self, requests: list[Request], features: Tensor, verdict: Verdict) -> None:
        """Keep the features of the accepted nodes for the draft cache."""
        if features.shape[1] == 1:
            for request, feature in zip(requests, features, strict=True):
                request.pending.append(feature)
            return
        index = verdict.path.clamp(min=0)[:, :, None].expand(-1, -1, features.shape[2])
        accepted = features.gather(1, index)
        for i, (request, count) in enumerate(zip(requests, verdict.num_accepted.tolist(), strict=True)):
            request.pending.append(accepted[i, : count + 1])

    def _commit(self, requests: list[Request], verdict: Verdict, healthy: Tensor, logits: Tensor, stats: StepStats) -> list[RequestOutput]:
        """Append the committed tokens to every request; a request that goes wrong here fails alone."""
        outputs = []
        tokens = verdict.tokens.tolist()
        for i, (request, ok) in enumerate(zip(requests, healthy.tolist(), strict=True)):
            committed = [token for token in tokens[i] if token >= 0]
            try:
                if not ok:
                    raise FloatingPointError("the target's logits are NaN")
                output = request.commit(committed, _path_logprobs(request, logits[i], verdict.path[i], committed))
            except Exception as error:
                logger.exception("request %s failed", request.request_id)
                output = RequestOutput(request.request_id, finish_reason="error", error=f"generation failed: {type(error).__name__}")
            request.context_len = len(request.token_ids) - 1
            stats.generation_tokens += len(output.token_ids)
            outputs.append(output)
        return outputs

    def _chunk(self, rows: list[int], starts: list[int], chunks: list[list[int]]) -> tuple[Tensor, TreeLayout]:
        """Causal rows: padded tokens int64 [B, W] that begin at logical slots ``starts``, and their layout."""
        width = max(map(len, chunks))
        tokens = torch.tensor([chunk + [0] * (width - len(chunk)) for chunk in chunks], device=self.device)
        depth = torch.arange(width, device=self.device)
        live = None
        if any(len(chunk) < width for chunk in chunks):
            live = depth < torch.tensor(list(map(len, chunks)), device=self.device)[:, None]
        tables = self.pool.tables[torch.tensor(rows, device=self.device)]
        lengths = torch.tensor(starts, device=self.device)
        return tokens, TreeLayout(tables, lengths, depth.expand(len(chunks), -1), None, live, self.pool.block_size, max(starts))

    def _rows(self, requests: list[Request]) -> Tensor:
        return torch.tensor([request.row for request in requests], device=self.device)

    def _roots(self, requests: list[Request]) -> Tensor:
        return torch.tensor([request.token_ids[-1] for request in requests], device=self.device)

    def _limits(self, requests: list[Request], shape: TreeShape) -> Tensor | None:
        """Most drafted nodes of every request, int64 [B]; None where the shape is the only limit."""
        limits = [request.max_draft_nodes for request in requests]
        return torch.tensor(limits, device=self.device) if min(limits) < shape.nodes - 1 else None

    def _context(self, requests: list[Request]) -> tuple[Tensor, int]:
        lengths = [request.context_len for request in requests]
        return torch.tensor(lengths, device=self.device), max(lengths)


def _allowed(requests: list[Request], shape: TreeShape) -> TreeShape:
    """The shape for no more nodes than some request may have."""
    most = max(request.max_draft_nodes for request in requests)
    return shape.shrunk(most + 1) if most < shape.nodes - 1 else shape


def _ngram_tree(roots: Tensor, shape: TreeShape, guesses: Candidates | None) -> Tree:
    """Trees of n-grams alone."""
    if guesses is None or guesses.pool is None:
        return root_only(roots)
    return best_tree(roots, guesses.pool.to(roots.device), shape.nodes, shape.node_price, guesses.depth)


def _verify(tree: Tree, max_depth: int, logits: Tensor, options: SamplingBatch, noise: Noise | None) -> tuple[Verdict, Tensor]:
    """The verdict, and which requests' logits are free of NaN, bool [B]; logits [B, N, V]."""
    *verdict, healthy = tree_verify(logits, options, noise, *tree, max_depth)
    return Verdict(*verdict), healthy


def _path_logprobs(request: Request, logits: Tensor, path: Tensor, committed: list[int]) -> list[TokenLogprob] | None:
    """Log-probabilities of the committed tokens under the target's raw distribution; logits [N, V], path int64 [D + 1]."""
    if request.params.logprobs is None:
        return None
    return token_logprobs(logits[path[: len(committed)]], committed, request.params.logprobs)
