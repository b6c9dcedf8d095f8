"""Speculation beside plain decoding, step by step in turn."""

from dataclasses import replace

import numpy as np
import pytest

from server.engine.types import SamplingParams
from tests.engine.engines import build, byte_tokenizer, random_head, tiny_model
from tools.bench import load
from tools.bench.load import PHASES, Phase, Replay, gains, picture, replay, requests_of

PHASE = Phase("a phase", 3, 1.0, False, 4)


@pytest.fixture(scope="module")
def replayed() -> tuple[load.Row, Replay, Replay]:
    model = tiny_model()
    requests = [([i, 2, 3], SamplingParams(max_tokens=5 + i, temperature=1.0, seed=i, ignore_eos=True)) for i in range(8)]
    return replay(PHASE, build(model, random_head(model)), build(model), requests)


def test_both_do_the_same_work_in_turn(replayed: tuple[load.Row, Replay, Replay]) -> None:
    row, ours, theirs = replayed
    assert row.differing_answers == 0
    assert row.requests == len(ours.answers) == 8
    assert ours.answers == theirs.answers
    assert [len(ours.answers[i]) for i in range(8)] == [5 + i for i in range(8)]
    assert ours.tokens[-1] == theirs.tokens[-1] == sum(5 + i for i in range(8))
    assert row.speedup_vs_plain == pytest.approx(theirs.seconds[-1] / ours.seconds[-1])
    assert max(len(step.emitted) for step in ours.steps) == 3
    assert row.drafting_later > 0.9


def test_an_answer_that_differs_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    requests = [([5, 2, 3], SamplingParams(max_tokens=5, seed=i)) for i in range(3)]
    plain = build(model)
    add = plain.add_request
    monkeypatch.setattr(plain, "add_request", lambda name, ids, params: add(name, ids, replace(params, seed=(params.seed or 0) // 2 * 2)))
    assert replay(PHASE, build(model), plain, requests)[0].differing_answers == 1


def test_gains_compare_the_time_for_the_same_tokens() -> None:
    ours = Replay(None, [], 1, seconds=list(np.arange(101) * 0.2), tokens=list(range(0, 303, 3)))  # type: ignore[arg-type]
    theirs = Replay(None, [], 1, seconds=list(np.arange(301) * 0.1), tokens=list(range(301)))  # type: ignore[arg-type]
    assert gains(ours, theirs) == pytest.approx([1.5] * 100)


def test_requests_are_the_same_in_every_run() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    questions = [[i] for i in range(50)]
    for phase in PHASES:
        first, second = (requests_of(phase, tokenizer, questions, 10) for _ in range(2))
        assert first == second
        assert len(first) == phase.streams * phase.repeats
        lengths = [params.max_tokens for _, params in first]
        assert min(lengths) >= 5
        assert max(lengths) <= 15


def test_picture(replayed: tuple[load.Row, Replay, Replay]) -> None:
    pytest.importorskip("matplotlib")
    row, ours, theirs = replayed
    assert len(picture([row], [(ours, theirs)]).axes) == 2
