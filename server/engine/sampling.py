"""The sampling options of a batch of requests as tensors."""

import torch
from torch import Tensor

from kernels.noise import Noise, NoiseKey
from kernels.sampling import Bans, Bias, Filters, Penalties, SamplingBatch
from server.engine.host import on_device
from server.engine.request import Request


def batch_options(requests: list[Request], vocab_size: int, device: torch.device) -> SamplingBatch:
    """Options of ``requests`` in order; parts that no request uses are None."""
    params = [request.params for request in requests]

    def column(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return on_device(values, device, dtype)

    filters = penalties = bias = None
    # A greedy choice needs no filter, and a greedy request's draft must not be narrowed by one.
    kept = [
        (p.top_k if 0 < p.top_k < vocab_size else vocab_size, p.top_p, p.min_p) if not p.greedy else (vocab_size, 1.0, 0.0) for p in params
    ]
    if any(values != (vocab_size, 1.0, 0.0) for values in kept):
        filters = Filters(column([k for k, _, _ in kept], torch.long), column([p for _, p, _ in kept]), column([m for _, _, m in kept]))
    if any(request.output_counts is not None for request in requests):
        penalties = _penalties(requests, vocab_size, device)
    if any(p.logit_bias for p in params):
        ids = _padded([list(p.logit_bias) for p in params], 0, device)
        bias = Bias(ids, _padded([list(p.logit_bias.values()) for p in params], 0.0, device))
    temperatures = [1.0 if p.greedy else p.temperature for p in params]
    neutral = device.type == "cpu" and all(value == 1.0 for value in temperatures)  # elsewhere graphs are recorded once for all of them
    temperature = None if neutral else column(temperatures)
    return SamplingBatch(temperature, filters, penalties, bias, _bans(requests, device))


def _penalties(requests: list[Request], vocab_size: int, device: torch.device) -> Penalties:
    counts = torch.zeros(len(requests), vocab_size, dtype=torch.int32, device=device)
    prompts = torch.zeros(len(requests), vocab_size, dtype=torch.bool, device=device)
    for i, request in enumerate(requests):
        if request.output_counts is not None and request.prompt_tokens is not None:
            counts[i], prompts[i] = request.output_counts.to(device), request.prompt_tokens.to(device)
    values = on_device([(r.params.presence_penalty, r.params.frequency_penalty, r.params.repetition_penalty) for r in requests], device)
    return Penalties(values[:, 0], values[:, 1], values[:, 2], counts, prompts)


def _bans(requests: list[Request], device: torch.device) -> Bans | None:
    """A node of depth d precedes output token number num_output + d + 1, which may end the request from min_tokens + 1 on."""
    until = [request.params.min_tokens - request.num_output for request in requests]
    if max(until) <= 0:
        return None
    ids = _padded([sorted(request.forbidden_until_min_tokens) for request in requests], -1, device)
    return Bans(ids, on_device(until, device))


def _padded(rows: list[list], fill: float, device: torch.device) -> Tensor:
    width = 1 << (max(map(len, rows)) - 1).bit_length()  # few widths: graphs are recorded for each
    return on_device([row + [fill] * (width - len(row)) for row in rows], device)


def batch_noise(requests: list[Request], depths: int, vocab_size: int, device: torch.device) -> Noise | None:
    """Noise of the next ``depths`` tokens: depth d is position len(token_ids) + d, so that it depends on the request's seed and the
    token's place alone. None when all requests are greedy.
    """
    sampled = [not request.params.greedy for request in requests]
    if not any(sampled):
        return None
    seeds = on_device([request.seed for request in requests], device)
    positions = on_device([len(request.token_ids) for request in requests], device)
    return Noise(NoiseKey(seeds, positions, on_device(sampled, device)), depths, vocab_size)
