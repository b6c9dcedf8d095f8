"""Copies of weights for a CPU give the same products, and are made of whole matrices alone."""

from pathlib import Path

import pytest
import torch
from torch import nn

from kernels import cpu
from server.engine import cpu_layout
from server.engine.config import EngineConfig
from server.engine.cpu_layout import FEW_ROWS, PackedLinear, PanelLinear, multiplies_bfloat16, pack_for_trees
from server.engine.engine import Engine
from server.engine.lean import LEAN, LeanDecoder
from server.engine.target import decoder_layers, self_check
from server.engine.types import SamplingParams
from tests.engine.engines import build, random_head, run, tiny_model
from tests.engine.test_model_types import NEW, PROMPTS, generate

needs_tiles = pytest.mark.skipif(not cpu.has("linear", torch.bfloat16), reason="the processor has no tiles")
needs_kernels = pytest.mark.skipif(cpu.library() is None, reason="there is no C++ compiler")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_tiles)])
def test_products_are_the_same(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(640, 500, bias=bias).requires_grad_(False).to(dtype)
    packed, tolerance = PanelLinear(linear), 1e-5 if dtype == torch.float32 else 0.02
    for rows in (1, 2, 7, FEW_ROWS[dtype], FEW_ROWS[dtype] + 1):
        x = torch.randn(1, rows, 640).to(dtype)
        with torch.inference_mode():
            torch.testing.assert_close(packed(x), linear(x), atol=tolerance, rtol=tolerance)
    assert packed.weight is linear.weight


@needs_kernels
def test_our_kernel_multiplies_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = PanelLinear(nn.Linear(64, 32).requires_grad_(False))
    seen = list[int]()
    monkeypatch.setattr(cpu_layout, "panel_linear_cpu", lambda x, *_: seen.append(len(x)))
    with torch.inference_mode():
        for rows in (1, FEW_ROWS[torch.float32], FEW_ROWS[torch.float32] + 1):
            packed(torch.randn(rows, 64))
    packed(torch.randn(1, 64))  # with gradients
    assert seen == [1, FEW_ROWS[torch.float32]]


@pytest.mark.skipif(not multiplies_bfloat16(), reason="the processor does not multiply bfloat16")
def test_bfloat16_products_are_close_with_any_number_of_rows() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(640, 512).bfloat16().requires_grad_(False)
    packed = PackedLinear(linear)
    for rows in (1, 2, 7, 40):
        x = torch.randn(1, rows, 640).bfloat16()
        exact = x.float() @ linear.weight.float().t() + linear.bias.float()
        torch.testing.assert_close(packed(x).float(), exact, atol=0.02, rtol=0.01)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(PanelLinear, marks=needs_tiles),
        pytest.param(PackedLinear, marks=pytest.mark.skipif(not multiplies_bfloat16(), reason="the processor does not multiply bfloat16")),
    ],
)
def test_a_bfloat16_pair_is_packed_whatever_its_size_and_decodes(layout: type, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "has", lambda *_: layout is PanelLinear)
    config = EngineConfig(str(demo / "target"), str(demo / "vsd"), "cpu", "bfloat16", max_num_seqs=3, load_rule=False)
    engine = Engine.from_config(config)
    decoder, drafter = engine.steps.target.decoder, engine.proposer.drafter
    assert isinstance(decoder, LeanDecoder)
    assert drafter is not None
    assert all(isinstance(part, layout) for part in (decoder.layers[0].qkv, decoder.lm_head, drafter.head.fc))
    requests = [([5 + i, 7, 9], SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)) for i in range(3)]
    results = run(engine, requests)
    assert [len(result.token_ids) for result in results] == [24] * 3
    assert all(result.speculation.num_accepted_tokens > 0 for result in results)


@needs_kernels
@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_greedy_text_equals_generate(model_type: str) -> None:
    model = tiny_model(model_type)
    expected = [generate(model, prompt) for prompt in PROMPTS]
    engine = build(model, random_head(model), decoder=LeanDecoder if model_type in LEAN else None, tree_nodes=8, max_num_seqs=3)
    target = engine.steps.target
    parts = target.decoder if isinstance(target.decoder, LeanDecoder) else target.model
    pack_for_trees(parts)
    assert sum(isinstance(module, PanelLinear) for module in parts.modules()) == 4 * 4 + 1
    self_check(target, 4)
    requests = [(prompt, SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)) for prompt in PROMPTS]
    assert [result.token_ids for result in run(engine, requests)] == expected


@needs_kernels
def test_a_lean_decoder_is_packed_and_the_model_is_not() -> None:
    model = tiny_model("llama")
    decoder = LeanDecoder(model)
    pack_for_trees(decoder)
    layer = decoder.layers[0]
    assert all(isinstance(part, PanelLinear) for part in (layer.qkv, layer.o_proj, layer.gate_up, layer.down_proj, decoder.lm_head))
    assert not any(isinstance(module, PanelLinear) for module in model.modules())


@needs_kernels
def test_a_part_of_a_matrix_is_not_packed_once_more() -> None:
    model = tiny_model("llama")
    LeanDecoder(model)  # q_proj becomes a view
    pack_for_trees(model)
    attention = decoder_layers(model, 4)[0].self_attn
    assert isinstance(attention.o_proj, PanelLinear)
    assert type(attention.q_proj) is nn.Linear


@needs_kernels
def test_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of pages of as many bytes as there are pages."""
    model = nn.Sequential(nn.Linear(640, 512))
    for root, kind in ((1000, nn.Linear), (2000, PanelLinear)):
        monkeypatch.setattr(cpu_layout.os, "sysconf", lambda name, root=root: root)
        pack_for_trees(model)
        assert type(model[0]) is kind


def test_without_kernels_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "library", lambda: None)
    model = nn.Sequential(nn.Linear(640, 512))
    pack_for_trees(model)
    assert type(model[0]) is nn.Linear


def test_nothing_is_compiled_for_models_on_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()
    monkeypatch.setattr(cpu, "library", lambda: asked.append("for the CPU's kernels"))
    pack_for_trees(nn.Sequential(nn.Linear(64, 32, device="meta")))
    assert asked == []
