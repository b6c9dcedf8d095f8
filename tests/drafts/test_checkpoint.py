"""Heads on disk: what is written is read back, and what does not fit is refused in one sentence with both values."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

from drafts.checkpoint import DraftError, find_head, load_head, save_head, target_hash, tokenizer_hash, write_metadata
from drafts.eagle3 import Eagle3Config, Eagle3Head, HeadMetadata

TARGET = LlamaConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=10,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
EMBEDDING = torch.randn(50, 32)
NAMES = {
    "fc.weight",
    "norm.weight",
    "lm_head.weight",
    "midlayer.input_layernorm.weight",
    "midlayer.hidden_norm.weight",
    "midlayer.post_attention_layernorm.weight",
    "midlayer.self_attn.q_proj.weight",
    "midlayer.self_attn.k_proj.weight",
    "midlayer.self_attn.v_proj.weight",
    "midlayer.self_attn.o_proj.weight",
    "midlayer.mlp.gate_proj.weight",
    "midlayer.mlp.up_proj.weight",
    "midlayer.mlp.down_proj.weight",
}


def make_head(**options: object) -> Eagle3Head:
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "draft_vocab_size": 50, "target_hidden_size": 32, "hidden_size": 32} | options
    head = Eagle3Head(
        Eagle3Config(
            intermediate_size=40,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=64,
            **shape,
        )
    )
    if head.d2t is not None:
        head.d2t.copy_(torch.arange(head.config.draft_vocab_size))
    sigmas = ((0.0, (0.4, 0.5)), (1.0, (0.7,)))
    head.metadata = HeadMetadata(target_hash(TARGET), "tokens", "eagle3", {"accuracy": 0.5}, sigmas, {1: 1.0, 16: 3.2})
    return head.requires_grad_(False)


def load(path: Path, **options: object) -> Eagle3Head:
    settings = {"tokenizer_hash": "tokens", "embedding": EMBEDDING, "device": "cpu", "dtype": torch.float32} | options
    return load_head(path, settings.pop("target", TARGET), **settings)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_head(tmp_path / "head", make_head(), torch.float32)
    return tmp_path / "head"


def edit_config(path: Path, **changes: object) -> None:
    raw = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(raw))


def edit_tensors(path: Path, remove: tuple[str, ...] = (), **changes: torch.Tensor) -> None:
    tensors = load_file(path / "model.safetensors") | {name.replace("__", "."): t for name, t in changes.items()}
    save_file({name: t for name, t in tensors.items() if name not in remove}, path / "model.safetensors")


@pytest.mark.parametrize(
    "options",
    [{}, {"draft_vocab_size": 20}, {"own_embedding": True}, {"own_embedding": True, "hidden_size": 48}, {"temperature_shift": True}],
)
def test_round_trip(tmp_path: Path, options: dict) -> None:
    head = make_head(**options)
    save_head(tmp_path, head, torch.float32)
    loaded = load(tmp_path)
    assert loaded.config == head.config
    assert loaded.metadata == head.metadata
    for (name, a), (_, b) in zip(head.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert not any(p.requires_grad for p in loaded.parameters())
    if not head.config.own_embedding:
        assert torch.equal(loaded.embed(torch.tensor([3])), EMBEDDING[3:4])


def test_published_layout(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    raw = json.loads((saved / "config.json").read_text())
    assert tensors.keys() == NAMES
    assert tensors["midlayer.self_attn.k_proj.weight"].shape == (16, 64)
    assert raw["architectures"] == ["LlamaForCausalLMEagle3"]
    assert raw["draft_vocab_size"] == 50
    assert raw["num_hidden_layers"] == 1
    assert raw["rope_theta"] == 10000.0
    assert raw["rope_scaling"] is None
    assert raw["rope_parameters"]["rope_theta"] == 10000.0
    assert "eagle_aux_hidden_state_layer_ids" not in json.dumps(raw)


def test_a_temperature_sharpness_is_one_key(saved: Path, tmp_path: Path) -> None:
    assert "temperature_sharpness" not in (saved / "config.json").read_text()
    save_head(tmp_path / "sharp", make_head(temperature_sharpness=1.5))
    assert load_file(tmp_path / "sharp" / "model.safetensors").keys() == NAMES
    assert load(tmp_path / "sharp").config.temperature_sharpness == 1.5


def test_a_temperature_shift_is_one_tensor_and_one_key(saved: Path, tmp_path: Path) -> None:
    assert "temperature_shift" not in (saved / "config.json").read_text()
    head = make_head(temperature_shift=True)
    assert head.temperature_shift is not None
    head.temperature_shift.fill_(0.25)
    save_head(tmp_path / "shifted", head)
    assert load_file(tmp_path / "shifted" / "model.safetensors").keys() == NAMES | {"vsd.temperature_shift"}
    assert json.loads((tmp_path / "shifted" / "config.json").read_text())["temperature_shift"] is True
    loaded = load(tmp_path / "shifted").temperature_shift
    assert loaded is not None
    assert torch.equal(loaded, torch.full((32,), 0.25))


def test_reduced_vocabulary_layout(tmp_path: Path) -> None:
    save_head(tmp_path, make_head(draft_vocab_size=20))
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors.keys() == NAMES | {"d2t", "t2d"}
    assert tensors["d2t"].dtype == torch.int64
    assert tensors["lm_head.weight"].dtype == torch.bfloat16
    assert tensors["t2d"].nonzero().flatten().tolist() == list(range(0, 40, 2))


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_parameters": None, "rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_theta": None, "rope_scaling": None, "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
    ],
)
def test_either_rope_spelling(saved: Path, spelling: dict) -> None:
    edit_config(saved, **spelling)
    loaded = load(saved)
    assert loaded.config.rope_parameters == {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
    save_head(saved, loaded)
    raw = json.loads((saved / "config.json").read_text())
    assert raw["rope_theta"] == 500.0
    assert raw["rope_scaling"] == {"type": "linear", "rope_type": "linear", "factor": 4.0}


def test_context_reaches_the_targets(saved: Path) -> None:
    edit_config(saved, max_position_embeddings=16)
    assert load(saved).config.max_position_embeddings == 64


def test_a_head_without_metadata_loads(saved: Path) -> None:
    raw = json.loads((saved / "config.json").read_text())
    del raw["vsd"]
    (saved / "config.json").write_text(json.dumps(raw))
    assert load(saved, tokenizer_hash="anything").metadata is None


def test_one_sigma_for_all_levels_is_read(saved: Path) -> None:
    raw = json.loads((saved / "config.json").read_text())["vsd"]
    edit_config(saved, vsd=raw | {"draft_temperature": [[0.0, 0.4], [1.0, [0.6, 0.7]]]})
    metadata = load(saved).metadata
    assert metadata is not None
    assert metadata.draft_temperature == ((0.0, (0.4,)), (1.0, (0.6, 0.7)))
    for sigmas in ([], [0.5, 0.0], "half"):
        edit_config(saved, vsd=raw | {"draft_temperature": [[0.0, sigmas]]})
        with pytest.raises(DraftError, match=r"'vsd' entry .* is malformed"):
            load(saved)


def test_metadata_is_replaced_in_place(saved: Path) -> None:
    metadata = HeadMetadata(target_hash(TARGET), "tokens", "eagle3", {}, ((0.0, (0.3,)),), {1: 1.5})
    write_metadata(saved, metadata)
    assert load(saved).metadata == metadata


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_hidden_size": 48}, "target hidden size 48, but the target has 32"),
        ({"vocab_size": 60}, "vocabulary size 60, but the target has 50"),
        ({"architectures": ["LlamaForCausalLM2"]}, "architecture LlamaForCausalLM2, but only LlamaForCausalLMEagle3"),
        ({"hidden_act": "gelu"}, "hidden_act gelu, but only silu"),
        ({"num_hidden_layers": 2}, "num_hidden_layers 2, but only 1"),
        ({"intermediate_size": None}, "lacks intermediate_size"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "RoPE type dynamic, expected one of default"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 5, 7]}}, r"layers \[2, 5, 7\], but only \[1, 4, 6\]"),
        ({"vsd": {"objective": "eagle3"}}, "'vsd' entry .* is malformed"),
        ({"draft_vocab_size": 20}, "lacks d2t"),
        ({"intermediate_size": 44}, r"gate_proj.weight .* shape \[40, 32\], expected \[44, 32\]"),
    ],
)
def test_a_configuration_that_does_not_fit(saved: Path, changes: dict, message: str) -> None:
    edit_config(saved, **changes)
    with pytest.raises(DraftError, match=message):
        load(saved)


def test_hashes_that_differ(saved: Path) -> None:
    deeper = LlamaConfig(**(TARGET.to_dict() | {"num_hidden_layers": 12}))
    with pytest.raises(DraftError, match=f"target hash {target_hash(TARGET)}, but the target has {target_hash(deeper)}"):
        load(saved, target=deeper)
    with pytest.raises(DraftError, match=r"tokenizer hash tokens, but the target has others"):
        load(saved, tokenizer_hash="others")


def test_tensors_that_do_not_fit(saved: Path) -> None:
    edit_tensors(saved, remove=("lm_head.weight", "fc.weight"))
    with pytest.raises(DraftError, match=r"lacks fc.weight, lm_head.weight"):
        load(saved)
    edit_tensors(saved, fc__weight=torch.zeros(32, 97), lm_head__weight=torch.zeros(50, 32))
    with pytest.raises(DraftError, match=r"fc.weight .* shape \[32, 97\], expected \[32, 96\]"):
        load(saved)
    edit_tensors(saved, fc_norm__0=torch.zeros(32))
    with pytest.raises(DraftError, match=r"unexpected tensors fc_norm.0"):
        load(saved)


def test_an_embedding_of_another_width(saved: Path) -> None:
    with pytest.raises(DraftError, match=r"no embed_tokens.weight and hidden size 32, but the target has 64"):
        load(saved, embedding=torch.randn(50, 64))


def test_a_mapping_out_of_range(tmp_path: Path) -> None:
    save_head(tmp_path, make_head(draft_vocab_size=20))
    edit_tensors(tmp_path, d2t=torch.full((20,), 40))
    with pytest.raises(DraftError, match=r"ids 40..59, not below 50"):
        load(tmp_path)


def test_missing_and_damaged_files(saved: Path) -> None:
    with pytest.raises(DraftError, match=r"nowhere is not a directory"):
        load(saved / "nowhere")
    weights = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(DraftError, match=f"{len(weights) // 2} bytes. is truncated or not safetensors"):
        load(saved)
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(DraftError, match=r"pytorch_model.bin.*convert it to safetensors"):
        load(saved)
    (saved / "pytorch_model.bin").unlink()
    with pytest.raises(DraftError, match=r"has no model.safetensors"):
        load(saved)
    (saved / "config.json").write_text("[]")
    with pytest.raises(DraftError, match=r"holds a list"):
        load(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(DraftError, match=r"is not JSON"):
        load(saved)
    (saved / "config.json").unlink()
    with pytest.raises(DraftError, match=r"has no config.json"):
        load(saved)


def test_target_hash_knows_architectures_only() -> None:
    same = LlamaConfig(**(TARGET.to_dict() | {"dtype": "float16", "transformers_version": "4.0", "_name_or_path": "x", "use_cache": False}))
    assert target_hash(same) == target_hash(TARGET)
    assert target_hash(LlamaConfig(**(TARGET.to_dict() | {"vocab_size": 51}))) != target_hash(TARGET)
    assert target_hash(Qwen3Config()) != target_hash(LlamaConfig())


def test_tokenizer_hash_sees_vocabulary_and_merges() -> None:
    def tokenizer(merges: list[tuple[str, str]], added: str = "<eos>") -> PreTrainedTokenizerFast:
        vocab = {token: i for i, token in enumerate(["a", "b", "c", "ab", "bc", "abc"])}
        backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=added)

    base = tokenizer_hash(tokenizer([("a", "b"), ("ab", "c")]))
    assert base == tokenizer_hash(tokenizer([("a", "b"), ("ab", "c")]))
    assert base != tokenizer_hash(tokenizer([("b", "c"), ("a", "bc")]))
    assert base != tokenizer_hash(tokenizer([("a", "b"), ("ab", "c")], added="<end>"))


def test_a_hub_id_is_looked_up_in_the_hub(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        assert allow_patterns == ["config.json", "model.safetensors"], "nothing else of a repository is wanted"
        return str(saved)

    monkeypatch.setattr("drafts.checkpoint.snapshot_download", snapshot)
    assert find_head("owner/head") == saved
    assert find_head(saved) == saved
    assert asked == ["owner/head"]


def test_a_hub_id_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DraftError, match=r"owner/no-such-head is not a directory, and the model hub did not give it: "):
        find_head("owner/no-such-head")
