"""The load rule: less drafting under load, none where it does not pay, and it learns."""

import itertools
import math
import random
from collections import Counter as Tally
from collections.abc import Callable

import pytest
import torch

from kernels.best_nodes import best_nodes
from server.engine import budget, texts
from server.engine.budget import LoadRule, Plan, default_acceptance
from server.engine.costs import UNMEASURED, StepCost, measure_costs
from server.engine.drafter import TreeShape, _worthwhile
from server.engine.ngram import DEMANDED, LONGEST, Draft, Rates
from server.engine.request import WARMEST, Request
from server.engine.types import SamplingParams
from tests.engine.engines import byte_tokenizer

SHAPE = TreeShape(16, 5, 4)
ACCEPTANCE = {1: 1.0, 2: 1.6, 4: 2.2, 8: 2.8, 16: 3.2}
BATCHES = (1, 2, 4, 8, 16, 32)


def machine(level: float, node: float, batches: tuple[int, ...] = BATCHES) -> dict[int, StepCost]:
    """A machine whose plain step costs 1, whatever the batch, and every further level and node of a request so much."""
    return {batch: StepCost(1.0, 1.0, level, node * batch) for batch in batches}


def request(name: str, temperature: float = 0.0, limit: int | None = None) -> Request:
    params = SamplingParams(max_tokens=100, temperature=temperature, max_draft_nodes=limit)
    return Request.create(name, [1, 2, 3], params, 0, frozenset(), byte_tokenizer().backend_tokenizer, 260)


def crowd(count: int, temperature: float = 0.0) -> list[Request]:
    return [request(str(i), temperature) for i in range(count)]


def play(
    rule: LoadRule, requests: list[Request], accepted: Callable[[Request], float], steps: int,
    clock: Callable[[int, bool], float | None] = lambda step, drafting: None,
) -> list[list[str]]:  # fmt: skip
    """Who drafted in each of ``steps`` steps; drafts have 8 nodes, of which so many are accepted, and ``clock`` tells the seconds."""
    history = []
    for step in range(steps):
        plan = rule.choose(requests)
        history.append(sorted(r.request_id for r in plan.drafting))
        plan.levels = 3
        plan.drafts = [(r, 8, accepted(r)) for r in plan.drafting]
        rule.observe(plan, clock(step, bool(plan.drafting)))
    return history


def experienced(*args) -> LoadRule:
    """A rule that has seen enough of every class to trust its estimates."""
    rule = LoadRule(*args)
    rule._tries.update(dict.fromkeys(range(WARMEST + 1), budget.TRIES))
    return rule


def drafting_steps(name: str, steps: int) -> list[list[str]]:
    """What a request does that drafts: now and then a step decodes plainly, to compare them."""
    return [[] if step + 1 in budget.FIRST_CHECKS else [name] for step in range(steps)]


def test_requests_that_come_count_before_they_decode() -> None:
    """With the first of a crowd drafting would pay, and no longer with the crowd, for which its prompt would have been caught up with."""
    rule = experienced(SHAPE, machine(0.1, 0.05), ACCEPTANCE)
    assert not rule.choose(crowd(2), coming=30).drafting
    assert len(rule.choose(crowd(2), coming=0).drafting) == 2


def test_a_resting_plan_is_of_the_requests_that_decode() -> None:
    """Whose prompts were still computed when it was made."""
    rule = experienced(SHAPE, machine(0.5, 0.5), ACCEPTANCE)
    assert rule.choose(crowd(1), coming=3).batch == 1
    assert rule.choose(crowd(4)).batch == 4


def test_trees_of_a_few_cost_what_trees_of_the_batch_do() -> None:
    """A step of many requests takes longer where only one of them has a tree: as if a text had proposed it."""
    few, many = StepCost(1.0, 1.1, 0.1, 0.01), StepCost(1.0, 1.1, 0.1, 0.01)
    costs = {1: few, 32: many._replace(text=0.5)}
    size = budget._Size(1, 1, 1)
    dearer = LoadRule(SHAPE, costs, ACCEPTANCE)._seconds(32, 1, size, 0) - LoadRule(SHAPE, {1: few, 32: many}, ACCEPTANCE)._seconds(
        32, 1, size, 0
    )
    assert dearer == pytest.approx(0.5)


