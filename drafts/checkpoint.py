"""Reading and writing draft heads in the SpecForge / SafeAILab EAGLE-3 layout: config.json and model.safetensors.

A head written here carries one key more, ``vsd``: the hashes of what it was trained for, and what was measured. Reading checks
everything that could make a head silently useless and refuses in one sentence that names what was found and what was expected.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedTokenizerBase

from drafts.eagle3 import Eagle3Config, Eagle3Head, HeadMetadata

ARCHITECTURES = ("LlamaForCausalLMEagle3", "LlamaForCausalLM")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

# What a target's forward pass depends on, under names that transformers has kept. Absent keys are left out of the hash.
_HASHED_KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "tie_word_embeddings",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
)


class DraftError(ValueError):
    """The head cannot be used: one sentence that says what was found and what was expected."""


def target_hash(config: PreTrainedConfig) -> str:
    """sha256 over the architecture of a target: the same for every dtype, path and version of transformers."""
    text = config.get_text_config()
    shape: dict[str, Any] = {key: getattr(text, key, None) for key in _HASHED_KEYS}
    shape["num_key_value_heads"] = shape["num_key_value_heads"] or shape["num_attention_heads"]
    shape["head_dim"] = shape["head_dim"] or shape["hidden_size"] // shape["num_attention_heads"]
    return _sha256({key: value for key, value in shape.items() if value is not None})


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over the vocabulary (added tokens included) and the merges."""
    merges: list[str] = []
    if tokenizer.is_fast:
        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        # Versions of tokenizers write a merge as "a b" or as ["a", "b"].
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]
    return _sha256([sorted(tokenizer.get_vocab().items()), merges])


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def save_head(path: str | Path, head: Eagle3Head, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write ``head`` to the directory ``path``, weights as ``dtype``. A reader never sees a half-written file."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {name: (t.to(dtype) if t.is_floating_point() else t).cpu().contiguous() for name, t in _to_disk(head).items()}
    save_file(tensors, path / "model.safetensors.partial", metadata={"format": "pt"})
    os.replace(path / "model.safetensors.partial", path / "model.safetensors")
    _write_json(path / "config.json", _config_to_json(head.config, dtype) | _metadata_to_json(head.metadata))


def write_metadata(path: str | Path, metadata: HeadMetadata) -> None:
    """Replace the metadata of the head saved at ``path``, leaving its weights alone."""
    path = Path(path)
    _write_json(path / "config.json", _read_json(path) | _metadata_to_json(metadata))


def find_head(name: str | Path) -> Path:
    """The directory ``name``; where there is none and ``name`` could be a hub id (owner/name), its copy in the hub's cache."""
    path = Path(name)
    if path.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        return path
    try:
        return Path(snapshot_download(str(name), allow_patterns=["config.json", "model.safetensors"]))
    except (OSError, ValueError) as error:  # what the hub's own errors derive from
        reason = str(error).strip().splitlines()[0]
        raise DraftError(f"The draft head {name} is not a directory, and the model hub did not give it: {reason}") from None


def load_head(
    path: str | Path,
    target_config: PreTrainedConfig,
    *,
    tokenizer_hash: str,
    embedding: Tensor,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Eagle3Head:
    """The head at ``path``, a directory or hub id, ready to serve the target whose input table is ``embedding`` [V, H_t].

    Raises DraftError when the head is missing, damaged, or made for another target or tokenizer. Pickled weights are refused.
    """
    path = find_head(path)
    raw = _read_json(path)
    config = _config_from_json(path, raw, target_config.get_text_config())
    metadata = _metadata_from_json(path, raw)
    if metadata is not None:
        _check_equal(path, "target hash", metadata.target_hash, target_hash(target_config))
        _check_equal(path, "tokenizer hash", metadata.tokenizer_hash, tokenizer_hash)
    tensors = _read_tensors(path)
    own_embedding = "embed_tokens.weight" in tensors
    if not own_embedding:
        _check_equal(path, "no embed_tokens.weight and hidden size", config.hidden_size, embedding.shape[1])
    head = Eagle3Head(Eagle3Config(**(vars(config) | {"own_embedding": own_embedding})))
    _from_disk(path, head, tensors)
    head = head.to(device=device, dtype=dtype).eval().requires_grad_(False)
    head.share_embedding(embedding)
    head.metadata = metadata
    return head


def _check_equal(path: Path, what: str, found: object, expected: object) -> None:
    if found != expected:
        raise DraftError(f"The draft head at {path} has {what} {found}, but the target has {expected}: use a head made for it.")


# --- config.json ---------------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise DraftError(f"The draft head {path} is not a directory: expected one with config.json and model.safetensors.")
    try:
        raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DraftError(f"The draft head at {path} has no config.json: expected config.json and model.safetensors.") from None
    except ValueError as error:
        raise DraftError(f"The draft head's {path / 'config.json'} is not JSON ({error}): expected an EAGLE-3 configuration.") from None
    if not isinstance(raw, dict):
        raise DraftError(f"The draft head's {path / 'config.json'} holds a {type(raw).__name__}: expected a JSON object.")
    return raw


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _config_from_json(path: Path, raw: dict[str, Any], target: PreTrainedConfig) -> Eagle3Config:
    architectures = raw.get("architectures") or ["none"]
    if architectures[0] not in ARCHITECTURES:
        raise DraftError(f"The draft head at {path} has architecture {architectures[0]}, but only {' or '.join(ARCHITECTURES)} is read.")
    required = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    if missing := [key for key in required if not isinstance(raw.get(key), int)]:
        raise DraftError(f"The config.json of the draft head at {path} lacks {', '.join(missing)}: expected an EAGLE-3 configuration.")
    target_hidden = raw.get("target_hidden_size") or raw["hidden_size"]
    _check_equal(path, "target hidden size", target_hidden, target.hidden_size)
    _check_equal(path, "vocabulary size", raw["vocab_size"], target.vocab_size)
    for key, supported in (("hidden_act", "silu"), ("num_hidden_layers", 1), ("attention_bias", False), ("mlp_bias", False)):
        if raw.get(key, supported) != supported:
            raise DraftError(f"The draft head at {path} has {key} {raw[key]}, but only {supported} is supported.")
    _check_feature_layers(path, raw, target.num_hidden_layers)
    return Eagle3Config(
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_attention_heads=raw["num_attention_heads"],
        num_key_value_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        vocab_size=raw["vocab_size"],
        draft_vocab_size=raw.get("draft_vocab_size") or raw["vocab_size"],
        target_hidden_size=target_hidden,
        # Published heads often state a shorter context than they are served with; positions must reach the target's.
        max_position_embeddings=max(raw.get("max_position_embeddings") or 0, target.max_position_embeddings),
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_parameters=_rope_parameters(path, raw),
        norm_before_residual=bool(raw.get("norm_before_residual")),
        norm_output=bool(raw.get("norm_output")),
    )


def _check_feature_layers(path: Path, raw: dict[str, Any], layers: int) -> None:
    """Layer ids mean the layer's output to some tools and its input to others, so only ids that say the default are safe."""
    ids = (raw.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids") or raw.get("eagle_aux_hidden_state_layer_ids")
    default = [1, layers // 2 - 1, layers - 4]
    if ids is not None and list(ids) != default:
        raise DraftError(f"The draft head at {path} was trained on the outputs of target layers {ids}, but only {default} are supported.")


def _rope_parameters(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """transformers' rope_parameters, from either spelling."""
    spelling: dict[str, Any] = {key: raw[key] for key in ("rope_theta", "rope_scaling") if key in raw}
    if raw.get("rope_parameters"):
        spelling = {"rope_parameters": raw["rope_parameters"]}
    parameters = dict(LlamaConfig(max_position_embeddings=raw.get("max_position_embeddings") or 2048, **spelling).rope_parameters)
    parameters.pop("type", None)
    if parameters["rope_type"] not in ROPE_TYPES:
        raise DraftError(f"The draft head at {path} has RoPE type {parameters['rope_type']}, expected one of {', '.join(ROPE_TYPES)}.")
    return parameters


def _config_to_json(config: Eagle3Config, dtype: torch.dtype) -> dict[str, Any]:
    rope = dict(config.rope_parameters)
    scaling = None if rope["rope_type"] == "default" else {k: v for k, v in rope.items() if k != "rope_theta"} | {"type": rope["rope_type"]}
    shape = {key: value for key, value in vars(config).items() if key not in ("rope_parameters", "own_embedding")}
    return {
        "architectures": [ARCHITECTURES[0]],
        "model_type": "llama",
        **shape,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling,
        "rope_parameters": rope,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _metadata_to_json(metadata: HeadMetadata | None) -> dict[str, Any]:
    if metadata is None:
        return {}
    lengths = {str(nodes): length for nodes, length in metadata.acceptance_length.items()}
    return {"vsd": vars(metadata) | {"acceptance_length": lengths}}


def _metadata_from_json(path: Path, raw: dict[str, Any]) -> HeadMetadata | None:
    if "vsd" not in raw:
        return None
    try:
        found = dict(raw["vsd"])
        temperatures = tuple((float(request), float(sigma)) for request, sigma in found.pop("draft_temperature", ()))
        lengths = {int(nodes): float(length) for nodes, length in found.pop("acceptance_length", {}).items()}
        return HeadMetadata(draft_temperature=temperatures, acceptance_length=lengths, **found)
    except (TypeError, ValueError, AttributeError) as error:
        raise DraftError(f"The 'vsd' entry of {path / 'config.json'} is malformed ({error}): expected HeadMetadata's fields.") from None


# --- model.safetensors ---------------------------------------------------------------------------------------------------


def _read_tensors(path: Path) -> dict[str, Tensor]:
    file = path / "model.safetensors"
    if not file.is_file():
        if pickled := sorted(path.glob("*.bin")):
            raise DraftError(f"The draft head at {path} is pickled ({pickled[0].name}), which can run code: convert it to safetensors.")
        raise DraftError(f"The draft head at {path} has no model.safetensors: expected config.json and model.safetensors.")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise DraftError(f"{file} ({file.stat().st_size} bytes) is truncated or not safetensors: {error}.") from None


def _to_disk(head: Eagle3Head) -> dict[str, Tensor]:
    """Tensors under their published names."""
    config = head.config
    heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    q, k, v = head.qkv_proj.weight.detach().split((heads, kv, kv))
    gate, up = head.gate_up_proj.weight.detach().chunk(2)
    tensors = {
        "fc.weight": head.fc.weight,
        "midlayer.input_layernorm.weight": head.input_layernorm,
        "midlayer.hidden_norm.weight": head.hidden_norm,
        "midlayer.self_attn.q_proj.weight": q,
        "midlayer.self_attn.k_proj.weight": k,
        "midlayer.self_attn.v_proj.weight": v,
        "midlayer.self_attn.o_proj.weight": head.o_proj.weight,
        "midlayer.post_attention_layernorm.weight": head.post_attention_layernorm,
        "midlayer.mlp.gate_proj.weight": gate,
        "midlayer.mlp.up_proj.weight": up,
        "midlayer.mlp.down_proj.weight": head.down_proj.weight,
        "norm.weight": head.norm,
        "lm_head.weight": head.lm_head.weight,
    }
    if head.embed_tokens is not None:
        tensors["embed_tokens.weight"] = head.embed_tokens
    if head.d2t is not None:
        drafted = torch.zeros(config.vocab_size, dtype=torch.bool)
        drafted[torch.arange(config.draft_vocab_size) + head.d2t.cpu()] = True
        tensors |= {"d2t": head.d2t, "t2d": drafted}
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _from_disk(path: Path, head: Eagle3Head, tensors: dict[str, Tensor]) -> None:
    """Copy ``tensors`` into ``head`` after checking every name and shape."""
    own = _to_disk(head)  # views of the head's parameters where it has them, so that copying fills the head
    if missing := sorted(own.keys() - tensors.keys() - {"t2d"}):
        raise DraftError(f"The draft head at {path} lacks {', '.join(missing)}: expected {len(own)} tensors, found {len(tensors)}.")
    if unexpected := sorted(tensors.keys() - own.keys() - {"t2d"}):
        raise DraftError(f"The draft head at {path} has unexpected tensors {', '.join(unexpected)}: expected only {', '.join(own)}.")
    for name, tensor in own.items():
        if name in tensors and tensors[name].shape != tensor.shape:
            raise DraftError(f"{name} of the draft head at {path} has shape {list(tensors[name].shape)}, expected {list(tensor.shape)}.")
    for name in own.keys() & tensors.keys():
        own[name].copy_(tensors[name])
    if head.d2t is not None:
        ids = torch.arange(head.config.draft_vocab_size) + head.d2t
        if ids.min() < 0 or ids.max() >= head.config.vocab_size:
            raise DraftError(f"d2t of the draft head at {path} maps to ids {ids.min()}..{ids.max()}, not below {head.config.vocab_size}.")
