"""How weights lie in memory, for matrix products of a few rows on a CPU."""

import logging
import os
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drafts.eagle3 import Eagle3Head

logger = logging.getLogger(__name__)
# Of a matrix; calls of oneDNN cost 10 to 20 us more, in which MKL multiplies a few rows by so much.
PACKED_ENTRIES = 1 << (20 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 17)
PACKED_ROWS = 8  # that the copies are made for


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


class PackedLinear(nn.Linear):
    """A linear layer with a second copy of its weight in oneDNN's blocks, for more than one row where the weight is float32."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.contiguous(), PACKED_ROWS)
        self._single = self.in_features if linear.weight.dtype == torch.float32 else 0

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == self._single:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise.default(x, self.packed, self.bias, "none", [], "")


def multiplies_bfloat16() -> bool:
    """Whether the processor does, not only oneDNN in its place."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@torch.no_grad()
def pack_for_trees(model: nn.Module) -> None:
    """Give the matrices on a CPU that gain by it a copy that oneDNN reads.

    Large float32 ones: trees of 2 to 16 rows take 0.5 to 0.8 of MKL's time, while a single row is faster with MKL. All bfloat16 ones,
    where the processor has that: any number of rows takes 0.7 of the time of the plain layout, which oneDNN reorders at every call.
    Nothing changes where the copies would take more than half of the free memory, or torch has no oneDNN.
    """
    gaining = [m for m in model.modules() if type(m) is nn.Linear and _gains(m.weight)]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if not torch.backends.mkldnn.is_available() or 2 * sum(linear.weight.nbytes for linear in gaining) > free:
        return
    packed = {linear: PackedLinear(linear) for linear in gaining}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in packed:
                setattr(parent, name, packed[child])


def _gains(weight: Tensor) -> bool:
    """Whether a copy pays for a matrix that is not a part of one that is packed as a whole."""
    if weight.device.type != "cpu" or weight.untyped_storage().nbytes() != weight.nbytes:
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 and weight.numel() >= PACKED_ENTRIES


class Int8Linear(nn.Module):
    """x W^T, W in 8 bits with a scale for each output, x in 7 bits with a scale for each row: good enough for guessing.

    A row's result does not depend on the rows beside it, so that neither does what a request drafts.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        weight = weight.float()
        scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces an end of quantized tensors, without another way to fbgemm's products
            quantized = torch.quantize_per_channel(weight, scale, torch.zeros(len(weight), dtype=torch.long), 0, torch.qint8)
            self.packed = torch.ops.quantized.linear_prepack(quantized, None)

    def forward(self, x: Tensor) -> Tensor:
        largest = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True, dtype=torch.float32).clamp_(min=1e-12)
        # 7 bits, 64 standing for 0: with all 8, sums of two products can exceed 16 bits on processors without VNNI.
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default(x / largest, 1 / 63, 64, self.packed)
        return y.mul_(largest).to(x.dtype)


@torch.no_grad()
def quantize_draft(head: Eagle3Head) -> None:
    """Read a head's matrices on a CPU as 8-bit integers, a quarter or a half of the bytes; guesses lose little, and what is
    generated does not depend on them. ``fc`` stays: it runs once per committed token, on features that have outliers. Small bfloat16
    matrices stay as well, which the processor multiplies as fast.

    Where torch no longer has the operation, the head stays as it is.
    """
    dtype = head.fc.weight.dtype
    if head.fc.weight.device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return
    try:
        for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"):
            weight = getattr(head, name).weight
            if dtype == torch.float32 or weight.numel() >= PACKED_ENTRIES:
                setattr(head, name, Int8Linear(weight))
    except (AttributeError, RuntimeError) as error:
        logger.warning("the draft head runs in %s, since this torch has no 8-bit products: %s", str(dtype).removeprefix("torch."), error)
