"""The engine: requests come in, every step drafts, verifies and commits for all that run."""

import logging
import random
import time
from collections.abc import Callable
from functools import partial

import torch
from transformers import PreTrainedTokenizerFast

from drafts.eagle3 import DraftTemperature, Eagle3Head
from kernels.tree_mask import MAX_NODES
from server.engine import trial
from server.engine.budget import LoadRule, Plan
from server.engine.calibration import LearnedSigma
from server.engine.config import NGRAM, EngineConfig, EngineError
from server.engine.drafter import Drafter, TreeShape
from server.engine.grammar import Grammars
from server.engine.graphs import Graphs, cuda_recorder, in_eighths, in_halves, power_of_two
from server.engine.kv_cache import PADDING_BLOCK, BlockPool, choose_num_blocks
from server.engine.loading import Report, load
from server.engine.ngram import Ngrams
from server.engine.prefix_cache import PrefixCache
from server.engine.proposer import Proposer
from server.engine.request import Request
from server.engine.scheduler import Scheduler
from server.engine.steps import Steps
from server.engine.target import Target
from server.engine.types import RequestOutput, SamplingParams, StepStats

logger = logging.getLogger(__name__)
DEFAULT_SIGMA: DraftTemperature = ((0.0, (0.4,)), (1.0, (0.6,)))  # drafting temperatures of heads that were never calibrated
Work = Callable[[list[Request], list[RequestOutput]], None]


