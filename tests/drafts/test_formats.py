"""Heads as other tools publish them: every layout is read and written, and what would make a head silently useless is refused."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig

from drafts.checkpoint import DraftError, load_head, read_head, save_head, target_hash
from drafts.eagle3 import Eagle3Config, Eagle3Head, HeadMetadata
from drafts.formats import LAYOUTS, LayoutError, check_mapping, read_config
from tools.train_vsd.export import check_export, export_head, sample_logits

H, INNER, V, VD, LAYERS = 32, 40, 50, 20, 10
TARGET = LlamaConfig(
    vocab_size=V,
    hidden_size=H,
    intermediate_size=INNER,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    architectures=["LlamaForCausalLM"],
)
EMBEDDING = torch.randn(V, H)
IDS = torch.arange(VD) * 2 + 1  # the target's ids of a reduced vocabulary
SHAPE = {
    "model_type": "llama",
    "hidden_size": H,
    "intermediate_size": INNER,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": V,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "num_hidden_layers": 1,
}
FOREIGN = {  # as the three tools write them, with keys that only they know
    "eagle": SHAPE | {"architectures": ["LlamaForCausalLM"], "rope_theta": 500.0, "rope_scaling": None, "bos_token_id": 1},
    "sglang": SHAPE | {"architectures": ["LlamaForCausalLMEagle3"], "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "speculators": {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "transformer_layer_config": SHAPE | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": False,
        "target_hidden_size": None,
        "eagle_aux_hidden_state_layer_ids": [2, 5, 7],
        "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "owner/target", "architectures": []}},
    },
}


def tensors_of(layout: str, reduced: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    layer = "layers.0." if layout == "speculators" else "midlayer."
    shapes = {
        "fc.weight": (H, 3 * H),
        f"{layer}input_layernorm.weight": (H,),
        f"{layer}hidden_norm.weight": (H,),
        f"{layer}self_attn.q_proj.weight": (32, 2 * H),
        f"{layer}self_attn.k_proj.weight": (16, 2 * H),
        f"{layer}self_attn.v_proj.weight": (16, 2 * H),
        f"{layer}self_attn.o_proj.weight": (H, 32),
        f"{layer}post_attention_layernorm.weight": (H,),
        f"{layer}mlp.gate_proj.weight": (INNER, H),
        f"{layer}mlp.up_proj.weight": (INNER, H),
        f"{layer}mlp.down_proj.weight": (H, INNER),
        "norm.weight": (H,),
        "lm_head.weight": (VD if reduced else V, H),
    }
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    if reduced:
        tensors |= {"d2t": IDS - torch.arange(VD), "t2d": torch.zeros(V, dtype=torch.bool).index_fill(0, IDS, True)}
    return tensors


def write(path: Path, layout: str, reduced: bool = False, config: dict | None = None, tensors: dict | None = None) -> Path:
    """A head as another tool writes it; ``config`` and ``tensors`` change it, None removes."""
    path.mkdir(exist_ok=True)
    raw = FOREIGN[layout] | {"draft_vocab_size": VD if reduced else V} | (config or {})
    (path / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
    changed = tensors_of(layout, reduced) | (tensors or {})
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path / "model.safetensors")
    return path


def load(path: Path) -> Eagle3Head:
    return load_head(path, TARGET, tokenizer_hash="tokens", embedding=EMBEDDING, device="cpu", dtype=torch.float32)


@pytest.fixture
def target(tmp_path: Path) -> str:
    TARGET.save_pretrained(tmp_path / "target")
    return str(tmp_path / "target")


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_foreign_head_is_read(tmp_path: Path, layout: str, reduced: bool) -> None:
    head, tensors = load(write(tmp_path, layout, reduced)), tensors_of(layout, reduced)
    layer = "layers.0." if layout == "speculators" else "midlayer."
    assert torch.equal(head.qkv_proj.weight, torch.cat([tensors[f"{layer}self_attn.{name}_proj.weight"] for name in "qkv"]))
    assert torch.equal(head.gate_up_proj.weight, torch.cat([tensors[f"{layer}mlp.{name}_proj.weight"] for name in ("gate", "up")]))
    assert torch.equal(head.hidden_norm, tensors[f"{layer}hidden_norm.weight"])
    assert torch.equal(head.lm_head.weight, tensors["lm_head.weight"])
    assert head.to_target_ids(torch.arange(VD)).tolist() == (IDS if reduced else torch.arange(VD)).tolist()
    assert head.config.rope_parameters == {"rope_type": "default", "rope_theta": 500.0}
    assert head.config.rms_norm_eps == 1e-5
    assert not head.config.norm_before_residual
    assert head.metadata is None


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_is_exported_as_any_other(tmp_path: Path, target: str, layout: str, to: str, reduced: bool) -> None:
    source = write(tmp_path / "head", layout, reduced)
    export_head(str(source), to, tmp_path / "out", target)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors_of(to, reduced).keys()
    assert torch.equal(sample_logits(load(tmp_path / "out")), sample_logits(load(source)))
    assert not (tmp_path / "out" / "model.safetensors.partial").exists()


def test_what_is_written_for_each_server(tmp_path: Path, target: str) -> None:
    source = str(write(tmp_path / "head", "sglang"))
    written = {}
    for layout in LAYOUTS:
        export_head(source, layout, tmp_path / layout, target)
        written[layout] = json.loads((tmp_path / layout / "config.json").read_text())
    assert written["eagle"]["architectures"] == ["LlamaForCausalLM"]
    assert written["sglang"]["architectures"] == ["LlamaForCausalLMEagle3"]
    for layout in ("eagle", "sglang"):
        assert "layer_ids" not in json.dumps(written[layout]), "no ids are right for every server"
    nested = written["speculators"]
    assert nested["norm_before_residual"] is False, "vLLM takes a missing one for true"
    assert nested["eagle_aux_hidden_state_layer_ids"] == [2, 5, 7], "the layers' inputs: vLLM's meaning"
    assert nested["speculators_config"]["verifier"] == {"name_or_path": target, "architectures": ["LlamaForCausalLM"]}
    assert nested["speculators_config"]["default_proposal_method"] == "greedy"
    for flat in (written["eagle"], written["sglang"], nested["transformer_layer_config"]):
        assert flat["rope_theta"] == flat["rope_parameters"]["rope_theta"] == 500.0, "both spellings"


def test_weights_keep_their_type_and_hashes_travel(tmp_path: Path, target: str) -> None:
    head = read_head(write(tmp_path / "head", "sglang", reduced=True))
    head.metadata = HeadMetadata(target_hash(AutoConfig.from_pretrained(target)), "tokens", "eagle3")
    save_head(tmp_path / "own", head)
    for layout in LAYOUTS:
        export_head(str(tmp_path / "own"), layout, tmp_path / layout, target)
        assert load_file(tmp_path / layout / "model.safetensors")["fc.weight"].dtype == torch.bfloat16
        assert load(tmp_path / layout).metadata == head.metadata


def test_an_own_embedding_is_optional(tmp_path: Path, target: str) -> None:
    table = torch.randn(V, H)
    for layout in LAYOUTS:
        source = write(tmp_path / layout, layout, tensors={"embed_tokens.weight": table})
        export_head(str(source), "speculators", tmp_path / f"{layout}-out", target)
        assert torch.equal(load(tmp_path / f"{layout}-out").embed(torch.tensor([3])), table[3:4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_temperature_is_folded_in(tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: torch.dtype) -> None:
    plain = read_head(write(tmp_path / "plain", "sglang", reduced=True)).config
    head = Eagle3Head(Eagle3Config(**(vars(plain) | {"temperature_shift": True, "temperature_sharpness": 1.3})))
    assert head.d2t is not None
    assert head.temperature_shift is not None
    head.requires_grad_(False).d2t.copy_(IDS - torch.arange(VD))
    head.temperature_shift.normal_()
    calibrated = ((0.0, (0.5,)), (1.0, (0.7,)))
    head.metadata = HeadMetadata(target_hash(TARGET), "tokens", "vsd", {"length_t0": 3.0, "length_t1": 2.0}, calibrated)
    save_head(tmp_path / "own", head, dtype)
    assert "vsd.temperature_shift" in load_file(tmp_path / "own" / "model.safetensors")
    export_head(str(tmp_path / "own"), "sglang", tmp_path / "out")
    assert "temperature 0" in capsys.readouterr().out
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors_of("sglang", True).keys()
    exported = load(tmp_path / "out")
    assert exported.config.temperature_sharpness == 1.0
    torch.testing.assert_close(
        sample_logits(exported), sample_logits(load(tmp_path / "own")), rtol=0.02, atol=1e-6 if dtype == torch.float32 else 0.02
    )
    assert exported.metadata is not None
    assert exported.metadata.draft_temperature == calibrated[:1], "what was calibrated for the head above 0 is not this head's"
    assert exported.metadata.held_out == {"length_t0": 3.0}


def test_a_missing_norm_before_residual(tmp_path: Path) -> None:
    assert load(write(tmp_path / "a", "speculators", config={"norm_before_residual": None})).config.norm_before_residual, "as in vLLM"
    assert not load(write(tmp_path / "b", "sglang")).config.norm_before_residual
    assert load(write(tmp_path / "c", "sglang", config={"norm_before_residual": True})).config.norm_before_residual


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_either_rope_spelling_in_a_nested_configuration(tmp_path: Path, key: str) -> None:
    linear = {"rope_type": "linear", "factor": 4.0}
    spelling = {key: linear | {"rope_theta": 500.0}} if key == "rope_parameters" else {key: linear, "rope_theta": 500.0}
    config = {"transformer_layer_config": SHAPE | spelling}
    assert load(write(tmp_path, "speculators", config=config)).config.rope_parameters == linear | {"rope_theta": 500.0}


def test_ids_of_the_default_layers(tmp_path: Path) -> None:
    """Model-Optimizer and SpecForge count outputs, and Model-Optimizer names tensors as vLLM does."""
    layer_ids = {"eagle_aux_hidden_state_layer_ids": [1, 4, 6], "use_aux_hidden_state": True}
    outputs = load(write(tmp_path, "sglang", config={"eagle_config": layer_ids}))
    save_file(tensors_of("speculators", False), tmp_path / "model.safetensors")
    assert torch.equal(load(tmp_path).qkv_proj.weight, outputs.qkv_proj.weight)


def test_an_identity_mapping_is_none(tmp_path: Path) -> None:
    stored = {"d2t": torch.zeros(V, dtype=torch.int64), "t2d": torch.ones(V, dtype=torch.bool)}
    assert load(write(tmp_path, "sglang", tensors=stored)).d2t is None
    with pytest.raises(DraftError, match="unexpected tensors d2t"):
        load(write(tmp_path, "sglang", tensors=stored | {"d2t": torch.ones(V, dtype=torch.int64)}))


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        (
            "sglang",
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 5, 7]}},
            r"outputs of .* \[2, 5, 7\], but only \[1, 4, 6\].*remove",
        ),
        ("eagle", {"eagle_aux_hidden_state_layer_ids": [3, 5, 7]}, r"outputs of .* \[3, 5, 7\], but only \[1, 4, 6\] are supported\.$"),
        ("speculators", {"eagle_aux_hidden_state_layer_ids": [1, 4, 6]}, r"inputs of .* \[1, 4, 6\], but only \[2, 5, 7\].*remove"),
        ("speculators", {"eagle_aux_hidden_state_layer_ids": [2, 5, 7, 10]}, r"inputs of .* \[2, 5, 7, 10\], but only \[2, 5, 7\]"),
        ("speculators", {"speculators_model_type": "dflash"}, "speculators_model_type dflash, but only eagle3"),
        ("speculators", {"transformer_layer_config": None}, "lacks transformer_layer_config"),
        ("speculators", {"transformer_layer_config": SHAPE | {"model_type": "qwen3"}}, "model_type qwen3, but only llama"),
        ("speculators", {"transformer_layer_config": SHAPE | {"vocab_size": V + 1}}, f"vocabulary size {V + 1}, but the target has {V}"),
        ("speculators", {"transformer_layer_config": {"hidden_size": H}}, "lacks intermediate_size, num_attention_heads, vocab_size"),
        ("speculators", {"norm_before_fc": True}, "norm_before_fc True, but only False"),
        ("speculators", {"fc_norm": True}, "fc_norm True, but only False"),
        ("sglang", {"fc_norm": True}, "fc_norm True, but only False"),
        ("sglang", {"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state False, but only True"),
        ("sglang", {"layer_types": ["sliding_attention"]}, "layer_types sliding_attention, but only full_attention"),
        ("sglang", {"rope_theta": 1e4}, r"rope_theta 10000.0 and another, 500.0, in rope_parameters"),
        ("sglang", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "RoPE settings .* not understood"),
        ("eagle", {"architectures": ["LlamaForCausalLMEagle"]}, "architecture LlamaForCausalLMEagle, but only"),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, layout: str, changes: dict, message: str) -> None:
    with pytest.raises(DraftError, match=f"^The draft head at .*{message}"):
        load(write(tmp_path, layout, config=changes))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_are_refused_by_the_names_in_the_file(tmp_path: Path, layout: str) -> None:
    layer = "layers.0." if layout == "speculators" else "midlayer."
    with pytest.raises(DraftError, match=f"lacks {layer}mlp.up_proj.weight, norm.weight: expected 13 tensors, found 11"):
        load(write(tmp_path, layout, tensors={f"{layer}mlp.up_proj.weight": None, "norm.weight": None}))
    with pytest.raises(DraftError, match=f"unexpected tensors {layer}self_attn.q_norm.weight"):
        load(write(tmp_path, layout, tensors={f"{layer}self_attn.q_norm.weight": torch.ones(8)}))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (write(tmp_path, "eagle") / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(DraftError, match=r"pytorch_model.bin.*convert it to safetensors"):
        load(tmp_path)


def test_mappings_that_are_refused(tmp_path: Path) -> None:
    def attempt(**tensors: torch.Tensor | None) -> None:
        load(write(tmp_path, "sglang", reduced=True, tensors=tensors))

    with pytest.raises(DraftError, match="d2t of absolute ids"):
        attempt(d2t=IDS)
    with pytest.raises(DraftError, match=r"maps to ids 40..59, not below 50"):
        attempt(d2t=torch.full((VD,), 40), t2d=None)
    with pytest.raises(DraftError, match="20 draft ids to only 1 target ids"):
        attempt(d2t=-torch.arange(VD), t2d=None)
    with pytest.raises(DraftError, match="other ids than the 20 that t2d marks"):
        attempt(d2t=IDS - torch.arange(VD) + 1)
    with pytest.raises(DraftError, match=r"t2d of .* has shape \[49\]"):
        attempt(t2d=torch.zeros(V - 1, dtype=torch.bool))
    with pytest.raises(DraftError, match="lacks d2t"):
        attempt(d2t=None)
    attempt(t2d=None)  # servers do not need it


@given(st.sets(st.integers(0, 99), min_size=1, max_size=99))
def test_offsets_are_told_from_absolute_ids(ids: set[int]) -> None:
    absolute = torch.tensor(sorted(ids))
    offsets = absolute - torch.arange(len(absolute))
    drafted = torch.zeros(100, dtype=torch.bool).index_fill(0, absolute, True)
    check_mapping(offsets, drafted, 100)
    if not torch.equal(absolute, offsets):
        with pytest.raises(LayoutError, match="absolute ids"):
            check_mapping(absolute, drafted, 100)


@pytest.mark.parametrize(
    ("layout", "config", "message"),
    [
        ("sglang", {"norm_before_residual": True}, "cannot be exported as sglang: it has norm_before_residual"),
        ("eagle", {"norm_output": True}, "cannot be exported as eagle: it has norm_output"),
        ("eagle", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "it has RoPE type yarn"),
    ],
)
def test_heads_that_a_server_would_misread_are_not_exported(tmp_path: Path, layout: str, config: dict, message: str) -> None:
    source = write(tmp_path / "head", "sglang", config=config)
    with pytest.raises(DraftError, match=message):
        export_head(str(source), layout, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_needs_what_its_layout_names(tmp_path: Path, target: str) -> None:
    source = str(write(tmp_path / "head", "sglang"))
    with pytest.raises(DraftError, match="with --target"):
        export_head(source, "speculators", tmp_path / "out")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(DraftError, match="give a new directory"):
        export_head(source, "sglang", tmp_path)
    ids = str(write(tmp_path / "ids", "speculators"))
    with pytest.raises(DraftError, match=r"target layers \[2, 5, 7\], which cannot be checked without the target"):
        export_head(ids, "sglang", tmp_path / "out")
    LlamaConfig(**(TARGET.to_dict() | {"num_hidden_layers": 6})).save_pretrained(target)
    with pytest.raises(DraftError, match="a target of 6 layers, too few"):
        export_head(source, "sglang", tmp_path / "out", target)


def test_the_check_after_an_export_sees_a_different_head(tmp_path: Path) -> None:
    head = read_head(write(tmp_path, "sglang"))
    check_export(tmp_path, head, "sglang")
    with pytest.raises(DraftError, match=r"differs from the speculators layout in layers.0.hidden_norm.weight"):
        check_export(tmp_path, head, "speculators")
    head.hidden_norm.data[0] += 0.1
    with pytest.raises(DraftError, match="reads back as another head"):
        check_export(tmp_path, head, "sglang")


def test_a_configuration_without_a_target_is_read() -> None:
    config = read_config(FOREIGN["sglang"], None)
    assert config.draft_vocab_size == config.vocab_size == V
    assert config.target_hidden_size == H
