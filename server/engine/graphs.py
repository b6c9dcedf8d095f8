"""CUDA graphs: what a function launches is recorded once for every size of its arguments, and then replayed in one go."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
MAX_GRAPHS = 1024  # that are kept, the last used ones
LEAST_CONTEXT = 1024  # that graphs are recorded for where nothing is won by less
Recorder = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]
"""Records a function; returns what does it again, and the tensors that hold its results afterwards."""


class _Recording(NamedTuple):
    arguments: list[Tensor]
    replay: Callable[[], None]
    results: Any


class Graphs:
    """Runs functions of tensors by graphs. Used from one thread; results may be overwritten by the next run, of whatever function.

    The entries of a batch are filled up with zeros to one of a few sizes, which ``filled_up`` tells, so that a function must give each
    entry the same whatever stands beside it, and must not mind entries of zeros. ``record``: see ``Recorder``.
    """

    def __init__(self, record: Recorder, filled_up: Callable[[int], int]) -> None:
        self._record, self._filled_up = record, filled_up
        self._kept: OrderedDict[Hashable, _Recording | None] = OrderedDict()

    def run(self, function: Callable[..., Any], *tensors: Any, **fixed: Hashable) -> Any:
        """``function(*tensors, **fixed)``. Arguments and results: tensors whose first dimension is that of a batch, None, and tuples of
        such. Results have as many entries as the first argument.
        """
        leaves: list[Tensor] = []
        form = _mapped(tensors, lambda leaf: leaves.append(leaf) or ...)  # type: ignore[func-returns-value]
        count = leaves[0].shape[0]
        sizes = tuple((self._filled_up(leaf.shape[0]), leaf.shape[1:], leaf.dtype) for leaf in leaves)
        key = (function, form, sizes, *fixed.items())
        if key not in self._kept:
            self._kept[key] = self._recorded(function, tensors, leaves, fixed)
            if len(self._kept) > MAX_GRAPHS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        recording = self._kept[key]
        if recording is None:
            return function(*tensors, **fixed)
        _fill(recording.arguments, leaves)
        recording.replay()
        return _mapped(recording.results, lambda result: result[:count])

    def _recorded(self, function: Callable[..., Any], tensors: tuple, leaves: list[Tensor], fixed: dict[str, Any]) -> _Recording | None:
        """None where it cannot be recorded, for want of memory say."""
        try:
            held = [leaf.new_zeros(self._filled_up(leaf.shape[0]), *leaf.shape[1:]) for leaf in leaves]
            _fill(held, leaves)
            arguments = iter(held)
            own = _mapped(tensors, lambda _: next(arguments))
            return _Recording(held, *self._record(lambda: function(*own, **fixed)))
        except torch.AcceleratorError:
            raise
        except RuntimeError:
            logger.exception("%s runs without a CUDA graph for %s", function.__name__, [tuple(leaf.shape) for leaf in leaves])
            return None


def graph_context(tokens: int, least: int = LEAST_CONTEXT) -> int:
    """The ``max_context`` of a graph for so many tokens, ``least`` times 1, 4, 16, ...: attention launches programs for all of it, and
    those past the end return at once.
    """
    while least < tokens:
        least *= 4
    return least


def cuda_recorder(device: torch.device) -> Recorder:
    """Records CUDA graphs that share one pool of memory, since they run one after the other."""
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def record(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        stream.wait_stream(torch.cuda.current_stream(device))
        try:
            with torch.cuda.stream(stream):
                function()  # compiles kernels, and lets libraries allocate what they keep
        finally:
            torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                results = function()
        except torch.AcceleratorError as error:
            torch.cuda.synchronize(device)  # raises where it is more than something that cannot be recorded
            raise RuntimeError("something that the function does cannot be recorded") from error
        return graph.replay, results

    return record


def power_of_two(count: int) -> int:
    """The next one."""
    return 1 << (count - 1).bit_length()


def in_halves(count: int) -> int:
    """1, 2, 4, ... 32, 48, 64, 96, ...: a GPU takes as long for few as for somewhat more, and all sizes can be recorded at start."""
    power = power_of_two(count)
    return power * 3 // 4 if power > 32 and count <= power * 3 // 4 else power


def in_eighths(count: int) -> int:
    """1 to 8, 10, 12, 14, 16, 20, ...: at most a quarter more, where a GPU takes twice as long for twice as many."""
    eighth = max(1, power_of_two(count) // 8)
    return -(-count // eighth) * eighth


def _fill(held: list[Tensor], leaves: list[Tensor]) -> None:
    for mine, leaf in zip(held, leaves, strict=True):
        if mine.shape == leaf.shape:
            mine.copy_(leaf)
        else:
            mine[: leaf.shape[0]] = leaf
            mine[leaf.shape[0] :] = 0


def _mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """``value`` with ``change`` made to its tensors, which may lie in tuples."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        parts = [_mapped(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value
