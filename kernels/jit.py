"""Triton where it is installed. A CPU needs the references alone, and then every module of ``kernels`` still imports."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # torch's CPU builds come without it
    triton = tl = None

__all__ = ["compute_capability", "jit", "tl", "triton"]


def jit(function: Callable[..., Any], **options: Any) -> Any:
    """``triton.jit``; without Triton the function itself, which then must not be launched."""
    return function if triton is None else triton.jit(function, **options)


@cache
def compute_capability(device: torch.device) -> int:
    """Of a GPU, times ten as in sm_90, which is also the answer for a CPU, where kernels are interpreted."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
