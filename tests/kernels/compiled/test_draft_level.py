"""The kernels of a draft level compile for whole and for reduced vocabularies."""

from pathlib import Path

import pytest
import torch

from kernels import best_nodes, draft_level, merge_pools
from kernels.noise import Noise, NoiseKey
from kernels.sampling import SamplingBatch
from tests.kernels.compile_only import SHARED_LIMIT, check_launches

BATCH, TOPK = 32, 8


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize(("vocab", "reduced"), [(32_000, True), (128_256, False)])
def test_draft_level_compiles(vocab: int, reduced: bool, capability: int, tmp_path: Path) -> None:
    logits = torch.empty(BATCH, TOPK, vocab, dtype=torch.bfloat16, device="meta")
    seeds = torch.zeros(BATCH, dtype=torch.long)
    noise = Noise(NoiseKey(seeds, seeds, seeds == 0), 9, 128_256)
    options = SamplingBatch(torch.ones(BATCH), None, None, None, None)
    target_ids = torch.arange(vocab) if reduced else None
    arguments = (logits, options, noise, 2, torch.ones(BATCH), target_ids, torch.zeros(BATCH, TOPK), TOPK)
    check_launches(draft_level, lambda: draft_level.draft_level_triton(*arguments), capability, tmp_path)


@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_best_nodes_compiles(capability: int, tmp_path: Path) -> None:
    drafted = torch.zeros(BATCH, TOPK + 7 * TOPK**2, dtype=torch.long)
    arguments = (drafted[:, 0], drafted.float(), drafted, drafted, 64, 0.0)
    check_launches(best_nodes, lambda: best_nodes.best_nodes_triton(*arguments), capability, tmp_path)


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize("more", [15, 31, 63])
def test_merge_pools_compiles(more: int, capability: int, tmp_path: Path) -> None:
    drafted, others = torch.zeros(BATCH, TOPK + 7 * TOPK**2, dtype=torch.long), torch.zeros(BATCH, more, dtype=torch.long)
    arguments = (drafted.float(), drafted, drafted, others.float(), others, others, 8)
    check_launches(merge_pools, lambda: merge_pools.merge_pools_triton(*arguments), capability, tmp_path)
