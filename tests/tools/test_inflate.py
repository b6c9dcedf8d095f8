"""The demo pair at larger shapes: the same function, as an ordinary Llama, with the same acceptance."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel, Qwen3Config

from drafts.checkpoint import read_head, save_head
from drafts.eagle3 import Eagle3Config, Eagle3Head, feature_layers
from server.engine import loading
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.types import SamplingParams
from tests.engine.engines import Result, run
from tools.bench import inflate as command
from tools.bench.inflation import InflateError, Inflater, Shape, layer_order, shared_constant

SHAPES = {
    "wider and deeper": "hidden_size=384,intermediate_size=1024,num_hidden_layers=12,num_attention_heads=6,vocab_size=5000",
    # as for llama-3.1-8b: larger heads, more queries to a key and value head
    "other heads": "hidden_size=512,num_hidden_layers=13,num_attention_heads=16,num_key_value_heads=4,head_dim=128,vocab_size=4100",
    "deeper alone": "num_hidden_layers=15,intermediate_size=800",
}
PROMPTS = ("Once upon a time", "Question: Tom has 3 apples and buys 4 more. How many apples has he?", "def add(a, b):")
NEW = 40


class Pair(NamedTuple):
    target: Path
    draft: Path
    model: PreTrainedModel


@pytest.fixture(scope="module")
def original(demo: Path) -> Pair:
    return Pair(demo / "target", demo / "vsd", AutoModelForCausalLM.from_pretrained(demo / "target", dtype=torch.float32))


@pytest.fixture(scope="module")
def inflated(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}

    def make(name: str) -> Pair:
        if name not in made:
            output = tmp_path_factory.mktemp("inflated")
            command.inflate(str(demo / "target"), str(demo / "vsd"), SHAPES[name], output, torch.float32)
            made[name] = Pair(output / "target", output / "draft", AutoModelForCausalLM.from_pretrained(output / "target"))
        return made[name]

    return make


@pytest.fixture(scope="module")
def prompts(demo: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(demo / "target")
    return [tokenizer(prompt).input_ids for prompt in PROMPTS]


@pytest.fixture(autouse=True)
def float_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """8-bit drafts round differently at another shape."""
    monkeypatch.setattr(loading, "quantize_draft", lambda head: None)


def served(pair: Pair, prompts: list[list[int]], temperature: float) -> list[Result]:
    """Prompt i has seed i."""
    config = EngineConfig(
        model=str(pair.target), draft=str(pair.draft), device="cpu", dtype="float32", load_rule=False, max_model_len=128, max_num_seqs=4
    )
    requests = [(prompt, SamplingParams(max_tokens=NEW, temperature=temperature, seed=i)) for i, prompt in enumerate(prompts)]
    return run(Engine.from_config(config), requests)


@pytest.mark.parametrize("name", SHAPES)
@torch.inference_mode()
def test_the_same_logits_and_features(name: str, original: Pair, inflated: Callable[[str], Pair], prompts: list[list[int]]) -> None:
    large = inflated(name)
    vocab, width = original.model.config.vocab_size, original.model.config.hidden_size
    for prompt in prompts:
        before, after = (pair.model(torch.tensor([prompt]), output_hidden_states=True) for pair in (original, large))
        assert (after.logits[..., :vocab] - before.logits).abs().max() < 1e-4
        assert (after.logits[..., vocab:] < -200).all(), "an added token could win"
        layers = zip(*(feature_layers(pair.model.config.num_hidden_layers) for pair in (original, large)), strict=True)
        for old, new in layers:
            features = after.hidden_states[new][..., :width]
            assert (features - before.hidden_states[old]).abs().max() < 1e-3 * features.abs().max()
            assert (after.hidden_states[new][..., width + 1 :] == 0).all()


@pytest.mark.parametrize("name", SHAPES)
def test_the_same_greedy_tokens(name: str, original: Pair, inflated: Callable[[str], Pair], prompts: list[list[int]]) -> None:
    for prompt in prompts:
        ids = torch.tensor([prompt])
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False}
        assert original.model.generate(ids, **options).tolist() == inflated(name).model.generate(ids, **options).tolist()


@pytest.mark.parametrize("name", ["wider and deeper", "other heads"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_same_text_and_acceptance_in_the_engine(
    name: str, temperature: float, original: Pair, inflated: Callable[[str], Pair], prompts: list[list[int]]
) -> None:
    before, after = (served(pair, prompts, temperature) for pair in (original, inflated(name)))
    assert [result.token_ids for result in after] == [result.token_ids for result in before]
    assert [result.speculation for result in after] == [result.speculation for result in before]
    assert sum(result.speculation.num_accepted_tokens for result in after) > 0.5 * sum(result.speculation.num_steps for result in after)


def test_an_ordinary_llama_with_its_tokenizer(original: Pair, inflated: Callable[[str], Pair]) -> None:
    large = inflated("other heads")
    assert type(large.model) is LlamaForCausalLM
    config = large.model.config
    assert Shape.of(config) == Shape(512, 704, 13, 16, 4, 128, 4100)
    assert not config.tie_word_embeddings
    assert large.model.generation_config.eos_token_id == original.model.generation_config.eos_token_id
    assert AutoTokenizer.from_pretrained(large.target)(PROMPTS[0]) == AutoTokenizer.from_pretrained(original.target)(PROMPTS[0])


def test_added_weights_are_dense(inflated: Callable[[str], Pair]) -> None:
    weights = {name: w for name, w in inflated("other heads").model.named_parameters() if w.ndim == 2 and "embed" not in name}
    zeros = sum(int((w == 0).sum()) for w in weights.values()) / sum(w.numel() for w in weights.values())
    assert zeros < 0.45  # at twice the hidden size; less for larger ones
    added = [name for name, w in weights.items() if not w.any()]
    assert not added, "a matrix of zeros"


def test_the_head_keeps_what_it_knows(original: Pair, inflated: Callable[[str], Pair]) -> None:
    before = read_head(original.draft).metadata
    large = inflated("wider and deeper")
    after = read_head(large.draft, large.model.config).metadata
    assert before is not None
    assert after is not None
    assert after.draft_temperature == before.draft_temperature
    assert after.tokenizer_hash == before.tokenizer_hash
    assert after.target_hash != before.target_hash


def test_a_reduced_draft_vocabulary_grows_by_tokens_that_it_lacked(
    original: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompts: list[list[int]]
) -> None:
    """Half of the vocabulary, the odd ids; and a head whose vocabulary ends before the inflated target's."""
    monkeypatch.setattr(command, "DRAFT_SHARE", 2)
    head = read_head(original.draft)
    half = Eagle3Head(Eagle3Config(**{**vars(head.config), "draft_vocab_size": 2048}))
    half.load_state_dict({**head.state_dict(), "lm_head.weight": head.lm_head.weight[1::2], "d2t": torch.arange(2048) + 1})
    half.metadata = head.metadata
    save_head(tmp_path / "half", half, torch.float32)
    small = original._replace(draft=tmp_path / "half")
    command.inflate(str(small.target), str(small.draft), SHAPES["wider and deeper"], tmp_path, torch.float32)
    large = Pair(tmp_path / "target", tmp_path / "draft", original.model)
    grown = read_head(large.draft)
    ids = grown.to_target_ids(torch.arange(2500))
    assert ids[:2048].tolist() == list(range(1, 4096, 2))
    assert ids[2048:].tolist() == list(range(0, 2 * 452, 2))
    before, after = (served(pair, prompts, 0.0) for pair in (small, large))
    assert [result.speculation for result in after] == [result.speculation for result in before]


