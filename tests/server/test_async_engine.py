"""The engine thread: admission, delivery, cancellation, failure, stop."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from server.engine.async_engine import AsyncEngine, EngineRequest, OutputStream, QueueFullError
from server.engine.config import EngineError
from server.engine.types import RequestOutput, SamplingParams, StepStats
from tests.server.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio


@pytest.fixture
def observed() -> list[StepStats]:
    return []


@pytest.fixture
async def runner(engine: FakeEngine, observed: list[StepStats], anyio_backend: str) -> AsyncIterator[AsyncEngine]:
    runner = AsyncEngine(engine, 3, observed.append)
    runner.start()
    yield runner
    await runner.stop()
    assert not runner.alive


def request(name: str, **options: object) -> EngineRequest:
    return EngineRequest(name, [70], SamplingParams(**options))


async def drain(stream: OutputStream) -> list[RequestOutput]:
    return [output async for outputs in stream for output in outputs]


async def settled(runner: AsyncEngine, name: str = "later") -> None:
    """Everything that was sent to the engine before has been handled."""
    async with runner.generate([request(name, max_tokens=1)]) as stream:
        await drain(stream)


async def test_outputs_of_several_requests(runner: AsyncEngine, engine: FakeEngine) -> None:
    async with runner.generate([request("a", max_tokens=4), request("b", max_tokens=2, seed=5)]) as stream:
        outputs = await drain(stream)
    assert "".join(output.text for output in outputs if output.request_id == "a") == "abcd"
    assert "".join(output.text for output in outputs if output.request_id == "b") == "fg"
    assert engine.aborted == []
    assert engine.threads == {"engine"}


async def test_idle_engine_makes_no_steps(runner: AsyncEngine, engine: FakeEngine) -> None:
    await settled(runner)
    steps = engine.num_steps
    await asyncio.sleep(0.05)
    assert engine.num_steps == steps


async def test_what_waits_comes_together() -> None:
    stream = OutputStream(["a"])
    for i in range(3):
        stream.put(RequestOutput("a", token_ids=[i], finish_reason="stop" if i == 2 else None))
    assert [len(outputs) async for outputs in stream] == [3]


async def test_all_are_admitted_or_none(runner: AsyncEngine, engine: FakeEngine) -> None:
    with pytest.raises(EngineError, match="666"):
        async with runner.generate([request("a"), request("b", max_tokens=666)]):
            pytest.fail("admitted")
    await settled(runner)
    assert engine.aborted == ["a"]


async def test_capacity(runner: AsyncEngine, engine: FakeEngine) -> None:
    with pytest.raises(EngineError, match="at most 3"):
        async with runner.generate([request(name) for name in "abcd"]):
            pytest.fail("admitted")
    engine.gate.clear()
    async with runner.generate([request("a"), request("b")]):
        with pytest.raises(QueueFullError):
            async with runner.generate([request("c"), request("d")]):
                pytest.fail("admitted")
        async with runner.generate([request("e")]):
            pass
    engine.gate.set()
    async with runner.generate([request("f"), request("g"), request("h")]) as stream:
        await drain(stream)


async def test_capacity_in_tokens(engine: FakeEngine) -> None:
    """Tokens count until the request has made one of its own, or is gone; the first to come is always taken."""
    runner = AsyncEngine(engine, 9, lambda stats: None, max_queued_tokens=5)
    runner.start()

    async def refused(tokens: int) -> bool:
        try:
            async with runner.generate([EngineRequest("more", [70] * tokens, SamplingParams(max_tokens=2))]):
                return False
        except QueueFullError:
            return True

    engine.gate.clear()
    async with runner.generate([EngineRequest("a", [70] * 6, SamplingParams(max_tokens=500))]) as stream:
        assert await refused(1)
        engine.gate.set()
        await anext(stream)
        assert not await refused(6)
    engine.gate.clear()
    async with runner.generate([request("b", max_tokens=2), request("c", max_tokens=2)]):
        assert not await refused(3)
        assert await refused(4)
    with pytest.raises(EngineError):
        async with runner.generate([EngineRequest("d", [70] * 5, SamplingParams(max_tokens=666))]):
            pytest.fail("admitted")
    assert not await refused(6), "what is gone does not count"
    engine.gate.set()
    await runner.stop()


@pytest.mark.parametrize("generating", [False, True])
async def test_leaving_aborts(runner: AsyncEngine, engine: FakeEngine, observed: list[StepStats], generating: bool) -> None:
    if not generating:
        engine.gate.clear()
    async with runner.generate([request("a", max_tokens=500), request("b", max_tokens=500)]) as stream:
        if generating:
            await anext(stream)
    engine.gate.set()
    await settled(runner)
    assert sorted(engine.aborted) == ["a", "b"]
    finished = [outcome for stats in observed for outcome, _ in stats.finished]
    assert sorted(finished) == ["abort", "abort", "length"]


async def test_cancelled_while_it_waits_to_be_admitted(runner: AsyncEngine, engine: FakeEngine) -> None:
    async def generate() -> None:
        async with runner.generate([request("a", max_tokens=500)]) as stream:
            await drain(stream)

    task = asyncio.ensure_future(generate())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await settled(runner)
    assert not engine.requests


async def test_step_that_raises_fails_the_requests_of_the_time_only(runner: AsyncEngine, engine: FakeEngine) -> None:
    engine.gate.clear()
    async with runner.generate([request("a"), request("b")]) as stream:
        engine.broken = True
        outputs = await drain(stream)
        assert {(output.request_id, output.finish_reason) for output in outputs} == {("a", "error"), ("b", "error")}
    engine.gate.set()
    await settled(runner)
    assert not engine.requests


async def test_idle_statistics_follow_an_abort(runner: AsyncEngine, engine: FakeEngine, observed: list[StepStats]) -> None:
    engine.gate.clear()
    async with runner.generate([request("a")]):
        while not any(stats.num_running for stats in observed):
            await asyncio.sleep(0.001)
    while observed[-1].num_running:
        await asyncio.sleep(0.001)
    assert observed[-1].seconds == 0
    assert observed[-1].kv_usage == 0


async def test_stop_ends_open_requests(engine: FakeEngine) -> None:
    engine.gate.clear()
    runner = AsyncEngine(engine, 3, lambda stats: None)
    runner.start()
    async with runner.generate([request("a")]) as stream:
        await runner.stop()
        assert [output.finish_reason for output in await drain(stream)] == ["abort"]
    with pytest.raises(RuntimeError):
        async with runner.generate([request("b")]):
            pytest.fail("admitted")
