"""A forward pass of Llama's shape with fewer, larger operations: what transformers' own costs beside the matrix products."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from kernels import cpu
from kernels.cpu_layers import Decoder, Layer
from kernels.linear import gated_linear, linear
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope_store import rope_store
from kernels.tree_attention import LARGEST_HEAD, reads_in_place
from kernels.tree_layout import Rows
from server.engine.cpu_layout import FEW_ROWS, PanelLinear, store_transposed
from server.engine.kv_cache import PagedTensors
from server.engine.target import ForwardContext, attend

LEAN = ("llama", "mistral", "qwen2", "qwen3")
"""Model types that are: embedding, layers of (norm, q k v, norms of q and k, RoPE, attention, norm, gated MLP), norm, output matrix."""


class LeanDecoder(nn.Module):
    """The forward pass of a model of ``LEAN`` types, of whose weights nothing is held twice; ``model`` itself stays usable."""

    _cos: Tensor
    _sin: Tensor

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        body: Any = model.model
        self.embed_tokens = body.embed_tokens
        with torch.no_grad():  # of every position at once: in a step it would be a dozen small operations
            everywhere = torch.arange(model.config.max_position_embeddings, device=model.device)
            cos, sin = (part[0, :, None] for part in body.rotary_emb(self.embed_tokens.weight[:1], everywhere[None]))
        self.register_buffer("_cos", cos.contiguous(), persistent=False)  # [positions, 1, D]
        self.register_buffer("_sin", sin.clone(), persistent=False)
        self._sin[..., : sin.shape[-1] // 2].neg_()  # as ``rope_store`` wants it
        self.layers = nn.ModuleList(LeanLayer(layer) for layer in body.layers)
        self._norms = (*(layer.input_layernorm for layer in body.layers), body.norm)  # each reads what the layer before it returns
        self.lm_head = model.get_output_embeddings()
        self._joined: Decoder | None = None

    def join(self) -> None:
        """On a CPU, make the whole pass over few rows in one call; ``pack_for_trees`` has been here before."""
        own: Any = self.layers
        layers = [_joined(layer, norm) for layer, norm in zip(own, self._norms, strict=False)]
        epsilons = {norm.variance_epsilon for norm in (*self._norms, *(layer.mlp_norm for layer in own))}
        if all(layers) and isinstance(self.lm_head, PanelLinear) and len(epsilons) == 1 and own[0].head_dim <= LARGEST_HEAD:
            self._joined = Decoder(
                self.embed_tokens.weight, self._cos, self._sin, [*filter(None, layers)], self._norms[-1].weight, self.lm_head.matrix,
                own[0].heads, own[0].kv_heads, own[0].head_dim, own[0].scale, *epsilons,
            )  # fmt: skip

    def at_once(self, parts: list[Rows], cache: PagedTensors, taps: tuple[int, ...]) -> list[tuple[Tensor, Tensor | None]] | None:
        """See ``target.Decoder``."""
        if self._joined is None or not _are_few(parts, self.embed_tokens.weight):
            return None
        return self._joined.run(parts, cache.k, cache.v, taps)

    def forward(
        self, tokens: Tensor, positions: Tensor, context: ForwardContext, keep: Tensor | None, taps: tuple[int, ...]
    ) -> tuple[Tensor, list[Tensor]]:
        """tokens, positions int64 [T] -> logits [T or K, V] of the rows ``keep`` int64 [K], and what the layers ``taps`` read, [T, H]."""
        hidden = F.embedding(tokens, self.embed_tokens.weight)
        cos, sin = self._cos.index_select(0, positions), self._sin.index_select(0, positions)
        delta: Any = None
        read = {}
        for i, (layer, norm) in enumerate(zip(self.layers, self._norms, strict=False)):
            hidden, normed = (hidden, _norm(hidden, norm)) if delta is None else _add_norm(hidden, delta, norm)
            if i in taps:
                read[i] = hidden
            hidden, delta = layer.forward(hidden, normed, cos, sin, context)
        if keep is not None:
            hidden, delta = hidden[keep], delta[keep]
        return linear(self.lm_head, _add_norm(hidden, delta, self._norms[-1])[1]), [read[i] for i in taps]


class LeanLayer(nn.Module):
    """transformers' ``layer`` with q, k, v and gate, up as one matrix each, of which its own weights become views."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        attention, mlp, config = layer.self_attn, layer.mlp, layer.self_attn.config
        self.qkv = _fused(attention.q_proj, attention.k_proj, attention.v_proj)
        self.gate_up = _fused(mlp.gate_proj, mlp.up_proj)
        self.o_proj, self.down_proj = attention.o_proj, mlp.down_proj
        self.activation = None if config.hidden_act == "silu" else mlp.act_fn
        self.mlp_norm = layer.post_attention_layernorm
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.index: int = attention.layer_idx
        self.head_dim: int = attention.head_dim
        self.heads: int = attention.q_proj.out_features // attention.head_dim
        self.kv_heads: int = attention.k_proj.out_features // attention.head_dim
        self.scale: float = attention.scaling
        # Mistral's layers read their window from the config.
        self.window: int | None = getattr(attention, "sliding_window", config.sliding_window if config.model_type == "mistral" else None)

    def forward(self, hidden: Tensor, normed: Tensor, cos: Tensor, sin: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """hidden [T, H], and as the input norm makes it; cos, sin [T, 1, D] -> two [T, H], whose sum is the layer's output."""
        qkv = linear(self.qkv, normed).view(len(hidden), -1, self.head_dim)
        qk, v = qkv[:, : self.heads + self.kv_heads], qkv[:, self.heads + self.kv_heads :]
        if self.q_norm is not None:
            qk = torch.cat((_norm(qk[:, : self.heads], self.q_norm), _norm(qk[:, self.heads :], self.k_norm)), dim=1)
        cache = context.cache
        q = rope_store(qk, v, cos, sin, context.slots, context.live, cache.k[self.index], cache.v[self.index])
        out = attend(q, self.index, self.scale, self.window, None, context)
        hidden, normed = _add_norm(hidden, linear(self.o_proj, out.flatten(1)), self.mlp_norm)
        return hidden, linear(self.down_proj, self._gated(normed))

    def _gated(self, normed: Tensor) -> Tensor:
        if self.activation is None:
            return gated_linear(self.gate_up, normed)
        gate, up = linear(self.gate_up, normed).chunk(2, dim=-1)
        return self.activation(gate) * up


def _joined(layer: Any, input_norm: Any) -> Layer | None:
    """A ``LeanLayer`` for ``Decoder``, None where it has parts that these have not."""
    matrices = layer.qkv, layer.o_proj, layer.gate_up, layer.down_proj
    if layer.activation is not None or layer.q_norm is not None or not all(isinstance(part, PanelLinear) for part in matrices):
        return None
    qkv, o, gate_up, down = (part.matrix for part in matrices)
    return Layer(input_norm.weight, qkv, o, layer.mlp_norm.weight, gate_up, down, layer.window)


def _are_few(parts: Sequence[Rows], weight: Tensor) -> bool:
    """Whether our kernels are the fastest for all that such rows need."""
    count = sum(part.tokens.numel() if part.layout.live is None else len(part.layout.live_rows) for part in parts)
    few = cpu.serves(weight) and count <= FEW_ROWS[weight.dtype]
    return few and all(reads_in_place(part.layout, weight.dtype) for part in parts)


def _norm(x: Tensor, norm: Any) -> Tensor:
    """transformers' RMSNorm."""
    return rms_norm(x, norm.weight, norm.variance_epsilon)


def _add_norm(x: Tensor, delta: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """x + delta, and its RMSNorm."""
    return add_rms_norm(x, delta, norm.weight, norm.variance_epsilon)


def _fused(*linears: nn.Linear) -> nn.Linear:
    """One layer for all: their outputs side by side. Their weights become views of its weight, so that nothing is held twice."""
    first, sizes = linears[0], [own.out_features for own in linears]
    fused = nn.utils.skip_init(nn.Linear, first.in_features, sum(sizes), bias=first.bias is not None, device="meta")
    fused.weight = nn.Parameter(torch.cat([own.weight for own in linears]), requires_grad=False)
    if first.bias is not None:
        fused.bias = nn.Parameter(torch.cat([own.bias for own in linears]), requires_grad=False)
    store_transposed(fused)
    for own, part in zip(linears, fused.weight.split(sizes), strict=True):
        own.weight = nn.Parameter(part, requires_grad=False)
    return fused
