"""What the host hands to the device."""

import torch
from torch import Tensor


def on_device(values: list, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of ``values``. The host does not wait for the device, as it does in ``torch.tensor(values, device=device)``: the driver
    has taken a copy when this returns.
    """
    tensor = torch.tensor(values, dtype=dtype)
    return tensor if device.type == "cpu" else tensor.to(device, non_blocking=True)
