"""Sampling at any temperature and with any options is a function of the target and the seed: equal for every tree, batch and load."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kernels import cpu
from server.engine.budget import Plan
from server.engine.request import Request
from server.engine.types import SamplingParams, Tree
from tests.engine.engines import EOS, Result, build, byte_tokenizer, random_head, run, tiny_model
from tests.engine.guided import Guide
from tests.engine.reference_decoding import Decoded, decode

NEW = 32
PROMPTS = ([72, 101], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49], [200, 7, 7, 90, 91, 7], [65] * 17)
BASE = SamplingParams(max_tokens=NEW, temperature=0.8, seed=5)
COLD = replace(BASE, temperature=0.0)
OPTIONS: dict[str, SamplingParams] = {
    "greedy": COLD,
    "temperature 0.2": replace(BASE, temperature=0.2),
    "temperature 1": replace(BASE, temperature=1.0),
    "temperature 2": replace(BASE, temperature=2.0),
    "seed": replace(BASE, seed=2**62 + 17),
    "negative seed": replace(BASE, seed=-3),
    "top_p": replace(BASE, top_p=0.6),
    "top_k": replace(BASE, top_k=3),
    "top_k beyond the vocabulary": replace(BASE, top_k=100_000),
    "min_p": replace(BASE, min_p=0.2),
    "top_k, top_p, min_p": replace(BASE, temperature=1.5, top_k=20, top_p=0.9, min_p=0.03),
    "presence": replace(BASE, presence_penalty=1.7),
    "frequency": replace(BASE, frequency_penalty=0.9),
    "negative frequency": replace(BASE, frequency_penalty=-1.0),
    "repetition": replace(BASE, repetition_penalty=1.6),
    "all penalties": replace(BASE, presence_penalty=0.5, frequency_penalty=0.4, repetition_penalty=1.2),
    "greedy with penalties": replace(COLD, presence_penalty=1.0, frequency_penalty=0.6, repetition_penalty=1.4),
    "logit_bias": replace(BASE, logit_bias={7: 4.0, 90: -100.0, EOS: 2.0}),
    "greedy with whole-number bias": replace(COLD, logit_bias={65: 3}),
    "forced token": replace(BASE, logit_bias={33: 100}),
    "end of sequence": replace(BASE, logit_bias={EOS: 3.5}),
    "ignore_eos": replace(BASE, logit_bias={EOS: 3.5}, ignore_eos=True),
    "stop_token_ids": replace(BASE, stop_token_ids=(7, 72, 100, 130, 180)),
    "min_tokens": replace(BASE, min_tokens=9, logit_bias={EOS: 6.0}),
    "min_tokens and stop_token_ids": replace(COLD, min_tokens=6, stop_token_ids=tuple(range(0, 250, 2))),
    "stop string": replace(BASE, stop=("a", "\x05", "<", "Z", "4")),
    "stop string after min_tokens": replace(BASE, stop=("a", "\x05", "<", "Z", "4", "\x10", "m", "n"), min_tokens=11),
    "logprobs": replace(BASE, logprobs=4),
    "logprobs of options": replace(BASE, logprobs=2, top_p=0.8, repetition_penalty=1.3, logit_bias={9: 2.0}),
    "max_tokens 1": replace(BASE, max_tokens=1),
    "max_tokens 2": replace(BASE, max_tokens=2),
    "everything": replace(
        BASE, temperature=1.2, top_k=60, top_p=0.95, min_p=0.01, presence_penalty=0.3, frequency_penalty=0.2, repetition_penalty=1.1,
        logit_bias={5: 1.0, 6: -2.0}, min_tokens=4, stop_token_ids=(13,), stop=("~~",), logprobs=1,
    ),
}  # fmt: skip
Table = dict[tuple[str, int], Decoded]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Softer than the greedy tests' model, so that temperatures between 0.2 and 2 all leave a choice."""
    return tiny_model("llama", spread=0.12)


@pytest.fixture(scope="module")
def expected(model: PreTrainedModel) -> Table:
    """The reference text of every option and prompt."""
    tokenizer = byte_tokenizer()

    def to_text(output: list[int]) -> str:
        return tokenizer.decode(output, skip_special_tokens=True)

    return {
        (name, i): decode(model, prompt, params, frozenset([EOS]), to_text)
        for name, params in OPTIONS.items()
        for i, prompt in enumerate(PROMPTS)
    }


