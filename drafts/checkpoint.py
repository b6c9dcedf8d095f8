"""Reading and writing draft heads: config.json and model.safetensors, in any layout of ``formats.py``.

A head written here carries one key more, ``vsd``: the hashes of what it was trained for, and what was measured. Reading checks
everything that could make a head silently useless and refuses in one sentence that names what was found and what was expected.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from drafts.eagle3 import Eagle3Config, Eagle3Head, HeadMetadata
from drafts.formats import LayoutError, Verifier, check_mapping, layer_prefix, read_config, write_config

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


def save_head(
    path: str | Path, head: Eagle3Head, dtype: torch.dtype = torch.bfloat16, layout: str = "sglang", verifier: Verifier | None = None
) -> None:
    """Write ``head`` to the directory ``path``, weights as ``dtype``. A reader never sees a half-written file.

    ``verifier``: the target, which the speculators layout names.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    own = _to_disk(head, "layers.0." if layout == "speculators" else "midlayer.")
    tensors = {name: (t.to(dtype) if t.is_floating_point() else t).cpu().contiguous() for name, t in own.items()}
    save_file(tensors, path / "model.safetensors.partial", metadata={"format": "pt"})
    os.replace(path / "model.safetensors.partial", path / "model.safetensors")
    _write_json(path / "config.json", write_config(layout, head.config, dtype, verifier) | _metadata_to_json(head.metadata))


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
    head = read_head(path, target_config)
    if head.metadata is not None:
        _check_equal(path, "tokenizer hash", head.metadata.tokenizer_hash, tokenizer_hash)
    if head.embed_tokens is None:
        _check_equal(path, "no embed_tokens.weight and hidden size", head.config.hidden_size, embedding.shape[1])
    head = head.to(device=device, dtype=dtype).eval().requires_grad_(False)
    head.share_embedding(embedding)
    return head


def read_head(path: Path, target_config: PreTrainedConfig | None = None) -> Eagle3Head:
    """The head in the directory ``path``, in float32 on the CPU, checked against the target's architecture where it is given."""
    raw = _read_json(path)
    target = target_config and target_config.get_text_config()
    metadata = _metadata_from_json(path, raw)
    try:
        config = read_config(raw, target and target.num_hidden_layers)
        if target is not None:
            config = _fitted(path, config, target)
            if metadata is not None:
                _check_equal(path, "target hash", metadata.target_hash, target_hash(target))
        tensors = _read_tensors(path)
        head = Eagle3Head(replace(config, own_embedding="embed_tokens.weight" in tensors))
        _from_disk(path, head, tensors)
    except LayoutError as error:
        raise DraftError(f"The draft head at {path} {error}.") from None
    head.metadata = metadata
    return head


def _fitted(path: Path, config: Eagle3Config, target: PreTrainedConfig) -> Eagle3Config:
    """``config`` after the checks against the target's shape. Published heads often state a shorter context than they are served
    with, so positions are made to reach the target's."""
    _check_equal(path, "target hidden size", config.target_hidden_size, target.hidden_size)
    _check_equal(path, "vocabulary size", config.vocab_size, target.vocab_size)
    return replace(config, max_position_embeddings=max(config.max_position_embeddings, target.max_position_embeddings))


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
        temperatures = tuple((float(request), _level_sigmas(sigmas)) for request, sigmas in found.pop("draft_temperature", ()))
        lengths = {int(nodes): float(length) for nodes, length in found.pop("acceptance_length", {}).items()}
        return HeadMetadata(draft_temperature=temperatures, acceptance_length=lengths, **found)
    except (TypeError, ValueError, AttributeError) as error:
        raise DraftError(f"The 'vsd' entry of {path / 'config.json'} is malformed ({error}): expected HeadMetadata's fields.") from None


def _level_sigmas(value: object) -> tuple[float, ...]:
    """sigma of every level; heads that were calibrated before levels had their own bring one number."""
    sigmas = tuple(map(float, value)) if isinstance(value, list | tuple) else (float(value),)  # type: ignore[arg-type]
    if not sigmas or min(sigmas) <= 0:
        raise ValueError(f"draft temperatures are {value}, expected numbers above 0")
    return sigmas


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


def _to_disk(head: Eagle3Head, layer: str = "midlayer.") -> dict[str, Tensor]:
    """Tensors under their published names, those of the decoder layer under ``layer``."""
    config = head.config
    heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    q, k, v = head.qkv_proj.weight.detach().split((heads, kv, kv))
    gate, up = head.gate_up_proj.weight.detach().chunk(2)
    tensors = {
        "fc.weight": head.fc.weight,
        f"{layer}input_layernorm.weight": head.input_layernorm,
        f"{layer}hidden_norm.weight": head.hidden_norm,
        f"{layer}self_attn.q_proj.weight": q,
        f"{layer}self_attn.k_proj.weight": k,
        f"{layer}self_attn.v_proj.weight": v,
        f"{layer}self_attn.o_proj.weight": head.o_proj.weight,
        f"{layer}post_attention_layernorm.weight": head.post_attention_layernorm,
        f"{layer}mlp.gate_proj.weight": gate,
        f"{layer}mlp.up_proj.weight": up,
        f"{layer}mlp.down_proj.weight": head.down_proj.weight,
        "norm.weight": head.norm,
        "lm_head.weight": head.lm_head.weight,
    }
    if head.temperature_shift is not None:
        tensors["vsd.temperature_shift"] = head.temperature_shift
    if head.embed_tokens is not None:
        tensors["embed_tokens.weight"] = head.embed_tokens
    if head.d2t is not None:
        drafted = torch.zeros(config.vocab_size, dtype=torch.bool)
        drafted[torch.arange(config.draft_vocab_size) + head.d2t.cpu()] = True
        tensors |= {"d2t": head.d2t, "t2d": drafted}
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _from_disk(path: Path, head: Eagle3Head, tensors: dict[str, Tensor]) -> None:
    """Copy ``tensors`` into ``head`` after checking every name and shape."""
    if head.d2t is None and "d2t" in tensors and not tensors["d2t"].any():
        tensors = {name: tensor for name, tensor in tensors.items() if name != "d2t"}  # SpecForge stores the identity
    own = _to_disk(head, layer_prefix(tensors))  # views of the head's parameters where it has them, so that copying fills the head
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
        check_mapping(head.d2t, tensors.get("t2d"), head.config.vocab_size)
