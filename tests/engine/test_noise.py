"""The noise of a batch, from runs that requests keep."""

import random

import pytest
import torch
from tokenizers import Tokenizer, models

from kernels.noise import gumbel_noise
from server.engine import sampling
from server.engine.request import Request
from server.engine.sampling import batch_noise
from server.engine.types import SamplingParams

VOCAB, CPU = 12, torch.device("cpu")


def request(seed: int, temperature: float) -> Request:
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    return Request.create(str(seed), [0] * (seed % 5 + 1), SamplingParams(temperature=temperature), seed, frozenset(), tokenizer, VOCAB)


@pytest.mark.parametrize("entries", [1, 3 * VOCAB, 100 * VOCAB], ids=["a row", "three rows", "many rows"])
def test_every_position_has_its_noise(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the steps are that lead there, and whoever is beside the request."""
    monkeypatch.setattr(sampling, "RUN_ENTRIES", entries)
    rng = random.Random(5)
    requests = [request(11, 1.0), request(2**61, 0.3), request(3, 0.0), request(77, 2.0)]
    for _ in range(40):
        batch, depths = rng.sample(requests, rng.randint(1, 4)), rng.randint(1, 9)
        noise = batch_noise(batch, depths, VOCAB, CPU)
        if noise is None:
            assert all(r.params.greedy for r in batch)
            continue
        for values, r in zip(noise.values, batch, strict=True):
            positions = torch.arange(len(r.token_ids), len(r.token_ids) + depths)
            right = gumbel_noise(torch.full_like(positions, r.seed), positions, VOCAB)
            assert torch.equal(values, torch.zeros_like(right) if r.params.greedy else right)
            r.token_ids += [0] * rng.randint(0, depths)


@pytest.mark.parametrize("reaches", [(6,), (6, 1, 14, 1)])
def test_no_run_is_made_twice_or_kept_for_ever(reaches: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """However far the steps look ahead, in turns."""
    monkeypatch.setattr(sampling, "RUN_ENTRIES", 4 * VOCAB)
    made: list[int] = []
    monkeypatch.setattr(
        sampling, "gumbel_noise", lambda seeds, positions, size: made.extend(positions.tolist()) or torch.rand(len(seeds), size)
    )
    r = request(4, 1.0)  # of 5 tokens
    for step in range(40):
        batch_noise([r], reaches[step % len(reaches)], VOCAB, CPU)
        r.token_ids.append(0)
        assert len(r.noise) <= 5
    assert made == list(range(4, made[-1] + 1))
