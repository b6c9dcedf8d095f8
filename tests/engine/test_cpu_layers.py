"""Whole passes, and whole drafts, in one call on a CPU: to the last bit what their parts make one after the other."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import cpu
from kernels.tree_layout import Rows, TreeLayout
from server.engine.cpu_layout import pack_for_trees, quantize_draft
from server.engine.drafter import Drafter, Grown
from server.engine.engine import Engine
from server.engine.kv_cache import PagedTensors
from server.engine.lean import LeanDecoder
from server.engine.request import Request
from server.engine.types import SamplingParams
from tests.engine.engines import build, random_head, run, tiny_model

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="there is no C++ compiler")
needs_tiles = pytest.mark.skipif(not cpu.has("linear", torch.bfloat16), reason="the processor has no tiles")
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=needs_tiles)]
HEADS = {
    "as published": {},
    "normed output": {"norm_output": True, "temperature_shift": True},
    "normed residual": {"norm_before_residual": True, "temperature_sharpness": 2.5},
    "few drafted tokens": {"draft_vocab_size": 100, "temperature_shift": True, "temperature_sharpness": 0.5},
}


def packed(model: Any) -> LeanDecoder:
    decoder = LeanDecoder(model)
    pack_for_trees(decoder)
    decoder.join()
    return decoder


def eight_bit_head(model: Any, **changes: Any) -> Any:
    head = random_head(model, **changes).to(model.dtype)
    if head.temperature_shift is not None:
        head.temperature_shift.normal_(std=0.1)
    if head.d2t is not None:
        head.d2t += torch.arange(len(head.d2t))  # every other token
    quantize_draft(head)
    return head


def drafting(kind: str, dtype: torch.dtype) -> tuple[Engine, Drafter]:
    """An engine whose head's rows go through in one call."""
    model = tiny_model("llama").to(dtype)
    engine = build(model, eight_bit_head(model, **HEADS[kind]), tree_nodes=12, max_num_seqs=4)
    drafter = engine.proposer.drafter
    assert drafter is not None
    assert drafter._joined is not None
    return engine, drafter


def serve(engine: Engine) -> None:
    """Requests of several lengths, greedy and sampled, with small trees, large ones and none."""
    requests = [
        ([7 + i] * (5 * i + 1), SamplingParams(max_tokens=12 + i, temperature=i % 3 / 2, seed=i, ignore_eos=True, max_draft_nodes=limit))
        for i, limit in enumerate((None, 2, None, 0, 5))
    ]
    run(engine, requests)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_passes(model_type: str, dtype: torch.dtype) -> None:
    """With a window, with biases; prompts and trees of different sizes in one pass, and features for a head."""
    model = tiny_model(model_type).to(dtype)
    engine = build(model, random_head(model).to(dtype), decoder=packed, tree_nodes=8, max_num_seqs=4)
    target = engine.steps.target
    decoder, counts = target.decoder, list[int]()
    assert isinstance(decoder, LeanDecoder)
    joined, forward_parts = decoder._joined, target.forward_parts
    assert joined is not None

    def both(parts: list[Rows], cache: PagedTensors) -> list[tuple[Tensor, Tensor | None]]:
        found = forward_parts(parts, cache)
        keys = cache.k.clone()
        decoder._joined = None
        expected = forward_parts(parts, cache)
        decoder._joined = joined
        assert torch.equal(cache.k[:, 1:], keys[:, 1:])  # what is padding goes to the first block
        for (logits, features), (expected_logits, expected_features) in zip(found, expected, strict=True):
            assert features is not None
            assert expected_features is not None
            assert torch.equal(logits, expected_logits)
            assert torch.equal(features, expected_features)
        counts.append(len(parts))
        return found

    target.forward_parts = both  # type: ignore[method-assign]
    serve(engine)
    assert max(counts) == 2
    assert len(counts) > 12


