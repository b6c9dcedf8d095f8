"""Time to the first token with the prefix cache."""

import pytest

from tests.engine.engines import build, random_head, tiny_model
from tools.bench.prefix import measure


def test_a_repeated_prompt_is_found_and_its_answer_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    engine = build(model, random_head(model), prefix_caching=True)
    row = measure(engine, [[i + j for j in range(60)] for i in range(3)], 6)
    assert row.prompt_tokens == 60
    assert row.same_answers
    assert row.faster == pytest.approx(row.first / row.repeated)
    assert engine.prefix_cache.enabled


def test_an_answer_that_depends_on_the_cache_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build(tiny_model(), prefix_caching=True)
    real = engine.add_request

    def add(name: str, prompt: list[int], params: object) -> None:
        real(name, prompt[::-1] if name == "1-repeated" else prompt, params)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "add_request", add)
    assert not measure(engine, [[i + j for j in range(60)] for i in range(3)], 6).same_answers
