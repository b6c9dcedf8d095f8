"""Gumbel noise from a counter-based generator: a pure function of (seed, position, token id)."""

import torch
from torch import Tensor

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
        c0, c2 = ((product1 >> 32) & _MASK) ^ c1 ^ key0, ((product0 >> 32) & _MASK) ^ c3 ^ key1
        c1, c3 = product1 & _MASK, product0 & _MASK
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=2).flatten(1)[:, :vocab_size]


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise, float32 [R, vocab_size], for the tokens at ``positions`` of requests with ``seeds`` (int64 [R] each).

    Every device and kernel derives it from the same bits: v = (bits + 1/2) / 2^32, g = -log(-log(1 - v)). Small v, which give
    the large g that win, keep float32's relative precision.
    """
    uniform = (random_bits(seeds, positions, vocab_size).float() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform.clamp(max=1 - 2.0**-24)))
