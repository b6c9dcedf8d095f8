"""Eight-bit drafts: close to the head's own, and never in the text."""

import pytest
import torch

from kernels import cpu
from server.engine.cpu_layout import Int8Linear, quantize_draft
from server.engine.types import SamplingParams
from tests.engine.engines import build, random_head, run, tiny_model

needs_kernels = pytest.mark.skipif(cpu.library() is None, reason="there is no C++ compiler")


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


def test_a_row_of_zeros() -> None:
    weight = torch.randn(4, 16)
    weight[2] = 0
    assert Int8Linear(weight)(torch.randn(1, 16))[0, 2] == 0


@needs_kernels
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


@needs_kernels
def test_what_is_read_in_eight_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the matrix of the features; nothing of float16 heads, and without kernels nothing at all."""
    names = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head")
    for dtype, expected in ((torch.float32, names), (torch.bfloat16, names), (torch.float16, ())):
        head = random_head(tiny_model("llama")).to(dtype)
        quantize_draft(head)
        assert tuple(name for name in (*names, "fc") if isinstance(getattr(head, name), Int8Linear)) == expected
    monkeypatch.setattr(cpu, "library", lambda: None)
    head = random_head(tiny_model("llama"))
    quantize_draft(head)
    assert isinstance(head.lm_head, torch.nn.Linear)
