"""Measures a head that is still in memory, with the engine that will serve it, on the teacher's own weights."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from drafts.eagle3 import Eagle3Head
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.target import Target
from server.engine.types import SamplingParams
from tools.train_vsd.evaluate import acceptance
from tools.train_vsd.generate import Completion, complete
from tools.train_vsd.teacher import Teacher


class Probe:
    """``concurrency``: requests that run at once; it changes speed and memory, not what is measured."""

    def __init__(self, teacher: Teacher, tokenizer: PreTrainedTokenizerFast, concurrency: int) -> None:
        self.teacher, self.tokenizer, self.concurrency = teacher, tokenizer, concurrency
        with teacher.serving():
            self.target = Target(teacher.model, taps=True)

    def complete(self, head: Eagle3Head, prompts: Sequence[list[int]], sampling: SamplingParams, **options: Any) -> list[Completion]:
        """Completions in the order of ``prompts``; request i has seed ``sampling.seed`` + i. ``options``: fields of EngineConfig."""
        requests = [(prompt, dataclasses.replace(sampling, seed=(sampling.seed or 0) + i)) for i, prompt in enumerate(prompts)]
        with self.teacher.serving():
            longest = max(map(len, prompts)) + sampling.max_tokens  # a cache for longer requests would only cost time
            config = EngineConfig(max_num_seqs=self.concurrency, load_rule=False, ngrams=False, max_model_len=longest, **options)
            engine = Engine(self.target, head, self.tokenizer, config)
            return sorted(complete(engine, requests, self.concurrency), key=lambda completion: completion.index)

    def lengths(self, head: Eagle3Head, prompts: Sequence[list[int]], max_tokens: int, **options: Any) -> dict[str, float]:
        """Pooled acceptance lengths at temperatures 0 and 1."""
        return {
            f"tau_t{temperature:g}": acceptance(
                self.complete(head, prompts, SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=0), **options)
            )["acceptance_length"]
            for temperature in (0.0, 1.0)
        }
