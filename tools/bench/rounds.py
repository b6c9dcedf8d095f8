"""Systems take turns: what both benchmarks measure, and in which order."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


class BenchError(RuntimeError):
    """The comparison cannot be made; the message says why."""


class SystemFailure(RuntimeError):
    """One system cannot be measured; the message says why. The others go on."""


@dataclass(frozen=True)
class Round:
    """All prompts, in order, once through one system. ``answers``: what each prompt got, texts or token ids; ``tokens``: how many.

    ``steps`` and ``accepted``: verifications and the draft tokens that they accepted, of all prompts together; 0 where nothing was
    drafted or nobody counts.
    """

    seconds: float
    answers: tuple[Hashable, ...]
    tokens: tuple[int, ...]
    steps: int = 0
    accepted: int = 0

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return sum(self.tokens) / self.seconds


def measure(
    systems: Sequence[str],
    run: Callable[[str, Sequence[Item], tqdm], Round],
    items: Sequence[Item],
    warm_up: int,
    rounds: int,
    title: str,
) -> tuple[dict[str, list[Round]], dict[str, str]]:
    """``rounds`` rounds of every system, in an order that is reversed every other round, after a turn with the first ``warm_up`` items
    that is not counted. ``run(system, items, progress)`` advances the bar by one per item.

    Returns the rounds by system, and by system why it failed, for those that did.
    """
    measured: dict[str, list[Round]] = {system: [] for system in systems}
    failed: dict[str, str] = {}
    warming = items[:warm_up]
    with tqdm(total=(len(warming) + rounds * len(items)) * len(systems), unit="request", disable=None) as progress:

        def turn(system: str, part: Sequence[Item], what: str) -> list[Round]:
            if system in failed:
                return []
            progress.set_description(f"{title}, {system}, {what}")
            try:
                return [run(system, part, progress)]
            except SystemFailure as failure:
                failed[system] = str(failure)
                return []

        for system in systems:
            turn(system, warming, "warm-up")
        for index in range(rounds):
            for system in systems[:: 1 if index % 2 == 0 else -1]:
                measured[system] += turn(system, items, f"round {index + 1}")
    return {system: done for system, done in measured.items() if system not in failed}, failed
