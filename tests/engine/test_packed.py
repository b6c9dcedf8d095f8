"""Packed copies give the same products and are made of whole, large matrices alone."""

import pytest
import torch
from torch import nn

from server.engine import cpu_layout
from server.engine.cpu_layout import PackedLinear, pack_for_trees
from server.engine.lean import LeanLayer, make_lean
from server.engine.target import decoder_layers, self_check
from server.engine.types import SamplingParams
from tests.engine.engines import build, random_head, run, tiny_model
from tests.engine.test_model_types import NEW, PROMPTS, generate


@pytest.mark.parametrize("bias", [False, True])
def test_products_are_the_same(bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(640, 512, bias=bias).requires_grad_(False)
    packed = PackedLinear(linear)
    for rows in (1, 2, 7, 40):
        x = torch.randn(1, rows, 640)
        torch.testing.assert_close(packed(x), linear(x), atol=1e-5, rtol=1e-5)
    assert packed.weight is linear.weight


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_greedy_text_equals_generate(monkeypatch: pytest.MonkeyPatch, model_type: str) -> None:
    monkeypatch.setattr(cpu_layout, "PACKED_ENTRIES", 1)
    model = tiny_model(model_type)
    expected = [generate(model, prompt) for prompt in PROMPTS]
    make_lean(model)
    engine = build(model, random_head(model), tree_nodes=8, max_num_seqs=3)
    model = engine.steps.target.model
    pack_for_trees(model)
    assert isinstance(model.get_output_embeddings(), PackedLinear)
    self_check(engine.steps.target, 4)
    requests = [(prompt, SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)) for prompt in PROMPTS]
    assert [result.token_ids for result in run(engine, requests)] == expected


def test_a_part_of_a_matrix_is_not_packed_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_layout, "PACKED_ENTRIES", 1)
    model = tiny_model("llama")
    make_lean(model)
    pack_for_trees(model)
    layer = decoder_layers(model, 4)[0]
    assert isinstance(layer, LeanLayer)
    assert isinstance(layer.qkv, PackedLinear)
    assert isinstance(layer.o_proj, PackedLinear)
    assert layer.o_proj is layer.layer.self_attn.o_proj
    assert type(layer.layer.self_attn.q_proj) is nn.Linear


def test_small_matrices_and_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(640, 512))
    monkeypatch.setattr(cpu_layout.os, "sysconf", lambda name: 4 * 640 * 512)
    pack_for_trees(model)
    assert [type(layer) for layer in model] == [nn.Linear, PackedLinear]
    model = nn.Sequential(nn.Linear(640, 512))
    monkeypatch.setattr(cpu_layout.os, "sysconf", lambda name: 1000)
    pack_for_trees(model)
    assert type(model[0]) is nn.Linear
