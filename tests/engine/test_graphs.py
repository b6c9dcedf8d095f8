"""Steps by graphs: a recorder that computes again what was recorded, into the same tensors, stands in for CUDA's."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from server.engine import engine as engine_module
from server.engine import trial
from server.engine.calibration import LearnedSigma
from server.engine.costs import StepCost
from server.engine.drafter import TreeShape
from server.engine.engine import DEFAULT_SIGMA, Engine
from server.engine.fixed_trees import FixedTreeRule
from server.engine.graphs import MAX_GRAPHS, Graphs, in_eighths, power_of_two
from server.engine.lean import LeanDecoder
from server.engine.prompts import PIECE
from server.engine.types import SamplingParams, StepStats
from tests.engine.engines import Run, build, poisoned_model, random_head, run, tiny_model
from tests.engine.recorder import KINDS, Recorded

MakeEngine = Callable[..., Engine]


@torch.inference_mode()
def test_batches_are_filled_up_with_zeros() -> None:
    seen: list[Tensor] = []

    def function(x: Tensor, rest: tuple[Tensor | None, Tensor], scale: int) -> tuple[Tensor, tuple[Tensor, None]]:
        seen.append(x.clone())
        return x * scale, (rest[1].sum(1), None)

    def other(x: Tensor, rest: tuple[Tensor | None, Tensor], scale: int) -> Tensor:
        return x - scale

    graphs = Graphs(Recorded(), power_of_two)
    for batch in (5, 8, 3, 7, 6):
        x, y = torch.arange(batch) + 1, torch.ones(batch, 4)
        doubled, (sums, nothing) = graphs.run(function, x, (None, y), scale=2)
        assert doubled.tolist() == [2 * (i + 1) for i in range(batch)]
        assert sums.tolist() == [4.0] * batch
        assert nothing is None
        assert seen[-1].tolist() == [*range(1, batch + 1), *[0] * ((4 if batch == 3 else 8) - batch)]
    assert len(graphs._kept) == 2
    assert graphs.run(function, x, (None, y), scale=3)[0].tolist() == [3 * (i + 1) for i in range(6)]
    assert graphs.run(other, x, (None, y), scale=3).tolist() == [i - 2 for i in range(6)]
    assert graphs.run(function, x, (y, y), scale=3)[0].tolist() == [3 * (i + 1) for i in range(6)]
    assert len(graphs._kept) == 5


@torch.inference_mode()
def test_what_cannot_be_recorded_runs_all_the_same() -> None:
    def fails(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        raise RuntimeError("out of memory")

    graphs = Graphs(fails, power_of_two)
    for _ in range(2):
        assert graphs.run(torch.neg, torch.arange(3)).tolist() == [0, -1, -2]


@torch.inference_mode()
def test_a_bounded_number_is_kept() -> None:
    def function(x: Tensor, number: int) -> Tensor:
        return x + number

    counting = Recorded()
    graphs = Graphs(counting, power_of_two)
    for number in [*range(MAX_GRAPHS + 10), 0, MAX_GRAPHS + 9]:
        assert graphs.run(function, torch.zeros(1), number=number).item() == number
    assert counting.count == MAX_GRAPHS + 11


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("nodes", [2, 16, 64])
def test_greedy_text_is_the_same(
    batch: int, nodes: int, demo_engine: MakeEngine, demo_prompts: list[list[int]], demo_greedy: list[list[int]], recorded: Recorded
) -> None:
    engine = demo_engine(tree_nodes=nodes, max_num_seqs=batch)
    part = slice(batch % 3, None, 9)
    running = Run(engine)
    for i, prompt in enumerate(demo_prompts[part]):
        running.add(str(i), prompt, SamplingParams(max_tokens=64, temperature=0))
    results = list(running.finish().values())
    assert [result.token_ids for result in results] == demo_greedy[part]
    assert sum(result.speculation.num_accepted_tokens for result in results) > 0
    assert sum(stats.failed_drafts for stats in running.stats) == 0, "guesses were read after another graph had run"
    assert 0 < recorded.count < 60


@pytest.mark.parametrize("rule", [False, True], ids=["fixed", "load rule"])
def test_every_option_gives_the_text_of_plain_decoding(
    rule: bool, demo_engine: MakeEngine, demo_prompts: list[list[int]], recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [
        (demo_prompts[i], SamplingParams(**{"max_tokens": 40, "seed": i, **KINDS[i % len(KINDS)]})) for i in range(2, 5 * len(KINDS), 2)
    ] + [(demo_prompts[1], SamplingParams(max_tokens=40, seed=1, **KINDS[1])), (demo_prompts[9], SamplingParams(max_tokens=30, **KINDS[9]))]
    requests += [(demo_prompts[i], SamplingParams(max_tokens=40, seed=i, **KINDS[i])) for i in (3, 5, 7)]
    engine = demo_engine(max_num_seqs=7, load_rule=rule)
    assert isinstance(engine.load_rule, FixedTreeRule) == rule
    results = run(engine, requests)
    monkeypatch.setattr(engine_module, "_graphs", lambda target, config: (None, None))
    plain = run(demo_engine(head=False, max_num_seqs=7), requests)
    assert [result.token_ids for result in results] == [result.token_ids for result in plain]
    assert [[entry.token_id for entry in result.logprobs] for result in results] == [[e.token_id for e in r.logprobs] for r in plain]
    assert sum(result.speculation.num_accepted_tokens for result in results) > 0
    for (_, params), result in zip(requests, results, strict=True):
        if params.max_draft_nodes is not None:
            assert result.speculation.num_draft_tokens <= params.max_draft_nodes * result.speculation.num_steps


@pytest.mark.parametrize("rule", [False, True], ids=["fixed", "load rule"])
def test_ngrams_without_a_head(
    rule: bool, demo_engine: MakeEngine, demo_prompts: list[list[int]], recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trees of any width are widened, so that few are recorded."""
    requests = [(prompt, SamplingParams(max_tokens=40, temperature=0)) for prompt in demo_prompts[::20]]
    engine = demo_engine(head=False, draft="ngram", max_num_seqs=4, load_rule=rule)
    if engine.load_rule:
        engine.load_rule.costs = dict.fromkeys(engine.load_rule.costs, StepCost(1.0, 1.0, 0.0, 0.01))  # what a machine has none of
    results = run(engine, requests)
    assert recorded.count <= 3 * 5 + 3 + (4 * 2 + 2) * 5 * rule  # with prompts and long contexts beside
    assert sum(result.speculation.num_accepted_tokens for result in results) > 20
    monkeypatch.setattr(engine_module, "_graphs", lambda target, config: (None, None))
    plain = run(demo_engine(head=False, max_num_seqs=4), requests)
    assert [result.token_ids for result in results] == [result.token_ids for result in plain]


