"""The draft side of a step: what is proposed to verification, by the head and by n-grams, and the head's cache kept true."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from drafts.eagle3 import DraftTemperature
from kernels.noise import Noise
from kernels.sampling import SamplingBatch
from kernels.tree_layout import TreeLayout
from server.engine.ahead import Drafted
from server.engine.batch import Placed
from server.engine.calibration import LearnedSigma
from server.engine.draft_temperature import level_sigmas
from server.engine.drafter import Drafter, TreeShape
from server.engine.host import fetch, on_device
from server.engine.kv_cache import BlockPool
from server.engine.ngram import Candidates, Draft, Ngrams
from server.engine.pool import best_tree, limited, merge, root_only
from server.engine.prompts import Prompts
from server.engine.request import Request
from server.engine.types import Tree, Verdict

logger = logging.getLogger(__name__)
MAX_PENDING_BYTES = 8 << 20  # features per request that may wait for the draft cache while speculation is off,
MAX_PENDING_ROWS = 8  # and rows of them by graphs, where a step that drafts should not have to catch up first


class Proposer:
    """``sigma``: drafting temperatures by request temperature and level; ``learned`` moves them.

    ``ngrams``: drafts from the requests' own text, beside the head's or without a head.
    """

    def __init__(self, drafter: Drafter | None, pool: BlockPool, sigma: DraftTemperature) -> None:
        self.drafter, self.pool, self.sigma, self.device = drafter, pool, sigma, pool.tables.device
        self.learned: LearnedSigma | None = None
        self.ngrams: Ngrams | None = None
        self.failed = 0  # drafts, since the engine last looked
        self.levels = 0  # that the head's last trees were grown by, the root's children included
        self.guesses: tuple[Tensor, Tensor] | None = None  # of the head's last trees, see ``Grown``

    def drafted(self, requests: list[Request], tree: Tree) -> bool:
        """Whether there is anything to verify. A head whose guess is NaN is not asked for that request again."""
        live = (tree.tokens[:, 1:] >= 0).any()
        if self.guesses is None:
            return bool(live)
        found, *lost = torch.cat((live[None], self.guesses[1].isneginf())).tolist()  # one wait for the device
        self._forsake(requests, lost)
        return bool(found)

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
        features = [rows for request in behind for rows in _first(request.pending, request.num_pending)]
        self._extend(behind, [request.context_len for request in behind], features, None)
        for request in behind:
            request.draft_len = request.context_len
            request.pending.clear()

    def _extend(self, requests: list[Request], ends: list[int], features: list[Tensor], newest: Tensor | None) -> tuple[Tensor, Tensor]:
        """Bring the draft caches up to ``ends``; features: pieces of all rows in order; newest int64 [B]: the tokens at the ends, where the
        host does not know them. Returns the requests' rows of the block tables, and ``ends``, int64 [B].
        """
        assert self.drafter is not None
        entries = self._entries(requests, ends)
        last = [end - 1 for end in accumulate(end - request.draft_len for request, end in zip(requests, ends, strict=True))]
        rows, last_rows, lengths = on_device([[request.row for request in requests], last, ends], self.device)
        following = entries[1] if newest is None else entries[1].index_copy(0, last_rows, newest)
        self.drafter.extend(
            rows + 1, torch.cat(features), following, entries[0], entries[2], last_rows, self.pool.tables[rows], lengths - 1,
            self._temperature(requests), max(ends) - 1,
        )  # fmt: skip
        return rows, lengths

    def _entries(self, requests: list[Request], ends: list[int]) -> Tensor:
        """Positions, next tokens and physical slots of the rows between the draft caches and ``ends``, int64 [3, M]."""
        positions, tokens, slots = list[int](), list[int](), list[int]()
        for request, end in zip(requests, ends, strict=True):
            first = request.draft_len
            positions += range(first, end)
            own = request.token_ids[first + 1 : end + 1]
            tokens += own + [0] * (end - first - len(own))
            slots += self.pool.slots(request.row, first, end - first)
        return on_device([positions, tokens, slots], self.device)

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
        """While speculation is off, features wait, since many rows at once cost little; this keeps their memory bounded. Who has half as
        many as may wait goes along, so that it is seldom.
        """
        if self.drafter is None:
            return
        if self.drafter.graphs is not None:
            if any(request.num_pending > MAX_PENDING_ROWS for request in requests):
                self._write_all_but_last([request for request in requests if request.num_pending > 1])
            return
        most = MAX_PENDING_BYTES // (self.drafter.head.fc.in_features * self.drafter.state.itemsize)
        if any(request.num_pending > most for request in requests):
            self.sync_draft([request for request in requests if request.num_pending > most // 2])

    def _write_all_but_last(self, requests: list[Request]) -> None:
        """Bring keys and values of the draft caches up to all pending rows but the last, from which drafting would start."""
        assert self.drafter is not None
        ends = [request.context_len - 1 for request in requests]
        entries = self._entries(requests, ends)
        features = [rows for request in requests for rows in _first(request.pending, request.num_pending - 1)]
        self.drafter.write(torch.cat(features), entries[1], entries[0], entries[2])
        for request, end in zip(requests, ends, strict=True):
            request.draft_len, request.pending = end, [request.pending[-1][-1:].clone()]  # a slice would keep all that it is one of

    def look_up(self, requests: list[Request], nodes: int, price: float = 0.0) -> list[Draft] | None:
        """What the requests' own texts propose for trees of ``nodes`` nodes that are worth ``price`` each; None when nothing is to be
        drafted, or when it fails.
        """
        if self.ngrams is None or nodes == 1 or (price == math.inf and all(request.matcher is None for request in requests)):
            return None
        try:
            return self.ngrams.find(requests, nodes, price)
        except Exception:
            logger.exception("looking up n-grams failed; this step drafts without them")
            return None

    def learn_texts(self, drafts: list[Draft] | None, committed: list[list[int]]) -> None:
        """What became of the texts' guesses; a failure costs what would have been learned."""
        if self.ngrams is None or drafts is None:
            return
        try:
            self.ngrams.learn(drafts, committed)
        except Exception:
            logger.exception("nothing was learned of the drafts of the texts")

    def propose(
        self, requests: list[Request], at: Placed, shape: TreeShape, options: SamplingBatch, noise: Noise | None,
        drafts: list[Draft] | None, ahead: Drafted | None = None,
    ) -> Tree:  # fmt: skip
        """The draft's trees, with what texts propose (``drafts``) and what was drafted ``ahead``; the roots alone when there is nothing to
        draft, or when drafting fails: a draft is never needed.
        """
        self.guesses = None
        if shape.nodes == 1:
            return root_only(at.roots)
        try:
            if self.drafter is None or shape.depth == 0:
                return self.copy(at.roots, shape, drafts)
            self._sync_drafting(requests)
            limits = self._limits(requests, shape)
            grown = ahead and ahead.of(requests)
            if grown is None:
                sigma, temperature, tables = self._sigma(requests, shape.depth), self._temperature(requests), self.pool.tables[at.rows]
                grown = self.drafter.grow(at.rows, tables, at.lengths, at.longest, shape, options, noise, sigma, temperature, limits)
            pool, depth, self.guesses = grown
            self.levels = depth
            if guesses := Candidates.of(drafts, 0 if self.drafter.graphs is None else shape.nodes - 1):  # kernels have sizes, too
                pool = merge(pool, guesses.pool.to(self.device), min(depth, guesses.depth))
                depth = max(depth, guesses.depth)
            return best_tree(at.roots, pool._replace(scores=limited(pool.scores, limits)), shape.nodes, shape.node_price, depth)
        except torch.AcceleratorError:  # unlike a shortage of memory, it comes back with every further call
            raise
        except Exception:
            logger.exception("drafting failed; this step decodes plainly")
            self.failed += 1
            return root_only(at.roots)

    def go_ahead(
        self, requests: list[Request], rows: Tensor, layout: TreeLayout, features: Tensor, verdict: Verdict, shape: TreeShape,
        options: SamplingBatch, noise: Noise | None,
    ) -> Drafted | None:  # fmt: skip
        """Bring the draft caches that had come to the contexts of ``layout`` up to what the ``verdict`` commits, and draft from there,
        while the host does not know it; rows int64 [B]: of the block tables. None when that fails; then it is all done again in its turn.
        """
        assert self.drafter is not None
        try:
            sigma, temperature = self._sigma(requests, shape.depth), self._temperature(requests)
            tables, lengths, longest = layout.block_tables, layout.context_lens, layout.max_context
            grown = self.drafter.go_on(rows, features, verdict, tables, lengths, longest, shape, options, noise, sigma, temperature)
            return Drafted(requests, grown)
        except torch.AcceleratorError:
            raise
        except Exception:
            logger.exception("drafting ahead failed; the next step drafts anew")
            self.failed += 1
            return None

    def join(
        self, prompts: Prompts, places: list[int], features: Tensor, tokens: Tensor, shape: TreeShape, options: SamplingBatch,
        noise: Noise | None,
    ) -> Drafted | None:  # fmt: skip
        """Take the prompts at ``places``, which end with this chunk, into the draft cache, and draft from their first ``tokens`` int64 [B],
        while the host does not know them; features [B', N, 3 * H] of the prompts' rows. None when that fails; then it is done in its turn.
        """
        assert self.drafter is not None
        requests = [prompts.requests[i] for i in places]
        computed = features.flatten(0, 1)
        pieces = [(*prompts.requests[i].pending, computed[prompts.firsts[i] :][: len(prompts.chunks[i])]) for i in places]
        try:
            ends = [request.prefill_len for request in requests]
            rows, lengths = self._extend(requests, ends, [piece for own in pieces for piece in own], tokens)
            sigma, temperature = self._sigma(requests, shape.depth), self._temperature(requests)
            if noise is not None:
                noise = replace(noise, key=noise.key._replace(positions=noise.key.positions + 1))
            options = options._replace(allowed=None)
            grown = self.drafter.grow(rows, self.pool.tables[rows], lengths, max(ends), shape, options, noise, sigma, temperature, None)
            return Drafted(requests, grown)
        except torch.AcceleratorError:
            raise
        except Exception:
            logger.exception("drafting for new requests failed; they draft a step later")
            self.failed += 1
            return None

    def copy(self, roots: Tensor, shape: TreeShape, drafts: list[Draft] | None) -> Tree:
        """Trees of what the requests' own texts propose, the roots alone when that fails; roots int64 [B]: their last tokens."""
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
        return on_device(list(map(_told, requests)), self.device, torch.float32)

    def tell(self, requests: list[Request], places: list[int], verdict: Verdict) -> Callable[[], None]:
        """Begin to ask how the best first guesses compare with the target's tokens there, which are known whatever was accepted; the result
        learns from the answer.

        ``places``: of the requests among those of the last trees.
        """
        if self.guesses is None:
            return lambda: None
        tokens, scores = self.guesses
        if places != list(range(len(tokens))):
            tokens, scores = tokens[places], scores[places]
        answer = fetch(scores, tokens == verdict.tokens[:, 0])

        def learn() -> None:
            known, right = answer()
            self._forsake(requests, [score == -math.inf for score in known])
            if self.learned is None:
                return
            for request, score, came_true in zip(requests, known, right, strict=True):
                if request.max_draft_nodes > 0 and (predicted := math.exp(score)) > 0:  # else nothing was to be drafted
                    self.learned.observe(_told(request), predicted, came_true)
            self.sigma = self.learned.points

        return learn

    def _sigma(self, requests: list[Request], levels: int) -> Tensor:
        """Drafting temperatures, float32 [B, levels]."""
        return on_device([level_sigmas(self.sigma, request.params.temperature, levels) for request in requests], self.device)

    def _limits(self, requests: list[Request], shape: TreeShape) -> Tensor | None:
        """Most drafted nodes of every request, int64 [B]; None where the shape is the only limit."""
        limits = [request.max_draft_nodes for request in requests]
        return on_device(limits, self.device) if min(limits) < shape.nodes - 1 else None


def _first(pieces: list[Tensor], count: int) -> Iterator[Tensor]:
    """The first ``count`` rows of all pieces together."""
    for piece in pieces:
        yield piece[:count]
        count -= min(count, len(piece))


def _told(request: Request) -> float:
    """The temperature that the head is told of."""
    return 0.0 if request.params.greedy else min(request.params.temperature, 1.0)
