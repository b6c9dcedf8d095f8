"""Faults are read as written, and put where they are named."""

import time
from dataclasses import replace

import pytest
import torch

from server.engine import steps
from server.engine.async_engine import AsyncEngine
from server.engine.engine import Engine
from server.engine.types import SamplingParams
from server.faults import Fault, install, parse
from server.openai.service import Service
from tests.engine.engines import Run, build, random_head, tiny_model

PROMPTS = [[10, 20, 30], [40, 50, 60, 70] * 9, [5, 6]]
PARAMS = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("draft:raise", [Fault("draft", "raise")]),
        ("draft:raise:0.1, target:nan,step:sleep=2", [Fault("draft", "raise", 0, 0.1), Fault("target", "nan"), Fault("step", "sleep", 2)]),
        ("step:sleep=0.5:0", [Fault("step", "sleep", 0.5, 0)]),
    ],
)
def test_parse(text: str, faults: list[Fault]) -> None:
    assert parse(text) == faults


@pytest.mark.parametrize(
    "text",
    ["", "draft", "draft:", "drafts:raise", "draft:rise", "draft:raise:x", "draft:raise:1.1", "draft:raise:-1", "draft:raise=1",
     "step:sleep", "step:sleep=x", "step:sleep=-1", "commit:nan", "draft:raise,", "draft:raise:nan"],
)  # fmt: skip
def test_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no fault"):
        parse(text)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    for name in ("tree_verify", "kv_commit", "prompt_rows"):
        monkeypatch.setattr(steps, name, getattr(steps, name))  # put back what a fault wraps
    model = tiny_model()
    return build(model, random_head(model))


def faulty(engine: Engine, text: str) -> Service:
    service = Service(AsyncEngine(engine, 9, lambda stats: None), "m", 15, 0, 20, False, None)
    install(parse(text), service)
    return service


def texts(engine: Engine, prefix: str = "") -> dict[str, list[int] | None]:
    """What is generated after the prompts, which come one after the other; None for a request that failed."""
    going = Run(engine)
    for i, prompt in enumerate(PROMPTS):
        going.add(f"{prefix}{i}", prompt, PARAMS)
        going.step()
        going.step()
    return {name[len(prefix) :]: None if r.finish_reason == "error" else r.token_ids for name, r in going.finish().items()}


def clean(engine: Engine) -> bool:
    return engine.pool.usage == engine.num_running == engine.num_waiting == 0


@pytest.mark.parametrize("fault", ["draft:raise", "draft:memory:0.5", "draft:nan", "draft:nan:0.3", "draft:sleep=0.001"])
def test_a_draft_that_fails_changes_no_text(engine: Engine, fault: str) -> None:
    expected = texts(engine, "before")
    faulty(engine, fault)
    assert texts(engine) == expected
    assert clean(engine)


@pytest.mark.parametrize("point", ["prefill", "target", "verify", "commit"])
@pytest.mark.parametrize("kind", ["raise", "memory"])
def test_a_step_that_fails_now_and_then_costs_its_requests_only(engine: Engine, point: str, kind: str) -> None:
    """With the one chance that each request gets alone, whatever survives is right."""
    expected = texts(engine, "before")
    faulty(engine, f"{point}:{kind}:0.3")
    survived = 0
    for turn in range(12):
        found = texts(engine, f"{turn}-")
        assert all(found[name] in (None, expected[name]) for name in expected)
        survived += sum(tokens is not None for tokens in found.values())
        assert clean(engine)
    assert survived


def test_every_request_of_nan_logits_fails(engine: Engine) -> None:
    faulty(engine, "target:nan")
    assert set(texts(engine).values()) == {None}
    assert clean(engine)


def test_failures_are_counted(engine: Engine) -> None:
    faulty(engine, "draft:raise,verify:raise:0.2")
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(str(i), prompt, replace(PARAMS, max_tokens=40))
    failed_drafts = failed_steps = 0
    while engine.has_work():
        _, stats = engine.step()
        failed_drafts, failed_steps = failed_drafts + stats.failed_drafts, failed_steps + stats.failed_steps
    assert failed_drafts
    assert failed_steps


@pytest.mark.parametrize("point", ["step", "prefill", "target", "verify"])
def test_an_error_of_the_device_ends_the_engine(engine: Engine, point: str) -> None:
    faulty(engine, f"{point}:device")
    with pytest.raises(torch.AcceleratorError):
        texts(engine)


@pytest.mark.anyio
async def test_tokenizer(engine: Engine) -> None:
    with pytest.raises(RuntimeError, match="injected at tokenizer"):
        await faulty(engine, "tokenizer:raise").encode(["x"])


def test_sleep(engine: Engine) -> None:
    faulty(engine, "step:sleep=0.05")
    start = time.monotonic()
    engine.step()
    assert time.monotonic() - start >= 0.05
