"""Plain decoding written out for one request: transformers' model and cache, transformers' logits processors, one token at a time.

Only the noise is the engine's, as it must be: the text is a function of the target and the noise.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kernels.noise import gumbel_noise
from server.engine.types import SamplingParams


class Decoded(NamedTuple):
    tokens: list[int]
    logprobs: list[Tensor]  # [V] each, raw
    finish_reason: str


def after_options(
    logits: Tensor,
    params: SamplingParams,
    prompt: list[int],
    output: list[int],
    eos: frozenset[int] = frozenset(),
    allowed: set[int] | None = None,
) -> Tensor:
    """Logits [V] of the next token after every option of the request; ``allowed``: what its grammar allows."""
    logits = logits.clone()
    for token, value in params.logit_bias.items():
        logits[token] += value
    if len(output) < params.min_tokens:
        logits[sorted(eos | set(params.stop_token_ids))] = float("-inf")
    if allowed is not None:
        logits[sorted(set(range(len(logits))) - allowed)] = float("-inf")
    row = logits[None]
    if params.repetition_penalty != 1:
        row = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(torch.tensor([prompt + output]), row)
    for token in set(output):
        row[0, token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    if not params.greedy:
        row = TemperatureLogitsWarper(params.temperature)(None, row) if params.temperature != 1 else row
        row = TopKLogitsWarper(params.top_k)(None, row) if params.top_k else row
        row = TopPLogitsWarper(params.top_p)(None, row) if params.top_p < 1 else row
        row = MinPLogitsWarper(params.min_p)(None, row) if params.min_p > 0 else row
    return row[0]


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prompt: list[int],
    params: SamplingParams,
    eos: frozenset[int] = frozenset(),
    to_text: Callable[[list[int]], str] = str,
    allowed: Callable[[list[int]], set[int]] | None = None,
) -> Decoded:
    """``to_text``: tokens to text, for stop strings; ``allowed``: output to what the request's grammar allows next."""
    output: list[int] = []
    logprobs: list[Tensor] = []
    cache, ids = None, prompt
    while True:
        result = model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
        cache, logits = result.past_key_values, result.logits[0, -1].float()
        scores = after_options(logits, params, prompt, output, eos, allowed and allowed(output))
        if not params.greedy:
            assert params.seed is not None
            position = len(prompt) + len(output)
            scores = scores + gumbel_noise(torch.tensor([params.seed]), torch.tensor([position]), len(scores))[0]
        token = int(scores.argmax())
        output.append(token)
        logprobs.append(logits.log_softmax(-1))
        ids = [token]
        before, text = len(to_text(output[:-1])), to_text(output)
        stopped = len(output) >= params.min_tokens and any(stop in text[max(0, before - len(stop) + 1) :] for stop in params.stop)
        if stopped or token in params.stop_token_ids or (token in eos and not params.ignore_eos):
            return Decoded(output, logprobs, "stop")
        if len(output) >= params.max_tokens:
            return Decoded(output, logprobs, "length")
