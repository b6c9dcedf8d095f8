"""The verification kernels compile for every kind of batch."""

from pathlib import Path

import pytest
import torch

from kernels import filter_cuts, tree_verify
from kernels.noise import Noise, NoiseKey
from kernels.sampling import Allowed, Bans, Bias, Filters, Penalties, SamplingBatch
from tests.kernels.compile_only import SHARED_LIMIT, check_launches

BATCH, NODES, VOCAB = 32, 64, 128_256


def options(every: bool) -> SamplingBatch:
    """Of a batch that uses every option, or none."""
    if not every:
        return SamplingBatch(torch.ones(BATCH), None, None, None, None)
    number = torch.ones(BATCH)
    return SamplingBatch(
        number,
        Filters(number.long(), number, number),
        Penalties(number, number, number, torch.zeros(BATCH, VOCAB, dtype=torch.int32), torch.zeros(BATCH, VOCAB, dtype=torch.bool)),
        Bias(torch.zeros(BATCH, 2, dtype=torch.long), torch.zeros(BATCH, 2)),
        Bans(torch.zeros(BATCH, 1, dtype=torch.long), torch.ones(BATCH, dtype=torch.long)),
        Allowed(torch.zeros(BATCH, dtype=torch.long), torch.zeros(1, NODES, -(-VOCAB // 32), dtype=torch.int32)),
    )


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize(("every", "sampled"), [(False, False), (False, True), (True, True)], ids=["greedy", "sampled", "every option"])
def test_compiles(every: bool, sampled: bool, capability: int, tmp_path: Path) -> None:
    index = torch.zeros(BATCH, NODES, dtype=torch.long)
    logits = torch.empty(BATCH, NODES, VOCAB, dtype=torch.bfloat16, device="meta")
    seeds = torch.zeros(BATCH, dtype=torch.long)
    noise = Noise(NoiseKey(seeds, seeds, seeds == 0), 9, VOCAB) if sampled else None
    arguments = (logits, options(every), noise, index, index, index, index, 8)

    def launch() -> None:
        tree_verify.tree_verify_triton(*arguments)

    if every:  # the filters' kernel is another module's
        check_launches(tree_verify, lambda: check_launches(filter_cuts, launch, capability, tmp_path), capability, tmp_path)
    else:
        check_launches(tree_verify, launch, capability, tmp_path)
