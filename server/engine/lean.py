"""Decoder layers of Llama's shape with fewer, larger operations: what transformers' own layers cost beside the matrix products."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from server.engine.cpu_layout import store_transposed
from server.engine.target import ForwardContext, decoder_layers, paged_tree_attention

LEAN = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose layers are: norm, q k v (norms of q and k), RoPE, attention, norm, gated MLP."""


def make_lean(model: PreTrainedModel) -> None:
    """Replace the decoder layers of ``LEAN`` model types, in place; others stay as they are."""
    if model.config.model_type in LEAN:
        layers = decoder_layers(model, model.config.num_hidden_layers)
        for i, layer in enumerate(layers):
            layers[i] = LeanLayer(layer)


class LeanLayer(nn.Module):
    """``layer`` with q, k, v and gate, up as one matrix each, of which its own weights become views.

    Outside ``Target.forward``, where there is no paged cache, the original layer runs: that is what ``self_check`` compares with.
    """

    layer: Any  # transformers' classes have these attributes, which nn.Module's type does not know

    def __init__(self, layer: Any) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.layer = layer
        self.qkv = _fused(attention.q_proj, attention.k_proj, attention.v_proj)
        self.gate_up = _fused(mlp.gate_proj, mlp.up_proj)
        self.o_proj: nn.Linear = attention.o_proj
        self.down_proj: nn.Linear = mlp.down_proj
        self.activation: nn.Module = mlp.act_fn
        self.heads: int = attention.q_proj.out_features // attention.head_dim
        # Mistral's layers read their window from the config.
        config = attention.config
        self.window: int | None = getattr(attention, "sliding_window", config.sliding_window if config.model_type == "mistral" else None)

    def forward(self, hidden_states: Tensor, tree: ForwardContext | None = None, **kwargs: Any) -> Tensor:
        """hidden_states [1, B * N, H] -> the same shape."""
        if tree is None:
            return self.layer(hidden_states, **kwargs)
        attention = self.layer.self_attn
        qkv = self.qkv(_norm(hidden_states, self.layer.input_layernorm)).unflatten(-1, (-1, attention.head_dim))
        qk, v = qkv.tensor_split((qkv.shape[2] - (qkv.shape[2] - self.heads) // 2,), dim=2)
        if hasattr(attention, "q_norm"):
            q, k = qk.tensor_split((self.heads,), dim=2)
            qk = torch.cat((_norm(q, attention.q_norm), _norm(k, attention.k_norm)), dim=2)
        cos, sin = (part.unsqueeze(2) for part in kwargs["position_embeddings"])
        first, second = qk.chunk(2, dim=-1)
        qk = torch.addcmul(qk * cos, torch.cat((-second, first), dim=-1), sin)
        q, k, v = (part.transpose(1, 2) for part in (*qk.tensor_split((self.heads,), dim=2), v))
        out, _ = paged_tree_attention(attention, q, k, v, None, attention.scaling, self.window, tree=tree)
        hidden_states = hidden_states + self.o_proj(out.flatten(2))
        gate, up = self.gate_up(_norm(hidden_states, self.layer.post_attention_layernorm)).chunk(2, dim=-1)
        return hidden_states + self.down_proj(self.activation(gate) * up)


def _norm(x: Tensor, norm: Any) -> Tensor:
    """RMSNorm, as one operation."""
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _fused(*linears: nn.Linear) -> nn.Linear:
    """One layer for all: their outputs side by side. Their weights become views of its weight, so that nothing is held twice."""
    first, sizes = linears[0], [linear.out_features for linear in linears]
    fused = nn.utils.skip_init(nn.Linear, first.in_features, sum(sizes), bias=first.bias is not None, device="meta")
    fused.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
    if first.bias is not None:
        fused.bias = nn.Parameter(torch.cat([linear.bias for linear in linears]), requires_grad=False)
    store_transposed(fused)
    for linear, part in zip(linears, fused.weight.split(sizes), strict=True):
        linear.weight = nn.Parameter(part, requires_grad=False)
    return fused
