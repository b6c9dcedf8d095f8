"""The lean forward pass gives what transformers' own gives, holds no weight twice, and leaves the model as it was."""

import pytest
import torch

from kernels.rms_norm import rms_norm
from server.engine.lean import LEAN, LeanDecoder
from server.engine.target import self_check
from server.engine.types import SamplingParams
from tests.engine.engines import build, random_head, run, tiny_model
from tests.engine.guided import Guide
from tests.engine.test_model_types import NEW, PROMPTS, generate


@pytest.mark.parametrize(("model_type", "changes"), [*((name, {}) for name in LEAN), ("llama", {"attention_bias": True, "mlp_bias": True})])
def test_greedy_text_equals_generate(model_type: str, changes: dict) -> None:
    model = tiny_model(model_type, **changes)
    expected = [generate(model, prompt) for prompt in PROMPTS]
    requests = [(prompt, SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)) for prompt in PROMPTS]
    engine = build(model, random_head(model), decoder=LeanDecoder, tree_nodes=16, max_num_seqs=3)
    self_check(engine.steps.target, 4)
    guide = Guide(engine, {str(i): prompt + future for i, (prompt, future) in enumerate(zip(PROMPTS, expected, strict=True))})
    assert [result.token_ids for result in run(engine, requests)] == expected
    assert guide.scattered > 5


def test_a_wrong_lean_layer_is_refused() -> None:
    target = build(tiny_model("qwen3"), decoder=LeanDecoder).steps.target
    self_check(target, 4)
    assert isinstance(target.decoder, LeanDecoder)
    target.decoder.layers[2].scale *= 1.5
    with pytest.raises(ValueError, match="self-check failed"):
        self_check(target, 4)


def test_no_weight_is_held_twice_and_the_model_stays_usable() -> None:
    model = tiny_model("llama")
    expected = [generate(model, prompt) for prompt in PROMPTS]
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    decoder = LeanDecoder(model)
    after = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in (model, decoder) for p in m.parameters()}
    assert sum(after.values()) == sum(storages.values())
    assert len(after) == len(storages) - 4 * 3
    assert [generate(model, prompt) for prompt in PROMPTS] == expected


@pytest.mark.parametrize("shape", [(1, 256), (3, 5, 24), (2, 3, 4, 7)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, weight = 10 * torch.randn(shape), torch.randn(shape[-1])
    x[0] = 0
    expected = (x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight).float()
    for inference in (False, True):  # with and without the possibility of a gradient
        with torch.inference_mode(inference):
            torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected)
            half = rms_norm(x.bfloat16(), weight.bfloat16(), 1e-5)
            assert half.dtype == torch.bfloat16
            torch.testing.assert_close(half.float(), expected, atol=0.1, rtol=0.02)
