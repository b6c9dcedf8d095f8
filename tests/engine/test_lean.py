"""Lean layers give what transformers' own layers give, hold no weight twice, and are the original layers outside the engine."""

import pytest
from torch import nn

from server.engine.lean import LEAN, LeanLayer, make_lean
from server.engine.target import decoder_layers, self_check
from server.engine.types import SamplingParams
from tests.engine.engines import build, random_head, run, tiny_model
from tests.engine.guided import Guide
from tests.engine.test_model_types import NEW, PROMPTS, generate


@pytest.mark.parametrize(("model_type", "changes"), [*((name, {}) for name in LEAN), ("llama", {"attention_bias": True, "mlp_bias": True})])
def test_greedy_text_equals_generate(model_type: str, changes: dict) -> None:
    model = tiny_model(model_type, **changes)
    expected = [generate(model, prompt) for prompt in PROMPTS]
    make_lean(model)
    assert all(isinstance(layer, LeanLayer) for layer in decoder_layers(model, 4))
    assert [generate(model, prompt) for prompt in PROMPTS] == expected, "outside the engine the original layers run"
    requests = [(prompt, SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)) for prompt in PROMPTS]
    engine = build(model, random_head(model), tree_nodes=16, max_num_seqs=3)
    self_check(engine.steps.target, 4)
    guide = Guide(engine, {str(i): prompt + future for i, (prompt, future) in enumerate(zip(PROMPTS, expected, strict=True))})
    assert [result.token_ids for result in run(engine, requests)] == expected
    assert guide.scattered > 5


def test_a_wrong_lean_layer_is_refused() -> None:
    model = tiny_model("qwen3")
    make_lean(model)
    target = build(model).steps.target
    self_check(target, 4)
    decoder_layers(target.model, 4)[2].o_proj = nn.Linear(32, 32, bias=False)
    with pytest.raises(ValueError, match="self-check failed"):
        self_check(target, 4)


def test_no_weight_is_held_twice() -> None:
    model = tiny_model("llama")
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    make_lean(model)
    after = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(after.values()) == sum(storages.values())
    assert len(after) == len(storages) - 4 * 3


def test_other_layers_stay() -> None:
    model = tiny_model("gemma2")
    make_lean(model)
    assert not any(isinstance(layer, LeanLayer) for layer in decoder_layers(model, 4))
