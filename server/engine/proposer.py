"""The draft side of a step: what is proposed to verification, by the head and by n-grams, and the head's cache kept true."""

import logging
import time
from itertools import accumulate

import torch
from torch import Tensor

from drafts.eagle3 import DraftTemperature
from kernels.noise import Noise
from kernels.sampling import SamplingBatch
from server.engine.batch import context_lens, last_tokens, table_rows
from server.engine.calibration import LearnedSigma
from server.engine.draft_temperature import level_sigmas
from server.engine.drafter import Drafter, TreeShape
from server.engine.host import on_device
from server.engine.kv_cache import BlockPool
from server.engine.ngram import Candidates, Draft, Ngrams
from server.engine.pool import best_tree, root_only
from server.engine.request import Request
from server.engine.types import Tree, Verdict

logger = logging.getLogger(__name__)
MAX_PENDING_BYTES = 8 << 20  # features per request that may wait for the draft cache while speculation is off


class Proposer:
    """``sigma``: drafting temperatures by request temperature and level; ``learned`` moves them.

    ``ngrams``: drafts from the requests' own text, beside the head's or without a head.
    """

    def __init__(self, drafter: Drafter | None, pool: BlockPool, sigma: DraftTemperature) -> None:
        self.drafter, self.pool, self.sigma, self.device = drafter, pool, sigma, pool.tables.device
        self.learned: LearnedSigma | None = None
        self.ngrams: Ngrams | None = None
        self.failed = 0  # drafts, since the engine last looked

    def drafted(self, requests: list[Request], tree: Tree) -> bool:
        """Whether there is anything to verify. A head whose guess is NaN is not asked for that request again."""
        live = (tree.tokens[:, 1:] >= 0).any()
        if self.drafter is None or self.drafter.guesses is None:
            return bool(live)
        found, *lost = torch.cat((live[None], self.drafter.guesses[1].isneginf())).tolist()  # one wait for the device
        self._forsake(requests, lost)
        return bool(found)

    def check(self, requests: list[Request]) -> None:
        """What ``drafted`` notes of the head, when the device has come so far anyhow."""
        if self.drafter is not None and self.drafter.guesses is not None:
            self._forsake(requests, self.drafter.guesses[1].isneginf().tolist())

    def _forsake(self, requests: list[Request], lost: list[bool]) -> None:
        for request, nan in zip(requests, lost, strict=True):
            if nan and request.max_draft_nodes > 0:  # else it was not to draft
                logger.warning("the draft head's logits for request %s are NaN; it decodes plainly", request.request_id)
                request.draft_failed = True
                self.failed += 1

    def sync_draft(self, requests: list[Request]) -> None:
        """Bring the draft cache up to the committed tokens, with the target's true features."""
        behind = [request for request in requests if request.pending]
        if self.drafter is None or not behind:
            return
        # A request that ended may have fewer tokens than were accepted.
        features = [torch.cat(request.pending)[: request.num_pending] for request in behind]
        counts = list(map(len, features))
        spans = [(r, place) for r, n in zip(behind, counts, strict=True) for place in range(r.draft_len, r.draft_len + n)]
        entries = [(request.row, place, request.token_ids[place + 1]) for request, place in spans]
        owners, positions, tokens = on_device(entries, self.device).unbind(1)
        size, tables = self.pool.block_size, self.pool.tables
        slots = tables[owners, positions // size] * size + positions % size
        last = on_device([end - 1 for end in accumulate(counts)], self.device)
        rows, ends = table_rows(behind, self.device), [request.draft_len + n - 1 for request, n in zip(behind, counts, strict=True)]
        lengths, temperature = on_device(ends, self.device), self._temperature(behind)
        self.drafter.extend(rows, torch.cat(features), tokens, positions, slots, last, tables[rows], lengths, temperature, max(ends))
        for request, n in zip(behind, counts, strict=True):
            request.draft_len += n
            request.pending.clear()

    def begin(self, requests: list[Request]) -> None:
        """Let the device start on what ``propose`` needs first, while the host has work of its own. What fails, fails there again."""
        try:
            self._sync_drafting(requests)
        except torch.AcceleratorError:
            raise
        except Exception:
            logger.debug("the draft cache was not brought up to date", exc_info=True)

    def _sync_drafting(self, requests: list[Request]) -> None:
        self.sync_draft([request for request in requests if request.max_draft_nodes > 0])

    def sync_seconds(self, requests: list[Request], rows: int) -> float:
        """How long it takes when each request is so many rows behind; nothing true is left of them in its draft cache."""
        if self.drafter is None:
            return 0.0
        self.sync_draft(requests)
        for request in requests:
            behind = min(rows, request.draft_len)
            request.draft_len -= behind
            request.pending.append(torch.zeros(behind, self.drafter.head.fc.in_features, device=self.device))
        start = time.perf_counter()
        self.sync_draft(requests)
        self.drafter.state[0].tolist()  # wait for the device
        return time.perf_counter() - start

    def complete_draft_blocks(self, request: Request) -> None:
        """Before a request leaves: bring its draft cache up to date if that fills a block."""
        if request.context_len // self.pool.block_size > request.draft_len // self.pool.block_size:
            try:
                self.sync_draft([request])
            except Exception:
                logger.exception("the draft cache of %s was not completed", request.request_id)

    def bound_pending(self, requests: list[Request]) -> None:
        """While speculation is off, features wait, since many rows at once cost little; this keeps their memory bounded."""
        if self.drafter is not None:
            most = MAX_PENDING_BYTES // (self.drafter.head.fc.in_features * self.drafter.state.itemsize)
            self.sync_draft([request for request in requests if request.num_pending > most])

    def look_up(self, requests: list[Request], nodes: int, price: float = 0.0) -> list[Draft] | None:
        """What the requests' own texts propose for trees of ``nodes`` nodes that are worth ``price`` each; None when nothing is to be
        drafted, or when it fails.
        """
        if self.ngrams is None or nodes == 1:
            return None
        try:
            return self.ngrams.find(requests, nodes, price)
        except Exception:
            logger.exception("looking up n-grams failed; this step drafts without them")
            return None

    def propose(
        self, requests: list[Request], shape: TreeShape, options: SamplingBatch, noise: Noise | None, drafts: list[Draft] | None
    ) -> Tree:
        """The draft's trees, with what texts propose (``drafts``); the roots alone when there is nothing to draft, or when drafting fails:
        a draft is never needed.
        """
        roots = last_tokens(requests, self.device)
        if self.drafter is not None:
            self.drafter.guesses = None
        if shape.nodes == 1:
            return root_only(roots)
        try:
            if self.drafter is None or shape.depth == 0:
                return self.copy(requests, shape, drafts)
            guesses = Candidates.of(drafts)
            self._sync_drafting(requests)
            lengths, max_context = context_lens(requests, self.device)
            rows, sigma, temperature = table_rows(requests, self.device), self._sigma(requests, shape.depth), self._temperature(requests)
            tables = self.pool.tables[rows]
            limits = self._limits(requests, shape)
            return self.drafter.grow(rows, roots, tables, lengths, max_context, shape, options, noise, sigma, temperature, limits, guesses)
        except torch.AcceleratorError:  # unlike a shortage of memory, it comes back with every further call
            raise
        except Exception:
            logger.exception("drafting failed; this step decodes plainly")
            self.failed += 1
            return root_only(roots)

    def copy(self, requests: list[Request], shape: TreeShape, drafts: list[Draft] | None) -> Tree:
        """Trees of what the requests' own texts propose, the roots alone when that fails."""
        roots = last_tokens(requests, self.device)
        try:
            guesses = Candidates.of(drafts)
            if guesses is None:
                return root_only(roots)
            return best_tree(roots, guesses.pool.to(roots.device), shape.nodes, shape.node_price, guesses.depth)
        except torch.AcceleratorError:
            raise
        except Exception:
            logger.exception("the drafts of the texts failed; this step decodes plainly")
            self.failed += 1
            return root_only(roots)

    def _temperature(self, requests: list[Request]) -> Tensor:
        """What the head is told, float32 [B]: 0 for greedy requests, 1 from temperature 1 on."""
        params = [request.params for request in requests]
        return on_device([0.0 if p.greedy else min(p.temperature, 1.0) for p in params], self.device)

    def learn(self, requests: list[Request], places: list[int], verdict: Verdict) -> None:
        """Compare the best first guesses with the target's tokens there, which are known whatever was accepted.

        ``places``: of the requests among those of the last trees.
        """
        if self.learned is None or self.drafter is None or self.drafter.guesses is None:
            return
        tokens, scores = (guess[places] for guess in self.drafter.guesses)
        told = zip(self._temperature(requests).tolist(), scores.exp().tolist(), (tokens == verdict.tokens[:, 0]).tolist(), strict=True)
        for temperature, predicted, right in told:
            if predicted > 0:  # else nothing was to be drafted
                self.learned.observe(temperature, predicted, right)
        self.sigma = self.learned.points

    def _sigma(self, requests: list[Request], levels: int) -> Tensor:
        """Drafting temperatures, float32 [B, levels]."""
        return on_device([level_sigmas(self.sigma, request.params.temperature, levels) for request in requests], self.device)

    def _limits(self, requests: list[Request], shape: TreeShape) -> Tensor | None:
        """Most drafted nodes of every request, int64 [B]; None where the shape is the only limit."""
        limits = [request.max_draft_nodes for request in requests]
        return on_device(limits, self.device) if min(limits) < shape.nodes - 1 else None
