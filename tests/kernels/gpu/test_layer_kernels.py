"""The small kernels between a layer's matrix products on a real GPU, against their references. Needs nothing beyond pytest and torch."""

import pytest
import torch

from tests.kernels.check_layer_kernels import check_gated_silu, check_linear, check_rms_norm, check_rope_store

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [80, 4096, 14336], ids=["small", "medium", "large"])
def test_rms_norm_and_gated_silu(size: int, dtype: torch.dtype) -> None:
    check_rms_norm(33, size, dtype, "cuda")
    check_gated_silu(33, size, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "size"), [((4, 2), 64), ((32, 8), 128), ((9, 3), 80)], ids=["small", "large", "odd"])
def test_rope_store(heads: tuple[int, int], size: int, dtype: torch.dtype) -> None:
    for rows in (1, 70):
        for padded in (False, True):
            check_rope_store(rows, heads, size, dtype, padded, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("outputs", "size"), [(40, 100), (2048, 4096), (16_500, 1024)], ids=["small", "large", "tall"])
def test_linear(outputs: int, size: int, dtype: torch.dtype) -> None:
    for rows in (1, 7, 16, 32):
        check_linear(rows, outputs, size, dtype, rows == 7, "cuda")
