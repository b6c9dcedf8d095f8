"""Drafts from a request's own text: what the index finds, what becomes of it in a tree, and that it changes no text."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from server.engine.budget import LoadRule, Plan
from server.engine.calibration import LearnedSigma
from server.engine.config import NGRAM, EngineConfig
from server.engine.costs import StepCost
from server.engine.engine import DEFAULT_SIGMA, Engine
from server.engine.ngram import BRANCHES, LEARNING, LONGEST, OCCURRENCES, SHORTEST, Candidates, Draft, NgramIndex, Ngrams, Rates
from server.engine.pool import Pool, best_tree, limited, merge
from server.engine.request import Request
from server.engine.types import SamplingParams
from server.engine.verifications import Verification
from tests.engine.engines import Run, build, byte_tokenizer, random_head, run, tiny_model
from tests.engine.reference_decoding import decode

texts = st.lists(st.integers(0, 3), min_size=SHORTEST, max_size=80)
NEW = 32
BASE = SamplingParams(max_tokens=NEW, temperature=0.8, seed=5, ignore_eos=True)
OPTIONS = (
    replace(BASE, temperature=0.0),
    BASE,
    replace(BASE, temperature=0.3, seed=1),
    replace(BASE, temperature=1.2, top_k=20, top_p=0.9, logprobs=2),
    replace(BASE, temperature=0.0, repetition_penalty=1.2, frequency_penalty=0.3),
    replace(BASE, min_p=0.1, presence_penalty=0.7, seed=-2),
)
PROMPTS = ([5, 6, 7, 8] * 6, [40, 41, 42, 43, 40, 41], [9] * 12)
REQUESTS = [(prompt, params) for params in OPTIONS for prompt in PROMPTS]


# The index


def by_search(ids: list[int]) -> list[tuple[int, int]]:
    """The matches of ``NgramIndex``, without an index."""
    found = []
    for place in range(len(ids) - 1, SHORTEST - 1, -1):
        longest = max((n for n in range(1, min(LONGEST, place) + 1) if ids[place - n : place] == ids[-n:]), default=0)
        if longest >= SHORTEST:
            found.append((longest, place))
    return sorted(found[:OCCURRENCES], key=lambda match: -match[0])


@given(texts, st.sets(st.integers(SHORTEST, 80)))
def test_matches_are_what_a_search_finds(ids: list[int], looks: set[int]) -> None:
    index = NgramIndex()
    for end in sorted({*(look for look in looks if look < len(ids)), len(ids)}):
        assert index.matches(ids[:end]) == by_search(ids[:end])


def test_a_text_too_short_to_match() -> None:
    index = NgramIndex()
    assert index.matches([7]) == []
    assert index.matches([7, 7]) == []
    assert index.matches([7, 7, 7]) == [(2, 2)]


# Drafts


def request(ids: list[int], params: SamplingParams = BASE) -> Request:
    return Request.create("0", ids, params, 0, frozenset(), byte_tokenizer().backend_tokenizer, 260)


def paths(tokens: Sequence[int], parents: Sequence[int], scores: Sequence[float]) -> dict[tuple[int, ...], float]:
    """Every live node's tokens from the root on, and its score; fails where a parent comes late or is dead, or siblings are equal."""
    found: dict[int, tuple[int, ...]] = {0: ()}
    scored: dict[tuple[int, ...], float] = {(): 0.0}
    for node, (token, parent, score) in enumerate(zip(tokens, parents, scores, strict=True), 1):
        if score > -math.inf:
            found[node] = (*found[parent], token)
            assert found[node] not in scored, "equal siblings"
            assert score <= scored[found[parent]]
            scored[found[node]] = score
    return scored


