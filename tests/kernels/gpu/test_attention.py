"""Mask, attention and commit on a real GPU against their references on it. Needs nothing beyond pytest and torch."""

import random

import pytest
import torch

from kernels.kv_commit import kv_commit_reference, kv_commit_triton
from kernels.tree_attention import tree_attention_reference, tree_attention_triton
from kernels.tree_layout import TreeLayout
from kernels.tree_mask import tree_mask_reference, tree_mask_triton
from tests.kernels.check_tree_verify import random_parents

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICE = "cuda"
# Against float32 on the same values: what remains is the rounding of the weights and of the result.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SIZES = {
    "small": (2, 9, [33, 0], 4, 2, 64),
    "one": (1, 32, [4097], 32, 8, 128),
    "many": (8, 64, [3000, 1, 16, 500, 1023, 0, 77, 2048], 32, 8, 128),
}


@pytest.mark.parametrize("nodes", [1, 9, 64, 128], ids=["root", "small", "word", "words"])
def test_tree_mask(nodes: int) -> None:
    parent = random_parents(random.Random(nodes), 5, nodes).to(DEVICE)
    for mine, other in zip(tree_mask_triton(parent, nodes), tree_mask_reference(parent, nodes), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (20, None), (None, 5.0)], ids=["plain", "window", "softcap"])
@pytest.mark.parametrize("causal", [False, True], ids=["tree", "chunk"])
@pytest.mark.parametrize("size", SIZES)
def test_tree_attention(size: str, causal: bool, window: int | None, softcap: float | None, dtype: torch.dtype) -> None:
    batch, nodes, contexts, heads, kv_heads, head_dim = SIZES[size]
    generator = torch.Generator(DEVICE).manual_seed(0)
    ancestors, depth = tree_mask_reference(random_parents(random.Random(0), batch, nodes).to(DEVICE), nodes)
    if causal:
        ancestors, depth = None, torch.arange(nodes, device=DEVICE).expand(batch, -1)
    blocks = batch * (-(-(max(contexts) + nodes) // 16))
    tables = (torch.randperm(blocks, generator=generator, device=DEVICE) + 1).view(batch, -1)
    q = torch.randn(batch, nodes, heads, head_dim, generator=generator, device=DEVICE).to(dtype)
    k, v = (torch.randn(blocks + 1, 16, kv_heads, head_dim, generator=generator, device=DEVICE).to(dtype) for _ in range(2))
    lengths = torch.tensor(contexts, device=DEVICE)
    ours, expected = (
        attend(*(part.to(kind) for part in (q, k, v)), layout, head_dim**-0.5, window, softcap)
        for attend, kind, layout in (
            (choose, kind, TreeLayout(tables, lengths, depth, ancestors, None, 16, max(contexts)))
            for choose, kind in ((tree_attention_triton, dtype), (tree_attention_reference, torch.float32))
        )
    )
    torch.testing.assert_close(ours.float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("heads", [(2, 16), (8, 128), (3, 80)], ids=["small", "usual", "odd"])
def test_kv_commit(heads: tuple[int, int]) -> None:
    rng, batch, nodes, depths = random.Random(0), 6, 40, 9
    paths = []
    for _ in range(batch):
        later = sorted(rng.sample(range(1, nodes), rng.randrange(depths)))
        paths.append([0, *later, *[-1] * (depths - 1 - len(later))])
    contexts = torch.tensor([rng.randrange(50) for _ in range(batch)], device=DEVICE)
    path = torch.tensor(paths, device=DEVICE)
    tables = (torch.randperm(batch * 6, device=DEVICE) + 1).view(batch, 6)
    k, v = (torch.randn(5, batch * 6 + 1, 16, *heads, device=DEVICE).bfloat16() for _ in range(2))
    expected = k.clone(), v.clone()
    kv_commit_reference(*expected, tables, contexts, path)
    kv_commit_triton(k, v, tables, contexts, path)
    assert torch.equal(k, expected[0])
    assert torch.equal(v, expected[1])
