"""Representative configurations compile for every GPU generation, with the instructions that they are designed for."""

from pathlib import Path

import pytest
import torch

from kernels import tree_attention
from kernels.tree_layout import TreeLayout
from tests.kernels.compile_only import SHARED_LIMIT, Launches, check_launches

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize(
    ("rows", "heads", "size", "dtype", "chunk", "options"),
    [
        (32, (32, 8), 128, BF16, False, {}),
        (12, (32, 8), 128, BF16, False, {}),
        (1, (32, 8), 128, BF16, False, {}),
        (512, (32, 8), 128, BF16, True, {}),
        (128, (32, 8), 128, BF16, False, {"sliding_window": 4096}),
        (16, (32, 32), 80, torch.float16, False, {}),
        (16, (8, 4), 256, BF16, False, {"softcap": 50.0, "sliding_window": 4096}),
        (256, (8, 4), 256, BF16, True, {"softcap": 50.0}),
        (32, (64, 8), 64, BF16, False, {"sliding_window": 128, "sinks": torch.empty(64, device="meta")}),
        (64, (8, 2), 128, FP32, True, {}),
    ],
)  # fmt: skip
def test_compiles(
    rows: int, heads: tuple[int, int], size: int, dtype: torch.dtype, chunk: bool, options: dict, capability: int, tmp_path: Path
) -> None:
    def empty(*shape: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    ancestors = None if chunk else empty(4, rows) if rows <= 64 else empty(4, rows, 2)
    live = empty(4, rows, dtype=torch.bool) if chunk else None
    layout = TreeLayout(empty(4, 2100), empty(4), empty(4, rows), ancestors, live, 16, 32768)
    q, cache = empty(4, rows, heads[0], size, dtype=dtype), empty(9000, 16, heads[1], size, dtype=dtype)
    ptx = check_launches(
        tree_attention, lambda: tree_attention.tree_attention_triton(q, cache, cache, layout, 0.1, **options), capability, tmp_path
    )
    assert "cp.async.cg" in ptx[0], "K and V are fetched ahead, 16 bytes at a time"
    assert ("wgmma" in ptx[0]) == (capability == 90 and rows * heads[0] >= 33 * heads[1] and dtype != FP32), "tiles of 64 rows or more"


def test_chunks_of_any_width_share_their_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of a new length must not wait for the compiler."""
    attention, combine = (Launches(getattr(tree_attention, name)) for name in ("tree_attention_kernel", "combine_kernel"))
    monkeypatch.setattr(tree_attention, "tree_attention_kernel", attention)
    monkeypatch.setattr(tree_attention, "combine_kernel", combine)
    for width in (140, 200, 330, 500, 2000):
        tables, lengths, depth = (torch.empty(shape, dtype=torch.long, device="meta") for shape in ((4, 2100), (4,), (4, width)))
        layout = TreeLayout(tables, lengths, depth, None, None, 16, 32768)
        q, cache = (torch.empty(shape, dtype=BF16, device="meta") for shape in ((4, width, 32, 128), (9000, 16, 8, 128)))
        tree_attention.tree_attention_triton(q, cache, cache, layout, 0.1)
    for launches in (attention, combine):
        params = launches.kernel.params
        fixed = [[value for param, value in zip(params, arguments, strict=False) if param.is_constexpr] for arguments, _ in launches.calls]
        assert len(fixed) > 1
        assert all(values == fixed[0] for values in fixed)
        splits = {param.name: param.do_not_specialize for param in params if param.name in ("min_split", "max_splits")}
        assert splits == {"min_split": True, "max_splits": True}
