"""Prometheus instruments, fed with what every engine step did."""

import time
from collections import Counter as Tally
from collections import deque
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from server.engine.types import FinishReason, RequestTimes, StepStats

LATENCY = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # seconds
ACCEPTANCE = tuple(range(1, 18))  # tokens per verification
NODES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
WINDOW = 5.0  # seconds over which the tokens-per-second gauge averages


class Metrics:
    """All instruments of one server, in a registry of their own. ``clock`` returns seconds."""

    def __init__(self, model_name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = CollectorRegistry()
        self._model_name, self._clock = model_name, clock
        self._recent: deque[tuple[float, int]] = deque()  # (time, tokens) of the steps in the window
        self._since_decoding = 0.0
        self._create_counters()
        self._create_histograms()
        self._create_gauges()

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def observe(self, stats: StepStats) -> None:
        """Feed one step; ``seconds`` 0 tells that the engine went idle without one."""
        if stats.seconds > 0:
            self._step_seconds.observe(stats.seconds)
        self._prompt_tokens.inc(stats.prompt_tokens)
        self._generation_tokens.inc(stats.generation_tokens)
        self._prefix_queries.inc(stats.prefix_cache_queries)
        self._prefix_hits.inc(stats.prefix_cache_hits)
        self._step_failures.inc(stats.failed_steps)
        self._draft_failures.inc(stats.failed_drafts)
        self._preemptions.inc(stats.preemptions)
        if stats.generation_tokens:
            self._recent.append((self._clock(), stats.generation_tokens))
            self._forget_old()
        self._observe_token_latency(stats)
        self._observe_drafts(stats.drafts)
        for outcome, times in stats.finished:
            self._observe_finished(outcome, times)
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        self._kv_usage.set(stats.kv_usage)

    def count_rejected(self) -> None:
        """A client was turned away since the queue is full."""
        self._requests.labels(self._model_name, "rejected").inc()

    def _observe_token_latency(self, stats: StepStats) -> None:
        """A request that gained m tokens waited 1/m of the time for each: that is the latency per token, not per burst."""
        self._since_decoding += stats.seconds
        if stats.emitted:
            self._drafting.set(stats.drafting)
            self._levels.set(stats.draft_levels)
            self._gain.set(stats.expected_gain)
            for tokens in stats.emitted:
                for _ in range(tokens):
                    self._token_latency.observe(self._since_decoding / tokens)
            self._since_decoding = 0.0
        if not stats.num_running:
            self._since_decoding = 0.0

    def _observe_drafts(self, drafts: list[tuple[int, int]]) -> None:
        depths: Tally[int] = Tally()
        for nodes, accepted in drafts:
            self._acceptance.observe(accepted + 1)
            self._verified_nodes.observe(nodes + 1)
            depths.update(range(accepted))
        self._drafts.inc(len(drafts))
        self._draft_tokens.inc(sum(nodes for nodes, _ in drafts))
        self._accepted_tokens.inc(sum(accepted for _, accepted in drafts))
        for depth, count in depths.items():
            self._accepted_per_position.labels(self._model_name, depth).inc(count)

    def _observe_finished(self, outcome: FinishReason, times: RequestTimes) -> None:
        self._requests.labels(self._model_name, outcome).inc()
        if times.scheduled is not None:
            self._queue_time.observe(times.scheduled - times.arrived)
        if times.first_token is not None:
            self._first_token.observe(times.first_token - times.arrived)
        if outcome in ("stop", "length"):
            self._end_to_end.observe(times.finished - times.arrived)

    def _tokens_per_second(self) -> float:
        self._forget_old()
        return sum(tokens for _, tokens in self._recent) / WINDOW

    def _forget_old(self) -> None:
        oldest = self._clock() - WINDOW
        while self._recent and self._recent[0][0] < oldest:
            self._recent.popleft()

    def _create_counters(self) -> None:
        self._drafts = self._counter("spec_decode_num_drafts", "Draft trees verified.")
        self._draft_tokens = self._counter("spec_decode_num_draft_tokens", "Drafted tokens verified.")
        self._accepted_tokens = self._counter("spec_decode_num_accepted_tokens", "Drafted tokens accepted.")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens computed.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._prefix_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache, and not computed.")
        self._step_failures = self._counter("step_failures", "Forward passes that raised, repeated ones of single requests included.")
        self._draft_failures = self._counter("draft_failures", "Drafts that failed or were NaN, so that the step decoded plainly.")
        self._preemptions = self._counter("num_preemptions", "Requests that lost their cache blocks to others and are computed anew.")
        self._accepted_per_position = Counter(
            "vsd_spec_decode_num_accepted_tokens_per_pos",
            "Verifications that accepted a token at this depth of the tree, the first level being 0.",
            ["model_name", "position"],
            registry=self.registry,
        )
        self._requests = Counter(
            "vsd_requests", "Requests by outcome: stop, length, abort, error, rejected.", ["model_name", "outcome"], registry=self.registry
        )

    def _create_histograms(self) -> None:
        self._acceptance = self._histogram(
            "spec_decode_acceptance_length", "Tokens committed per verification, bonus token included.", ACCEPTANCE
        )
        self._verified_nodes = self._histogram("spec_decode_verified_nodes", "Tree nodes per verification, root included.", NODES)
        self._first_token = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", LATENCY)
        self._token_latency = self._histogram(
            "inter_token_latency_seconds", "Time per token: that of a step divided by the tokens that the request gained.", LATENCY
        )
        self._step_seconds = self._histogram("step_seconds", "Duration of an engine step.", LATENCY)
        self._end_to_end = self._histogram("e2e_request_latency_seconds", "From arrival to the last token.", LATENCY)
        self._queue_time = self._histogram("request_queue_time_seconds", "From arrival until the request was scheduled.", LATENCY)

    def _create_gauges(self) -> None:
        self._running = self._gauge("num_requests_running", "Requests in the batch.")
        self._waiting = self._gauge("num_requests_waiting", "Requests that wait for a place.")
        self._drafting = self._gauge("spec_decode_num_requests_drafting", "Requests of the last decoding step that could draft.")
        self._levels = self._gauge("spec_decode_draft_levels", "Levels of the last decoding step's trees, 0 where nobody drafted.")
        self._gain = self._gauge("spec_decode_expected_gain", "Tokens per second over those of plain decoding, as the load rule expects.")
        self._kv_usage = self._gauge("kv_cache_usage_ratio", "Used share of the KV cache, 0 to 1.")
        rate = self._gauge("generation_tokens_per_second", f"Tokens generated per second over the last {WINDOW:g} seconds.")
        rate.set_function(self._tokens_per_second)

    def _counter(self, name: str, help_text: str) -> Counter:
        return Counter(f"vsd_{name}", help_text, ["model_name"], registry=self.registry).labels(self._model_name)

    def _gauge(self, name: str, help_text: str) -> Gauge:
        return Gauge(f"vsd_{name}", help_text, ["model_name"], registry=self.registry).labels(self._model_name)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"vsd_{name}", help_text, ["model_name"], buckets=buckets, registry=self.registry).labels(self._model_name)
