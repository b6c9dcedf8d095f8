"""The three layouts in which EAGLE-3 heads are published: their configurations, and what they call the decoder layer's tensors.

eagle (SafeAILab) and sglang (SpecForge, SGLang; this project's own) are flat Llama configurations with ``midlayer.*`` tensors,
speculators (vLLM) nests the decoder layer's configuration and says ``layers.0.*``. The forward pass is the same in all of them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from drafts.eagle3 import Eagle3Config, feature_layers

ARCHITECTURES = {"sglang": "LlamaForCausalLMEagle3", "eagle": "LlamaForCausalLM"}
LAYOUTS = (*ARCHITECTURES, "speculators")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_LAYER_IDS = "eagle_aux_hidden_state_layer_ids"

# Settings that change what a head computes, with the one value that Eagle3Head implements; absent and null mean it too.
_ONLY = {
    "hidden_act": "silu",
    "num_hidden_layers": 1,
    "attention_bias": False,
    "mlp_bias": False,
    "fc_norm": False,
    "use_aux_norm": False,
    "norm_before_fc": False,
    "num_aux_hidden_states": 3,
    "use_aux_hidden_state": True,
    "parallel_drafting": False,
    "logit_scale": 1.0,
}


class LayoutError(ValueError):
    """What is wrong with a head, as the rest of a sentence that begins with the head."""


@dataclass(frozen=True)
class Verifier:
    """The target, as a speculators configuration names it."""

    name: str
    architectures: tuple[str, ...]
    num_layers: int


# --- reading -------------------------------------------------------------------------------------------------------------


def read_config(raw: Mapping[str, Any], num_layers: int | None) -> Eagle3Config:
    """The configuration that ``raw``, a config.json of any layout, states for a target of ``num_layers`` (None: not known)."""
    layout, flat = _flatten(raw)
    required = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    if missing := [key for key in required if not isinstance(flat.get(key), int)]:
        raise LayoutError(f"has a config.json that lacks {', '.join(missing)}: expected an EAGLE-3 configuration")
    settings = flat | (flat.get("eagle_config") or {})
    for key, supported in _ONLY.items():
        if settings.get(key) not in (None, supported):
            raise LayoutError(f"has {key} {settings[key]}, but only {supported} is supported")
    if others := set(settings.get("layer_types") or ()) - {"full_attention"}:
        raise LayoutError(f"has layer_types {', '.join(sorted(others))}, but only full_attention is supported")
    _check_feature_layers(layout, settings.get(_LAYER_IDS), num_layers)
    return Eagle3Config(
        hidden_size=flat["hidden_size"],
        intermediate_size=flat["intermediate_size"],
        num_attention_heads=flat["num_attention_heads"],
        num_key_value_heads=flat.get("num_key_value_heads") or flat["num_attention_heads"],
        head_dim=flat.get("head_dim") or flat["hidden_size"] // flat["num_attention_heads"],
        vocab_size=flat["vocab_size"],
        draft_vocab_size=flat.get("draft_vocab_size") or flat["vocab_size"],
        target_hidden_size=flat.get("target_hidden_size") or flat["hidden_size"],
        max_position_embeddings=flat.get("max_position_embeddings") or 2048,
        rms_norm_eps=flat.get("rms_norm_eps", 1e-6),
        rope_parameters=_rope_parameters(flat),
        norm_before_residual=bool(flat.get("norm_before_residual")),
        norm_output=bool(flat.get("norm_output")),
        temperature_shift=bool(flat.get("temperature_shift")),
        temperature_sharpness=float(flat.get("temperature_sharpness") or 1.0),
    )


def _flatten(raw: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(layout, its keys in one flat object)."""
    if kind := raw.get("speculators_model_type"):
        layer = raw.get("transformer_layer_config")
        if kind != "eagle3":
            raise LayoutError(f"has speculators_model_type {kind}, but only eagle3 is read")
        if not isinstance(layer, dict):
            raise LayoutError("has a config.json that lacks transformer_layer_config: expected the decoder layer's configuration there")
        if layer.get("model_type", "llama") != "llama":
            raise LayoutError(f"has a decoder layer of model_type {layer['model_type']}, but only llama is read")
        # vLLM, which serves this layout, takes a missing norm_before_residual for true; in flat configurations it is false.
        return "speculators", {"norm_before_residual": True, **raw, **layer}
    architecture = (raw.get("architectures") or ["none"])[0]
    for layout, name in ARCHITECTURES.items():
        if architecture == name:
            return layout, dict(raw)
    raise LayoutError(f"has architecture {architecture}, but only {' or '.join(ARCHITECTURES.values())} is read")


def _check_feature_layers(layout: str, ids: list[int] | None, num_layers: int | None) -> None:
    """Refuse ids of any layers but the default ones.

    An id is a layer's input to vLLM and speculators and a layer's output to SpecForge and SGLang. Heads fed with the wrong
    features draft without an error and are hardly ever accepted.
    """
    if not ids:
        return
    if num_layers is None:
        raise LayoutError(f"names the target layers {ids}, which cannot be checked without the target: give it")
    inputs = list(feature_layers(num_layers))
    outputs = [i - 1 for i in inputs]
    found, expected, other = ("inputs", inputs, outputs) if layout == "speculators" else ("outputs", outputs, inputs)
    if list(ids) != expected:
        hint = f"; if it was trained on them and the ids follow another tool's meaning, remove {_LAYER_IDS}" if list(ids) == other else ""
        raise LayoutError(f"was trained on the {found} of target layers {list(ids)}, but only {expected} are supported{hint}")


