"""All state that the engine's parts share, on one screen."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

from server.engine.config import EngineError

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class Grammar:
    """What an output must match as a whole. ``text``: of a JSON schema, of a regular expression, of a JSON list of texts (choice), of a
    grammar in Lark's or GBNF's notation; empty for any JSON object.
    """

    kind: Literal["json_schema", "json_object", "regex", "choice", "grammar"]
    text: str = ""


@dataclass(frozen=True)
class SamplingParams:
    """How one request samples. The defaults are the OpenAI completions defaults.

    Order of application: logit_bias, min_tokens and grammar, penalties, temperature, top_k, top_p, min_p (as in vLLM, top_k before top_p).
    ``temperature`` below 1e-5 is greedy. ``top_k`` 0 keeps every token. ``logprobs``: number of alternatives reported for each
    generated token (0: only the chosen one), None for no report; values are of the target's raw distribution, before any option.
    ``max_draft_nodes``: most live nodes of the request's trees, the root not counted; 0 decodes plainly, None sets no limit of its own.
    It changes the speed, never the text.
    ``cache_salt``: only requests of the same salt share computed prompts.
    ``grammar``: the output matches it unless ``max_tokens`` or a stop cuts it off. It decides where the output ends, so that it goes
    with neither ``min_tokens`` nor ``ignore_eos``.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    max_draft_nodes: int | None = None
    cache_salt: str | None = None
    grammar: Grammar | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5


class TokenLogprob(NamedTuple):
    """Log-probability of one token, and the most likely alternatives (token id, log-probability), best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass
class SpeculationStats:
    """What speculation did for one request. ``accepted_by_depth[d]``: steps whose accepted path reached depth d + 1."""

    num_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    verified_nodes: int = 0
    acceptance_histogram: list[int] = field(default_factory=list)
    accepted_by_depth: list[int] = field(default_factory=list)

    def record(self, draft_nodes: int, accepted: int, depth: int) -> None:
        """Count one verification of ``draft_nodes`` drafted nodes (root excluded) that accepted ``accepted`` of depth ``depth``."""
        missing = depth + 1 - len(self.acceptance_histogram)
        self.acceptance_histogram += [0] * missing
        self.accepted_by_depth += [0] * (depth - len(self.accepted_by_depth))
        self.num_steps += 1
        self.num_draft_tokens += draft_nodes
        self.verified_nodes += draft_nodes + 1
        self.num_accepted_tokens += accepted
        self.acceptance_histogram[accepted] += 1
        for d in range(accepted):
            self.accepted_by_depth[d] += 1


@dataclass
class RequestOutput:
    """What one step made of one request: the increment, and at the end the reason.

    ``text`` is what may be shown now (stop strings are held back until they are ruled out). ``token_texts[i]`` is the part of the
    text that token i completed; joined over all outputs of a request it is the request's whole text before a stop string is cut.
    ``prompt_logprobs`` comes once, with the first output, its first entry None. ``stop_reason``: the stop string or stop token id
    that ended the request, None for the end-of-sequence token. ``error``: what to tell the client when ``finish_reason`` is "error";
    ``invalid``: that the request is to blame for it.
    ``num_cached_tokens``: prompt tokens that were not computed, since other requests had computed them.
    """

    request_id: str
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    token_texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    invalid: bool = False
    num_cached_tokens: int = 0
    speculation: SpeculationStats | None = None  # with the last output

    @classmethod
    def failed(cls, request_id: str, error: Exception) -> "RequestOutput":
        """The end of a request by ``error``, of which only what an EngineError says is for the client."""
        invalid = isinstance(error, EngineError)
        message = str(error) if invalid else "the engine failed on this request"
        return cls(request_id, finish_reason="error", error=message, invalid=invalid)


@dataclass(frozen=True)
class RequestTimes:
    """Seconds on one monotonic clock, for the latency metrics of a finished request. None: never reached."""

    arrived: float
    scheduled: float | None
    first_token: float | None
    finished: float


@dataclass
class StepStats:
    """What one engine step did, for the metrics.

    ``drafts``: one (draft nodes, accepted nodes) pair per request that verified a tree. ``drafting``: requests that could
    draft; ``expected_gain``: speed over plain decoding that the load rule hoped for; ``draft_levels`` and ``tree_nodes``: of
    the largest tree, 0 levels where no head drafted, 1 node where the step decoded plainly. ``emitted``: tokens that each
    decoding request gained in this step.
    ``prefix_cache_queries`` and ``prefix_cache_hits``: prompt tokens looked up, and found, when requests began to run.
    ``failed_steps``: forward passes that raised, repetitions included; ``failed_drafts``: those that raised or were NaN.
    """

    seconds: float = 0.0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    drafts: list[tuple[int, int]] = field(default_factory=list)
    drafting: int = 0
    expected_gain: float = 1.0
    draft_levels: int = 0
    tree_nodes: int = 1
    emitted: list[int] = field(default_factory=list)
    finished: list[tuple[FinishReason, RequestTimes]] = field(default_factory=list)
    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0
    failed_steps: int = 0
    failed_drafts: int = 0
    preemptions: int = 0


class Tree(NamedTuple):
    """One draft tree per request. Node 0 is the last committed token; parents precede children; N <= 64.

    Dead (padding) nodes have parent 0, token -1 and depth 1: no target token ever equals -1, so they never survive.
    """

    tokens: Tensor  # int64 [B, N]
    parent: Tensor  # int64 [B, N], parent[:, 0] = 0
    depth: Tensor  # int64 [B, N]
    ancestors: Tensor  # int64 [B, N], bit j set: node j is an ancestor or the node itself


class Verdict(NamedTuple):
    """What survived, per request."""

    path: Tensor  # int64 [B, D + 1], node indices of the accepted path from node 0 on, -1 padded
    num_accepted: Tensor  # int64 [B], accepted nodes without node 0
    tokens: Tensor  # int64 [B, D + 1], the committed tokens: accepted draft tokens, then the target's next token, -1 padded