def test_prices_rise_with_the_load_until_nobody_drafts() -> None:
    rule = LoadRule(SHAPE, machine(0.1, 0.05), ACCEPTANCE)
    plans = [rule.choose(crowd(batch)) for batch in BATCHES]
    busy = [len(plan.drafting) < batch for plan, batch in zip(plans, BATCHES, strict=True)]
    assert not busy[0]
    assert not plans[-1].drafting
    assert busy == sorted(busy), "once too busy, always too busy"
    prices = [plan.shape.node_price for plan in plans if plan.drafting]
    assert prices == sorted(prices)
    assert prices[0] > 0


def test_prices_are_what_the_time_would_bring_otherwise() -> None:
    rule = LoadRule(SHAPE, {4: StepCost(plain=0.1, base=0.12, level=0.004, node=0.001)}, ACCEPTANCE)
    requests = crowd(4)
    accepted = min(4 * rule._worth_of(requests[0]) * rule._sizes[4, 0].gain, 4 * rule._sizes[4, 0].nodes)
    shape = rule.choose(requests).shape
    tokens_per_second = (4 + accepted) / rule._seconds(4, 4, rule._sizes[4, 0], accepted)
    assert shape.level_price == pytest.approx(tokens_per_second * 0.004)
    assert shape.node_price == pytest.approx(tokens_per_second * 0.001 / 4)


def test_a_step_costs_what_its_drafting_requests_cost() -> None:
    costs = {1: StepCost(1.0, 1.5, 0.1, 0.01), 8: StepCost(2.0, 4.0, 0.4, 0.16)}
    rule = LoadRule(SHAPE, costs, ACCEPTANCE)
    between = StepCost(*(first + (second - first) * 3 / 7 for first, second in zip(costs[1], costs[8], strict=True)))
    for measured, drafting, own in ((1, 1, costs[1]), (8, 4, between)):
        size = levels, nodes, _ = rule._sizes[measured, 0]
        expected = 2.0 + (own.tree(1, 1) - own.plain) + own.level * (levels - 1) + 0.16 / 8 * nodes * drafting
        assert rule._seconds(8, drafting, size, 0) == pytest.approx(expected)
    assert rule._seconds(8, 8, size, 0) == pytest.approx(costs[8].tree(levels, 1 + nodes))


def test_nothing_is_concluded_of_sizes_that_were_not_measured() -> None:
    costs = {1: StepCost(1.0, 1.1, 0.0, 0.01), 32: StepCost(1.0, UNMEASURED, 0.0, UNMEASURED)}
    rule = LoadRule(SHAPE, costs, ACCEPTANCE)
    assert [rule._cost(batch) for batch in (1, 2, 32, 40)] == [costs[1], costs[32], costs[32], costs[32]]


def test_a_draft_cache_that_is_far_behind_must_pay_until_the_request_ends() -> None:
    rule = LoadRule(SHAPE, {1: StepCost(1.0, 1.1, 0.0, 0.01, row=0.01)}, ACCEPTANCE)

    def drafts(behind: int, left: int) -> bool:
        late = request("x")
        late.worth, late.context_len = 0.2, behind
        late.token_ids += [0] * (100 - left)
        return bool(rule.choose([late]).drafting)

    assert drafts(10, 100)
    assert drafts(10, 2)
    assert drafts(500, 100)
    assert not drafts(500, 10)


def test_hard_requests_do_not_draft_and_easy_ones_do() -> None:
    rule = LoadRule(SHAPE, machine(0.02, 0.02), ACCEPTANCE)
    requests = crowd(8)
    history = play(rule, requests, lambda r: 5 if r.request_id in "05" else 0, 60)
    late = Tally(name for step in history[30:] for name in step)
    assert late["0"] == late["5"] == 29, "and one step to compare"
    assert sum(late.values()) - 58 <= 12, "the others are tried now and then"


