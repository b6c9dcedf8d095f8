"""One request while the engine works on it."""

import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from kernels.tree_mask import MAX_NODES
from server.engine.detokenizer import Detokenizer
from server.engine.grammar import Matcher
from server.engine.ngram import NgramIndex
from server.engine.types import FinishReason, RequestOutput, RequestTimes, SamplingParams, SpeculationStats, TokenLogprob

WARMEST = 2  # class of requests, see ``Request.warmth``


class Piece(NamedTuple):
    """Rows of features, those from ``first`` to ``end`` of ``whole`` [R, 3 * H]. Most are never looked at, so that no view is made."""

    whole: Tensor
    first: int
    end: int

    def rows(self, most: int) -> Tensor:
        """The first ``most`` of them, [n, 3 * H]."""
        return self.whole[self.first : min(self.end, self.first + most)]


@dataclass(eq=False)
class Request:
    """``token_ids`` holds prompt and output. K and V of the first ``context_len`` tokens are in the target's cache, of the first
    ``draft_len`` in the draft's (row i of the draft needs token i + 1); ``pending`` holds the target features of the rows between.
    Before decoding, the first ``prefill_len`` tokens are computed: the prompt, and after a preemption all but the last token.
    ``block_keys``: see ``extend_keys``; the first ``num_offered`` blocks were taken over from other requests, or offered to them.
    """

    request_id: str
    prompt_len: int
    token_ids: list[int]
    params: SamplingParams
    seed: int
    eos_token_ids: frozenset[int]
    detokenizer: Detokenizer
    arrived: float = field(default_factory=time.monotonic)
    scheduled: float | None = None
    first_token: float | None = None
    row: int = -1  # of the block tables
    prefill_len: int = 0
    context_len: int = 0
    draft_len: int = 0
    pending: list[Piece] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    num_offered: int = 0
    num_cached_tokens: int = 0  # of the prompt, taken over from other requests
    output_counts: Tensor | None = None  # int32 [V], only with penalties
    prompt_tokens: Tensor | None = None  # bool [V]
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])
    speculation: SpeculationStats = field(default_factory=SpeculationStats)
    ngrams: NgramIndex = field(default_factory=NgramIndex)
    matcher: Matcher | None = None  # has followed the output, only with a grammar
    draft_failed: bool = False  # what the head said of it was NaN: it decodes plainly from then on
    worth: float | None = None  # drafted tokens that it accepts beside the usual ones, None before the first; see LoadRule

    @classmethod
    def create(
        cls,
        request_id: str,
        prompt: list[int],
        params: SamplingParams,
        seed: int,
        eos: frozenset[int],
        tokenizer: Tokenizer,
        vocab_size: int,
    ) -> "Request":
        detokenizer = Detokenizer(tokenizer, prompt, params.stop, params.include_stop_str_in_output)
        request = cls(request_id, len(prompt), list(prompt), params, seed, eos, detokenizer, prefill_len=len(prompt))
        if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0:
            request.output_counts = torch.zeros(vocab_size, dtype=torch.int32)
            request.prompt_tokens = torch.zeros(vocab_size, dtype=torch.bool).index_fill_(0, torch.tensor(prompt), True)
        return request

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def num_pending(self) -> int:
        """Rows that the draft's cache is behind."""
        return self.context_len - self.draft_len

    @property
    def prefilling(self) -> bool:
        return self.context_len < self.prefill_len

    @property
    def prompt_alternatives(self) -> int | None:
        """``prompt_logprobs`` while the prompt's rows are still to be reported, then None."""
        return None if self.num_output else self.params.prompt_logprobs

    @property
    def max_len(self) -> int:
        """Tokens of prompt and output together, at most."""
        return self.prompt_len + self.params.max_tokens

    @property
    def max_draft_nodes(self) -> int:
        """Drafted nodes of a tree, at most."""
        if self.draft_failed:
            return 0
        return MAX_NODES if self.params.max_draft_nodes is None else self.params.max_draft_nodes

    @cached_property
    def warmth(self) -> int:
        """A class of requests whose guesses come true equally often: 0 near greedy decoding, WARMEST near temperature 1 and above."""
        return 0 if self.params.greedy else round(WARMEST * min(self.params.temperature, 1.0))

    @property
    def forbidden_until_min_tokens(self) -> frozenset[int]:
        """Tokens that would end the request and may not be drawn before ``min_tokens``."""
        return self.eos_token_ids | set(self.params.stop_token_ids)

    def start(self, row: int, blocks: int, block_size: int, now: float) -> None:
        """Begin to run in ``row``, whose first ``blocks`` blocks hold the beginning of the prompt."""
        self.row, self.num_offered = row, blocks
        self.context_len = self.draft_len = blocks * block_size
        if self.scheduled is None:
            self.scheduled, self.num_cached_tokens = now, self.context_len

    def preempt(self) -> None:
        """Stop to run: what the caches hold will be computed again, and what was generated stays."""
        self.row, self.context_len, self.draft_len = -1, 0, 0
        self.pending.clear()
        if self.num_output:
            self.prefill_len = len(self.token_ids) - 1
        else:
            self.prompt_logprobs = [None]

    def commit(self, tokens: list[int], logprobs: list[TokenLogprob] | None) -> RequestOutput:
        """Append the committed ``tokens`` up to where the request ends; return what may be shown."""
        output = RequestOutput(self.request_id, num_cached_tokens=self.num_cached_tokens)
        output.logprobs = None if self.params.logprobs is None else []
        if self.params.max_tokens == 0:  # only the prompt's log-probabilities were wanted
            tokens, output.finish_reason = [], "length"
        for i, token in enumerate(tokens):
            self.token_ids.append(token)
            if self.output_counts is not None:
                self.output_counts[token] += 1
            if self.matcher is not None:
                self.matcher.advance(token)
            piece, stop = self.detokenizer.add(token, self.num_output >= self.params.min_tokens, token in self.params.stop_token_ids)
            output.token_ids.append(token)
            output.token_texts.append(piece)
            if output.logprobs is not None and logprobs is not None:
                output.logprobs.append(logprobs[i])
            output.finish_reason, output.stop_reason = self._ended(token, stop)
            if output.finish_reason:
                break
        if self.first_token is None:
            self.first_token = time.monotonic()
            if self.params.prompt_logprobs is not None:
                output.prompt_logprobs = self.prompt_logprobs
        output.text = self.detokenizer.show(finished=output.finish_reason is not None)
        return output

    def _ended(self, token: int, stop: str | None) -> tuple[FinishReason | None, int | str | None]:
        if token in self.params.stop_token_ids:
            return "stop", token
        if token in self.eos_token_ids and not self.params.ignore_eos:
            return "stop", None
        if stop is not None:
            return "stop", stop
        return ("length", None) if self.num_output >= self.params.max_tokens else (None, None)

    def times(self) -> RequestTimes:
        return RequestTimes(self.arrived, self.scheduled, self.first_token, time.monotonic())
