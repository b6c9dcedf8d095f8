"""The head against the forward pass of the published layout, written out plainly."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from drafts.checkpoint import _to_disk
from drafts.eagle3 import Eagle3Config, Eagle3Head, feature_layers, rotated

HEADS, KV, DIM = 4, 2, 8


def make_head(**options: object) -> Eagle3Head:
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "draft_vocab_size": 50, "max_position_embeddings": 64, "target_hidden_size": 24} | options
    head = Eagle3Head(
        Eagle3Config(
            hidden_size=32,
            intermediate_size=40,
            num_attention_heads=HEADS,
            num_key_value_heads=KV,
            head_dim=DIM,
            **shape,
        )
    )
    for norm in (head.input_layernorm, head.hidden_norm, head.post_attention_layernorm, head.norm):
        torch.nn.init.normal_(norm, 1.0, 0.2)
    head.share_embedding(torch.randn(50, 32))
    return head.requires_grad_(False)


@rotated
def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rows of one sequence: [T, H, D]."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(0, 1)


def published_forward(head: Eagle3Head, embeddings: Tensor, hidden: Tensor) -> Tensor:
    """Rows 0..T-1 of one sequence through the tensors as they lie on disk. [T, H] -> [T, H]."""
    w, eps, rows = _to_disk(head), head.config.rms_norm_eps, len(hidden)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w[name]

    normed = norm(hidden, "midlayer.hidden_norm.weight")
    x = torch.cat((norm(embeddings, "midlayer.input_layernorm.weight"), normed), dim=-1)
    q, k, v = ((x @ w[f"midlayer.self_attn.{n}_proj.weight"].T).view(1, rows, -1, DIM).transpose(1, 2) for n in "qkv")
    rotary = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=32,
            num_attention_heads=HEADS,
            head_dim=DIM,
            rope_parameters=head.config.rope_parameters,
        )
    )
    q, k = apply_rotary_pos_emb(q, k, *rotary(x, torch.arange(rows)[None]))
    k, v = k.repeat_interleave(HEADS // KV, 1), v.repeat_interleave(HEADS // KV, 1)
    scores = (q @ k.transpose(-1, -2) / DIM**0.5).masked_fill(torch.ones(rows, rows).triu(1).bool(), float("-inf"))
    mixed = (scores.softmax(-1) @ v)[0].transpose(0, 1).reshape(rows, -1)
    y = (normed if head.config.norm_before_residual else hidden) + mixed @ w["midlayer.self_attn.o_proj.weight"].T
    x = norm(y, "midlayer.post_attention_layernorm.weight")
    gate, up = (x @ w[f"midlayer.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
    y = y + (F.silu(gate) * up) @ w["midlayer.mlp.down_proj.weight"].T
    return norm(y, "norm.weight") if head.config.norm_output else y


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_before_residual": True},
        {"norm_output": True},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ],
)
def test_forward_is_the_published_one(options: dict) -> None:
    head = make_head(**options)
    tokens, hidden = torch.randint(50, (7,)), head.combine(torch.randn(7, 3 * 24))
    y = head(head.embed(tokens), hidden, head.angles(torch.arange(7)), causal)
    torch.testing.assert_close(y, published_forward(head, head.embed(tokens), hidden))
    normed = y if head.config.norm_output else F.rms_norm(y, (32,), head.norm, head.config.rms_norm_eps)
    torch.testing.assert_close(head.logits(y), normed @ head.lm_head.weight.T)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_any_leading_shape_and_dtype(shape: tuple[int, ...]) -> None:
    head = make_head().to(torch.bfloat16)
    head.share_embedding(torch.randn(50, 32, dtype=torch.bfloat16))
    tokens = torch.randint(50, shape)
    angles = head.angles(torch.full(shape, 3))
    y = head(head.embed(tokens), torch.randn(*shape, 32, dtype=torch.bfloat16), angles, rotated(lambda q, k, v: q))
    assert y.shape == (*shape, 32)
    assert y.dtype == torch.bfloat16
    assert head.logits(y).shape == (*shape, 50)


def test_the_temperature_shift() -> None:
    torch.manual_seed(3)
    plain, shifted = make_head(), make_head(temperature_shift=True)
    assert shifted.temperature_shift is not None
    embeddings, hidden = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    kept: list[Tensor] = []

    @rotated
    def keep(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kept.append(torch.cat((k, v)))
        return q

    def run(head: Eagle3Head, temperature: Tensor | None) -> Tensor:
        condition = None if temperature is None else head.condition(temperature)
        return head(embeddings, hidden, head.angles(torch.arange(3)), keep, condition)

    temperature = torch.tensor([[0.0], [0.5]])
    assert torch.equal(run(plain, temperature), run(shifted, temperature)), "a fresh shift is zero"
    shifted.temperature_shift.normal_()
    y, warm = run(plain, None), run(shifted, temperature)
    assert torch.equal(run(shifted, None), y)
    assert torch.equal(warm[0], y[0]), "temperature 0 is the head without it"
    assert not torch.isclose(warm[1], y[1]).all(-1).any()
    torch.testing.assert_close(run(shifted, temperature.expand(2, 3)), warm)
    assert all(torch.equal(kept[0], other) for other in kept[1:]), "keys and values do not know the temperature"
    embeddings, hidden = embeddings.bfloat16(), hidden.bfloat16()
    assert run(shifted.bfloat16(), temperature).dtype == torch.bfloat16


def test_positions_reach_past_the_context() -> None:
    head = make_head()
    here, there, last, beyond = head.angles(torch.tensor([64 + 40, 64 + 41, 64 + 63, 1000])).unbind(1)
    assert here.isfinite().all()
    assert not torch.equal(here, there), "each has an angle of its own"
    assert torch.equal(beyond, last)


def test_draft_ids_map_by_offsets() -> None:
    head = make_head(draft_vocab_size=3)
    head.d2t.copy_(torch.tensor([4, 8, 40]))
    assert head.to_target_ids(torch.tensor([[0, 1], [2, 2]])).tolist() == [[4, 9], [42, 42]]
    assert make_head().to_target_ids(torch.tensor([7])).tolist() == [7]


def test_an_own_embedding_is_kept() -> None:
    head = make_head(own_embedding=True)
    head.share_embedding(torch.ones(50, 32))
    assert head.embed(torch.tensor([1])).abs().sum() == 0


def test_feature_layers() -> None:
    assert feature_layers(32) == (2, 16, 29)
    assert feature_layers(2) == (1, 1, 0)


def test_the_temperature_sharpness() -> None:
    torch.manual_seed(4)
    plain, sharp = make_head(), make_head(temperature_sharpness=4.0)
    sharp.load_state_dict(plain.state_dict())
    y = torch.randn(3, 5, 32)
    expected = plain.logits(y)
    torch.testing.assert_close(sharp.logits(y), 4 * expected)
    torch.testing.assert_close(sharp.logits(y, sharp.condition(1.0)), expected)
    mixed = sharp.logits(y, sharp.condition(torch.tensor([[0.0], [0.5], [1.0]])))
    torch.testing.assert_close(mixed, torch.tensor([4.0, 2.0, 1.0])[:, None, None] * expected)
