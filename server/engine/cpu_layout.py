"""How weights lie in memory, for matrix products of a few rows on a CPU."""

import logging
import warnings

import torch
from torch import Tensor, nn

from drafts.eagle3 import Eagle3Head

logger = logging.getLogger(__name__)


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


class Int8Linear(nn.Module):
    """x W^T, W in 8 bits with a scale for each output, x in 7 bits with a scale for each row: good enough for guessing.

    A row's result does not depend on the rows beside it, so that neither does what a request drafts.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces an end of quantized tensors, without another way to fbgemm's products
            quantized = torch.quantize_per_channel(weight, scale, torch.zeros(len(weight), dtype=torch.long), 0, torch.qint8)
            self.packed = torch.ops.quantized.linear_prepack(quantized, None)

    def forward(self, x: Tensor) -> Tensor:
        largest = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True).clamp(min=1e-12)
        # 7 bits, 64 standing for 0: with all 8, sums of two products can exceed 16 bits on processors without VNNI.
        return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x / largest, 1 / 63, 64, self.packed).mul_(largest)


@torch.no_grad()
def quantize_draft(head: Eagle3Head) -> None:
    """Read a float32 head's matrices on a CPU as 8-bit integers, a quarter of the bytes; guesses lose little, and what is
    generated does not depend on them. ``fc`` stays: it runs once per committed token, on features that have outliers.

    Where torch no longer has the operation, the head stays as it is.
    """
    if head.fc.weight.device.type != "cpu" or head.fc.weight.dtype != torch.float32:
        return
    try:
        for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"):
            setattr(head, name, Int8Linear(getattr(head, name).weight))
    except (AttributeError, RuntimeError) as error:
        logger.warning("the draft head runs in float32, since this torch has no 8-bit products: %s", error)
