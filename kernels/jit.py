"""Triton where it is installed. A CPU needs the references alone, and then every module of ``kernels`` still imports."""

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # torch's CPU builds come without it
    triton = tl = None

__all__ = ["jit", "tl", "triton"]


def jit(function: Callable[..., Any]) -> Any:
    """``triton.jit``; without Triton the function itself, which then must not be launched."""
    return function if triton is None else triton.jit(function)