@pytest.mark.parametrize("everything", [False, True])
def test_rows_that_are_not_live(everything: bool) -> None:
    """What is asked of prompts of different lengths: their last logits, or all."""
    model = tiny_model("llama")
    target = build(model, random_head(model), decoder=packed, max_num_seqs=4).steps.target
    decoder, cache = target.decoder, target.new_cache(8, 16)
    assert isinstance(decoder, LeanDecoder)
    live = torch.tensor([[True, True, True, True], [True, False, False, False], [True, True, False, False]])
    layout = TreeLayout(torch.tensor([[1, 2], [3, 4], [5, 6]]), torch.tensor([0, 15, 2]), torch.arange(4).expand(3, -1), None, live, 16, 15)
    rows = Rows(torch.arange(12).view(3, 4), layout, None if everything else torch.tensor([3, 4, 9]))
    with torch.inference_mode():
        (logits, features), *_ = target.forward_parts([rows], cache)
        decoder._joined = None
        (expected, expected_features), *_ = target.forward_parts([rows], cache)
    assert features is not None
    assert expected_features is not None
    assert torch.equal(logits, expected)
    assert torch.equal(features, expected_features)
    assert (len(logits), int((logits == 0).all(1).sum())) == ((12, 5) if everything else (3, 0))


@pytest.mark.parametrize("keep", [[1, 3, 4], [4, 4], []])
def test_rows_that_are_kept_twice_or_not_live(keep: list[int]) -> None:
    """As graphs of prompts have them of nobody's entries; there the value does not matter, but for the others."""
    model = tiny_model("llama")
    target = build(model, random_head(model), decoder=packed, max_num_seqs=4).steps.target
    cache, live = target.new_cache(8, 16), torch.tensor([[True, True], [False, False], [True, False]])
    layout = TreeLayout(
        torch.tensor([[1, 2], [3, 4], [5, 6]]), torch.zeros(3, dtype=torch.long), torch.arange(2).expand(3, -1), None, live, 16, 0
    )
    with torch.inference_mode():
        (everything, _), *_ = target.forward_parts([Rows(torch.arange(6).view(3, 2), layout)], cache)
        (logits, _), *_ = target.forward_parts([Rows(torch.arange(6).view(3, 2), layout, torch.tensor(keep, dtype=torch.long))], cache)
    assert len(logits) == len(keep)
    for own, row in zip(logits, keep, strict=True):
        assert not live.flatten()[row] or torch.equal(own, everything[row])


@pytest.mark.parametrize("model_type", ["qwen3"])
def test_other_layers_stay_apart(model_type: str) -> None:
    assert packed(tiny_model(model_type))._joined is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", HEADS)
def test_drafts(kind: str, dtype: torch.dtype) -> None:
    engine, drafter = drafting(kind, dtype)
    joined, grow, levels = drafter._joined, drafter.grow, list[int]()

    def both(*arguments: Any) -> Grown:
        shape = arguments[4]
        for priced in (shape._replace(level_price=0.3, node_price=0.02), shape._replace(level_price=9.0, node_price=0.02), shape):
            own = (*arguments[:4], priced, *arguments[5:])
            drafter._joined = None
            expected = grow(*own)
            drafter._joined = joined
            found = grow(*own)
            assert found.levels == expected.levels
            assert all(map(torch.equal, found.pool, expected.pool))
            assert all(map(torch.equal, found.guesses, expected.guesses))
            levels.append(found.levels)
        return found

    drafter.grow = both  # type: ignore[method-assign]
    serve(engine)
    assert {1, engine.shape.depth} <= set(levels)
    assert engine.proposer.failed == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", HEADS)
def test_caches_brought_up_to_date(kind: str, dtype: torch.dtype) -> None:
    """The states of last rows may differ by rounding; keys and values do not."""
    engine, drafter = drafting(kind, dtype)
    cache, counts = engine.proposer.cache, list[list[int]]()
    assert cache is not None
    joined, extend = drafter._joined, cache.extend

    def both(requests: list[Request], ends: list[int], features: list[Tensor], newest: Tensor | None) -> None:
        places = [1 + request.row for request in requests]
        drafter._joined = None
        extend(requests, ends, features, newest)
        expected, keys, values = drafter.state.clone(), drafter.cache.k.clone(), drafter.cache.v.clone()
        drafter.state[places] = torch.nan
        drafter._joined = joined
        extend(requests, ends, features, newest)
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(drafter.state, expected, atol=tolerance, rtol=tolerance)
        assert torch.equal(drafter.cache.k, keys)
        assert torch.equal(drafter.cache.v, values)
        counts.append([end - request.draft_len for request, end in zip(requests, ends, strict=True)])

    cache.extend = both  # type: ignore[method-assign]
    serve(engine)
    assert any(len(set(own)) > 1 for own in counts), "some requests had more rows than others"
    assert any(len(own) == 1 for own in counts)
