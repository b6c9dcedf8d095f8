"""Acceptance of a head, measured by the engine that serves it."""

import dataclasses
import time
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import torch

from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.types import SamplingParams
from tools.loops import repeated_8_grams
from tools.train_vsd.generate import Completion, complete


def measuring_engine(target: str, draft: str | None, device: str, concurrency: int, ngrams: bool = False, **options: Any) -> Engine:
    """An engine whose head drafts the same tree at every step, whatever the load, alone unless ``ngrams``.

    ``options``: further fields of EngineConfig.
    """
    config = EngineConfig(
        model=target, draft=draft, device=device, threads=torch.get_num_threads(), max_num_seqs=concurrency, load_rule=False,
        ngrams=ngrams, **options,
    )  # fmt: skip
    return Engine.from_config(config)


def evaluate(engine: Engine, prompts: Sequence[list[int]], sampling: SamplingParams, concurrency: int) -> dict[str, Any]:
    """Generate for every prompt and return the figures of ``evaluate --json``.

    Request i samples with seed ``sampling.seed`` + i. Acceptance length counts the bonus token: tokens committed per verification.
    The interval is a bootstrap over prompts. ``repeated_8_grams``: share of looping text, which lengthens acceptance.
    """
    start = time.monotonic()
    requests = [(prompt, dataclasses.replace(sampling, seed=(sampling.seed or 0) + i)) for i, prompt in enumerate(prompts)]
    completions = list(complete(engine, requests, concurrency))
    seconds = time.monotonic() - start
    num_tokens = sum(len(completion.token_ids) for completion in completions)
    return {
        **acceptance(completions),
        "num_prompts": len(prompts),
        "num_tokens": num_tokens,
        "tokens_per_second": num_tokens / seconds,
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_tokens,
        "seed": sampling.seed or 0,
        "concurrency": concurrency,
        "repeated_8_grams": float(np.mean([repeated_8_grams(completion.token_ids) for completion in completions])),
        "tree": dict(zip(("nodes", "depth", "topk"), engine.shape, strict=False)) | {"draft_temperature": engine.proposer.sigma},
    }


def acceptance(completions: Sequence[Completion]) -> dict[str, Any]:
    """Acceptance lengths, pooled and per prompt, over the completions that verified anything."""
    stats = [completion.speculation for completion in completions if completion.speculation.num_steps > 0]
    steps = np.array([s.num_steps for s in stats])
    tokens = steps + np.array([s.num_accepted_tokens for s in stats])
    if not stats:
        return dict.fromkeys(("acceptance_length", "acceptance_length_per_prompt_mean"), 1.0) | {
            "acceptance_length_ci95": [1.0, 1.0],
            "acceptance_by_depth": [],
            "acceptance_histogram": [],
            "num_steps": 0,
        }
    by_depth = np.array(add_up([s.accepted_by_depth for s in stats]))
    samples = np.random.default_rng(0).integers(len(stats), size=(2000, len(stats)))
    resampled = tokens[samples].sum(1) / steps[samples].sum(1)
    return {
        "acceptance_length": float(tokens.sum() / steps.sum()),
        "acceptance_length_per_prompt_mean": float((tokens / steps).mean()),
        "acceptance_length_ci95": [float(x) for x in np.quantile(resampled, (0.025, 0.975))],
        "acceptance_by_depth": [float(x) for x in by_depth / steps.sum()],
        "acceptance_histogram": add_up([s.acceptance_histogram for s in stats]),
        "num_steps": int(steps.sum()),
    }


def add_up(counts: Sequence[Sequence[int]]) -> list[int]:
    """Sum of lists of counts; shorter ones have zeros at their end."""
    return [sum(column) for column in zip_longest(*counts, fillvalue=0)]
