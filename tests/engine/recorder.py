"""Stands in for CUDA graphs on a CPU."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from server.engine.types import Grammar

KINDS: list[dict] = [
    {}, {"temperature": 0}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 20, "repetition_penalty": 1.2}, {"logit_bias": {7: 2.0}},
    {"max_draft_nodes": 0}, {"max_draft_nodes": 3}, {"min_tokens": 5, "min_p": 0.05}, {"logprobs": 2},
    {"grammar": Grammar("regex", "(yes|no|maybe), [a-z ]{3,20}")},
]  # fmt: skip
"""Options of every kind."""


def tensors(value: Any) -> Iterator[Tensor]:
    """Those in (nested) tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors(part)


class Recorded:
    """A recorder, which counts. What it records computes anew, into the tensors that the results were in; as CUDA graphs share their
    memory, all results of other recordings are lost then.
    """

    def __init__(self) -> None:
        self.count = 0
        self._results: list[list[Tensor]] = []

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        assert not torch.is_grad_enabled(), "kernels without gradients would not be recorded"
        self.count += 1
        results = function()
        own = list(tensors(results))
        self._results.append(own)

        def replay() -> None:
            new = list(tensors(function()))
            for others in self._results:
                for tensor in others:
                    tensor.fill_(float("-inf") if tensor.is_floating_point() else 3)
            for held, value in zip(own, new, strict=True):
                held.copy_(value)

        return replay, results