def _rope_parameters(flat: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' rope_parameters, from either spelling."""
    spelling: dict[str, Any] = {key: flat[key] for key in ("rope_theta", "rope_scaling") if flat.get(key) is not None}
    theta = spelling.get("rope_theta")
    if flat.get("rope_parameters"):
        spelling = {"rope_parameters": flat["rope_parameters"]}
    try:
        if any(isinstance(value, dict) for value in spelling.get("rope_parameters", {}).values()):
            raise ValueError("one set for each type of layer")
        parameters = dict(LlamaConfig(max_position_embeddings=flat.get("max_position_embeddings") or 2048, **spelling).rope_parameters)
        rope_type, found = parameters["rope_type"], parameters["rope_theta"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise LayoutError(
            f"has RoPE settings {spelling} that are not understood ({error}): expected one rope_theta and rope_type"
        ) from None
    parameters.pop("type", None)
    if rope_type not in ROPE_TYPES:
        raise LayoutError(f"has RoPE type {rope_type}, expected one of {', '.join(ROPE_TYPES)}")
    if theta not in (None, found):
        raise LayoutError(f"has rope_theta {theta} and another, {found}, in rope_parameters: expected one value")
    return parameters


def layer_prefix(names: Iterable[str]) -> str:
    """What the decoder layer's tensors in a file are called. vLLM and Model-Optimizer read and write ``layers.0.`` in flat layouts too."""
    return "layers.0." if any(name.startswith("layers.0.") for name in names) else "midlayer."


def check_mapping(d2t: Tensor, t2d: Tensor | None, vocab_size: int) -> None:
    """Refuse a ``d2t`` [Vd] that is no set of offsets into the target's vocabulary. ``t2d`` [V] marks the ids that are drafted."""
    own = torch.arange(len(d2t))
    ids = own + d2t
    drafted = None if t2d is None else t2d.bool().nonzero().flatten()
    if drafted is not None and torch.equal(d2t.sort().values, drafted) and not torch.equal(ids.sort().values, drafted):
        raise LayoutError("has a d2t of absolute ids (t2d marks the same): expected offsets, d2t - arange(len(d2t))")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise LayoutError(f"has a d2t that maps to ids {ids.min()}..{ids.max()}, not below {vocab_size}")
    if len(ids.unique()) != len(ids):
        raise LayoutError(f"has a d2t that maps {len(ids)} draft ids to only {len(ids.unique())} target ids: expected distinct ones")
    if drafted is not None and not torch.equal(ids.sort().values, drafted):
        raise LayoutError(f"has a d2t that maps to other ids than the {len(drafted)} that t2d marks: one of them is wrong")


# --- writing -------------------------------------------------------------------------------------------------------------


def write_config(layout: str, config: Eagle3Config, dtype: torch.dtype, verifier: Verifier | None = None) -> dict[str, Any]:
    """The config.json of ``layout``. Layer ids are left out of flat layouts, where no ids are right for every server."""
    rope = dict(config.rope_parameters)
    scaling = None if rope["rope_type"] == "default" else {k: v for k, v in rope.items() if k != "rope_theta"} | {"type": rope["rope_type"]}
    layer = {
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling,
        "rope_parameters": rope,
    }
    head = {
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        "norm_before_residual": config.norm_before_residual,
        "norm_output": config.norm_output,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if layout == "speculators":
        assert verifier is not None, "a speculators configuration names its verifier"
        return _speculators(verifier) | {"transformer_layer_config": layer} | head
    condition: dict[str, Any] = {"temperature_shift": True} if config.temperature_shift else {}
    if config.temperature_sharpness != 1.0:
        condition["temperature_sharpness"] = config.temperature_sharpness
    return {"architectures": [ARCHITECTURES[layout]]} | layer | head | condition


def _speculators(verifier: Verifier) -> dict[str, Any]:
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 5}],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": verifier.name, "architectures": list(verifier.architectures)},
        },
        _LAYER_IDS: list(feature_layers(verifier.num_layers)),  # inputs: vLLM's meaning
        "norm_before_fc": False,
        "fc_norm": False,
    }


def unserved(layout: str, config: Eagle3Config, num_layers: int | None) -> str | None:
    """Why no reader of ``layout`` would compute what the head computes, None where they do. The settings are those that
    SafeAILab's code and SGLang read past without a word."""
    low, middle, high = feature_layers(num_layers) if num_layers is not None else (0, 1, 2)
    if not low < middle < high:
        return f"a target of {num_layers} layers, too few for the servers' feature layers 2, L // 2 and L - 3"
    if layout != "speculators" and config.norm_before_residual:
        return "norm_before_residual, which only the speculators layout carries"
    if layout == "eagle" and config.norm_output:
        return "norm_output, which SafeAILab's code does not know"
    if layout == "eagle" and config.rope_parameters["rope_type"] not in ("default", "linear"):
        return f"RoPE type {config.rope_parameters['rope_type']}; SafeAILab's code knows default and linear"
    return None
