"""Runs many requests through the engine: the answers that a head is trained on, and the measurements of a head."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from server.engine.engine import Engine
from server.engine.types import SamplingParams, SpeculationStats


@dataclass
class Completion:
    """What the engine generated for request ``index``. ``speculation`` is all zeros where nothing was drafted."""

    index: int
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    speculation: SpeculationStats = field(default_factory=SpeculationStats)


def complete(
    engine: Engine, requests: Sequence[tuple[list[int], SamplingParams]], in_flight: int, deadline: float | None = None
) -> Iterator[Completion]:
    """Yield each request's completion as it finishes, at most ``in_flight`` at a time.

    After ``deadline`` (seconds of ``time.monotonic``) nothing new is begun; what runs is finished.
    Raises RuntimeError when the engine reports an error for a request.
    """
    running: dict[str, Completion] = {}
    upcoming = iter(enumerate(requests))
    while True:
        while len(running) < in_flight and (deadline is None or time.monotonic() < deadline):
            index, (prompt, sampling) = next(upcoming, (-1, ([], None)))
            if sampling is None:
                break
            running[str(index)] = Completion(index)
            engine.add_request(str(index), prompt, sampling)
        if not engine.has_work():
            return
        outputs, _ = engine.step()
        for output in outputs:
            completion = running[output.request_id]
            completion.token_ids += output.token_ids
            if output.finish_reason == "error":
                raise RuntimeError(f"The engine failed on request {output.request_id}: {output.error}")
            if output.finish_reason is not None:
                completion.finish_reason = output.finish_reason
                completion.speculation = output.speculation or completion.speculation
                yield running.pop(output.request_id)
