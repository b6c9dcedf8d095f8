"""Triton where it is installed. A CPU needs the references alone, and then every module of ``kernels`` still imports."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # torch's CPU builds come without it
    triton = tl = None

__all__ = ["compute_capability", "jit", "tl", "triton"]


def jit(function: Callable[..., Any]) -> Any:
    """``triton.jit``; without Triton the function itself, which then must not be launched."""
    return function if triton is None else triton.jit(function)


def compute_capability(tensor: Tensor) -> int:
    """Compute capability of the tensor's GPU times ten, 90 where kernels are interpreted."""
    if not tensor.is_cuda:
        return 90
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor
