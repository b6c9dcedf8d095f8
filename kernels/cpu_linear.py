"""Matrix products of a few rows on a CPU, with weights in the order in which they are read."""

import torch.nn.functional as F
from torch import Tensor

from kernels import cpu

PANEL = 32  # outputs that lie side by side; so it is in native/linear.h


def panels_of(weight: Tensor) -> Tensor:
    """weight [N, K] -> [ceil(N / PANEL), K, PANEL], filled up with zeros."""
    padded = F.pad(weight, (0, 0, 0, -len(weight) % PANEL))
    return padded.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def padded(vector: Tensor) -> Tensor:
    """[N] -> float32 [ceil(N / PANEL) * PANEL]."""
    return F.pad(vector.float(), (0, -len(vector) % PANEL))


def panel_linear(x: Tensor, panels: Tensor, outputs: int, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    """x W^T * scale + bias; x [..., K] -> [..., outputs].

    panels: W as ``panels_of`` has it, float32 as x, or int8 with a scale, and then x float32 or bfloat16; bias, scale: ``padded``.
    """
    return (panel_linear_cpu if cpu.serves(x) else panel_linear_reference)(x, panels, outputs, bias, scale)


def panel_linear_cpu(x: Tensor, panels: Tensor, outputs: int, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    """``panel_linear`` in one call."""
    x, size = x.contiguous(), panels.shape[1]
    out = x.new_empty(*x.shape[:-1], outputs)
    kernel = "linear" if scale is None else "int8_linear"
    cpu.launch(kernel, x.dtype, x, panels, scale, bias, x.numel() // size, size, outputs, out)
    return out


def panel_linear_reference(x: Tensor, panels: Tensor, outputs: int, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    """``panel_linear`` in plain PyTorch."""
    out = x.float() @ panels.transpose(1, 2).flatten(0, 1).float().t()
    out = out if scale is None else out * scale
    return (out if bias is None else out + bias)[..., :outputs].to(x.dtype)
