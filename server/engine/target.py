"""Any transformers decoder over the paged cache: one forward pass for all new rows of all requests."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from drafts.eagle3 import feature_layers
from kernels.tree_attention import tree_attention
from kernels.tree_layout import TreeLayout
from kernels.tree_mask import tree_mask
from server.engine.config import EngineError
from server.engine.kv_cache import PagedTensors

SUPPORTED = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "gpt_neox", "olmo", "olmo2", "mixtral", "qwen3_moe",
    "granite", "smollm3", "cohere2", "gpt2", "opt",
)  # fmt: skip
"""Model types compared with eager attention on trees, with and without a committed prefix (tests/engine)."""


@dataclass
class ForwardContext:
    """What our attention needs beside q, k and v; transformers hands it through to every layer."""

    layout: TreeLayout
    slots: Tensor  # int64 [B * N]
    cache: PagedTensors


def attend(
    q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float, window: int | None, softcap: float | None, tree: ForwardContext
) -> Tensor:
    """Store k and v [B * N, Hkv, D] in the cache of ``layer``, then attend from q [B * N, Hq, D]; the result has q's shape."""
    tree.cache.write(layer, tree.slots, k, v, tree.layout.live)
    rows = q.unflatten(0, tree.layout.depth.shape)
    return tree_attention(rows, tree.cache.k[layer], tree.cache.v[layer], tree.layout, scale, window, softcap).flatten(0, 1)


def paged_tree_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    sliding_window: int | None = None, softcap: float | None = None, tree: ForwardContext | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention signature: query [1, Hq, B * N, D], key and value [1, Hkv, B * N, D] -> [1, B * N, Hq, D]."""
    assert tree is not None, "this attention runs inside Target.forward only"
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return attend(q, k, v, int(module.layer_idx), scale, sliding_window, softcap, tree)[None], None  # type: ignore[arg-type]


AttentionInterface.register("paged_tree", paged_tree_attention)


def refuse_unsupported(config: Any) -> None:
    """Raise EngineError for what would be silently wrong over a paged tree cache."""
    layers = set(getattr(config, "layer_types", None) or ())
    rope = getattr(config, "rope_parameters", None) or {}
    rope_types = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    reasons = {
        f"layers of type {sorted(layers - {'full_attention', 'sliding_attention'})}": bool(
            layers - {"full_attention", "sliding_attention"}
        ),
        "chunked attention": getattr(config, "attention_chunk_size", None) is not None,
        "multi-head latent attention (MLA)": getattr(config, "kv_lora_rank", None) is not None,
        "attention sinks": config.model_type == "gpt_oss",
        "RoPE that depends on the longest sequence of a batch": bool(rope_types & {"dynamic", "longrope"}),
    }
    found = [reason for reason, applies in reasons.items() if applies]
    if found:
        raise EngineError(
            f"model type {config.model_type!r} uses {', '.join(found)}, which this engine cannot serve losslessly; "
            f"supported model types: {', '.join(SUPPORTED)}"
        )
    if config.model_type not in SUPPORTED:
        raise EngineError(f"model type {config.model_type!r} is not supported; expected one of {', '.join(SUPPORTED)}")


def decoder_layers(model: nn.Module, count: int) -> nn.ModuleList:
    """The list of decoder layers, whatever the architecture calls it."""
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count)


def _own_config(model: PreTrainedModel) -> None:
    """Give all modules of the model one copy of its config: set_attn_implementation writes into it, and other models may share it."""
    shared, own = model.config, copy.deepcopy(model.config)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own


Decoder = Callable[[Tensor, Tensor, ForwardContext, Tensor | None, tuple[int, ...]], tuple[Tensor, list[Tensor]]]
"""A forward pass as ``LeanDecoder.forward`` is."""


class Target:
    """A causal LM with its paged cache.

    ``taps``: collect the low, middle and high hidden states for a draft head. ``decoder``: the forward pass of ``model``, where it is not
    transformers' own.
    """

    def __init__(self, model: PreTrainedModel, taps: bool, decoder: Decoder | None = None) -> None:
        refuse_unsupported(model.config)
        self.model = model.eval().requires_grad_(False)
        _own_config(model)
        self.model.set_attn_implementation("paged_tree")
        config = model.config
        self.device, self.dtype = model.device, model.dtype
        self.vocab_size: int = config.vocab_size
        self.max_positions: int = config.max_position_embeddings
        self.num_layers: int = config.num_hidden_layers
        self.kv_heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.head_size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.taps = feature_layers(self.num_layers) if taps else ()
        self.decoder = decoder
        self._features: list[Tensor] | None = None  # a list while our own forward pass runs: others may use the model too
        if decoder is None:
            layers = decoder_layers(model, self.num_layers)
            for index in self.taps:
                layers[index].register_forward_pre_hook(self._tap, with_kwargs=True)

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.kv_heads * self.head_size * self.dtype.itemsize

    def new_cache(self, blocks: int, block_size: int) -> PagedTensors:
        return PagedTensors(self.num_layers, blocks, block_size, self.kv_heads, self.head_size, self.dtype, self.device)

    def _tap(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._features is not None:
            self._features.append(args[0] if args else kwargs["hidden_states"])

    def forward(self, tokens: Tensor, layout: TreeLayout, cache: PagedTensors, keep: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """One pass over tokens int64 [B, N], whose K and V go to the layout's slots.

        keep: flat row indices int64 [K] whose logits are wanted, None for all. Returns logits [K or B * N, V] and, with taps, the
        features [B, N, 3 * H].
        """
        context = ForwardContext(layout, layout.slots.flatten(), cache)
        positions = layout.positions.clamp(max=self.max_positions - 1).flatten()  # nodes past the end are never accepted
        run = self.decoder or self._transformers
        logits, taken = run(tokens.flatten(), positions, context, keep, self.taps)
        return logits, torch.cat(taken, dim=-1).unflatten(0, tokens.shape) if taken else None

    def _transformers(
        self, tokens: Tensor, positions: Tensor, context: ForwardContext, keep: Tensor | None, taps: tuple[int, ...]
    ) -> tuple[Tensor, list[Tensor]]:
        """transformers' own forward pass, as a ``Decoder``; hooks collect the features."""
        taken: list[Tensor] = []
        self._features = taken
        logits = self.model(
            input_ids=tokens[None], position_ids=positions[None], use_cache=False, tree=context, logits_to_keep=0 if keep is None else keep
        ).logits[0]
        self._features = None
        return logits, [part[0] for part in taken]


