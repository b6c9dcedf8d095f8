"""Whole forward passes on a CPU in one call: between the kernels of a small model's step, Python takes longer than they do."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from struct import pack
from sys import byteorder
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import cpu
from kernels.noise import NoiseKey
from kernels.tree_layout import Rows, TreeLayout


class Matrix(NamedTuple):
    """A linear layer of ``inputs`` and ``outputs``, arguments as ``panel_linear`` has them."""

    panels: Tensor
    scale: Tensor | None
    bias: Tensor | None
    inputs: int
    outputs: int


class Layer(NamedTuple):
    """One of Llama's shape: qkv, and gate and up, as one matrix each, the norms before these, and how far it sees."""

    input_norm: Tensor
    qkv: Matrix
    o: Matrix
    norm: Tensor
    gate_up: Matrix
    down: Matrix
    window: int | None


class Decoder:
    """A model: embeddings ``table`` [V, H], RoPE's ``cos`` and ``sin`` [positions, 1, D] as ``rope_store`` has them, layers, the last norm,
    the output matrix; ``heads``, ``kv_heads`` and their ``size``, ``scale`` of scores, ``eps`` of norms.
    """

    def __init__(
        self, table: Tensor, cos: Tensor, sin: Tensor, layers: Sequence[Layer], norm: Tensor, lm_head: Matrix, heads: int, kv_heads: int,
        size: int, scale: float, eps: float,
    ) -> None:  # fmt: skip
        assert all(part.is_contiguous() for part in (table, cos, sin))
        self.table, self.outputs, self.shape, self.numbers = table, lm_head.outputs, (heads, kv_heads, size), (scale, eps)
        self._parts = table, cos, sin, list(layers), norm, lm_head  # whose addresses the words have
        self._taps = cache(lambda taps: torch.tensor(taps, dtype=torch.long))
        self._layers = torch.tensor([_words(layer) for layer in layers])
        self.words = torch.tensor(_words((table, cos, sin, norm, lm_head, self._layers, len(layers), len(cos))))

    def run(self, parts: Sequence[Rows], k_cache: Tensor, v_cache: Tensor, taps: tuple[int, ...]) -> list[tuple[Tensor, Tensor | None]]:
        """Of each part logits [K, V] and what the layers ``taps`` read, [B, N, taps * H], 0 at rows that are not live; None without taps.

        k_cache, v_cache [layers, blocks, block, Hkv, D].
        """
        width, held, words = len(taps) * self.table.shape[1], list[Tensor](), list[int]()
        counts = list[int]()
        features: list[Tensor | None] = []
        for tokens, layout, keep in parts:
            own = None
            if taps:
                own = (self.table.new_empty if layout.live is None else self.table.new_zeros)(*tokens.shape, width)
            held += [tokens := tokens.contiguous(), *([] if keep is None else [keep := keep.contiguous()])]
            features.append(own)
            counts.append(len(keep) if keep is not None else tokens.numel() if layout.live is None else len(layout.live_rows))
            words += _words((tokens, keep, -1 if keep is None else len(keep), own))
        logits = self.table.new_empty(sum(counts), self.outputs)
        layouts = parts[0].layout.words.own if len(parts) == 1 else torch.stack([part.layout.words.own for part in parts])
        cpu.launch(
            "decode", self.table.dtype, self.words, layouts, torch.tensor(words), len(parts), k_cache, v_cache, k_cache.stride(0),
            self._taps(taps), len(taps), self.table.shape[1], *self.shape, *self.numbers, logits,
        )  # fmt: skip
        return list(zip(logits.split(counts), features, strict=True))


class Head(NamedTuple):
    """An EAGLE-3 head: its layer, the norms of the states before and of its own, its output matrix, and two flags of its config."""

    layer: Layer
    hidden_norm: Tensor
    norm: Tensor
    lm_head: Matrix
    norm_before_residual: bool
    norm_output: bool


