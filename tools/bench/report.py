"""What the rounds say: speeds, ratios, and when there is no ratio."""

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from tools.bench.rounds import Round


@dataclass(frozen=True)
class Row:
    """One system at one concurrency and temperature. ``missing``: why it was not measured; then the figures are None.

    ``tokens_per_second``: of the median round. ``tokens`` and ``seconds``: of one round. ``speedup_vs_plain``: median of the ratios
    within rounds, ``speedup_range`` their least and largest; None where the two generated different numbers of tokens.
    ``acceptance_length``: tokens committed per verification, bonus token counted, pooled over everything; None when nothing was
    verified. ``differing_answers``: prompts that did not get plain decoding's answer in every round; None where they may differ.
    """

    system: str
    concurrency: int
    temperature: float
    tokens_per_second: float | None = None
    tokens: int | None = None
    seconds: float | None = None
    acceptance_length: float | None = None
    speedup_vs_plain: float | None = None
    speedup_range: tuple[float, float] | None = None
    differing_answers: int | None = None
    missing: str | None = None


def rows(
    measured: Mapping[str, Sequence[Round]], plain: str, concurrency: int, temperature: float, comparable: Collection[str]
) -> list[Row]:
    """One row per system. ``plain``: whose speed the others are compared with, and the answers of those that are ``comparable``."""
    base, result = measured[plain], []
    for system, rounds in measured.items():
        ratios = speedups(rounds, base)
        result.append(
            Row(
                system=system,
                concurrency=concurrency,
                temperature=temperature,
                tokens_per_second=round(median(one.speed for one in rounds), 2),
                tokens=sum(rounds[0].tokens),
                seconds=round(median(one.seconds for one in rounds), 3),
                acceptance_length=acceptance_length(rounds),
                speedup_vs_plain=round(median(ratios), 3) if ratios else None,
                speedup_range=(round(min(ratios), 3), round(max(ratios), 3)) if ratios else None,
                differing_answers=differing_answers(rounds, base) if system in comparable else None,
            )
        )
    return result


def speedups(rounds: Sequence[Round], plain: Sequence[Round]) -> list[float]:
    """The ratio of the speeds in every round; none if any prompt got another number of tokens in any of them."""
    if len({one.tokens for one in (*rounds, *plain)}) > 1:
        return []
    return [base.seconds / one.seconds for one, base in zip(rounds, plain, strict=True)]


def acceptance_length(rounds: Sequence[Round]) -> float | None:
    steps = sum(one.steps for one in rounds)
    return round(1 + sum(one.accepted for one in rounds) / steps, 3) if steps else None


def differing_answers(rounds: Sequence[Round], plain: Sequence[Round]) -> int:
    answers = zip(*(one.answers for one in (plain[0], *rounds)), strict=True)
    return sum(len(set(of_one_prompt)) > 1 for of_one_prompt in answers)


def table(part: Sequence[Row]) -> str:
    """Rows as text, one line each."""
    width = max(len(row.system) for row in part)
    lines = [f"temperature  concurrency  {'system':<{width}}  tokens/s  acceptance  differing  speed against plain (range over rounds)"]
    for row in part:
        start = f"{row.temperature:>11g}  {row.concurrency:>11}  {row.system:<{width}}"
        if row.missing is not None or row.tokens_per_second is None:
            lines.append(f"{start}  missing: {row.missing}")
            continue
        accepted = "-" if row.acceptance_length is None else f"{row.acceptance_length:.2f}"
        differing = "-" if row.differing_answers is None else str(row.differing_answers)
        ratio = "none: other numbers of tokens"
        if row.speedup_vs_plain is not None and row.speedup_range is not None:
            ratio = f"{row.speedup_vs_plain:.2f}x ({row.speedup_range[0]:.2f} .. {row.speedup_range[1]:.2f})"
        lines.append(f"{start}  {row.tokens_per_second:>8.1f}  {accepted:>10}  {differing:>9}  {ratio}")
    return "\n".join(lines)


def verdict(part: Sequence[Row], own: Collection[str]) -> int:
    """1 when a system has no ratio, or one of our ``own`` gave other answers than plain decoding; says so on the terminal."""
    without = list(dict.fromkeys(row.system for row in part if row.missing is None and row.speedup_vs_plain is None))
    for system in without:
        print(f"NO RATIO for {system}: it and plain decoding generated different numbers of tokens", file=sys.stderr)
    differing = max((row.differing_answers or 0 for row in part if row.system in own), default=0)
    if differing:
        print(f"ANSWERS DIFFER for {differing} prompts: in float32 that is a bug, in 16 bits also rounding", file=sys.stderr)
    return int(bool(without or differing))
