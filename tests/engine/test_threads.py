"""The number of threads is decided by measured seconds, and a thread that brings little is left alone."""

from collections.abc import Iterator

import pytest
import torch

from server.engine import threads
from server.engine.threads import choose_threads
from tests.engine.engines import build, tiny_model


@pytest.fixture(autouse=True)
def same_threads_afterwards() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("seconds", "limit", "chosen"),
    [
        ({1: 1.0}, 1, 1),
        ({1: 1.0, 2: 0.95}, 2, 1),
        ({1: 1.0, 2: 0.6}, 2, 2),
        ({1: 1.0, 2: 0.6, 3: 0.58}, 3, 2),
        ({1: 1.0, 2: 0.95, 4: 0.5, 6: 0.7}, 6, 4),
    ],
)
def test_the_fewest_that_are_fast(monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], limit: int, chosen: int) -> None:
    now = [0.0]

    def work(*_: object) -> None:
        now[0] += seconds[torch.get_num_threads()]

    monkeypatch.setattr(threads, "_forward", lambda target, rows: work)
    monkeypatch.setattr(threads.time, "perf_counter", lambda: now[0])
    assert choose_threads(build(tiny_model("llama")).steps.target, limit) == chosen


def test_real_passes() -> None:
    assert choose_threads(build(tiny_model("llama")).steps.target, 2) in (1, 2)
