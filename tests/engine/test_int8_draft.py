"""Eight-bit drafts: close to the head's own, never in the text, and only where they pay."""

import logging

import pytest
import torch

from server.engine import cpu_layout
from server.engine.cpu_layout import Int8Linear, quantize_draft
from server.engine.types import SamplingParams
from tests.engine.engines import build, random_head, run, tiny_model


def test_products_are_close() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(96, 64) * torch.rand(96, 1), torch.randn(2, 5, 64)
    expected = x @ weight.t()
    found = Int8Linear(weight)(x)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 0.03 * expected.abs().max()


def test_other_types_go_in_and_come_out() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(96, 64).bfloat16(), torch.randn(2, 5, 64).bfloat16()
    found = Int8Linear(weight)(x)
    assert found.dtype == torch.bfloat16
    expected = x.float() @ weight.float().t()
    assert (found.float() - expected).abs().max() < 0.03 * expected.abs().max()


def test_rows_do_not_meet() -> None:
    torch.manual_seed(0)
    layer, x = Int8Linear(torch.randn(96, 64)), torch.randn(5, 64) * torch.tensor([1e-3, 1.0, 50.0, 0.3, 7.0])[:, None]
    together = layer(x)
    for i in range(5):
        assert torch.equal(together[i : i + 1], layer(x[i : i + 1]))


def test_large_products_do_not_overflow() -> None:
    """All weights and inputs at their largest: pairs of products would not fit 16 bits with eight bits each."""
    weight, x = torch.full((8, 256), 3.0), torch.full((1, 256), 5.0)
    torch.testing.assert_close(Int8Linear(weight)(x), x @ weight.t(), rtol=0.02, atol=0)


def test_a_row_of_zeros() -> None:
    weight = torch.randn(4, 16)
    weight[2] = 0
    assert Int8Linear(weight)(torch.randn(1, 16))[0, 2] == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_text_stays(temperature: float) -> None:
    model = tiny_model("llama")
    head = random_head(model)
    requests = [([i, 2 * i, 7], SamplingParams(max_tokens=20, temperature=temperature, seed=i, ignore_eos=True)) for i in range(1, 4)]
    plain = [result.token_ids for result in run(build(model), requests)]
    engine = build(model, head, tree_nodes=8)
    quantize_draft(engine.proposer.drafter.head)
    assert isinstance(engine.proposer.drafter.head.lm_head, Int8Linear)
    results = run(engine, requests)
    assert [result.token_ids for result in results] == plain
    assert all(result.speculation.num_draft_tokens > 0 for result in results)


def test_what_is_read_in_eight_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bfloat16 matrices the large ones alone, of float16 none."""
    names = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head")
    for dtype, large in ((torch.float32, names), (torch.bfloat16, ("lm_head",)), (torch.float16, ())):
        head = random_head(tiny_model("llama")).to(dtype)
        monkeypatch.setattr(cpu_layout, "PACKED_ENTRIES", head.lm_head.weight.numel())
        assert all(getattr(head, name).weight.numel() < cpu_layout.PACKED_ENTRIES for name in names[:-1])
        quantize_draft(head)
        assert tuple(name for name in names if isinstance(getattr(head, name), Int8Linear)) == large


def test_a_torch_without_the_operation(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def gone(_: torch.Tensor) -> None:
        raise AttributeError("no such operation")

    monkeypatch.setattr(cpu_layout, "Int8Linear", gone)
    head = random_head(tiny_model("llama"))
    with caplog.at_level(logging.WARNING):
        quantize_draft(head)
    assert isinstance(head.lm_head, torch.nn.Linear)
    assert "no such operation" in caplog.text