class HeadRows:
    """Drafted rows of a head in one call; arguments as ``Decoder`` has them."""

    def __init__(self, head: Head, heads: int, kv_heads: int, size: int, scale: float, eps: float) -> None:
        self.head, self.shape, self.numbers = head, (heads, kv_heads, size), (scale, eps)
        self.words = torch.tensor(_words(head))

    def run(
        self, table: Tensor, tokens: Tensor, hidden: Tensor, angles: Tensor, slots: Tensor, layout: TreeLayout, shift: Tensor | None,
        sharpness: Tensor | None, k_cache: Tensor, v_cache: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The states of drafted rows, [B, N, H], and their logits [B, N, Vd].

        table [V, H]: embeddings of tokens; tokens int64 [B, N]; hidden [B, N, H]: the states before; angles [2, B, N, 1, D], slots int64
        [B, N]; shift [B, 1, H] and sharpness [B, 1, 1], None: none.
        """
        _check(table, hidden)
        hidden = hidden.contiguous().clone()
        out = hidden.new_empty(*tokens.shape, self.head.lm_head.outputs)
        cos, sin = angles.contiguous()
        cpu.launch(
            "head_rows", hidden.dtype, self.words, layout.words.own, table, tokens.contiguous(), cos, sin, slots.contiguous(),
            None if shift is None else shift.contiguous(), None if sharpness is None else sharpness.contiguous(), k_cache, v_cache,
            *hidden.shape, *self.shape, *self.numbers, hidden, out,
        )  # fmt: skip
        return hidden, out

    def catch_up(
        self, table: Tensor, hidden: Tensor, tokens: Tensor, angles: Tensor, rows: Tensor, starts: Tensor, ends: Tensor, tables: Tensor,
        block_size: int, shift: Tensor | None, k_cache: Tensor, v_cache: Tensor, state: Tensor,
    ) -> None:  # fmt: skip
        """Write the draft rows ``starts`` .. ``ends`` of requests with ``rows`` of the block ``tables``, int64 [B] each, and to ``state``
        [1 + rows, H] what the last one of each returns. hidden [M, H]: what the features of all these rows combine to, one request's
        after the other's; tokens int64 [M]: the one after each. The others as in ``grow``.
        """
        _check(table, hidden)
        assert tables.is_contiguous()
        assert state.is_contiguous()
        cpu.launch(
            "catch_up", hidden.dtype, self.words, table, angles, angles.shape[1], hidden.contiguous(), tokens, rows, starts, ends, tables,
            tables.shape[1], block_size, None if shift is None else shift.contiguous(), len(rows), hidden.shape[1], *self.shape,
            *self.numbers, k_cache, v_cache, state,
        )  # fmt: skip

    def grow(
        self, table: Tensor, states: Tensor, angles: Tensor, shift: Tensor | None, sharpness: Tensor | None, block_tables: Tensor,
        lengths: Tensor, block_size: int, key: NoiseKey | None, vocab: int, target_ids: Tensor | None, temperature: Tensor | None,
        sigma: Tensor, start: Tensor | None, topk: int, prices: tuple[float, float], k_cache: Tensor, v_cache: Tensor,
    ) -> tuple[tuple[Tensor, Tensor, Tensor], int]:  # fmt: skip
        """The levels of drafts, as ``Drafter._levels`` makes them: scores, tokens and parents of all nodes [B, D], and how many levels.

        states [B, H]: what drafting begins from; angles [2, positions, D]: RoPE's table; ``key``: of the noise over ``vocab`` tokens,
        None: none; temperature float32 [B]; sigma float32 [B, levels]; start float32 [B]: scores of the roots, None: 0; ``prices``: of a
        level and of a node. The others as in ``run`` and ``draft_level``.
        """
        _check(table, states)
        assert angles.is_contiguous()
        batch, levels = sigma.shape
        drafted = self.head.lm_head.outputs
        own = None if key is None else NoiseKey(*(part.contiguous() for part in key))
        parts = [
            table, angles, *(None if part is None else part.contiguous() for part in (shift, sharpness)), block_tables,
            lengths.contiguous(), target_ids, *((None, None) if own is None else own[:2]), None if own is None else own.sampled,
            temperature, sigma.contiguous(), start,
        ]  # fmt: skip
        sizes = batch, block_tables.stride(0), block_tables.shape[1], block_size, angles.shape[1], vocab, drafted, topk, levels
        draft = torch.tensor([*_words(tuple(parts)), *sizes, *(int.from_bytes(pack("d", price), byteorder) for price in prices)])
        pool = batch, topk * (1 + (levels - 1) * topk)
        scores, tokens, parents = torch.empty(pool), *(torch.empty(pool, dtype=torch.long) for _ in range(2))
        used = torch.empty(2, dtype=torch.long)
        cpu.launch(
            "grow", states.dtype, self.words, draft, states.shape[1], *self.shape, *self.numbers, states.contiguous(), k_cache, v_cache,
            scores, tokens, parents, used,
        )  # fmt: skip
        columns, grown = used.tolist()
        return (scores[:, :columns], tokens[:, :columns], parents[:, :columns]), grown


def _check(table: Tensor, states: Tensor) -> None:
    """What would be read as something else otherwise."""
    assert table.is_contiguous()
    assert (table.dtype, table.shape[1]) == (states.dtype, states.shape[-1])


def _words(part: Any) -> list[int]:
    """As native/layers.h has it, in words of 64 bits: addresses and numbers, 0 for nothing."""
    if isinstance(part, tuple):
        return [word for own in part for word in _words(own)]
    return [0 if part is None else part.data_ptr() if isinstance(part, Tensor) else part]