def test_norms_of_small_states_too() -> None:
    """Where eps decides."""
    old, new = Shape(8, 8, 5, 2, 1, 4, 10), Shape(24, 8, 5, 2, 1, 4, 12)
    inflater = Inflater(old, new, shared_constant(old, [1e-6, 1e-5]), torch.Generator())
    weight, state = torch.rand(8), torch.randn(4, 8) * 1e-3
    state_with_constant = torch.cat((state, torch.full((4, 1), inflater.constant), torch.zeros(4, 15)), dim=1)
    for eps in (1e-6, 1e-5):
        normed = F.rms_norm(state_with_constant, (24,), inflater.norm(weight), inflater.eps(eps))
        torch.testing.assert_close(normed[:, :8], F.rms_norm(state, (8,), weight, eps))


def test_shards_hold_every_tensor_once(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inflated: Callable[[str], Pair]
) -> None:
    monkeypatch.setattr(command, "SHARD_BYTES", 10_000_000)
    arguments = ["--target", demo / "target", "--draft", demo / "vsd", "--like", SHAPES["wider and deeper"], "--output", tmp_path]
    assert command.main([*map(str, arguments), "--dtype", "bfloat16"]) == 0
    files = sorted((tmp_path / "target").glob("model-*.safetensors"))
    assert len(files) > 2
    found = [name for file in files for name in load_file(file)]
    whole = inflated("wider and deeper").model
    assert sorted(found) == sorted(whole.state_dict())
    sharded = LlamaForCausalLM.from_pretrained(tmp_path / "target")
    assert sharded.dtype == torch.bfloat16
    for name, tensor in sharded.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name].bfloat16()), name
    assert not list((tmp_path / "target").glob("*.partial"))


