"""The EAGLE-3 draft head (Li et al., 2025, arXiv 2503.01840): one decoder layer over the target's features.

Row i pairs token i + 1 with the target's feature at token i and predicts token i + 2; its RoPE position is i. H is the head's
hidden size, H_t the target's, V the target's vocabulary and Vd the head's. The same module serves and trains: RoPE and attention,
which are all that differs, are the caller's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from kernels.linear import gated_linear, linear
from kernels.rms_norm import add_rms_norm, rms_norm

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""q and k before RoPE [..., Hq + Hkv, D], v [..., Hkv, D], cosines and signed sines [..., 1, D] -> [..., Hq, D], scaled by 1 / sqrt(D)."""

DraftTemperature = tuple[tuple[float, tuple[float, ...]], ...]
"""((request temperature, (sigma of level 1, level 2, ...)), ...), request temperatures rising; deeper levels have the last sigma."""

DEEPEST_TREE = 64  # positions past the target's context that a draft may reach


def feature_layers(num_layers: int) -> tuple[int, int, int]:
    """The target layers whose *inputs* are the low, middle and high features: index i of transformers' ``hidden_states``.

    These are the layers of the EAGLE-3 release, (2, L // 2, L - 3), clamped for targets of fewer than five layers.
    """
    low, middle, high = (min(max(i, 0), num_layers - 1) for i in (2, num_layers // 2, num_layers - 3))
    return low, middle, high


@dataclass(frozen=True)
class Eagle3Config:
    """Shape of a head. ``rope_parameters`` are transformers' (rope_type, rope_theta, factor, ...).

    ``temperature_shift``: the head has a vector that tells it the request's temperature. ``temperature_sharpness``: how many times
    larger its logits are at temperature 0, where one token is right, than at 1.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    target_hidden_size: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_parameters: Mapping[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    norm_before_residual: bool = False
    norm_output: bool = False
    own_embedding: bool = False
    temperature_shift: bool = False
    temperature_sharpness: float = 1.0


@dataclass(frozen=True)
class HeadMetadata:
    """What a head knows about itself.

    ``held_out``: acceptance figures on prompts that were not trained on. ``draft_temperature``: what makes softmax((log q + noise) /
    sigma) the probability that a drafted token survives; empty before calibration. ``acceptance_length``: tokens committed per
    verification at temperature 0, bonus token counted, by number of tree nodes.
    """

    target_hash: str
    tokenizer_hash: str
    objective: str
    held_out: Mapping[str, float] = field(default_factory=dict)
    draft_temperature: DraftTemperature = ()
    acceptance_length: Mapping[int, float] = field(default_factory=dict)


class Condition(NamedTuple):
    """What the requests' temperature changes in a head, made by ``Eagle3Head.condition`` once for all steps of a draft."""

    shift: Tensor | None  # [..., H], added to a row's state after attention; None: nothing
    scale: Tensor | None  # [..., 1], of the logits; None: 1


def rotated(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Attend:
    """An ``Attend`` by one of q [..., Hq, D], k and v [..., Hkv, D] with RoPE applied. Has gradients; serving has a kernel for it."""

    def rotate(qk: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        qk = torch.addcmul(qk * cos, qk.roll(qk.shape[-1] // 2, dims=-1), sin)
        q, k = qk.tensor_split((qk.shape[-2] - v.shape[-2],), dim=-2)
        return attend(q, k, v)

    return rotate


def rope_table(config: Eagle3Config) -> Tensor:
    """Cosines and signed sines of every position, [2, positions, head_dim]; rotation is ``x * cos + roll(x, D / 2) * sin``."""
    rotary = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters=dict(config.rope_parameters),
        )
    )
    cos, sin = rotary(torch.empty(0), torch.arange(config.max_position_embeddings + DEEPEST_TREE)[None])
    sign = torch.ones(config.head_dim)
    sign[: config.head_dim // 2] = -1
    return torch.stack((cos[0], sin[0] * sign))


class Eagle3Head(nn.Module):
    """One EAGLE-3 head. q, k, v and gate, up are kept as one matrix each, which halves the launches of a small draft step;
    ``checkpoint.py`` writes and reads them under their published names."""

    d2t: Tensor | None
    rope: Tensor
    _shared_embedding: Tensor | None

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.config = config
        self.metadata: HeadMetadata | None = None
        hidden, heads, kv = config.hidden_size, config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.fc = nn.Linear(3 * config.target_hidden_size, hidden, bias=False)
        self.input_layernorm = nn.Parameter(torch.ones(hidden))
        self.hidden_norm = nn.Parameter(torch.ones(hidden))
        self.qkv_proj = nn.Linear(2 * hidden, heads + 2 * kv, bias=False)
        self.o_proj = nn.Linear(heads, hidden, bias=False)
        self.post_attention_layernorm = nn.Parameter(torch.ones(hidden))
        self.gate_up_proj = nn.Linear(hidden, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, hidden, bias=False)
        self.norm = nn.Parameter(torch.ones(hidden))
        self.lm_head = nn.Linear(hidden, config.draft_vocab_size, bias=False)
        self.temperature_shift = nn.Parameter(torch.zeros(hidden)) if config.temperature_shift else None
        self.embed_tokens = nn.Parameter(torch.zeros(config.vocab_size, hidden)) if config.own_embedding else None
        reduced = config.draft_vocab_size != config.vocab_size
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64) if reduced else None)
        self.register_buffer("rope", rope_table(config), persistent=False)
        self.register_buffer("_shared_embedding", None, persistent=False)

    def share_embedding(self, weight: Tensor) -> None:
        """Use the target's table, [V, H], where the head has none of its own."""
        if self.embed_tokens is None:
            self._shared_embedding = weight.detach()

    @property
    def table(self) -> Tensor:
        """The embeddings, [V, H]."""
        table = self._shared_embedding if self.embed_tokens is None else self.embed_tokens
        assert table is not None, "share_embedding() first: this head has no table of its own"
        return table

    def embed(self, token_ids: Tensor) -> Tensor:
        """Target token ids [...] -> [..., H]."""
        return F.embedding(token_ids, self.table)

    def combine(self, features: Tensor) -> Tensor:
        """The target's low, middle and high features side by side, [..., 3 * H_t] -> [..., H]."""
        return linear(self.fc, features)

    def condition(self, temperature: Tensor | float = 0.0) -> Condition:
        """For requests' temperatures, clamped to [0, 1], of a shape that broadcasts to that of the rows, [...]."""
        sharpness, dtype = self.config.temperature_sharpness, self.norm.dtype
        warm = torch.as_tensor(temperature, device=self.norm.device).unsqueeze(-1)
        return Condition(
            None if self.temperature_shift is None else warm.to(dtype) * self.temperature_shift,
            None if sharpness == 1.0 else (sharpness ** (1 - warm)).to(dtype),
        )

    def angles(self, positions: Tensor) -> Tensor:
        """RoPE's cosines and signed sines, [2, ..., 1, D], at positions int64 [...]; past the end of the table as at its end."""
        positions = positions.clamp(max=self.rope.shape[1] - 1)
        return self.rope.index_select(1, positions.flatten()).view(2, *positions.shape, 1, self.config.head_dim)

    def forward(
        self,
        embeddings: Tensor,
        hidden: Tensor,
        angles: Tensor,
        attend: Attend,
        condition: Condition | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """One draft step.

        ``embeddings``: [..., H] of token i + 1. ``hidden``: [..., H], ``combine``d feature i, or the state that this method
        returned for the row before. ``angles``: of the rows' positions, or of some that broadcast to [...]. ``condition``: None is
        temperature 0. Returns the state to recycle, [..., H].
        ``keep``, int64 [B]: the only rows, of [M], whose states are wanted; ``attend`` and ``condition`` are of those alone.
        """
        config, eps = self.config, self.config.rms_norm_eps
        qk, v, normed = self.project(embeddings, hidden)
        residual = normed if config.norm_before_residual else hidden
        if keep is not None:
            residual = residual[keep]
        if condition is not None and condition.shift is not None:
            # Not before attention: keys and values of committed rows are the same at every temperature, so prefixes can be shared.
            residual = residual + condition.shift
        attended = linear(self.o_proj, attend(qk, v, *angles).flatten(-2))
        y, normed = add_rms_norm(residual, attended, self.post_attention_layernorm, eps)
        more = linear(self.down_proj, gated_linear(self.gate_up_proj, normed))
        return add_rms_norm(y, more, self.norm, eps)[1] if config.norm_output else y + more

    def project(self, embeddings: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What rows have before attention: q and k [..., Hq + Hkv, D], v [..., Hkv, D], and ``hidden`` normed."""
        config, eps = self.config, self.config.rms_norm_eps
        normed = rms_norm(hidden, self.hidden_norm, eps)
        x = torch.cat((rms_norm(embeddings, self.input_layernorm, eps), normed), dim=-1)
        qkv = linear(self.qkv_proj, x).unflatten(-1, (-1, config.head_dim))
        return *qkv.tensor_split((config.num_attention_heads + config.num_key_value_heads,), dim=-2), normed

    def output(self, y: Tensor) -> Tensor:
        """[..., H], as ``forward`` returns it -> what ``lm_head`` reads, [..., H]."""
        return y if self.config.norm_output else rms_norm(y, self.norm, self.config.rms_norm_eps)

    def logits(self, y: Tensor, condition: Condition | None = None) -> Tensor:
        """[..., H], as ``forward`` returns it -> [..., Vd]. ``condition``: as ``forward`` takes it."""
        output, scale = self.output(y), (condition or self.condition()).scale
        return linear(self.lm_head, output if scale is None else output * scale)  # H numbers to scale, and not Vd

    def to_target_ids(self, draft_ids: Tensor) -> Tensor:
        """Ids in the draft's vocabulary -> ids in the target's, same shape."""
        return draft_ids if self.d2t is None else draft_ids + self.d2t[draft_ids]
