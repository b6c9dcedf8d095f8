"""RMSNorm, in the fewest operations that a device has for it."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; x [..., H], weight [H].

    On a CPU torch's own is a chain of slower operations. Written in place, ours has no gradient.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_grad_enabled():
        return F.rms_norm(x, weight.shape, weight, eps)
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * scale).mul_(weight)