@given(texts, st.integers(2, 20), st.sampled_from([0, 1, 5, None]))
def test_a_draft_is_a_tree_of_what_followed(ids: list[int], nodes: int, limit: int | None) -> None:
    found = Candidates.of(Ngrams().find([request(ids, replace(BASE, max_draft_nodes=limit))], nodes))
    assert (found is None) == (not by_search(ids) or limit == 0)
    if found is None:
        return
    scores, tokens, parents = (part[0].tolist() for part in found.pool)
    scored = paths(tokens, parents, scores)
    assert 1 < len(scored) <= min(nodes - 1, 64 if limit is None else limit) + 1
    assert max(map(len, scored)) <= found.depth
    followed = [ids[place:] for _, place in by_search(ids)]
    for path in scored:
        assert any((rest * len(path))[: len(path)] == list(path) for rest in followed), "a path follows one match, again and again"
    assert max(parents.count(parent) for parent in parents) <= BRANCHES


def test_the_longest_and_newest_match_comes_first() -> None:
    draft = Ngrams().find([request([1, 2, 3, 50, 2, 3, 51, 9, 2, 3, 52, 1, 2, 3])], 16)[0]
    first = [draft.tokens[node - 1] for node in draft.children[0].values()]
    assert first == [50, 52, 51], "three tokens match, then the newest of two"
    scores = [draft.scores[node - 1] for node in draft.children[0].values()]
    assert scores[0] > scores[1] >= scores[2]


def test_a_text_that_repeats_itself_is_drafted_to_the_end_of_the_tree() -> None:
    rates = Rates()
    for _ in range(50):
        for length in range(SHORTEST, LONGEST + 1):
            rates.observe((0, length, 0), True)
    ngrams = Ngrams()
    ngrams.rates = rates
    for period in (1, 2, 3):
        ids = [7, 8, 9][:period] * 4
        draft = ngrams.find([request(ids, replace(BASE, temperature=0.0))], 16)[0]
        assert draft.depth == 15
        assert draft.tokens == [*ids, *ids, *ids, *ids][:15]


def test_rates_meet_the_truth_and_stay_apart() -> None:
    rates, rng = Rates(), random.Random(0)
    before = rates[0, 4, 0]
    for _ in range(2000):
        rates.observe((0, 3, 0), rng.random() < 0.7)
        rates.observe((2, 3, 0), rng.random() < 0.2)
        rates.observe((0, 3, 1), False)
    assert rates[0, 3, 0] == pytest.approx(0.7, abs=0.05)
    assert rates[2, 3, 0] == pytest.approx(0.2, abs=0.05)
    assert 0 < rates[0, 3, 1] < 0.02
    assert rates[0, 4, 0] == before


def test_guesses_are_judged_by_the_committed_text_as_far_as_their_parents_were_right() -> None:
    ngrams = Ngrams()
    found = ngrams.find([request([1, 2, 3, 4, 5, 1, 2], replace(BASE, temperature=0.0))], 16)
    before = {length: ngrams.rates[0, length, 0] for length in (2, 3, 4)}
    ngrams.learn(found, [[3, 9, 5]])
    assert ngrams.rates[0, 2, 0] > before[2], "3 was right"
    assert ngrams.rates[0, 3, 0] < before[3], "4 was wrong"
    assert ngrams.rates[0, 4, 0] == before[4], "5 had a wrong parent"


# Merging


@st.composite
def pools(draw: st.DrawFn, max_nodes: int) -> list[tuple[int, int, float]]:
    """Token, parent and score of every node; no child above its parent, siblings differ, some dead at the end of a branch."""
    nodes: list[tuple[int, int, float]] = []
    taken = set()
    for _ in range(draw(st.integers(1, max_nodes))):
        alive = [0, *(place for place, node in enumerate(nodes, 1) if node[2] > -math.inf)]
        parent, token = draw(st.sampled_from(alive)), draw(st.integers(0, 3))
        if (parent, token) not in taken:
            taken.add((parent, token))
            above = nodes[parent - 1][2] if parent else 0.0
            nodes.append((token, parent, above - draw(st.sampled_from([0.0, 0.25, 0.5, 1.0, math.inf]))))
    return nodes