def test_a_request_that_becomes_easy_is_found_and_one_that_becomes_hard_is_dropped_within_20_steps() -> None:
    rule = LoadRule(SHAPE, machine(0.05, 0.02), ACCEPTANCE)
    requests = crowd(1)
    assert play(rule, requests, lambda _: 4, 30) == drafting_steps("0", 30)
    dropping = play(rule, requests, lambda _: 0, 40)
    assert [] in dropping[:20]
    assert sum(map(len, dropping[20:])) <= 2
    rule, requests = LoadRule(SHAPE, machine(0.05, 0.02), ACCEPTANCE), crowd(1)
    play(rule, requests, lambda _: 0, 20)
    rising = play(rule, requests, lambda _: 8, 40)
    found = rising.index(["0"])
    assert found < 20
    assert sum(map(len, rising[found:])) >= 40 - found - 2, "but for two steps to compare"


def test_who_drafts_goes_on_where_nobody_would_begin() -> None:
    """Estimates move with every step's luck: between the two limits things stay as they are."""
    rule, requests = experienced(SHAPE, machine(0.0, 0.1), ACCEPTANCE), crowd(1)
    assert play(rule, requests, lambda _: 3, 3) == [["0"]] * 3

    def drafts_at(gain: float) -> bool:
        rule._rest = 0
        requests[0].worth = (rule._seconds(1, 1, rule._sizes[1, 0], 0) * gain - 1) / rule._sizes[1, 0].gain
        return bool(rule.choose(requests).drafting)

    between = (budget.START_GAIN + budget.STOP_GAIN) / 2
    assert drafts_at(between)
    assert not drafts_at(budget.STOP_GAIN - 0.01)
    assert not drafts_at(between)
    assert drafts_at(budget.START_GAIN + 0.01)


@pytest.mark.parametrize("batch", [1, 32])
def test_what_is_unknown_is_tried(batch: int) -> None:
    """An estimate of nothing must not decide that nothing will ever be known."""
    rule = LoadRule(SHAPE, {batch: StepCost(1.0, 4.0, 1.0, 1.0)}, ACCEPTANCE)
    history = play(rule, crowd(batch, 1.0), lambda _: 1, 100)
    assert sum(map(len, history[: budget.EAGER * budget.TRIES])) == budget.TRIES
    assert sum(map(len, history[budget.EAGER * budget.TRIES :])) < 4


def test_useless_tries_become_rare() -> None:
    rule = LoadRule(SHAPE, machine(0.5, 0.5), ACCEPTANCE)
    history = play(rule, crowd(4), lambda _: 0, 1000)
    tries = [i for i, step in enumerate(history) if step]
    gaps = [after - before for before, after in itertools.pairwise(tries)]
    assert all(len(history[i]) == 1 for i in tries[3:]), "one request at a time"
    assert gaps[-1] == budget.MAX_PROBE
    rule = LoadRule(SHAPE, machine(0.1, 0.1), ACCEPTANCE)
    near = [i for i, step in enumerate(play(rule, crowd(4), lambda _: 0, 1000)) if step]
    assert max(after - before for before, after in itertools.pairwise(near)) < budget.MAX_PROBE, "less is lost by them"


def test_tries_that_catch_up_with_a_prompt_are_rarer() -> None:
    """All of it is for one draft."""

    def interval(context: int) -> int:
        rule = experienced(SHAPE, {4: StepCost(1.0, 1.0, 0.1, 0.4, row=0.002)}, ACCEPTANCE)
        requests = crowd(4)
        for r in requests:
            r.context_len = context
        play(rule, requests, lambda _: 0, 2 * budget.PROBE)
        return rule._interval

    assert interval(500) >= interval(0) + 0.9 * 500 * 0.002 / budget.PROBED_SHARE > 0


@pytest.mark.parametrize("batch", [1, 8])
def test_clocks_find_that_drafting_costs_more_than_the_model_says(batch: int) -> None:
    rule = LoadRule(SHAPE, machine(0.05, 0.02), ACCEPTANCE)
    history = play(rule, crowd(batch), lambda _: 2, 1000, lambda _, drafting: 4.0 if drafting else 1.0)
    assert all(history[:5])
    assert sum(map(bool, history[300:])) < 30


