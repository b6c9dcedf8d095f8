"""Gumbel noise from a counter-based generator: a pure function of (seed, position, token id)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import cpu
from kernels.jit import jit, tl, triton

_MASK = 0xFFFFFFFF
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 7  # the fewest that pass BigCrush (Salmon et al., 2011)


def random_bits(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).

    seeds int64 [R] are the 64-bit keys, positions int64 [R]; the counter is (token id // 4, position, 0, 0) and word
    ``token id % 4`` belongs to the token. Returns uint32 values in int64 [R, vocab_size].
    """
    key0, key1 = (seeds & _MASK)[:, None], ((seeds >> 32) & _MASK)[:, None]
    c0 = torch.arange(-(-vocab_size // 4), device=seeds.device).expand(len(seeds), -1)
    c1 = (positions & _MASK)[:, None].expand_as(c0)
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]  # the low 64 bits are right even where int64 wraps
        c0 = (product1 >> 32).bitwise_and_(_MASK).bitwise_xor_(c1).bitwise_xor_(key0)
        c2 = (product0 >> 32).bitwise_and_(_MASK).bitwise_xor_(c3).bitwise_xor_(key1)
        c1, c3 = product1.bitwise_and_(_MASK), product0.bitwise_and_(_MASK)
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=2).flatten(1)[:, :vocab_size]


def gumbel_noise_reference(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """``gumbel_noise`` in plain PyTorch."""
    uniform = random_bits(seeds, positions, vocab_size).float().add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()  # -log(-log(1 - uniform))


@jit
def philox(seed: tl.tensor, position: tl.tensor, block: tl.tensor) -> tl.tensor:
    """The four words of counter (block, position, 0, 0) under the key ``seed``; block: uint32 of any shape, the others int64 scalars."""
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c0, c2 = block, tl.zeros_like(block)
    c1, c3 = c2 + (position & 0xFFFFFFFF).to(tl.uint32), c2
    for _ in tl.static_range(7):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@jit
def log_normal(x: tl.tensor) -> tl.tensor:
    """ln of positive normal float32 numbers, to their last bits. ``tl.log`` minds zero, denormal numbers and infinity as well, and branches
    for each value.
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) & -0x800000  # that of x / (2/3): what remains, 1 + f, lies between 2/3 and 4/3
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    # The polynomial of degree 6 that approximates (ln(1 + f) - f + f^2 / 2) / f^3 best there.
    series = tl.fma(f, 0.14013819, -0.1513927)
    series = tl.fma(f, series, 0.13999087)
    series = tl.fma(f, series, -0.16469346)
    series = tl.fma(f, series, 0.20010896)
    series = tl.fma(f, series, -0.25004363)
    series = tl.fma(f, series, 0.33333206)
    series = tl.fma(f * f, tl.fma(f, series, -0.5), f)
    return tl.fma(exponent.to(tl.float32), 2.0**-23 * 0.6931471805599453, series)


@jit
def gumbel(bits: tl.tensor) -> tl.tensor:
    """The noise of uint32 words, as in ``gumbel_noise``."""
    v = tl.minimum((bits.to(tl.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    rest = 1.0 - v
    lost = (1.0 - rest) - v  # by rounding; exact. Where it matters, rest is almost 1, and so is the slope of its logarithm.
    return -log_normal(-(log_normal(rest) + lost))


@jit
def gumbel_tile(seed: tl.tensor, position: tl.tensor, first: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Noise float32 [BLOCK] of the tokens from ``first``, a multiple of 4, on: one counter makes four tokens' words."""
    w0, w1, w2, w3 = philox(seed, position, (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32))
    return gumbel(tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK]))


@jit
def gumbel_at(seed: tl.tensor, position: tl.tensor, ids: tl.tensor) -> tl.tensor:
    """Noise float32 of the tokens ``ids``, int64 of any shape and order."""
    w0, w1, w2, w3 = philox(seed, position, (ids // 4).to(tl.uint32))
    word = ids % 4
    return gumbel(tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3)))


@jit
def gumbel_noise_kernel(seeds: tl.tensor, positions: tl.tensor, out: tl.tensor, vocab: tl.tensor, BLOCK: tl.constexpr) -> None:
    """One program per (tile of the vocabulary, row)."""
    row = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK
    ids = first + tl.arange(0, BLOCK)
    noise = gumbel_tile(tl.load(seeds + row), tl.load(positions + row), first, BLOCK)
    tl.store(out + row * vocab + ids, noise, mask=ids < vocab)


def gumbel_noise_triton(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """``gumbel_noise`` as one kernel."""
    out = torch.empty(len(seeds), vocab_size, device=seeds.device)
    grid = (triton.cdiv(vocab_size, 1024), len(seeds))
    gumbel_noise_kernel[grid](seeds, positions, out, vocab_size, BLOCK=1024)
    return out


def gumbel_noise_cpu(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """``gumbel_noise`` in one call."""
    out = torch.empty(len(seeds), vocab_size)
    cpu.launch("gumbel_noise", None, seeds.contiguous(), positions.contiguous(), len(seeds), vocab_size, out)
    return out


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise, float32 [R, vocab_size], for the tokens at ``positions`` of requests with ``seeds`` (int64 [R] each).

    Every device and kernel derives it from the same bits: v = (bits + 1/2) / 2^32, g = -log(-log(1 - v)). Small v, which give
    the large g that win, keep float32's relative precision. Devices differ by the last bits of their logarithms.
    """
    run = gumbel_noise_triton if seeds.is_cuda else gumbel_noise_cpu if cpu.library() else gumbel_noise_reference
    return run(seeds, positions, vocab_size)


class NoiseKey(NamedTuple):
    """What the noise of a batch is a function of; depth d of request b belongs to the token at position ``positions[b] + d``."""

    seeds: Tensor  # int64 [B]
    positions: Tensor  # int64 [B]
    sampled: Tensor  # bool [B], False for greedy requests, which have no noise


@dataclass(frozen=True, eq=False)
class Noise:
    """The noise of one step. Kernels make the values where they need them, from the key; what has no kernel reads ``values`` or ``at``."""

    key: NoiseKey
    depths: int
    vocab_size: int

    @cached_property
    def values(self) -> Tensor:
        """float32 [B, depths, V], made once; zero for greedy requests."""
        return torch.stack([self.at(depth) for depth in range(self.depths)], dim=1)

    def at(self, depth: int) -> Tensor:
        """The values of one depth, float32 [B, V]."""
        seeds, first, _ = self.key
        if self._sampled is None:
            return gumbel_noise(seeds, first + depth, self.vocab_size)
        rows = self._sampled
        drawn = gumbel_noise(seeds[rows], first[rows] + depth, self.vocab_size)
        return drawn.new_zeros(len(seeds), self.vocab_size).index_copy_(0, rows, drawn)

    @cached_property
    def _sampled(self) -> Tensor | None:
        """The requests that have noise, None: all."""
        rows = self.key.sampled.nonzero().squeeze(1)
        return None if len(rows) == len(self.key.sampled) else rows
