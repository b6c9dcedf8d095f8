"""Every supported kind of target: greedy trees give transformers' own text, and what cannot be served losslessly is refused."""

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel

from kernels.tree_layout import TreeLayout
from server.engine import target as target_module
from server.engine.config import EngineError
from server.engine.target import SUPPORTED, Target, refuse_unsupported, self_check
from server.engine.types import SamplingParams
from tests.engine.engines import SHAPES, build, random_head, run, tiny_model
from tests.engine.guided import Guide

NEW = 40
PROMPTS = tuple([(7 * i + 3 * j * j + 11) % 256 for j in range(length)] for i, length in enumerate((1, 5, 12, 30)))
LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "factor": 2.0, "short_factor": [1.0] * 64, "long_factor": [2.0] * 64,
    "original_max_position_embeddings": 1024,
}  # fmt: skip


def generate(model: PreTrainedModel, prompt: list[int], new: int = NEW) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return out[0, len(prompt) :].tolist()


def test_every_supported_type_is_tested() -> None:
    assert set(SHAPES) == set(SUPPORTED)


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_greedy_text_equals_generate(model_type: str) -> None:
    """Plain, and with trees of which a part is right, so that accepted paths of several nodes are moved and built upon."""
    model = tiny_model(model_type)
    expected = [generate(model, prompt) for prompt in PROMPTS]
    requests = [(prompt, SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)) for prompt in PROMPTS]
    assert [result.token_ids for result in run(build(model), requests)] == expected
    for nodes in (5, 16):
        engine = build(model, random_head(model), tree_nodes=nodes, max_num_seqs=3)
        self_check(engine.steps.target, 4)
        guide = Guide(engine, {str(i): prompt + future for i, (prompt, future) in enumerate(zip(PROMPTS, expected, strict=True))})
        results = run(engine, requests)
        assert [result.token_ids for result in results] == expected
        assert sum(result.speculation.num_accepted_tokens for result in results) > 30
        assert guide.scattered > 5


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "gemma2", "gemma3_text", "phi3", "smollm3", "cohere2"])
def test_the_sliding_window_matters(model_type: str) -> None:
    """Without this the equality above could pass with windows ignored."""
    wide = {"sliding_window": 200}
    narrow, ignored = tiny_model(model_type), tiny_model(model_type, **wide)
    ignored.load_state_dict(narrow.state_dict())
    assert generate(narrow, PROMPTS[3]) != generate(ignored, PROMPTS[3])


def test_a_random_head_by_itself_changes_nothing() -> None:
    """The real drafter: growing, its own cache, reduced vocabulary, the target's features."""
    model = tiny_model("llama")
    expected = [generate(model, prompt) for prompt in PROMPTS]
    requests = [(prompt, SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)) for prompt in PROMPTS]
    for changes in ({}, {"draft_vocab_size": 100}):
        engine = build(model, random_head(model, **changes), tree_nodes=33, tree_topk=8, tree_depth=4)
        results = run(engine, requests)
        assert [result.token_ids for result in results] == expected
        assert all(result.speculation.num_draft_tokens == 32 * result.speculation.num_steps for result in results)


@pytest.mark.parametrize("block_size", [1, 2, 3, 16, 64])
def test_block_sizes(block_size: int) -> None:
    model = tiny_model("mistral")
    expected = [generate(model, prompt) for prompt in PROMPTS]
    engine = build(model, random_head(model), tree_nodes=16, block_size=block_size)
    self_check(engine.steps.target, block_size)
    Guide(engine, {str(i): prompt + future for i, (prompt, future) in enumerate(zip(PROMPTS, expected, strict=True))})
    requests = [(prompt, SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)) for prompt in PROMPTS]
    assert [result.token_ids for result in run(engine, requests)] == expected


def test_up_to_the_last_position() -> None:
    """A request that fills the whole context: tree nodes past the end are drafted, never accepted."""
    model = tiny_model("llama", max_position_embeddings=64)
    prompt = PROMPTS[1]
    expected = generate(model, prompt, 64 - len(prompt))
    engine = build(model, random_head(model), tree_nodes=16)
    Guide(engine, {"0": prompt + expected})
    [result] = run(engine, [(prompt, SamplingParams(max_tokens=64 - len(prompt), temperature=0, ignore_eos=True))])
    assert result.token_ids == expected


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (AutoConfig.for_model("qwen3_next"), "linear_attention"),
        (AutoConfig.for_model("llama4_text"), "chunked"),
        (AutoConfig.for_model("deepseek_v3"), "multi-head latent attention"),
        (AutoConfig.for_model("gpt_oss"), "sinks"),
        (LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}), "RoPE"),
        (LlamaConfig(rope_parameters=LONG_ROPE), "RoPE"),
        (AutoConfig.for_model("mamba2"), "linear_attention"),
        (AutoConfig.for_model("bloom"), "not supported"),
    ],
    ids=["linear layers", "chunked", "MLA", "sinks", "dynamic rope", "longrope", "mamba", "other"],
)
def test_refusals(config: PreTrainedConfig, words: str) -> None:
    with pytest.raises(EngineError, match=words) as refusal:
        refuse_unsupported(config)
    message = str(refusal.value)
    assert config.model_type in message
    assert "llama" in message, "it says what is supported"
    assert "\n" not in message


def test_supported_configurations_are_not_refused() -> None:
    for model_type, shape in SHAPES.items():
        refuse_unsupported(AutoConfig.for_model(model_type, **shape))
    refuse_unsupported(LlamaConfig(rope_parameters={
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }))  # fmt: skip


@pytest.mark.parametrize("broken", ["scale", "softcap", "siblings", "context", "window"])
def test_a_broken_attention_fails_the_self_check(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = target_module.tree_attention
    target = Target(tiny_model("gemma2" if broken == "softcap" else "mistral"), taps=False)
    self_check(target, 4)

    def wrong(q: Tensor, k: Tensor, v: Tensor, layout: TreeLayout, scale: float, window: int | None, softcap: float | None) -> Tensor:
        if broken == "siblings" and layout.ancestors is not None:
            layout = _changed(layout, ancestors=torch.tensor([[1, 3, 7, 11]]))
        if broken == "context" and layout.ancestors is not None:
            layout = _changed(layout, block_tables=layout.block_tables.flip(1))
        return right(
            q, k, v, layout, scale * 1.1 if broken == "scale" else scale, None if broken == "window" else window,
            None if broken == "softcap" else softcap,
        )  # fmt: skip

    monkeypatch.setattr(target_module, "tree_attention", wrong)
    with pytest.raises(EngineError, match="self-check failed"):
        self_check(target, 4)


def _changed(layout: TreeLayout, **changes: Tensor) -> TreeLayout:
    names = ("block_tables", "context_lens", "depth", "ancestors", "live", "block_size", "max_context", "first_column")
    return TreeLayout(**{**{name: getattr(layout, name) for name in names}, **changes})