@torch.inference_mode()
def self_check(target: Target, block_size: int) -> None:
    """Compare prefix + branching tree through our attention with eager attention on every root-to-node path; raise on mismatch."""
    device, size = target.device, 4
    generator = torch.Generator().manual_seed(0)
    prefix, nodes = (
        torch.randint(target.vocab_size, (2 * block_size + 3,), generator=generator),
        torch.randint(target.vocab_size, (size,), generator=generator),
    )
    parent = torch.tensor([[0, 0, 0, 1]], device=device)
    ancestors, depth = tree_mask(parent, 2)
    blocks = -(-(len(prefix) + size) // block_size)
    table = torch.arange(1, blocks + 1, device=device)[None]
    cache = target.new_cache(blocks + 1, block_size)
    length = torch.tensor([len(prefix)], device=device)
    chunk = TreeLayout(table, torch.zeros_like(length), torch.arange(len(prefix), device=device)[None], None, None, block_size, 0)
    target.forward(prefix[None].to(device), chunk, cache)
    tree = TreeLayout(table, length, depth, ancestors, None, block_size, len(prefix))
    ours, _ = target.forward(nodes[None].to(device), tree, cache)
    target.model.set_attn_implementation("eager")
    paths = torch.stack([torch.cat((prefix, nodes[[0, 1, 3]])), torch.cat((prefix, nodes[[0, 2, 2]]))]).to(device)
    reference = target.model(input_ids=paths, use_cache=False).logits[:, len(prefix) :]
    target.model.set_attn_implementation("paged_tree")
    expected = torch.stack([reference[0, 0], reference[0, 1], reference[1, 1], reference[0, 2]])
    error = ((ours - expected).abs().max() / expected.abs().max()).item()
    limit = 1e-3 if target.dtype == torch.float32 else 0.1
    if not error < limit:
        raise EngineError(
            f"self-check failed: logits of {target.model.config.model_type!r} over the paged tree cache differ from eager attention "
            f"by {error:.2g} of the largest logit, expected below {limit}; this model cannot be served losslessly"
        )