def batched(rows: list[list[tuple[int, int, float]]]) -> Pool:
    width = max(map(len, rows))
    filled = [row + [(-1, 0, -math.inf)] * (width - len(row)) for row in rows]
    return Pool(
        torch.tensor([[node[2] for node in row] for row in filled]),
        torch.tensor([[node[0] for node in row] for row in filled]),
        torch.tensor([[node[1] for node in row] for row in filled]),
    )


def depth_of(pool: Pool) -> int:
    return max(len(path) for row in zip(*(part.tolist() for part in pool), strict=True) for path in paths(row[1], row[2], row[0]))


@given(st.lists(st.tuples(pools(12), pools(8)), min_size=1, max_size=3), st.integers(2, 12), st.sampled_from([0, 2, 5, 100]))
def test_merged_pools_hold_every_path_once_with_the_larger_score(rows: list, nodes: int, limit: int) -> None:
    first, second = batched([row[0] for row in rows]), batched([row[1] for row in rows])
    # Depths of dead nodes do not count, but they may stand one level deeper.
    merged = merge(first, second, min(depth_of(first), depth_of(second)) + 1)
    for b in range(len(rows)):
        one, other, both = (
            paths(pool.tokens[b].tolist(), pool.parents[b].tolist(), pool.scores[b].tolist()) for pool in (first, second, merged)
        )
        assert both == {path: max(one.get(path, -math.inf), other.get(path, -math.inf)) for path in {*one, *other}}
    limits = torch.tensor([limit, 3, 100][: len(rows)])
    kept = merged._replace(scores=limited(merged.scores, limits))
    tree = best_tree(torch.zeros(len(rows), dtype=torch.long), kept, nodes, 0.0, max(depth_of(first), depth_of(second), 1))
    for b, allowed in enumerate(limits.tolist()):
        tokens, parents = tree.tokens[b, 1:].tolist(), tree.parent[b, 1:].tolist()
        live = paths(tokens, parents, [0.0 if token >= 0 else -math.inf for token in tokens])
        whole = paths(merged.tokens[b].tolist(), merged.parents[b].tolist(), merged.scores[b].tolist())
        assert len(live) - 1 == min(allowed, nodes - 1, len(whole) - 1)
        assert sorted(whole[path] for path in live) == sorted(whole.values())[-len(live) :], "the best of all"
        assert [len(path) for path in live][1:] == [
            depth for depth, token in zip(tree.depth[b, 1:].tolist(), tokens, strict=True) if token >= 0
        ]


# The engine


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", spread=0.15)


@pytest.fixture(scope="module")
def expected(model: PreTrainedModel) -> list[list[int]]:
    """Plain decoding, which other tests compare with transformers."""
    return [result.token_ids for result in run(build(model, max_num_seqs=len(REQUESTS)), REQUESTS)]


class Prophet(Ngrams):
    """Follows the true text, now and then with a wrong token: deep trees that hit. ``futures``: prompt and output by request id."""

    def __init__(self, futures: dict[str, list[int]]) -> None:
        super().__init__()
        self.futures, self.rng = futures, random.Random(0)

    def _draft(self, request: Request, limit: int, price: float) -> Draft:
        draft, truth = Draft(), self.futures[request.request_id][len(request.token_ids) :]
        for _ in range(2):
            path = [token if self.rng.random() < 0.85 else self.rng.randrange(256) for token in truth[:limit]]
            draft.follow(path, LONGEST, 0, self.rates)
        draft.keep(limit)
        return draft


