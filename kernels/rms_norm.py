"""RMSNorm, in the fewest operations that a device has for it."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; x [..., H], weight [H].

    On a CPU torch's own is a chain of slower operations. Written in place, ours has no gradient.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_grad_enabled():
        return F.rms_norm(x, weight.shape, weight, eps)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (x * torch.addcmul(_constant(eps), norm, norm, value=1 / x.shape[-1]).rsqrt_()).mul_(weight)


@lru_cache
def _constant(value: float) -> Tensor:
    """Operations on Python numbers make such a tensor every time."""
    return torch.tensor(value)
