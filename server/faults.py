"""Faults on purpose, to test what must be survived: named points of the engine raise, take long or compute NaN.

They are wrapped around the objects of a loaded engine; without any, nothing is wrapped.
"""

import asyncio
import inspect
import logging
import random
import time
from collections.abc import Callable, Iterator
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from server.openai.service import Service

logger = logging.getLogger(__name__)
POINTS = ("tokenizer", "step", "prefill", "draft", "target", "verify", "commit")
KINDS = ("raise", "memory", "device", "sleep", "nan")
NAN_POINTS = ("draft", "target")  # those that return logits, or states that these are made from


class Fault(NamedTuple):
    """``raise``: any error, ``memory``: out of memory, ``device``: one that stays; ``sleep``: ``seconds`` more; ``nan``: all logits."""

    point: str
    kind: str
    seconds: float = 0.0
    probability: float = 1.0  # of each call


def parse(text: str) -> list[Fault]:
    """Faults as ``point:kind[=seconds][:probability],...``; ValueError says what is expected."""
    return [_parse_one(item.strip()) for item in text.split(",")]


def _parse_one(item: str) -> Fault:
    point, _, rest = item.partition(":")
    kind, _, probability = rest.partition(":")
    kind, _, seconds = kind.partition("=")
    try:
        fault = Fault(point, kind, float(seconds or 0), float(probability or 1))
    except ValueError:
        fault = Fault("", "")
    known = fault.point in POINTS and kind in KINDS and (kind != "nan" or point in NAN_POINTS)
    if not known or not 0 <= fault.probability <= 1 or (kind == "sleep") != (fault.seconds > 0):
        raise ValueError(
            f"{item!r} is no fault: point:kind[:probability] is expected, points being {', '.join(POINTS)} and kinds raise, memory, "
            f"device, sleep=SECONDS and, at {' and '.join(NAN_POINTS)}, nan"
        )
    return fault


def install(faults: list[Fault], service: "Service") -> None:
    """Wrap what the faults name. Their draws are seeded by their place in the list."""
    for seed, fault in enumerate(faults):
        logger.warning("faults are injected: %s", fault)
        for owner, name in _places(fault.point, service):
            setattr(owner, name, _wrapped(getattr(owner, name), fault, random.Random(seed)))


def _places(point: str, service: "Service") -> Iterator[tuple[Any, str]]:
    from server.engine import steps as module

    engine = service.engine.engine
    steps, proposer = engine.steps, engine.proposer
    match point:
        case "tokenizer":
            yield service, "encode"
        case "step":
            yield engine, "step"
        case "prefill":
            yield module, "prompt_rows"
        case "draft":
            if proposer.drafter is not None:
                yield proposer.drafter, "states"
            elif proposer.ngrams is not None:
                yield proposer.ngrams, "find"
        case "target":
            yield steps.target, "forward_parts"
        case "verify":
            yield module, "tree_verify"
        case "commit":
            yield module, "kv_commit"


def _wrapped(function: Callable[..., Any], fault: Fault, draws: random.Random) -> Callable[..., Any]:
    raises = fault.kind not in ("sleep", "nan")

    if inspect.iscoroutinefunction(function):

        @wraps(function)
        async def call_async(*args: Any, **options: Any) -> Any:
            if draws.random() < fault.probability:
                if raises:
                    raise _error(fault)
                await asyncio.sleep(fault.seconds)
            return await function(*args, **options)

        return call_async

    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        if draws.random() >= fault.probability:
            return function(*args, **options)
        if raises:
            raise _error(fault)
        time.sleep(fault.seconds)
        result = function(*args, **options)
        return _with_nan(result) if fault.kind == "nan" else result

    return call


def _error(fault: Fault) -> Exception:
    import torch

    message = f"injected at {fault.point}"
    return {"raise": RuntimeError, "memory": torch.OutOfMemoryError, "device": torch.AcceleratorError}[fault.kind](message)


def _with_nan(result: Any) -> Any:
    """Logits, or pairs of logits and features, with NaN for logits."""
    if isinstance(result, list):
        return [(logits * float("nan"), features) for logits, features in result]
    return result * float("nan")