def test_clocks_are_heard_where_half_of_the_requests_draft() -> None:
    rule = experienced(SHAPE, machine(0.05, 0.02), ACCEPTANCE)
    requests = crowd(4) + [request(f"quiet {i}", limit=0) for i in range(4)]
    history = play(rule, requests, lambda _: 2, 1000, lambda _, drafting: 4.0 if drafting else 1.0)
    assert all(len(drafting) == 4 for drafting in history[:5])
    assert sum(map(bool, history[300:])) < 30


def test_close_calls_are_compared_more_often() -> None:
    def compared(accepted: float) -> int:
        rule = LoadRule(SHAPE, machine(0.05, 0.02), ACCEPTANCE)
        history = play(rule, crowd(1), lambda _: accepted, 512)
        return sum(not drafting for drafting in history[256:])

    assert compared(2.0) == 256 // budget.CHECK
    assert compared(0.55) == 256 // budget.DOUBTFUL_CHECK


def test_clocks_find_that_drafting_costs_less_than_the_model_says() -> None:
    rule = experienced(SHAPE, {1: StepCost(1.0, 4.0, 0.1, 0.02)}, ACCEPTANCE)
    history = play(rule, crowd(1), lambda _: 2, 1500, lambda _, drafting: 1.3 if drafting else 1.0)
    assert sum(map(bool, history[:60])) < 20
    assert sum(map(bool, history[1200:])) > 290


