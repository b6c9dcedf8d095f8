"""How weights lie in memory, for matrix products of a few rows on a CPU."""

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drafts.eagle3 import Eagle3Head
from kernels import cpu
from kernels.cpu_layers import Head, HeadRows, Layer, Matrix
from kernels.cpu_linear import padded, panel_linear, panel_linear_cpu, panels_of
from kernels.tree_attention import LARGEST_HEAD

PACKED_ROWS = 8  # that oneDNN's copies are made for
FEW_ROWS = {torch.float32: 320, torch.bfloat16: 256}  # up to which our kernels are faster than the library's, or as fast


def store_transposed(model: nn.Module) -> None:
    """Keep the float32 matrices of square and widening linear layers on a CPU as [in, out] in memory; nothing else changes.

    A decoding step multiplies 1 to some 50 rows. MKL reads a matrix of a layer that widens up to twice as fast that way round; one
    that narrows gains nothing, and loses with one row (measured with 1 to 128 rows). An output matrix tied to the embedding becomes a
    copy of its own.
    """
    for module in model.modules():
        if type(module) is not nn.Linear or module.weight.device.type != "cpu" or module.weight.dtype != torch.float32:
            continue
        if module.out_features >= module.in_features:
            module.weight = nn.Parameter(module.weight.detach().t().contiguous().t(), requires_grad=False)


class PanelLinear(nn.Linear):
    """A linear layer with a second copy of its weight, for a few rows."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.panels, self._bias = panels_of(linear.weight), None if linear.bias is None else padded(linear.bias)

    @property
    def matrix(self) -> Matrix:
        return Matrix(self.panels, None, self._bias, self.in_features, self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() <= FEW_ROWS[self.weight.dtype] * self.in_features and cpu.serves(x):
            return panel_linear_cpu(x, self.panels, self.out_features, self._bias, None)
        return F.linear(x, self.weight, self.bias)


class PackedLinear(nn.Linear):
    """A bfloat16 linear layer with a second copy of its weight in oneDNN's blocks, where the processor has no tiles for our kernel."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.contiguous(), PACKED_ROWS)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.default(x, self.packed, self.bias, "none", [], "")


def multiplies_bfloat16() -> bool:
    """Whether the processor does, not only oneDNN in its place."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@torch.no_grad()
def pack_for_trees(model: nn.Module) -> None:
    """Give the matrices on a CPU a second copy in the order in which it is read.

    float32 ones for our kernels, where these could be compiled: 1 to 16 rows take about as long as one, which MKL takes two to three
    times as long for. bfloat16 ones for our kernel where the processor has tiles, which takes 0.7 of oneDNN's time for up to 32 rows; else
    for oneDNN, where the processor has bfloat16: any number of rows takes 0.7 of the time of the plain layout, which oneDNN reorders at
    every call. Nothing changes where the copies would take more than half of the free memory.
    """
    gaining = [m for m in model.modules() if type(m) is nn.Linear and _gains(m.weight)]
    if not gaining:  # on a GPU nothing is compiled for a CPU
        return
    packed = {torch.float32: PanelLinear, torch.bfloat16: PanelLinear if cpu.has("linear", torch.bfloat16) else PackedLinear}
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 2 * sum(linear.weight.nbytes for linear in gaining) > free:
        return
    copies = {linear: packed[linear.weight.dtype](linear) for linear in gaining}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in copies:
                setattr(parent, name, copies[child])


def _gains(weight: Tensor) -> bool:
    """Whether a copy pays for a matrix that is not a part of one that is packed as a whole."""
    if weight.device.type != "cpu" or weight.untyped_storage().nbytes() != weight.nbytes:
        return False
    if weight.dtype == torch.bfloat16:
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 and cpu.library() is not None


class Int8Linear(nn.Module):
    """x W^T, W in 8 bits with a scale for each output: good enough for guessing."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        weight = weight.float()
        scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        self.outputs, self.scale = len(weight), padded(scale)
        self.panels = panels_of((weight / scale[:, None]).round().to(torch.int8))

    @property
    def matrix(self) -> Matrix:
        return Matrix(self.panels, self.scale, None, self.panels.shape[1], self.outputs)

    def forward(self, x: Tensor) -> Tensor:
        return panel_linear(x, self.panels, self.outputs, None, self.scale)


@torch.no_grad()
def quantize_draft(head: Eagle3Head) -> None:
    """Read a head's matrices on a CPU as 8-bit integers, a quarter or a half of the bytes, where our kernels could be compiled; guesses
    lose little, and what is generated does not depend on them. ``fc`` stays: it runs once per committed token, on features that have
    outliers.
    """
    weight = head.fc.weight
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16) or cpu.library() is None:
        return
    for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"):
        setattr(head, name, Int8Linear(getattr(head, name).weight))


def joined(head: Eagle3Head) -> HeadRows | None:
    """The head for drafted rows in one call, None where its matrices are not 8-bit integers: elsewhere than on a CPU with our kernels."""
    matrices: list[Any] = [head.qkv_proj, head.o_proj, head.gate_up_proj, head.down_proj, head.lm_head]
    config = head.config
    if not all(isinstance(part, Int8Linear) for part in matrices) or config.head_dim > LARGEST_HEAD:
        return None
    qkv, o, gate_up, down, lm_head = (part.matrix for part in matrices)
    layer = Layer(head.input_layernorm, qkv, o, head.post_attention_layernorm, gate_up, down, None)
    whole = Head(layer, head.hidden_norm, head.norm, lm_head, config.norm_before_residual, config.norm_output)
    scale = config.head_dim**-0.5
    return HeadRows(whole, config.num_attention_heads, config.num_key_value_heads, config.head_dim, scale, config.rms_norm_eps)