@pytest.mark.parametrize("head", [False, True], ids=["alone", "merged"])
@pytest.mark.parametrize(("nodes", "batch"), [(16, 8), (33, 5), (2, 3)])
def test_the_text_is_that_of_plain_decoding(head: bool, nodes: int, batch: int, model: PreTrainedModel, expected: list[list[int]]) -> None:
    engine = build(model, random_head(model) if head else None, draft=NGRAM, tree_nodes=nodes, max_num_seqs=batch)
    found = run(engine, REQUESTS)
    assert [result.token_ids for result in found] == expected
    assert sum(result.speculation.num_accepted_tokens for result in found) > 0
    engine.proposer.ngrams = Prophet({str(i): prompt + text for i, ((prompt, _), text) in enumerate(zip(REQUESTS, expected, strict=True))})
    found = run(engine, REQUESTS)
    assert [result.token_ids for result in found] == expected
    tokens = len(REQUESTS) * (NEW - 1)
    assert sum(result.speculation.num_accepted_tokens for result in found) > tokens * (0.3 if nodes == 2 else 0.5)


def test_sizes_that_change_every_step(model: PreTrainedModel, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    for head in (None, random_head(model)):
        engine = build(model, head, draft=NGRAM, tree_nodes=24)
        rng, full = random.Random(0), engine.shape
        shapes = [full, full.shrunk(1), full.shrunk(5), full._replace(level_price=1.0), full._replace(node_price=0.2)]
        monkeypatch.setattr(engine, "_plan", lambda requests, rng=rng, shapes=shapes: Plan(rng.choice(shapes), requests))
        assert [result.token_ids for result in run(engine, REQUESTS)] == expected


def test_what_is_proposed_names_its_own_parents() -> None:
    draft = Draft()
    unlikely = draft.add(0, 5, -3.0, (0, 2, 0))
    draft.add(unlikely, 6, -4.0, (0, 3, 0))
    likely = draft.add(0, 7, -1.0, (0, 2, 1))
    draft.add(likely, 8, -2.0, (0, 3, 0))
    draft.keep(2)
    candidates = Candidates.of([draft, Draft()], width=3)
    assert candidates is not None
    assert candidates.pool.tokens.tolist() == [[7, 8, -1], [-1, -1, -1]]
    assert candidates.pool.parents.tolist() == [[0, 1, 0], [0, 0, 0]]
    assert candidates.pool.scores.tolist() == [[-1.0, -2.0, -math.inf], [-math.inf] * 3]
    assert Candidates.of([Draft(), Draft()], width=3) is None


def test_a_failure_to_learn_loses_no_token(model: PreTrainedModel, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build(model, draft=NGRAM, tree_nodes=16)

    def fails(*_: object) -> None:
        raise RuntimeError("injected")

    assert engine.proposer.ngrams is not None
    monkeypatch.setattr(engine.proposer.ngrams, "learn", fails)
    assert [result.token_ids for result in run(engine, REQUESTS)] == expected


@pytest.mark.parametrize(("options", "together"), [({}, True), ({"temperature": 1.0, "top_k": 5}, False), ({"logprobs": 1}, False)])
def test_whoever_drafts_all_are_verified_together(options: dict[str, Any], together: bool, model: PreTrainedModel) -> None:
    """But for requests with options for which dead nodes would cost as much as others."""
    engine = build(model, random_head(model), draft=NGRAM, tree_nodes=8)
    verifications, sizes = engine.steps.verifications, list[list[tuple[int, int]]]()
    of = verifications.of

    def counted(requests: list[Request], plan: Plan, ahead: None) -> list[Verification]:
        found = of(requests, replace(plan, drafting=requests[:1]), ahead)
        sizes.append([(len(one.proposal.requests), one.proposal.by_head) for one in found])
        return found

    engine.steps.verifications.of = counted  # type: ignore[method-assign]
    run(engine, [([5, 6, i], SamplingParams(max_tokens=4, **{"temperature": 0, "ignore_eos": True, **options})) for i in range(2)])
    both = [step for step in sizes if sum(count for count, _ in step) == 2]
    assert both
    assert ([(2, 1)] in both) is together
    assert ([(1, 1), (1, 0)] in both) is not together


@pytest.mark.parametrize("node_price", [0.0, 0.6, 1.5])
def test_texts_beside_a_head_and_beside_nothing(
    node_price: float, model: PreTrainedModel, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every third request by the head, every third by what is known of its text; at 1.5 no node is worth it."""
    engine = build(model, random_head(model), draft=NGRAM, tree_nodes=12)
    futures = {str(i): prompt + text for i, ((prompt, _), text) in enumerate(zip(REQUESTS, expected, strict=True))}
    engine.proposer.ngrams = Prophet(futures)

    def plan(requests: list[Request]) -> Plan:
        found = engine.proposer.look_up(requests, 12)
        assert found is not None
        guesses = {request.request_id: draft for request, draft in zip(requests, found, strict=True)}
        return Plan(engine.shape._replace(node_price=node_price), requests[::3], copying=requests[1::3], guesses=guesses)

    monkeypatch.setattr(engine, "_plan", plan)
    results = run(engine, REQUESTS)
    assert [result.token_ids for result in results] == expected
    assert (sum(result.speculation.num_accepted_tokens for result in results[1::3]) > 0) == (node_price < 1)


def test_a_price_leaves_out_what_is_not_worth_it_but_now_and_then() -> None:
    ngrams = Ngrams()
    asked = request([1, 2, 3, 4, 5, 1, 2], replace(BASE, temperature=0.0))
    rate = ngrams.rates[0, 2, 0]
    sizes = [
        [len(ngrams.find([asked], 16, price)[0].tokens) for _ in range(2 * LEARNING)] for price in (0.0, 0.9 * rate, 1.1 * rate, math.inf)
    ]
    assert sizes[0] == [sizes[0][0]] * 2 * LEARNING
    assert all(0 < few < sizes[0][0] for i, few in enumerate(sizes[1], 1) if i % LEARNING)
    assert all(size == (0 if i % LEARNING else sizes[0][0]) for i, size in enumerate(sizes[2], 1))
    assert sizes[3] == [0] * 2 * LEARNING, "nothing is demanded"


def test_a_request_without_a_match_decodes_plainly(model: PreTrainedModel) -> None:
    params = replace(BASE, temperature=2.0, max_tokens=12)
    prompt = list(range(20, 40))
    text = decode(model, prompt, params).tokens
    pairs = list(zip(prompt + text, (prompt + text)[1:], strict=False))
    assert len(pairs) == len(set(pairs)), "no pair of tokens comes twice"
    going = Run(build(model, draft=NGRAM))
    going.add("0", prompt, params)
    results = going.finish()
    assert results["0"].token_ids == text
    assert results["0"].speculation.num_steps == 0
    assert all(stats.tree_nodes == 1 and not stats.drafts for stats in going.stats)


def test_it_need_not_match_to_run_beside_one_that_does(model: PreTrainedModel, expected: list[list[int]]) -> None:
    """Its nodes are dead: they are not counted."""
    params = replace(BASE, temperature=2.0, max_tokens=12)
    matching, other = run(build(model, draft=NGRAM), [REQUESTS[2], (list(range(20, 40)), params)])
    assert matching.token_ids == expected[2]
    assert matching.speculation.num_draft_tokens > 0
    assert other.token_ids == decode(model, list(range(20, 40)), params).tokens
    assert other.speculation.num_steps == other.speculation.verified_nodes == 0


def test_a_failing_lookup_only_costs_the_draft(model: PreTrainedModel, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(Ngrams, "find", fail)
    for head in (None, random_head(model)):
        results = run(build(model, head, draft=NGRAM), REQUESTS)
        assert [result.token_ids for result in results] == expected
        assert (sum(result.speculation.num_steps for result in results) > 0) == (head is not None)


# The load rule


def test_the_rule_measures_and_keeps_the_text(model: PreTrainedModel, expected: list[list[int]]) -> None:
    engine = build(model, draft=NGRAM, load_rule=True, max_num_seqs=4)
    assert engine.load_rule is not None
    assert not engine.load_rule.head
    assert set(engine.load_rule.costs) == {1, 2, 4}
    assert type(engine.proposer.ngrams) is Ngrams, "what stood in for the measurement is gone"
    assert [result.token_ids for result in run(engine, REQUESTS)] == expected


def test_rates_are_learned_while_no_tree_pays(model: PreTrainedModel, expected: list[list[int]]) -> None:
    """So a text that begins to repeat itself is drafted at once when it pays."""
    engine = build(model, draft=NGRAM)
    engine.load_rule = LoadRule(engine.shape, {8: StepCost(1.0, 1e9, 0.0, 0.0, text=1e9)}, {1: 1.0}, head=False)
    results = run(engine, REQUESTS)
    assert [result.token_ids for result in results] == expected
    assert sum(result.speculation.num_steps for result in results) == 0
    assert engine.proposer.ngrams.rates[0, LONGEST, 0] != Rates()[0, LONGEST, 0]


# The request's own limit


@pytest.mark.parametrize("kind", ["head", "ngram", "merged"])
def test_requests_limit_their_trees(kind: str, model: PreTrainedModel, expected: list[list[int]]) -> None:
    engine = build(model, None if kind == "ngram" else random_head(model), draft=NGRAM, ngrams=kind != "head", tree_nodes=12)
    limits = [(0, 3, None, 50, 1)[i % 5] for i in range(len(REQUESTS))]
    for chosen in (limits, [0] * len(REQUESTS), [2] * len(REQUESTS)):
        requests = [(prompt, replace(params, max_draft_nodes=limit)) for (prompt, params), limit in zip(REQUESTS, chosen, strict=True)]
        going = Run(engine)
        for i, each in enumerate(requests):
            going.add(str(i), *each)
        results = list(going.finish().values())
        assert [result.token_ids for result in results] == expected
        for result, limit in zip(results, chosen, strict=True):
            figures = result.speculation
            assert figures.verified_nodes == figures.num_draft_tokens + figures.num_steps
            if limit == 0:
                assert figures.num_steps == 0
            elif kind != "ngram":
                assert figures.num_draft_tokens == figures.num_steps * min(11 if limit is None else limit, 11)
            else:
                assert figures.num_draft_tokens <= figures.num_steps * min(11 if limit is None else limit, 11)
        assert max(stats.tree_nodes for stats in going.stats) == min(11, max(50 if limit is None else limit for limit in chosen)) + 1


def test_a_capped_request_does_not_disturb_the_learned_draft_temperature(model: PreTrainedModel) -> None:
    engine = build(model, random_head(model), ngrams=False)
    engine.proposer.learned = LearnedSigma(DEFAULT_SIGMA)
    start = engine.proposer.learned.points
    run(engine, [(PROMPTS[0], replace(BASE, max_draft_nodes=0)), (PROMPTS[1], replace(BASE, max_draft_nodes=0))])
    assert engine.proposer.learned.points == start


def test_the_demo_target_copies_itself(demo: Path) -> None:
    """Loaded by name, as the server does it: no head is read, and greedy text that loops is drafted far ahead."""
    config = EngineConfig(
        model=str(demo / "target"), draft=NGRAM, device="cpu", dtype="float32", load_rule=False, max_num_seqs=4, max_model_len=512
    )
    engine = Engine.from_config(config)
    assert engine.speculative
    assert engine.proposer.drafter is None
    greedy = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
    for prompt in ("one two three four five six seven\n" * 6, "a = 1\nb = 2\nc = 3\n" * 8):
        going = Run(engine)
        going.add("0", engine.tokenizer(prompt).input_ids, greedy)
        going.finish()
        assert 63 / len([stats for stats in going.stats if stats.emitted]) > 3, "tokens per step, plain ones counted"
