"""python -m tools.bench.prefix: time to the first token of a prompt that the prefix cache has, and of one that it has not."""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median

from server.engine.config import EngineConfig, EngineError
from server.engine.engine import Engine
from server.engine.loading import load
from server.engine.types import SamplingParams
from tools.bench.arguments import add_model, complete_draft, positive


@dataclass(frozen=True)
class Row:
    """Medians, in seconds; ``same_answers``: that no answer depends on the cache."""

    prompt_tokens: int
    first: float
    repeated: float
    faster: float
    same_answers: bool


def first_token(engine: Engine, name: str, prompt: list[int], max_tokens: int) -> tuple[float, list[int]]:
    """Seconds until the first token of a request that is alone, and its whole answer."""
    start, seconds = time.perf_counter(), 0.0
    engine.add_request(name, prompt, SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True))
    answer: list[int] = []
    while engine.has_work():
        for output in engine.step()[0]:
            answer += output.token_ids
        seconds = seconds or (time.perf_counter() - start if answer else 0.0)
    return seconds, answer


def measure(engine: Engine, prompts: Sequence[list[int]], max_tokens: int) -> Row:
    """Every prompt twice with the cache, and once without."""
    first: list[float] = []
    repeated: list[float] = []
    same = True
    for i, prompt in enumerate(prompts):
        answers = []
        for times, turn in ((first, "first"), (repeated, "repeated")):
            seconds, answer = first_token(engine, f"{i}-{turn}", prompt, max_tokens)
            times.append(seconds)
            answers.append(answer)
        engine.prefix_cache.enabled = False
        answers.append(first_token(engine, f"{i}-without", prompt, max_tokens)[1])
        engine.prefix_cache.enabled = True
        same &= answers[0] == answers[1] == answers[2]
    return Row(len(prompts[0]), median(first), median(repeated), median(first) / median(repeated), same)


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 when an answer depends on the cache."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.prefix", description=__doc__)
    add_model(parser)
    parser.add_argument("--tokens", type=positive, default=1500, metavar="N", help="of the prompt, or as many as fit (default %(default)s)")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="prompts (default %(default)s)")
    parser.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)), metavar="N", help="on a CPU (default: all)")
    args = parser.parse_args(argv)
    complete_draft(parser, args)
    try:
        engine = Engine(*load(config := EngineConfig(args.model, args.draft, dtype="float32", threads=args.threads)), config)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    tokens, draws = min(args.tokens, engine.max_model_len - 16), random.Random(0)
    prompts = [[draws.randrange(engine.vocab_size // 2) for _ in range(tokens)] for _ in range(args.rounds)]
    row = measure(engine, prompts, 16)
    times = f"{row.first * 1e3:.1f} ms to the first token, {row.repeated * 1e3:.1f} ms when repeated, {row.faster:.1f}x faster"
    print(f"{row.prompt_tokens} prompt tokens: {times}; answers {'do not ' if row.same_answers else ''}depend on the cache")
    if args.json:
        args.json.write_text(json.dumps(asdict(row), indent=2) + "\n", encoding="utf-8")
    return int(not row.same_answers)


if __name__ == "__main__":
    sys.exit(main())
