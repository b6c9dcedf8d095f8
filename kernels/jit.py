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

__all__ = ["await_inputs", "compute_capability", "jit", "overlap", "tl", "triton"]


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


def overlap(device: torch.device) -> dict[str, bool]:
    """How to launch a kernel that may begin before the one ahead of it has ended (programmatic dependent launch, from sm_90 on): OVERLAP
    tells it to ``await_inputs`` before it reads what others write, or writes what they read. A GPU then loses less time between kernels.
    """
    possible = device.type != "cpu" and compute_capability(device) >= 90
    return {"OVERLAP": True, "launch_pdl": True} if possible else {"OVERLAP": False}


@jit
def await_inputs() -> None:
    """Let the next kernel begin, and wait for the one ahead."""
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