def test_prompts_of_any_length_need_few_graphs(
    demo_engine: MakeEngine, demo_prompts: list[list[int]], recorded: Recorded, recorded_prompts: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone and beside each other and beside trees, from one token to more than are computed at once."""
    monkeypatch.setattr("server.engine.scheduler.PREFILL_ROWS", 4 * PIECE)
    text = [token for prompt in demo_prompts for token in prompt][:200]
    lengths = [1, 2, PIECE - 1, PIECE, PIECE + 1, *range(40, 120, 9), 4 * PIECE, 4 * PIECE + 1, 180]
    requests = [(text[:length], SamplingParams(max_tokens=8, temperature=i % 2, seed=i)) for i, length in enumerate(lengths)]
    results = run(demo_engine(max_num_seqs=3), requests)
    rows = {in_eighths(count) for count in range(1, 4 * PIECE + 1)}
    assert 0 < recorded_prompts.count <= 4 + len(rows) + 3, "of 1, 2, 3 and 4 pieces, of their rows in the draft cache, and of three states"
    monkeypatch.setattr(engine_module, "_graphs", lambda target, config: (None, None))
    plain = run(demo_engine(head=False, max_num_seqs=3), requests)
    assert [result.token_ids for result in results] == [result.token_ids for result in plain]
    assert sum(result.speculation.num_accepted_tokens for result in results) > 0


def test_a_draft_of_nan_is_counted_and_not_asked_for_again(recorded: Recorded) -> None:
    model = tiny_model("llama")
    requests = [([5, 6, i], SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)) for i in range(3)]
    expected = [result.token_ids for result in run(build(model, decoder=LeanDecoder), requests)]
    head = random_head(model)
    head.fc.weight.data[:] = float("nan")
    running = Run(build(model, head, decoder=LeanDecoder, tree_nodes=8, ngrams=False))
    for i, (prompt, params) in enumerate(requests):
        running.add(str(i), prompt, params)
    assert [result.token_ids for result in running.finish().values()] == expected
    assert [stats.failed_drafts for stats in running.stats if stats.failed_drafts] == [3]
    assert sum(stats.drafting > 0 for stats in running.stats) == 1


def test_a_failing_target_ends_its_request_alone(recorded: Recorded) -> None:
    model = poisoned_model()
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    expected = [result.token_ids for result in run(build(model, decoder=LeanDecoder), [([5, 6], params), ([7, 8, 9], params)])]
    engine = build(model, random_head(model), decoder=LeanDecoder, tree_nodes=8)
    outputs: dict[str, list[int]] = {}
    for name, prompt in {"a": [5, 6], "poison": [5, 77], "b": [7, 8, 9]}.items():
        engine.add_request(name, prompt, params)
        outputs[name] = []
    errors = []
    while engine.has_work():
        for output in engine.step()[0]:
            outputs[output.request_id] += output.token_ids
            errors += [output.request_id] if output.finish_reason == "error" else []
    assert errors == ["poison"]
    assert [outputs["a"], outputs["b"]] == expected


def test_trees_that_are_filled_up_end_where_the_context_does(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """33 nodes are computed as 64, of which the last would stand past all that a request can hold."""
    model, different = tiny_model("llama", spread=0.15), 0
    for length in range(60, 92, 3):
        params = [SamplingParams(max_tokens=length - 12, temperature=1.0, seed=i, ignore_eos=True) for i in range(4)]
        requests = [([5 + i, 6, 7, i] * 3, own) for i, own in enumerate(params)]
        options = {"decoder": LeanDecoder, "max_model_len": length, "block_size": 32, "max_num_seqs": 4}
        trees = {"tree_nodes": 33, "tree_depth": 3, "tree_topk": 16, "ngrams": False}
        with monkeypatch.context() as plainly:
            plainly.setattr(engine_module, "_graphs", lambda target, config: (None, None))
            plain = run(build(model, **options), requests)
        results = run(build(model, random_head(model), **options, **trees), requests)
        different += sum(mine.token_ids != other.token_ids for mine, other in zip(results, plain, strict=True))
    assert different == 0


def test_what_may_not_draft_teaches_nothing(recorded: Recorded) -> None:
    model = tiny_model("llama")
    engine = build(model, random_head(model), decoder=LeanDecoder, tree_nodes=8, max_num_seqs=2, ngrams=False)
    engine.proposer.learned = learned = LearnedSigma(DEFAULT_SIGMA)
    told: list[float] = []
    learned.observe = lambda temperature, *_: told.append(temperature)  # type: ignore[method-assign]
    run(engine, [([5, 6, 7], SamplingParams(max_tokens=30, temperature=t, max_draft_nodes=n, seed=0)) for t, n in ((0.0, None), (0.5, 0))])
    assert set(told) == {0.0}


def test_what_most_loads_need_is_recorded_at_start(demo_engine: MakeEngine, demo_prompts: list[list[int]], recorded: Recorded) -> None:
    """Whatever the rule chooses, greedy and sampled, for three to five requests at a time, with copied texts and without."""
    engine = demo_engine(max_num_seqs=6, load_rule=True, tree_nodes=8, tree_depth=6)
    at_start = recorded.count
    rng, rule = random.Random(0), engine.load_rule
    assert isinstance(rule, FixedTreeRule)
    running = Run(engine)
    for i, prompt in enumerate(demo_prompts[:40]):
        for batch, steps in rule._steps.items():  # so close that the rule changes its mind, and about levels now and then
            level = 0.03 * (i // 4 % 2)
            rule._steps[batch] = {shape: 1.0 + 0.02 * shape.nodes + level * shape.depth for shape in steps}
        running.add(str(i), prompt, SamplingParams(max_tokens=rng.randrange(5, 40), temperature=i % 2, seed=i, ignore_eos=True))
        for _ in range(3):
            running.step()
    running.finish()
    assert {stats.tree_nodes for stats in running.stats} >= {1, 8}
    assert {stats.draft_levels for stats in running.stats} >= {3, 6}
    assert sum(stats.failed_steps for stats in running.stats) == 0, "trees may be deeper than those of the step's shape"
    assert max(stats.num_running for stats in running.stats) > 3
    assert recorded.count == at_start


@pytest.mark.parametrize(("nodes", "max_num_seqs"), [(12, 8), (5, 4), (64, 4)])
def test_what_is_served_was_recorded_at_start(
    nodes: int, max_num_seqs: int, demo_engine: MakeEngine, demo_prompts: list[list[int]], recorded: Recorded
) -> None:
    """Trees of numbers of nodes that graphs fill up, with prompts along and of contexts that are not short."""
    engine = demo_engine(max_num_seqs=max_num_seqs, load_rule=True, ngrams=False, tree_nodes=nodes, max_model_len=1000)
    assert engine.steps.graphs

    def trees() -> set:
        assert engine.steps.graphs
        return {key for key in engine.steps.graphs._kept if key[0].__name__ == "_trees"}  # type: ignore[index]

    before = trees()
    requests = [
        ((prompt * 12)[: 30 if i % 2 else 300], SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))
        for i, prompt in enumerate(demo_prompts[:24])
    ]
    run(engine, requests)
    assert trees() == before
    assert {key[2][0][1][0] for key in before} == {1 << i for i in range((nodes - 1).bit_length() + 1)}


def test_trials_time_steps_of_whole_batches(demo_engine: MakeEngine, recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without prompts among them, whenever these are computed."""
    timed, step = list[tuple[int, int]](), trial._Trial.step
    last: list[StepStats] = []
    engine_step = Engine.step

    def noted(engine: Engine) -> tuple:
        outputs, stats = engine_step(engine)
        last[:] = [stats]
        return outputs, stats

    def spied(self: trial._Trial, batch: int, shape: TreeShape) -> float:
        seconds = step(self, batch, shape)
        assert last[0].prompt_tokens == 0
        timed.append((batch, len(last[0].emitted)))
        return seconds

    monkeypatch.setattr(Engine, "step", noted)
    monkeypatch.setattr(trial._Trial, "step", spied)
    demo_engine(max_num_seqs=12, load_rule=True, ngrams=False, tree_nodes=16)
    assert {batch for batch, _ in timed} == {1, 2, 4, 8, 12}
    assert all(batch == emitted for batch, emitted in timed)