def test_what_slows_the_whole_machine_changes_nothing() -> None:
    rule, rng = LoadRule(SHAPE, machine(0.05, 0.02), ACCEPTANCE), random.Random(1)
    bursts = [rng.choice((1, 1, 2, 3)) for _ in range(40)]

    def clock(step: int, drafting: bool) -> float:
        seconds = (1 + 2 * 0.05 + 0.02 * 9 if drafting else 1.0) * bursts[step // 50]
        return seconds * rng.uniform(0.9, 1.3) * (3 if rng.random() < 0.02 else 1)

    history = play(rule, crowd(1), lambda _: 2, 2000, clock)
    assert sum(map(bool, history)) > 1900


def test_what_the_warm_accept_says_nothing_about_the_cold() -> None:
    rule = LoadRule(SHAPE, machine(0.1, 0.02), ACCEPTANCE)
    cold, warm = rule._worth_of(request("a")), rule._worth_of(request("b", 1.0))
    assert warm < cold
    play(rule, [request("c", 1.0)], lambda _: 0, 30)
    assert rule._worth_of(request("a")) == cold
    assert rule._worth_of(request("b", 1.0)) < warm


def test_a_load_that_leaves_no_room_is_followed_at_once() -> None:
    rule = experienced(SHAPE, {1: StepCost(1.0, 1.2, 0.05, 0.02), 32: StepCost(1.0, 4.0, 1.0, 1.0)}, ACCEPTANCE)
    assert play(rule, crowd(1), lambda _: 4, 5) == [["0"]] * 5
    assert play(rule, crowd(32), lambda _: 4, 5) == [[]] * 5
    assert play(rule, crowd(1), lambda _: 4, 5) == [["0"]] * 5


def test_who_may_not_draft_does_not() -> None:
    rule = LoadRule(SHAPE, machine(0.0, 0.0), ACCEPTANCE)
    requests = [request("may"), request("may not", limit=0)]
    assert play(rule, requests, lambda _: 3, 20) == drafting_steps("may", 20)
    assert play(rule, requests[1:], lambda _: 3, 20) == [[]] * 20


def test_the_estimate_meets_the_truth() -> None:
    rule = LoadRule(SHAPE, machine(0.0, 0.0), ACCEPTANCE)
    requests = crowd(2)
    play(rule, requests, lambda r: 1 + int(r.request_id), 400)
    usual = 1.8 + (2.2 - 1.8) / 8  # accepted of a tree of 9 nodes
    assert [r.worth for r in requests] == pytest.approx([1 / usual, 2 / usual], abs=0.01)
    assert rule._worth_of(request("new")) == pytest.approx(1.5 / usual, abs=0.05)
    assert rule._sizes[2, 0] == pytest.approx((3, 8, usual), abs=0.01)


def test_what_is_known_of_large_trees_is_expected_of_small_ones_in_proportion() -> None:
    """A request that accepts half of what is usual does so at every load, where trees are smaller."""
    costs = dict.fromkeys((1, 8), StepCost(1.0, 1.4, 0.0, 0.05))
    rule, requests = LoadRule(SHAPE, costs, ACCEPTANCE), crowd(8)
    for alone in requests:
        play(rule, [alone], lambda _: 1, 50)
    rule._sizes[8, 0] = rule._sizes[8, 0]._replace(nodes=1.0, gain=0.6)
    assert len(rule.choose(requests).drafting) < 8, "1 of 1.85 accepted makes 0.32 of 0.6, in 1.5 times the time"
    easy = crowd(8)
    for alone in easy:
        play(rule, [alone], lambda _: 7, 50)
    assert len(rule.choose(easy).drafting) == 8


def guess(*rates: float) -> Draft:
    """A chain of guesses of a request's own text, each of which comes true at such a rate if its parent did."""
    draft, score = Draft(), 0.0
    for node, rate in enumerate(rates):
        score += math.log(rate)
        draft.add(node, 0, score, (0, LONGEST, 0))
    return draft


def test_texts_are_verified_where_they_pay_together() -> None:
    rule = LoadRule(SHAPE, {4: StepCost(1.0, 1.0, 0.0, 0.2, text=0.3)}, ACCEPTANCE, head=False)
    requests = crowd(4)
    assert rule.lookup_price(requests) == pytest.approx(0.22)

    def copying(*guesses: Draft) -> list[str]:
        plan = rule.choose(requests, list(guesses))
        assert not plan.drafting
        assert plan.guesses_of(requests) == list(guesses)
        return [r.request_id for r in plan.copying]

    none = guess()
    assert copying(guess(0.9, 0.9, 0.9), guess(0.9), none, none) == ["0", "1"], "1.84 times the tokens, in 1.5 times the time"
    assert copying(guess(0.9, 0.9, 0.9, 0.2), guess(0.9), none, guess(0.1)) == ["0", "1"], "a node must bring 0.22 tokens"
    assert copying(guess(0.9), guess(0.9), none, none) == [], "1.45 times the tokens, in 1.4 times the time"
    assert copying(none, none, none, none) == []


def test_what_a_grammar_demands_need_not_pay() -> None:
    rule = LoadRule(SHAPE, {4: StepCost(1.0, 1.0, 0.0, 0.2, text=3.0)}, ACCEPTANCE, head=False)
    demanded = Draft()
    demanded.demand([1, 2], 0, Rates())
    plan = rule.choose(crowd(4), [guess(0.9, 0.9), demanded, guess(), guess()])
    assert [r.request_id for r in plan.copying] == ["1"]


def test_a_plan_says_nothing_of_requests_that_came_later() -> None:
    """Such as one that finished its prompt while the step failed for another."""
    guesses = [guess(0.9), guess()]
    plan = LoadRule(SHAPE, machine(0.1, 0.05), ACCEPTANCE).choose(crowd(2), guesses)
    assert plan.guesses_of(crowd(2)) == guesses
    assert plan.guesses_of(crowd(3)) is None
    assert Plan(SHAPE, []).guesses_of(crowd(1)) is None


def test_the_head_drafts_where_it_brings_more_than_the_text() -> None:
    costs = {batch: StepCost(1.0, 1.02, 0.01, 0.005 * batch) for batch in (1, 2)}
    sure, doubtful = guess(*[0.99] * 5), guess(0.4)
    for batch, guesses, drafting, copying in (
        (1, [doubtful], ["0"], []), (1, [sure], [], ["0"]), (2, [sure, doubtful], ["1"], ["0"]), (2, [doubtful] * 2, ["0", "1"], []),
    ):  # fmt: skip
        plan = experienced(SHAPE, costs, ACCEPTANCE).choose(crowd(batch), guesses)
        assert [r.request_id for r in plan.drafting] == drafting
        assert [r.request_id for r in plan.copying] == copying
        assert plan.gain > 1.5


def test_a_text_that_is_better_for_once_does_not_stop_the_head() -> None:
    rule, requests = experienced(SHAPE, {1: StepCost(1.0, 1.02, 0.01, 0.005)}, ACCEPTANCE), crowd(1)
    for step in range(5):
        sure = step in (0, 3)
        plan = rule.choose(requests, [guess(*[0.99] * 5) if sure else guess()])
        assert (plan.copying, plan.drafting) == ((requests, []) if sure else ([], requests))


def test_a_text_is_copied_while_the_head_rests() -> None:
    rule, requests = experienced(SHAPE, {1: StepCost(1.0, 40.0, 1.0, 0.01)}, ACCEPTANCE), crowd(1)
    for step in range(12):
        plan = rule.choose(requests, [guess(0.9, 0.9) if step % 3 else guess()])
        assert (plan.copying, plan.drafting) == (requests if step % 3 else [], [])


def test_texts_in_vain_are_looked_up_in_few_of_short_steps() -> None:
    plain = texts.LOOKUP_SECONDS / texts.LOOKUP_SHARE  # of which a lookup for one request takes just the share
    for batch, vain, between in ((1, True, 1), (4, True, 4), (4, False, 0)):
        rule, requests = experienced(SHAPE, {batch: StepCost(plain, 40 * plain, plain, 0.01 * plain)}, ACCEPTANCE), crowd(batch)
        looked = []
        for _ in range(20):
            looked.append(rule.lookup_price(requests) is not None)
            rule.choose(requests, [guess() if vain else guess(0.9, 0.9)] * batch if looked[-1] else None)
        assert looked == [step % (between + 1) == 0 for step in range(20)]


def test_texts_that_promise_too_much_are_believed_less() -> None:
    """Where half of what they promise comes true they are tried now and then; where that changes, it is soon found."""
    rule, requests = experienced(SHAPE, {1: StepCost(1.0, 40.0, 1.0, 0.4)}, ACCEPTANCE), crowd(1)

    def copied(steps: int, right: int) -> int:
        """Steps in which a text is verified, that promises 0.9 tokens and keeps them in ``right`` of 10."""
        count = 0
        for _ in range(steps):
            plan = rule.choose(requests, [guess(0.9)])
            plan.copied = int(bool(plan.copying) and count % 10 < right)
            count += bool(plan.copying)
            rule.observe(plan, 1.0)
        return count

    assert copied(300, 9) > 290
    copied(300, 4)
    assert 0 < copied(300, 4) < 100
    copied(300, 9)
    assert copied(300, 9) > 290


def test_one_step_of_a_crowd_that_brought_nothing_is_forgiven() -> None:
    """However many tokens it had promised; and what a grammar demands is verified all the while."""
    rule, requests = experienced(SHAPE, {16: StepCost(1.0, 40.0, 1.0, 0.3)}, ACCEPTANCE), crowd(16)
    sure, demanded = guess(*[0.98] * 12), guess(*[0.98] * 12)
    demanded.kinds = [(0, DEMANDED, 0)] * 12
    assert rule.choose(requests, [sure] * 16).copying == requests
    rule._texts.learn(170.0, 0)
    assert rule._texts.truth > 0.4
    for _ in range(2):
        rule._texts.learn(170.0, 0)
    gains = rule._texts.gains(requests, [sure] * 15 + [demanded], rule.costs[16])
    assert gains == {requests[15].request_id: demanded.worth(0.0)}
    assert rule.choose(requests, [sure] * 16).copying == []
    assert rule.choose(requests, [sure] * 15 + [demanded]).copying == requests[15:]
    assert any(rule.choose(requests, [sure] * 16).copying for _ in range(1000))


def test_clocks_do_not_hear_steps_with_texts() -> None:
    """They would say as much of the texts as of the head."""
    rule, requests = experienced(SHAPE, {1: StepCost(1.0, 1.2, 0.05, 0.02, text=0.5)}, ACCEPTANCE), crowd(1)
    kinds = Tally[tuple[bool, bool]]()
    for step in range(400):
        plan = rule.choose(requests, [guess(*[0.95] * 5) if step % 3 == 0 else guess()])
        kinds[bool(plan.drafting), bool(plan.copying)] += 1
        plan.levels, plan.drafts, plan.copied = 3, [(r, 8, 3) for r in plan.drafting], round(plan.expected)
        rule.observe(plan, 10.0 if plan.copying else 1.48 if plan.drafting else 1.0)
    assert min(kinds[True, False], kinds[False, True], kinds[False, False]) > 5
    assert abs(rule._bias[1]) < 0.02


def test_default_acceptance_grows_slowly() -> None:
    guess = default_acceptance(32)
    assert guess[1] == 1
    values = [guess[nodes] for nodes in sorted(guess)]
    assert values == sorted(values)
    assert guess[32] < 4


def test_shrunk_shapes_hold_their_nodes() -> None:
    for nodes in range(1, 17):
        shape = SHAPE.shrunk(nodes)
        assert shape.nodes == nodes
        assert shape.depth <= max(1, nodes - 1)
        assert shape.topk <= max(1, nodes - 1)
        assert shape.lookahead <= SHAPE.lookahead


def test_measuring_ends_and_larger_batches_then_decode_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.costs.MEASURING_SECONDS", 0.005)
    costs = measure_costs(lambda batch, shape: 1e-3, lambda batch, rows: 1e-4, SHAPE, 32)
    assert costs[1].base < 1 < costs[32].base
    rule = experienced(SHAPE, costs, ACCEPTANCE)
    assert not any(play(rule, crowd(32), lambda _: 5, budget.MAX_PROBE - 1))


# Trees at a price


def test_levels_and_nodes_are_bought_at_their_price() -> None:
    scores = torch.tensor([[0.6, 0.3, 0.02], [0.9, 0.05, 0.01]]).log()  # columns survive 1.5, 0.35 and 0.03 times
    parents = torch.tensor([[1.0], [0.98]]).log()

    def expanded(level: float, node: float, parents: torch.Tensor = parents) -> int:
        return _worthwhile(scores, parents, SHAPE._replace(level_price=level, node_price=node))

    assert expanded(0, 0) == 3, "free"
    assert expanded(0, 0.05) == 2
    assert expanded(0, 0.25) == 1
    assert expanded(0, 1.0) == 0
    kept = 1.88 / 1.98  # of the level before survives in this one, and of this one in the next
    assert expanded(1.88 * kept - 0.01, 1e-6) == 3
    assert expanded(1.88 * kept + 0.01, 1e-6) == 0
    bought = (0.6 + 0.9) * 1.8 / 1.98 - 2 * 0.25 + 0.3 * 1.8 / 1.98 - 0.25  # by a node price of 0.25
    assert expanded(bought - 0.01, 0.25) == 1
    assert expanded(bought + 0.01, 0.25) == 0
    assert expanded(1.0, 0.25, torch.zeros(2, 4)) == 0, "of eight nodes as good little has survived: less will"


@pytest.mark.parametrize(("price", "nodes"), [(0.0, 6), (0.04, 5), (0.15, 4), (0.4, 3), (5.0, 2)])
def test_verified_nodes_are_the_ones_that_pay(price: float, nodes: int) -> None:
    scores = torch.tensor([[0.6, 0.2, 0.02, 0.45, 0.1]]).log()
    parents = torch.tensor([[0, 0, 0, 1, 1]])  # the last two are children of the first
    tokens, _ = best_nodes(torch.tensor([3]), scores, torch.tensor([[7, 8, 9, 5, 6]]), parents, 6, price)
    assert tokens.shape == (1, nodes), "the best drafted node is always verified"
    assert tokens[0, :2].tolist() == [3, 7]
    assert set(tokens[0].tolist()) == set([3, 7, 5, 8, 6, 9][:nodes])
