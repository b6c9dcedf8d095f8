"""What the benchmark and its workers tell each other."""

from dataclasses import dataclass
from typing import Protocol

SPECULATION, PLAIN = "vsd-serve", "vsd-serve plain"


@dataclass(frozen=True)
class Settings:
    """What a backend loads. ``concurrency`` and ``max_length`` (tokens of prompt and answer): the largest that will be asked for.

    ``draft``: the head for this backend, in its own layout. ``draft_tokens``: length of the chains that peers draft. ``converted``:
    where a backend with a format of its own keeps the converted model.
    """

    model: str
    draft: str
    device: str
    dtype: str
    threads: int
    concurrency: int
    max_length: int
    draft_tokens: int
    converted: str


@dataclass(frozen=True)
class Work:
    """Prompts as token ids, at most ``concurrency`` at once, ``max_tokens`` tokens for each whatever they are."""

    system: str
    prompts: list[list[int]]
    concurrency: int
    temperature: float
    max_tokens: int


@dataclass(frozen=True)
class Answers:
    """Generated ids of every prompt in order; verifications of drafts and draft tokens accepted, over all prompts, 0 where unknown."""

    token_ids: list[list[int]]
    steps: int = 0
    accepted: int = 0


class Backend(Protocol):
    version: str

    def run(self, work: Work) -> Answers: ...
