"""python -m tools.bench.load: speculation beside plain decoding under a load that changes, step by step in turn.

Both engines have one copy of the model and the same requests, and whoever is behind in tokens makes the next step, so that whatever else
the machine does meets both alike. Answers differ in length, as real ones do: half to one and a half times --max-tokens.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from server.engine.config import EngineConfig, EngineError
from server.engine.engine import Engine
from server.engine.host import keep_what_is_loaded
from server.engine.loading import load
from server.engine.target import Target
from server.engine.types import SamplingParams, StepStats
from tools.bench.arguments import PROMPTS, add_model, complete_draft, positive
from tools.prompts import PromptError, read_prompts
from tools.train_vsd.generate import Completion
from tools.train_vsd.plots import panels, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Request = tuple[list[int], SamplingParams]
HEROES = ("a fox who", "an old sailor who", "two sisters who", "a small robot that", "a king who", "a boy named Tim who")
HABITS = ("lost a red hat", "could not sleep", "wanted to see the sea", "was afraid of rain", "found a map", "never said no")
STORIES = [f"Write a story that begins like this: Once upon a time there was {hero} {habit}." for hero in HEROES for habit in HABITS]
WINDOW = 20  # steps over which speeds are compared, and within which the load rule should have followed a change


@dataclass(frozen=True)
class Phase:
    """``repeats``: requests for each stream, one after the other."""

    name: str
    streams: int
    temperature: float
    stories: bool
    repeats: int


PHASES = (
    Phase("text that repeats itself, 1 stream", 1, 0.0, False, 4),
    Phase("stories, 1 stream", 1, 1.0, True, 4),
    Phase("text that repeats itself, 8 streams", 8, 0.0, False, 3),
    Phase("stories, 8 streams", 8, 1.0, True, 3),
    Phase("text that repeats itself, 32 streams", 32, 0.0, False, 3),
    Phase("stories, 32 streams", 32, 1.0, True, 3),
    Phase("text that repeats itself, 1 stream again", 1, 0.0, False, 4),
)


@dataclass
class Replay:
    """One engine at the requests of one phase. ``seconds`` of its own steps, and ``tokens``, after each of them."""

    engine: Engine
    requests: Sequence[Request]
    streams: int
    seconds: list[float] = field(default_factory=lambda: [0.0])
    tokens: list[int] = field(default_factory=lambda: [0])
    steps: list[StepStats] = field(default_factory=list)
    answers: dict[int, list[int]] = field(default_factory=dict)
    _running: dict[str, Completion] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return not self._running and len(self.answers) == len(self.requests)

    def step(self) -> None:
        start = time.perf_counter()
        while len(self._running) < self.streams and len(self._running) + len(self.answers) < len(self.requests):
            index = len(self._running) + len(self.answers)
            self.engine.add_request(str(index), *self.requests[index])
            self._running[str(index)] = Completion(index)
        outputs, stats = self.engine.step()
        self.seconds.append(self.seconds[-1] + time.perf_counter() - start)
        self.tokens.append(self.tokens[-1] + stats.generation_tokens)
        self.steps.append(stats)
        for output in outputs:
            self._running[output.request_id].token_ids.extend(output.token_ids)
            if output.finish_reason is not None:
                self.answers[int(output.request_id)] = self._running.pop(output.request_id).token_ids


@dataclass(frozen=True)
class Row:
    """``drafting``: share of the requests that drafted, in the first WINDOW steps of the phase and in all later ones."""

    phase: str
    streams: int
    temperature: float
    requests: int
    plain_tokens_per_second: float
    tokens_per_second: float
    speedup_vs_plain: float
    drafting_at_first: float
    drafting_later: float
    differing_answers: int


def replay(phase: Phase, speculative: Engine, plain: Engine, requests: Sequence[Request]) -> tuple[Row, Replay, Replay]:
    """Both engines through the phase."""
    ours, theirs = (Replay(engine, requests, phase.streams) for engine in (speculative, plain))
    total = sum(params.max_tokens for _, params in requests)
    with tqdm(total=2 * total, desc=phase.name, unit="token", leave=False, disable=None) as progress:
        while not (ours.done and theirs.done):
            one = min((one for one in (ours, theirs) if not one.done), key=lambda one: one.tokens[-1])
            one.step()
            progress.update(one.tokens[-1] - one.tokens[-2])
    shares = [step.drafting / len(step.emitted) for step in ours.steps if step.emitted]
    row = Row(
        phase.name, phase.streams, phase.temperature, len(requests), theirs.tokens[-1] / theirs.seconds[-1],
        ours.tokens[-1] / ours.seconds[-1], theirs.seconds[-1] / ours.seconds[-1], float(np.mean(shares[:WINDOW])),
        float(np.mean(shares[WINDOW:] or shares)), sum(ours.answers[i] != theirs.answers[i] for i in theirs.answers),
    )  # fmt: skip
    return row, ours, theirs


def gains(ours: Replay, theirs: Replay) -> list[float]:
    """Speed against plain decoding of the same tokens, over WINDOW steps around each."""
    edges = np.arange(len(ours.tokens))
    ends = [np.clip(edges[1:] + shift, 0, len(edges) - 1) for shift in (-WINDOW // 2, WINDOW // 2)]
    mine = [np.asarray(ours.seconds)[end] for end in ends]
    plain = [np.interp(np.asarray(ours.tokens)[end], theirs.tokens, theirs.seconds) for end in ends]
    return list((plain[1] - plain[0]) / (mine[1] - mine[0]))


def picture(rows: Sequence[Row], replays: Sequence[tuple[Replay, Replay]]) -> "Figure":
    """Step by step: who drafts, and the speed."""
    figure, every = panels(2 * len(rows))
    for row, (ours, theirs), left, right in zip(rows, replays, every[::2], every[1::2], strict=True):
        steps = range(1, len(ours.steps) + 1)
        left.plot(steps, [len(step.emitted) for step in ours.steps], color="0.7", label="decoding")
        left.plot(steps, [step.drafting for step in ours.steps], color="C0", label="drafting")
        left.axvline(WINDOW, color="0.8", linestyle=":")
        left.set(title=row.phase, xlabel="Step", ylabel="Requests", ylim=(0, None))
        left.legend()
        right.axhline(1, color="0.7")
        right.plot(steps, gains(ours, theirs), color="C1")
        right.set(title=f"{row.speedup_vs_plain:.2f}x plain decoding", xlabel="Step", ylabel="Speed against plain", ylim=(0, None))
    return figure


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model(parser)
    parser.add_argument("--max-tokens", type=positive, default=64, metavar="N", help="mean of the answers' lengths (default %(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)), metavar="N", help="on a CPU (default: all)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the steps there")
    args = parser.parse_args(argv)
    complete_draft(parser, args)
    return args


def requests_of(phase: Phase, tokenizer: PreTrainedTokenizerBase, questions: Sequence[list[int]], max_tokens: int) -> list[Request]:
    """The phase's requests, the same in every run."""
    draws = random.Random(phase.name)
    if phase.stories:
        chats = [[{"role": "user", "content": story}] for story in draws.sample(STORIES, len(STORIES))]
        every = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"] for chat in chats]
    else:
        every = draws.sample(questions, len(questions))
    lengths = [draws.randint(max(1, max_tokens // 2), max_tokens * 3 // 2) for _ in range(phase.streams * phase.repeats)]
    return [
        (every[i % len(every)], SamplingParams(max_tokens=length, temperature=phase.temperature, seed=i, ignore_eos=True))
        for i, length in enumerate(lengths)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 when some answer was not that of plain decoding."""
    args = parse_arguments(argv)
    config = EngineConfig(args.model, args.draft, args.device, args.dtype, threads=args.threads, prefix_caching=False)
    try:
        target, head, tokenizer = load(config)
        questions = read_prompts(PROMPTS, tokenizer, 128)
        speculative = Engine(target, head, tokenizer, config)
        plain = Engine(Target(target.model, taps=False, decoder=target.decoder), None, tokenizer, config)
        keep_what_is_loaded()
    except (EngineError, PromptError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    rows: list[Row] = []
    replays: list[tuple[Replay, Replay]] = []
    print(f"{'load':<42} {'plain':>8} {'speculation':>12} {'speed':>7}  {'drafting at first, later':>24}  differing")
    for phase in PHASES:
        row, ours, theirs = replay(phase, speculative, plain, requests_of(phase, tokenizer, questions, args.max_tokens))
        rows.append(row)
        replays.append((ours, theirs))
        speeds = f"{row.plain_tokens_per_second:8.1f} {row.tokens_per_second:12.1f} {row.speedup_vs_plain:6.2f}x"
        print(f"{row.phase:<42} {speeds}  {row.drafting_at_first:16.0%}, {row.drafting_later:5.0%}  {row.differing_answers:9}", flush=True)
    if args.json:
        settings = {"dtype": args.dtype, "threads": args.threads, "max_tokens": args.max_tokens}
        args.json.write_text(json.dumps([asdict(row) | settings for row in rows], indent=2) + "\n", encoding="utf-8")
    if args.plot:
        save(args.plot.parent, lambda: {args.plot.stem: picture(rows, replays)})
    return int(any(row.differing_answers for row in rows))


if __name__ == "__main__":
    sys.exit(main())
