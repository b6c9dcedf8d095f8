"""The noise of a batch."""

import random

import torch
from tokenizers import Tokenizer, models

from kernels.noise import gumbel_noise
from server.engine.request import Request
from server.engine.sampling import batch_noise
from server.engine.types import SamplingParams

VOCAB, CPU = 12, torch.device("cpu")


def request(seed: int, temperature: float) -> Request:
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    return Request.create(str(seed), [0] * (seed % 5 + 1), SamplingParams(temperature=temperature), seed, frozenset(), tokenizer, VOCAB)


def test_every_position_has_its_noise() -> None:
    """Whatever the steps are that lead there, and whoever is beside the request."""
    rng = random.Random(5)
    requests = [request(11, 1.0), request(2**61, 0.3), request(3, 0.0), request(77, 2.0)]
    for _ in range(40):
        batch, depths = rng.sample(requests, rng.randint(1, 4)), rng.randint(1, 9)
        noise = batch_noise(batch, depths, VOCAB, CPU)
        if noise is None:
            assert all(r.params.greedy for r in batch)
            continue
        for i, (values, r) in enumerate(zip(noise.values, batch, strict=True)):
            positions = torch.arange(len(r.token_ids), len(r.token_ids) + depths)
            right = gumbel_noise(torch.full_like(positions, r.seed), positions, VOCAB)
            assert torch.equal(values, torch.zeros_like(right) if r.params.greedy else right)
            assert torch.equal(noise.at(depths - 1)[i], values[-1])
            r.token_ids += [0] * rng.randint(0, depths)
