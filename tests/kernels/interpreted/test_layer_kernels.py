"""The small kernels between a layer's matrix products in Triton's interpreter."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.check_layer_kernels import check_gated_silu, check_linear, check_rms_norm, check_rope_store

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SIZES = st.sampled_from([1, 24, 80, 1000, 1024, 2050])


@given(st.integers(1, 3), SIZES, DTYPES)
@settings(max_examples=15)
def test_rms_norm(rows: int, size: int, dtype: torch.dtype) -> None:
    check_rms_norm(rows, size, dtype, "cpu")


@given(st.integers(1, 4), SIZES, DTYPES)
@settings(max_examples=15)
def test_gated_silu(rows: int, size: int, dtype: torch.dtype) -> None:
    check_gated_silu(rows, size, dtype, "cpu")


@given(st.integers(1, 4), st.sampled_from([(1, 1), (4, 2), (9, 3), (32, 8)]), st.sampled_from([8, 80, 96, 128]), DTYPES, st.booleans())
@settings(max_examples=20)
def test_rope_store(rows: int, heads: tuple[int, int], size: int, dtype: torch.dtype, padded: bool) -> None:
    check_rope_store(rows, heads, size, dtype, padded, "cpu")


@given(
    st.sampled_from([1, 2, 16, 17, 32]), st.sampled_from([1, 31, 40, 130]), st.sampled_from([8, 100, 128, 300]),
    st.sampled_from([torch.float32, torch.float16]), st.booleans(),
)  # fmt: skip
@settings(max_examples=15)
def test_linear(rows: int, outputs: int, size: int, dtype: torch.dtype, biased: bool) -> None:
    """Without bfloat16, whose products the interpreter gets wrong."""
    check_linear(rows, outputs, size, dtype, biased, "cpu")