class Engine:
    """Continuous batching over a paged cache. Used from one thread; never raises for the fault of a single request.

    ``head`` None: drafts from the requests' own text if the configuration asks for it, else plain decoding by the same steps, with trees
    of one node.
    """

    def __init__(self, target: Target, head: Eagle3Head | None, tokenizer: PreTrainedTokenizerFast, config: EngineConfig) -> None:
        self.tokenizer, self.vocab_size = tokenizer, target.vocab_size
        self.max_model_len = min(config.max_model_len or target.max_positions, target.max_positions)
        drafts = head is not None or config.draft == NGRAM
        self.shape = _tree_shape(config, head is not None) if drafts else TreeShape(1, 1, 1)
        graphs, prompt_graphs = _graphs(target, config)
        # With graphs, what is begun ahead lies behind the nodes that are verified meanwhile, and trees are filled up to powers of two. Both
        # must fit: ``physical_slots`` takes what lies past a table for slots of its last block.
        widest = power_of_two(self.shape.nodes)
        self.lookahead = max(self.shape.lookahead, widest) + widest if graphs else self.shape.lookahead
        max_slots = self.max_model_len + self.lookahead
        bytes_per_token = target.kv_bytes_per_token + (
            head.config.num_key_value_heads * head.config.head_dim * 2 * target.dtype.itemsize if head else 0
        )
        blocks = choose_num_blocks(
            bytes_per_token, config.block_size, config.max_num_seqs * max_slots, config.kv_cache_memory, target.device
        )
        self.pool = BlockPool(blocks, config.block_size, config.max_num_seqs, max_slots, target.device)
        self.prefix_cache = PrefixCache(self.pool, enabled=True)
        self.scheduler = Scheduler(self.pool, self.prefix_cache, self.lookahead, prompt_graphs is not None)
        drafter = Drafter(head, blocks, config.block_size, config.max_num_seqs) if head else None
        self.proposer = Proposer(drafter, self.pool, _sigma(head, config.draft_temperature))
        self.steps = Steps(target, self.proposer, self.pool, target.new_cache(blocks, config.block_size))
        self.steps.use_graphs(graphs, prompt_graphs)
        self._eos_token_ids = _eos_token_ids(target, tokenizer)
        self.grammars = Grammars(tokenizer, target.vocab_size, self._eos_token_ids)
        self._seeds = random.Random(config.seed)
        self._requests: dict[str, Request] = {}
        self.load_rule: LoadRule | None = None
        self._observed: float | None = None  # when the last step was, if this one follows at once and it had no prompts
        ruled = drafts and config.load_rule and self.shape.nodes > 1
        if ruled or (graphs and not drafts):  # plain decoding has graphs to record, too
            rule = trial.choose_rule(self, target, head, config)
            self.load_rule = rule if ruled else None
        if drafts and (config.ngrams or head is None):
            self.proposer.ngrams = Ngrams()
        if head and config.load_rule and self.proposer.sigma is DEFAULT_SIGMA:
            self.proposer.learned = LearnedSigma(DEFAULT_SIGMA)
        self.prefix_cache.enabled = config.prefix_caching

    @classmethod
    def from_config(cls, config: EngineConfig, report: Report = lambda phase, percent: None) -> "Engine":
        """Load model, tokenizer and head; EngineError says in one sentence why they cannot serve."""
        loaded = load(config, report)
        report("measuring the cost of steps", 75)
        return cls(*loaded, config)

    @property
    def speculative(self) -> bool:
        return self.proposer.drafter is not None or self.proposer.ngrams is not None

    @property
    def max_request_tokens(self) -> int:
        """Prompt and output tokens that one request can hold at most."""
        return min(self.max_model_len, self.pool.capacity - self.lookahead)

    @property
    def num_running(self) -> int:
        return len(self.scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.waiting)

    def has_work(self) -> bool:
        return bool(self._requests)

    def add_request(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """Queue a request; EngineError when it could never run."""
        if request_id in self._requests:
            raise EngineError(f"request id {request_id!r} is running already")
        if not prompt_token_ids:
            raise EngineError("the prompt is empty: at least one token is expected")
        outside = [token for token in (*prompt_token_ids, *params.logit_bias, *params.stop_token_ids) if not 0 <= token < self.vocab_size]
        if outside:
            raise EngineError(f"token id {outside[0]} is outside the vocabulary of {self.vocab_size} tokens")
        total = len(prompt_token_ids) + params.max_tokens
        if total > self.max_request_tokens:
            raise EngineError(
                f"{len(prompt_token_ids)} prompt tokens and max_tokens {params.max_tokens} make {total} tokens; "
                f"a request can hold {self.max_request_tokens}"
            )
        if params.grammar is not None and (params.min_tokens or params.ignore_eos):
            raise EngineError("a grammar decides where the output ends; min_tokens and ignore_eos cannot be used with it")
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(62)
        tokenizer = self.tokenizer.backend_tokenizer
        request = Request.create(request_id, prompt_token_ids, params, seed, self._eos_token_ids, tokenizer, self.vocab_size)
        if params.grammar is not None:
            request.matcher = self.grammars.matcher(params.grammar)
        self._requests[request_id] = request
        self.scheduler.waiting.append(request)

    def abort(self, request_id: str) -> None:
        """Drop a request, in whatever state; its slot and blocks are free at once. Unknown ids are ignored."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return
        if not self._requests:
            self.steps.ahead = self._observed = None
        if request in self.scheduler.running and request.prefilling:
            self._clear(request)  # nobody has looked at its logits yet
        self.scheduler.remove(request)

    @torch.inference_mode()
    def step(self) -> tuple[list[RequestOutput], StepStats]:
        """Compute the next prompt chunks, and draft, verify and commit for every decoding request."""
        stats, start = StepStats(), time.monotonic()
        self._make_room(stats)
        self.scheduler.admit(start, stats)
        prefilling, width = self.scheduler.next_prefill()
        decoding = self.scheduler.decoding()
        plan = self._plan(decoding)
        run = partial(self.steps.run, width=width, plan=plan, stats=stats)
        outputs = self._guarded(run, prefilling + decoding, stats)
        now = time.monotonic()
        if self.load_rule:
            # A device that goes on by itself is at work on a step from the end of the last one, if that had no prompts.
            begun = self._observed if self.steps.graphs else start
            self.load_rule.observe(plan, None if stats.prompt_tokens or begun is None else now - begun)
        self._observed = None if stats.prompt_tokens else now
        self._bound_pending(stats)
        if not self.has_work():
            self.steps.ahead = self._observed = None
        stats.failed_drafts, self.proposer.failed = stats.failed_drafts + self.proposer.failed, 0
        stats.drafting, stats.expected_gain = len(plan.drafting) + len(plan.copying), plan.gain
        stats.seconds = time.monotonic() - start
        stats.num_running, stats.num_waiting, stats.kv_usage = self.num_running, self.num_waiting, self.pool.usage
        return outputs, stats

    def _make_room(self, stats: StepStats) -> None:
        """Preempt requests until the others have blocks for this step."""
        while (request := self.scheduler.make_room()) is not None:
            if request.prefilling:
                self._clear(request)  # nobody has looked at its logits yet
            else:
                self._offer(request, last=True)
            self.scheduler.preempt(request)
            self.steps.ahead = None  # it may hold a part of the prompt, in blocks that are another's by now
            stats.preemptions += 1

    def _plan(self, decoding: list[Request]) -> Plan:
        """Who may draft in this step, and how much."""
        if self.load_rule and decoding:
            overlapped = self.steps.graphs is not None and self.load_rule.head  # then texts are looked up while the device works
            price = None if overlapped else self.load_rule.lookup_price(decoding)
            guesses = None if price is None else self.proposer.look_up(decoding, self.shape.nodes, price)
            return self.load_rule.choose(decoding, guesses, coming=self.num_running - len(decoding))
        return Plan(self.shape, [request for request in decoding if request.max_draft_nodes > 0], lasting=True)

    def _guarded(self, work: Work, requests: list[Request], stats: StepStats) -> list[RequestOutput]:
        """Do the work and end what it ended; if it raises, do it anew for each request that has nothing from it, alone, so that only those
        fail which raise again.
        """
        outputs: list[RequestOutput] = []
        left: list[Request] = []
        try:
            if requests:
                work(requests, outputs)
        except torch.AcceleratorError:  # unlike a shortage of memory, it comes back with every further call
            raise
        except Exception as error:
            logger.exception("a step of %d requests failed", len(requests))
            stats.failed_steps += 1
            served = {output.request_id for output in outputs}
            left = [request for request in requests if request.request_id not in served]
            if len(requests) == 1 and left:
                outputs.append(RequestOutput.failed(left.pop().request_id, error))
        for output in outputs:
            request = self._requests[output.request_id]
            if output.finish_reason != "error":
                self._offer(request, last=output.finish_reason is not None)
            if output.finish_reason:
                self._finish(self._requests.pop(output.request_id), output, stats)
        return outputs + [output for request in left for output in self._guarded(work, [request], stats)]

    def _bound_pending(self, stats: StepStats) -> None:
        try:
            if self.proposer.cache:
                self.proposer.cache.bound(self.scheduler.decoding())
        except torch.AcceleratorError:
            raise
        except Exception:  # it is tried again, and nothing but drafting needs it
            logger.exception("the draft cache was not brought up to date")
            stats.failed_drafts += 1

    def _offer(self, request: Request, last: bool) -> None:
        """Let later requests take over the blocks that are full, in the draft's cache too: a request's last rows would stay pending."""
        rows = request.context_len
        if self.proposer.cache:
            if self.prefix_cache.enabled and last:
                self.proposer.cache.complete_blocks(request)
            rows = min(request.draft_len, request.context_len)  # who wanted no token has a draft row of one that was dropped
        self.prefix_cache.offer(request, rows)

    def _finish(self, request: Request, output: RequestOutput, stats: StepStats) -> None:
        assert output.finish_reason is not None
        if output.finish_reason == "error":
            self.pool.forget(request.row)
            self._clear(request)
        output.speculation = request.speculation
        self.scheduler.remove(request)
        stats.finished.append((output.finish_reason, request.times()))

    def _clear(self, request: Request) -> None:
        """Zero what a request wrote that failed or was never checked: masked columns still spread a NaN."""
        blocks = [PADDING_BLOCK, *self.pool.unnamed(request.row)]
        self.steps.cache.clear(blocks)
        if self.proposer.drafter:
            self.proposer.drafter.cache.clear(blocks)


def _graphs(target: Target, config: EngineConfig) -> tuple[Graphs, Graphs] | tuple[None, None]:
    """Graphs of trees and of prompts where the device has them and the configuration does not forbid them."""
    if target.device.type != "cuda" or not config.cuda_graphs:
        return None, None
    return Graphs(cuda_recorder(target.device), in_halves), Graphs(cuda_recorder(target.device), in_eighths)


def _tree_shape(config: EngineConfig, head: bool) -> TreeShape:
    """The largest tree; its verified and its drafted nodes must each fit one ancestor word. Without a head there are no levels."""
    shape = TreeShape(config.tree_nodes, config.tree_depth, config.tree_topk) if head else TreeShape(config.tree_nodes, 1, 1)
    if min(shape[:3]) < 1 or max(shape.nodes, shape.expanded) > MAX_NODES:
        raise EngineError(
            f"tree_nodes {shape.nodes}, tree_depth {shape.depth} and tree_topk {shape.topk} were given; all must be at least 1, "
            f"and tree_nodes and (tree_depth - 1) x tree_topk at most {MAX_NODES}"
        )
    return shape.shrunk(shape.nodes)  # no level that the nodes could not fill


def _sigma(head: Eagle3Head | None, override: float | None) -> DraftTemperature:
    """The drafting temperatures: the flag's, the head's own, or the defaults."""
    if override is not None:
        return ((0.0, (override,)),)
    return (head.metadata.draft_temperature if head and head.metadata else ()) or DEFAULT_SIGMA


def _eos_token_ids(target: Target, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """End-of-sequence ids: the generation config's, as transformers' generate uses them, else the tokenizer's."""
    ids = target.model.generation_config.eos_token_id if target.model.generation_config else None
    ids = tokenizer.eos_token_id if ids is None else ids
    return frozenset(() if ids is None else [ids] if isinstance(ids, int) else ids)
