"""Matrix products of a few rows on a CPU, with weights in the order in which they are read."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cpu

PANEL, TILE_DEPTH = 32, 32  # outputs that lie side by side, and inputs that a tile has; so it is in native/linear.h and native/tiles.h


def panels_of(weight: Tensor) -> Tensor:
    """weight [N, K] -> [ceil(N / PANEL), K, PANEL], filled up with zeros. bfloat16: [ceil(N / PANEL), K / 2, 2 * PANEL], two inputs of an
    output side by side, and K filled up to a multiple of TILE_DEPTH.
    """
    if weight.dtype == torch.bfloat16:
        whole = F.pad(weight, (0, -weight.shape[1] % TILE_DEPTH, 0, -len(weight) % PANEL))
        return whole.view(-1, PANEL, whole.shape[1] // 2, 2).transpose(1, 2).flatten(2).contiguous()
    whole = F.pad(weight, (0, 0, 0, -len(weight) % PANEL))
    return whole.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def padded(vector: Tensor) -> Tensor:
    """[N] -> float32 [ceil(N / PANEL) * PANEL]."""
    return F.pad(vector.float(), (0, -len(vector) % PANEL))


def panel_linear(x: Tensor, panels: Tensor, outputs: int, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    """x W^T * scale + bias; x [..., K] -> [..., outputs].

    panels: W as ``panels_of`` has it, of x's type, or int8 with a scale; x float32 or bfloat16; bias, scale: ``padded``.
    """
    return (panel_linear_cpu if has_panel_kernel(x, panels) else panel_linear_reference)(x, panels, outputs, bias, scale)


def has_panel_kernel(x: Tensor, panels: Tensor) -> bool:
    """Whether there is one for x; in bfloat16 processors with tiles alone have it."""
    return cpu.serves(x) and (panels.dtype == torch.int8 or cpu.has("linear", x.dtype))


def panel_linear_cpu(x: Tensor, panels: Tensor, outputs: int, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    """``panel_linear`` in one call. In bfloat16 what a row gets does not depend on how many there are."""
    x, size = x.contiguous(), x.shape[-1]
    out = x.new_empty(*x.shape[:-1], outputs)
    kernel = "linear" if scale is None else "int8_linear"
    cpu.launch(kernel, x.dtype, x, panels, scale, bias, x.numel() // size, size, outputs, out)
    return out


def panel_linear_reference(x: Tensor, panels: Tensor, outputs: int, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    """``panel_linear`` in plain PyTorch."""
    pairs = panels.unflatten(2, (PANEL, -1)).transpose(1, 2).flatten(2)  # [panels, PANEL, K]
    out = x.float() @ pairs.flatten(0, 1)[:, : x.shape[-1]].float().t()
    out = out if scale is None else out * scale
    return (out if bias is None else out + bias)[..., :outputs].to(x.dtype)
