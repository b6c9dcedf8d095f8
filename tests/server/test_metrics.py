"""The instruments, fed with made-up steps."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.engine.types import RequestTimes, StepStats
from server.metrics import Metrics


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics(clock: Clock) -> Metrics:
    return Metrics("m", clock)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"vsd_{name}", {"model_name": "m", **labels})


def test_speculation(metrics: Metrics) -> None:
    metrics.observe(StepStats(seconds=0.01, drafts=[(15, 2), (15, 0), (7, 1)]))
    metrics.observe(StepStats(seconds=0.01, drafts=[(7, 3)]))
    assert value(metrics, "spec_decode_num_drafts_total") == 4
    assert value(metrics, "spec_decode_num_draft_tokens_total") == 44
    assert value(metrics, "spec_decode_num_accepted_tokens_total") == 6
    per_position = [value(metrics, "spec_decode_num_accepted_tokens_per_pos_total", position=str(i)) for i in range(4)]
    assert per_position == [3, 2, 1, None]
    assert value(metrics, "spec_decode_acceptance_length_sum") == 6 + 4
    assert value(metrics, "spec_decode_verified_nodes_bucket", le="8.0") == 2
    assert value(metrics, "spec_decode_verified_nodes_sum") == 48


def test_prefix_cache(metrics: Metrics) -> None:
    metrics.observe(StepStats(seconds=0.01, prefix_cache_queries=40, prefix_cache_hits=32))
    metrics.observe(StepStats(seconds=0.01, prefix_cache_queries=9))
    assert value(metrics, "prefix_cache_queries_total") == 49
    assert value(metrics, "prefix_cache_hits_total") == 32


def test_decisions_of_the_load_rule(metrics: Metrics) -> None:
    metrics.observe(StepStats(seconds=0.01, emitted=[3, 1], drafting=1, draft_levels=4, expected_gain=1.7))
    metrics.observe(StepStats(seconds=0.01, prompt_tokens=9))  # nothing was decoded
    assert value(metrics, "spec_decode_num_requests_drafting") == 1
    assert value(metrics, "spec_decode_draft_levels") == 4
    assert value(metrics, "spec_decode_expected_gain") == 1.7
    metrics.observe(StepStats(seconds=0.01, emitted=[1, 1], preemptions=2))
    assert value(metrics, "spec_decode_num_requests_drafting") == 0
    assert value(metrics, "spec_decode_expected_gain") == 1
    assert value(metrics, "num_preemptions_total") == 2


def test_tokens_per_second_falls_to_zero(metrics: Metrics, clock: Clock) -> None:
    for _ in range(10):
        clock.now += 0.5
        metrics.observe(StepStats(seconds=0.5, generation_tokens=20))
    assert value(metrics, "generation_tokens_total") == 200
    assert value(metrics, "generation_tokens_per_second") == pytest.approx(40)
    clock.now += 2.5
    assert value(metrics, "generation_tokens_per_second") == pytest.approx(20, abs=5)
    clock.now += 2.6
    assert value(metrics, "generation_tokens_per_second") == 0


def test_latency_is_per_token(metrics: Metrics) -> None:
    metrics.observe(StepStats(seconds=0.02, num_running=2))  # a prompt chunk: the others wait for it
    metrics.observe(StepStats(seconds=0.04, num_running=2, emitted=[3, 1]))
    assert value(metrics, "inter_token_latency_seconds_count") == 4
    assert value(metrics, "inter_token_latency_seconds_sum") == pytest.approx(0.06 * 2)
    assert value(metrics, "inter_token_latency_seconds_bucket", le="0.025") == 3
    metrics.observe(StepStats(seconds=0.01, num_running=2, emitted=[1]))
    assert value(metrics, "inter_token_latency_seconds_sum") == pytest.approx(0.13)
    assert value(metrics, "step_seconds_count") == 3


def test_finished_requests(metrics: Metrics) -> None:
    done = RequestTimes(arrived=10, scheduled=11, first_token=13, finished=20)
    metrics.observe(StepStats(finished=[("stop", done), ("length", done), ("abort", RequestTimes(10, None, None, 11))]))
    metrics.count_rejected()
    outcomes = {name: value(metrics, "requests_total", outcome=name) for name in ("stop", "length", "abort", "error", "rejected")}
    assert outcomes == {"stop": 1, "length": 1, "abort": 1, "error": None, "rejected": 1}
    assert value(metrics, "request_queue_time_seconds_sum") == 2
    assert value(metrics, "time_to_first_token_seconds_sum") == 6
    assert value(metrics, "e2e_request_latency_seconds_sum") == 20


def test_gauges_return_to_zero_without_a_step(metrics: Metrics) -> None:
    metrics.observe(StepStats(seconds=0.01, num_running=3, num_waiting=2, kv_usage=0.25, prompt_tokens=5))
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_ratio")
    assert [value(metrics, name) for name in names] == [3, 2, 0.25]
    metrics.observe(StepStats())
    assert [value(metrics, name) for name in names] == [0, 0, 0]
    assert value(metrics, "step_seconds_count") == 1
    assert value(metrics, "prompt_tokens_total") == 5


def test_exposition(metrics: Metrics) -> None:
    families = {family.name: family for family in text_string_to_metric_families(metrics.render().decode())}
    assert all(name.startswith("vsd_") for name in families)
    assert all(sample.labels["model_name"] == "m" for family in families.values() for sample in family.samples)
    for name, family in families.items():
        if name.endswith("_seconds"):
            assert min(float(sample.labels["le"]) for sample in family.samples if "le" in sample.labels) == 0.0005
