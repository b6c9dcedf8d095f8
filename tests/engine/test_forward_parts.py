"""Several kinds of rows in one forward pass give what each gives alone, and padding is nobody's business."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kernels.tree_layout import Rows, TreeLayout
from kernels.tree_mask import tree_mask
from server.engine.kv_cache import PagedTensors
from server.engine.lean import LeanDecoder
from server.engine.target import Target
from tests.engine.engines import tiny_model

BLOCK, CONTEXT = 4, 6


def tree_rows(target: Target, tables: Tensor, live: Tensor | None) -> Rows:
    """Trees of five nodes after a context of six tokens."""
    parent = torch.tensor([[0, 0, 0, 1, 1]]).expand(len(tables), -1)
    ancestors, depth = tree_mask(parent, 2)
    tokens = torch.arange(5 * len(tables)).view(-1, 5) % target.vocab_size
    return Rows(tokens, TreeLayout(tables, torch.full((len(tables),), CONTEXT), depth, ancestors, live, BLOCK, CONTEXT))


def chunk_rows(tables: Tensor, live: Tensor | None, keep: Tensor | None = None) -> Rows:
    tokens = torch.arange(6 * len(tables)).view(-1, 6) + 40
    depth = torch.arange(6).expand(len(tables), -1)
    return Rows(tokens, TreeLayout(tables, torch.zeros(len(tables), dtype=torch.long), depth, None, live, BLOCK, 0), keep)


def filled(target: Target, tables: Tensor) -> PagedTensors:
    cache = target.new_cache(32, BLOCK)
    target.forward_parts([chunk_rows(tables, None)], cache)
    return cache


@pytest.fixture(params=["transformers", "lean"])
def target(request: pytest.FixtureRequest) -> Target:
    model: PreTrainedModel = tiny_model("mistral")
    return Target(model, True, LeanDecoder(model) if request.param == "lean" else None)


@torch.inference_mode()
def test_parts_are_what_they_are_alone(target: Target) -> None:
    old, new = torch.arange(1, 9).view(2, 4), torch.arange(9, 18).view(3, 3)
    live = torch.tensor([[True] * 6, [True] * 3 + [False] * 3, [True] + [False] * 5])
    keep = torch.tensor([5, 8, 12])  # the last live row of each
    parts = [chunk_rows(new, live, keep), tree_rows(target, old[:1], None), tree_rows(target, old[1:], None)]
    alone = [target.forward_parts([part], filled(target, old))[0] for part in parts]
    together = target.forward_parts(parts, filled(target, old))
    for (logits, features), (expected, expected_features) in zip(together, alone, strict=True):
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(features, expected_features, atol=1e-5, rtol=1e-4)
    assert [len(logits) for logits, _ in together] == [3, 5, 5]


@torch.inference_mode()
def test_dead_rows_change_nothing_and_are_zero(target: Target) -> None:
    tables = torch.arange(1, 9).view(2, 4)
    live = torch.tensor([[True, True, False, True, False], [True, False, False, False, False]])
    full, full_features = target.forward_parts([tree_rows(target, tables, None)], filled(target, tables))[0]
    part, features = target.forward_parts([tree_rows(target, tables, live)], filled(target, tables))[0]
    assert features is not None
    assert full_features is not None
    alive = live.flatten()
    torch.testing.assert_close(part[alive], full[alive], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(features[live], full_features[live], atol=1e-5, rtol=1e-4)
    assert part[~alive].abs().max() == 0
    assert features[~live].abs().max() == 0