def test_named_shapes() -> None:
    assert sum(parameters(command.LIKE["llama-3.1-8b"])) == 8_030_261_248  # as published
    assert 120e6 < sum(parameters(command.LIKE["125m"])) < 130e6


def parameters(shape: Shape) -> tuple[int, int]:
    """Of the layers, and of everything else."""
    query, kv = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    layer = shape.hidden_size * (2 * query + 2 * kv + 3 * shape.intermediate_size + 2)
    return shape.num_hidden_layers * layer, shape.hidden_size * (2 * shape.vocab_size + 1)


@pytest.mark.parametrize(("old", "new"), [(10, 10), (10, 12), (10, 32), (5, 6), (6, 80)])
def test_features_are_taken_after_the_same_layers(old: int, new: int) -> None:
    order = layer_order(old, new)
    assert [index for index in order if index is not None] == list(range(old))
    assert len(order) == new
    for before, after in zip(feature_layers(old), feature_layers(new), strict=True):
        assert [index for index in order[:after] if index is not None] == list(range(before))


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ("hidden_size=128", "hidden_size 128 was asked for, but the target has 256: give at least that"),
        ("num_hidden_layers=9", "num_hidden_layers 9 was asked for, but the target has 10"),
        ("num_attention_heads=7", "num_attention_heads 7 was asked for, but the target has 2 to one"),
        ("hidden_size=512,num_attention_heads=8,num_key_value_heads=8", "give a whole multiple of num_key_value_heads, at least 16"),
        ("hidden_size=512,head_dim=96", "head_dim 96 was asked for, but the target has 64: give a multiple"),
        ("hidden_size=500,num_attention_heads=6", "give 504"),
        ("vocab_size=8192", "give a larger hidden_size, or vocab_size 4096"),
        ("llama-2-7b", "expected 125m or llama-3.1-8b, or sizes"),
        ("hidden_size=big", "expected 125m or llama-3.1-8b, or sizes"),
    ],
)
def test_shapes_that_cannot_be_made(like: str, message: str, demo: Path, tmp_path: Path) -> None:
    with pytest.raises(InflateError, match=message):
        command.inflate(str(demo / "target"), str(demo / "vsd"), like, tmp_path / "out", torch.float32)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("which", "changes", "message"),
    [
        ("target", {"attention_bias": True}, "the target has biases"),
        ("target", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "the target has RoPE settings"),
        ("vsd", {"norm_output": True}, "norm_output True"),
    ],
)
def test_models_that_cannot_be_inflated(which: str, changes: dict, message: str, demo: Path, tmp_path: Path) -> None:
    for name in ("target", "vsd"):
        shutil.copytree(demo / name, tmp_path / name)
    file = tmp_path / which / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(InflateError, match=message):
        command.inflate(str(tmp_path / "target"), str(tmp_path / "vsd"), "125m", tmp_path / "out", torch.float32)


def test_only_llamas(tmp_path: Path, demo: Path) -> None:
    Qwen3Config().save_pretrained(tmp_path)
    with pytest.raises(InflateError, match="the target is of qwen3, but only plain Llama models"):
        command.inflate(str(tmp_path), str(demo / "vsd"), "125m", tmp_path / "out", torch.float32)


def test_nothing_is_overwritten(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "target").mkdir()
    arguments = ["--target", demo / "target", "--draft", demo / "vsd", "--like", "125m", "--output", tmp_path]
    assert command.main(list(map(str, arguments))) == 1
    assert "exists: give another --output" in capsys.readouterr().err


def test_targets_that_are_too_flat() -> None:
    with pytest.raises(InflateError, match="give a target of at least 5 layers"):
        layer_order(4, 12)
