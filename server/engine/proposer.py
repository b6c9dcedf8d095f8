"""The draft side of a step: what is proposed to verification, by the head and by n-grams."""

import logging
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from drafts.eagle3 import DraftTemperature
from kernels.noise import Noise
from kernels.sampling import SamplingBatch
from kernels.tree_layout import TreeLayout
from server.engine.ahead import Drafted
from server.engine.batch import Placed
from server.engine.calibration import LearnedSigma
from server.engine.draft_cache import DraftCache, told_temperature
from server.engine.draft_temperature import level_sigmas
from server.engine.drafter import Drafter, Grown, TreeShape
from server.engine.host import fetch, on_device
from server.engine.kv_cache import BlockPool
from server.engine.ngram import Candidates, Draft, Ngrams
from server.engine.pool import best_tree, limited, merge, root_only
from server.engine.prompts import Computed
from server.engine.request import Request
from server.engine.types import Tree, Verdict

logger = logging.getLogger(__name__)


class Proposer:
    """``sigma``: drafting temperatures by request temperature and level; ``learned`` moves them.

    ``ngrams``: drafts from the requests' own text, beside the head's or without a head.
    """

    def __init__(self, drafter: Drafter | None, pool: BlockPool, sigma: DraftTemperature) -> None:
        self.drafter, self.pool, self.sigma, self.device = drafter, pool, sigma, pool.tables.device
        self.cache = None if drafter is None else DraftCache(drafter, pool)
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

    def begin(self, requests: list[Request]) -> None:
        """Let the device start on what ``propose`` needs first, while the host has work of its own. What fails, fails there again."""
        try:
            self._sync_drafting(requests)
        except torch.AcceleratorError:
            raise
        except Exception:
            logger.debug("the draft cache was not brought up to date", exc_info=True)

    def _sync_drafting(self, requests: list[Request]) -> None:
        if self.cache is not None:
            self.cache.sync([request for request in requests if request.max_draft_nodes > 0])

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
            if self.drafter is None or self.cache is None or shape.depth == 0:
                return self.copy(at.roots, shape, drafts)
            self._sync_drafting(requests)
            limits = self._limits(requests, shape)
            grown = ahead and ahead.of(requests)
            if grown is None:
                sigma, told = self._sigma(requests, shape.depth), self.cache.told(requests)
                grown = self.drafter.grow(at.rows, at.tables, at.lengths, at.longest, shape, options, noise, sigma, told, limits)
            self.drew(grown)
            if guesses := Candidates.of(drafts, 0 if self.drafter.graphs is None else shape.nodes - 1):  # kernels have sizes, too
                pool = merge(grown.pool, guesses.pool.to(self.device), min(grown.levels, guesses.depth))
                grown = grown._replace(pool=pool, levels=max(grown.levels, guesses.depth))
            return _best_tree(at.roots, grown, limits, shape)
        except torch.AcceleratorError:  # unlike a shortage of memory, it comes back with every further call
            raise
        except Exception:
            logger.exception("drafting failed; this step decodes plainly")
            self.failed += 1
            return root_only(at.roots)

    def drew(self, grown: Grown | None) -> None:
        """Note what the trees that are verified next were chosen from."""
        self.guesses, self.levels = (None, 0) if grown is None else (grown.guesses, grown.levels)

    def trees(self, requests: list[Request], roots: Tensor, grown: Grown, shape: TreeShape) -> Tree:
        """The best of what the head has drafted; roots int64 [B]."""
        return _best_tree(roots, grown, self._limits(requests, shape), shape)

    def go_ahead(
        self, requests: list[Request], rows: Tensor, layout: TreeLayout, features: Tensor, verdict: Verdict, shape: TreeShape,
        options: SamplingBatch, noise: Noise | None,
    ) -> Drafted | None:  # fmt: skip
        """Bring the draft caches that had come to the contexts of ``layout`` up to what the ``verdict`` commits, and draft from there,
        while the host does not know it; rows int64 [B]: of the block tables. None when that fails; then it is all done again in its turn.
        """
        assert self.drafter is not None
        assert self.cache is not None
        try:
            sigma, temperature = self._sigma(requests, shape.depth), self.cache.told(requests).temperature
            tables, lengths, longest = layout.block_tables, layout.context_lens, layout.max_context
            grown = self.drafter.go_on(rows, features, verdict, tables, lengths, longest, shape, options, noise, sigma, temperature)
            return Drafted(requests, grown)
        except torch.AcceleratorError:
            raise
        except Exception:
            logger.exception("drafting ahead failed; the next step drafts anew")
            self.failed += 1
            return None

    def take_in(self, computed: Computed, places: list[int], tokens: Tensor) -> bool:
        """Take the prompts at ``places``, which end with this chunk, into the draft cache; their first ``tokens`` int64 [B] may be unknown
        to the host. False when that fails; then it is done in its turn.
        """
        assert self.cache is not None
        assert computed.features is not None
        (whose, chunks, firsts, _), tapped = computed.prompts, computed.features.flatten(0, 1)
        requests = [whose[i] for i in places]
        pieces = [(*(whole[first:end] for whole, first, end in whose[i].pending), tapped[firsts[i] :][: len(chunks[i])]) for i in places]
        try:
            self.cache.extend(requests, [request.prefill_len for request in requests], [piece for own in pieces for piece in own], tokens)
            return True
        except torch.AcceleratorError:
            raise
        except Exception:
            logger.exception("the draft cache did not take in new requests; they draft a step later")
            self.failed += 1
            return False

    def join(
        self, requests: list[Request], others: Drafted | None, shape: TreeShape, options: SamplingBatch, noise: Noise | None
    ) -> Drafted | None:
        """Draft from the first tokens of requests that were taken in, beside ``others``. None when that fails."""
        assert self.drafter is not None
        assert self.cache is not None
        try:
            ends = [request.prefill_len for request in requests]
            rows, lengths = on_device([[request.row for request in requests], ends], self.device)
            sigma, told = self._sigma(requests, shape.depth), self.cache.told(requests)
            if noise is not None:
                noise = replace(noise, key=noise.key._replace(positions=noise.key.positions + 1))
            options = options._replace(allowed=None)
            grown = self.drafter.grow(rows, self.pool.tables[rows], lengths, max(ends), shape, options, noise, sigma, told, None)
            return Drafted(requests, grown).beside(others)
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

    def tell(self, requests: list[Request], verdict: Verdict) -> Callable[[], None]:
        """Begin to ask how the best first guesses for ``requests``, which had the last trees and come first in the ``verdict``, compare
        with the target's tokens there, which are known whatever was accepted; the result learns from the answer.
        """
        if self.guesses is None:
            return lambda: None
        tokens, scores = self.guesses
        answer = fetch(scores, tokens == verdict.tokens[: len(requests), 0])

        def learn() -> None:
            known, right = answer()
            self._forsake(requests, [score == -math.inf for score in known])
            if self.learned is None:
                return
            for request, score, came_true in zip(requests, known, right, strict=True):
                if request.max_draft_nodes > 0 and (predicted := math.exp(score)) > 0:  # else nothing was to be drafted
                    self.learned.observe(told_temperature(request), predicted, came_true)
            self.sigma = self.learned.points

        return learn

    def _sigma(self, requests: list[Request], levels: int) -> Tensor:
        """Drafting temperatures, float32 [B, levels]."""
        temperatures = [request.params.temperature for request in requests]
        known = {temperature: level_sigmas(self.sigma, temperature, levels) for temperature in set(temperatures)}
        return on_device([known[temperature] for temperature in temperatures], self.device)

    def _limits(self, requests: list[Request], shape: TreeShape) -> Tensor | None:
        """Most drafted nodes of every request, int64 [B]; None where the shape is the only limit."""
        limits = [request.max_draft_nodes for request in requests]
        return on_device(limits, self.device) if min(limits) < shape.nodes - 1 else None


def _best_tree(roots: Tensor, grown: Grown, limits: Tensor | None, shape: TreeShape) -> Tree:
    pool = grown.pool._replace(scores=limited(grown.pool.scores, limits))
    return best_tree(roots, pool, shape.nodes, shape.node_price, grown.levels)