def check(result: Result, wanted: Decoded, params: SamplingParams) -> None:
    assert result.token_ids == wanted.tokens
    assert result.finish_reason == wanted.finish_reason
    if params.logprobs is None:
        return
    assert len(result.logprobs) == len(wanted.tokens)
    for ours, token, logprobs in zip(result.logprobs, wanted.tokens, wanted.logprobs, strict=True):
        values, ids = logprobs.topk(params.logprobs)
        assert ours.token_id == token
        assert ours.logprob == pytest.approx(float(logprobs[token]), abs=1e-4)
        assert [token for token, _ in ours.top] == ids.tolist()
        assert [value for _, value in ours.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_the_options_differ(expected: Table) -> None:
    """The table means something only if the options change the text, and the ends that it wants to see occur."""
    texts = {name: tuple(tuple(expected[name, i].tokens) for i in range(len(PROMPTS))) for name in OPTIONS}
    silent = {"logprobs", "top_k beyond the vocabulary"}
    base = texts["logprobs"]
    assert all((text == base) == (name in silent) for name, text in texts.items())
    for name in ("end of sequence", "stop_token_ids", "min_tokens", "stop string", "stop string after min_tokens"):
        assert any(expected[name, i].finish_reason == "stop" and len(expected[name, i].tokens) > 1 for i in range(len(PROMPTS))), name
    assert all(len(expected["ignore_eos", i].tokens) == NEW for i in range(len(PROMPTS)))


@pytest.mark.parametrize("name", OPTIONS)
def test_alone_and_plain(name: str, model: PreTrainedModel, expected: Table) -> None:
    params = OPTIONS[name]
    for i, prompt in enumerate(PROMPTS):
        [result] = run(build(model), [(prompt, params)])
        check(result, expected[name, i], params)


@pytest.mark.parametrize("nodes", [16, 33])
@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_with_speculation(name: str, nodes: int, model: PreTrainedModel, expected: Table) -> None:
    params = OPTIONS[name]
    engine = build(model, random_head(model), tree_nodes=nodes, max_num_seqs=3)
    Guide(engine, {str(i): prompt + _future(expected, name, i) for i, prompt in enumerate(PROMPTS)})
    results = run(engine, [(prompt, params) for prompt in PROMPTS])
    for i, result in enumerate(results):
        check(result, expected[name, i], params)
    if max(len(expected[name, i].tokens) for i in range(len(PROMPTS))) == NEW:
        assert sum(result.speculation.num_accepted_tokens for result in results) > NEW // 2


def _future(expected: Table, name: str, i: int) -> list[int]:
    """The text, and beyond its end something to draft, so that a path may reach past a stop."""
    return [*expected[name, i].tokens, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("nodes", "batch"), [(1, 32), (16, 32), (33, 5), (16, 2)])
def test_all_options_in_one_batch(nodes: int, batch: int, model: PreTrainedModel, expected: Table) -> None:
    """Every request next to requests with other options, which come and go at different times."""
    keys = list(itertools.product(OPTIONS, range(len(PROMPTS))))
    keys = keys[::3] + keys[1::3] + keys[2::3]
    engine = build(model, random_head(model), tree_nodes=nodes, max_num_seqs=batch, block_size=8)
    Guide(engine, {str(n): PROMPTS[i] + _future(expected, name, i) for n, (name, i) in enumerate(keys)})
    results = run(engine, [(PROMPTS[i], OPTIONS[name]) for name, i in keys])
    for key, result in zip(keys, results, strict=True):
        check(result, expected[key], OPTIONS[key[0]])


@pytest.mark.parametrize("with_kernels", [True, False])
def test_tree_sizes_that_change_every_step(
    with_kernels: bool, model: PreTrainedModel, expected: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the load rule may do at worst, with a real head: on, off, small, large; texts' own trees beside them, looked up before or not;
    where the CPU's kernels could be compiled, and where not.
    """
    if not with_kernels:
        monkeypatch.setattr(cpu, "library", lambda: None)
    engine = build(model, random_head(model), tree_nodes=33)
    full = engine.shape
    priced = [full._replace(level_price=level, node_price=node) for level, node in ((0.3, 0.0), (0.5, 0.05), (0.0, 0.2))]
    shapes = itertools.cycle([*priced, *(full.shrunk(nodes) for nodes in (33, 1, 2, 16, 1, 1, 5, 3, 8))])
    steps = itertools.count()

    def plan(requests: list[Request]) -> Plan:
        """Now all draft, now those of odd places, while some of the others copy."""
        step, shape = next(steps), next(shapes)
        found = engine.proposer.look_up(requests, 33)
        assert found is not None
        guesses = {request.request_id: draft for request, draft in zip(requests, found, strict=True)} if step % 4 else None
        drafting = requests[step % 2 :: 2] if step % 3 else requests
        others = [request for request in requests if request not in drafting]
        copied.update(request.request_id for request in others[::2])
        return Plan(shape, drafting, copying=others[::2], guesses=guesses)

    copied = set[str]()
    monkeypatch.setattr(engine, "_plan", plan)
    keys = [(name, i) for i in range(len(PROMPTS)) for name in OPTIONS]
    results = run(engine, [(PROMPTS[i], OPTIONS[name]) for name, i in keys])
    assert len(copied) > 5
    for key, result in zip(keys, results, strict=True):
        check(result, expected[key], OPTIONS[key[0]])


def test_a_head_that_knows_the_temperature(model: PreTrainedModel, expected: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shift changes what is drafted above temperature 0, and never the text."""

    def trees(name: str, shift: float) -> list[Tensor]:
        head, drafted = random_head(model, temperature_shift=True, temperature_sharpness=1.5), []
        assert head.temperature_shift is not None
        head.temperature_shift.copy_(shift * torch.randn(head.config.hidden_size, generator=torch.Generator().manual_seed(0)))
        engine = build(model, head, tree_nodes=16)
        propose = engine.proposer.propose

        def record(*arguments: Any) -> Tree:
            drafted.append(propose(*arguments))
            return drafted[-1]

        monkeypatch.setattr(engine.proposer, "propose", record)
        for i, result in enumerate(run(engine, [(prompt, OPTIONS[name]) for prompt in PROMPTS])):
            check(result, expected[name, i], OPTIONS[name])
        return [tree.tokens for tree in drafted]

    for name, same in (("greedy", True), ("temperature 1", False)):
        without, shifted = trees(name, 0.0), trees(name, 5.0)
        assert torch.equal(without[0], shifted[0]) == same
        assert (len(without) == len(shifted) and all(map(torch.equal, without, shifted))) == same


def test_prompt_logprobs_in_chunks(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.scheduler.PREFILL_ROWS", 7)
    params = replace(BASE, max_tokens=3, prompt_logprobs=2)
    others = [(prompt, BASE) for prompt in PROMPTS]
    results = run(build(model), [others[0], (PROMPTS[3] + PROMPTS[1], params), *others])
    prompt = PROMPTS[3] + PROMPTS[1]
    with torch.inference_mode():
        logprobs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    ours = results[1].prompt_logprobs
    assert ours is not None
    assert ours[0] is None
    assert len(ours) == len(prompt)
    for position, entry in enumerate(ours[1:]):
        assert entry is not None
        assert entry.token_id == prompt[position + 1]
        assert entry.logprob == pytest.approx(float(logprobs[position, entry.token_id]), abs=1e-4)
        assert [token for token, _ in entry.top] == logprobs[position].topk(2).indices.tolist()
    assert results[0].prompt_logprobs is None


def test_requests_without_a_seed_follow_the_engine_seed(model: PreTrainedModel) -> None:
    free = replace(BASE, seed=None)
    texts = [[result.token_ids for result in run(build(model, seed=seed), [(PROMPTS[0], free), (PROMPTS[0], free)])] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0] != texts[0][1], "two requests without a seed differ"


def test_children_of_one_request_by_seeds(model: PreTrainedModel) -> None:
    """n choices are n requests with n seeds: each is what it would be alone."""
    together = run(build(model, random_head(model)), [(PROMPTS[1], replace(BASE, seed=seed)) for seed in range(6)])
    alone = [run(build(model), [(PROMPTS[1], replace(BASE, seed=seed))])[0] for seed in range(6)]
    assert [result.token_ids for result in together] == [result.token_ids for result in alone]
    assert len({tuple(result.token_ids) for result in together}) == 6
