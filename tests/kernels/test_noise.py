"""Philox against a scalar implementation from the paper, and the law of the noise."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from kernels.noise import gumbel_noise, gumbel_noise_reference, random_bits


def philox(counter: tuple[int, int, int, int], key: tuple[int, int], rounds: int = 7) -> tuple[int, int, int, int]:
    """Philox4x32 as in Salmon et al. (2011), section 4.3, on Python integers."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = divmod(0xD2511F53 * x0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * x2, 2**32)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return x0, x1, x2, x3


def test_scalar_philox_gives_the_published_answers() -> None:
    """Known answers of the authors' Random123 library (kat_vectors), philox4x32 with 7 and 10 rounds."""
    ones = 2**32 - 1
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    assert philox((0, 0, 0, 0), (0, 0)) == (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    assert philox((ones,) * 4, (ones,) * 2) == (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)
    assert philox(*pi) == (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)
    assert philox((0, 0, 0, 0), (0, 0), 10) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox(*pi, 10) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**31), st.integers(1, 70))
def test_bits_equal_scalar_philox(seed: int, position: int, vocab_size: int) -> None:
    ours = random_bits(torch.tensor([seed]), torch.tensor([position]), vocab_size)[0].tolist()
    key = (seed % 2**32, (seed >> 32) % 2**32)
    words = [word for block in range(-(-vocab_size // 4)) for word in philox((block, position, 0, 0), key)]
    assert ours == words[:vocab_size]


def test_bits_of_high_token_ids() -> None:
    ours = random_bits(torch.tensor([5]), torch.tensor([9]), 262_145)[0]
    assert tuple(ours[262_140:262_144].tolist()) == philox((65_535, 9, 0, 0), (5, 0))
    assert int(ours[262_144]) == philox((65_536, 9, 0, 0), (5, 0))[0]


def test_noise_is_the_gumbel_quantile_of_the_bits() -> None:
    seeds, positions = torch.tensor([1, -7, 2**62]), torch.tensor([0, 5, 100_000])
    bits = random_bits(seeds, positions, 999).double().numpy()
    expected = -np.log(-np.log1p(-(bits + 0.5) / 2**32))
    np.testing.assert_allclose(gumbel_noise(seeds, positions, 999).numpy(), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("bits", [0, 1, 2**31, 2**32 - 129, 2**32 - 128, 2**32 - 1])
def test_extreme_bits_give_finite_noise(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.noise.random_bits", lambda seeds, positions, size: torch.full((len(seeds), size), bits))
    noise = gumbel_noise_reference(torch.tensor([0]), torch.tensor([0]), 4)
    assert noise.isfinite().all()
    assert noise[0, 0].item() == pytest.approx(-math.log(-math.log1p(-min((bits + 0.5) / 2**32, 1 - 2**-24))), rel=1e-4)


def test_law_of_the_noise() -> None:
    """Gumbel by the Kolmogorov-Smirnov distance, and word by word uniform."""
    noise = gumbel_noise(torch.arange(-50, 50), torch.arange(100) * 3, 2000)
    assert stats.kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 1e-3
    bits = random_bits(torch.arange(-50, 50), torch.arange(100), 2000).numpy()
    for shift in (0, 8, 16, 24):
        counts = np.bincount(((bits >> shift) & 255).ravel(), minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize(
    ("first", "second"),
    [((3, 7), (3, 8)), ((3, 7), (4, 7)), ((3, 7), (-3, 7)), ((3, 7), (3 + 2**32, 7)), ((7, 3), (3, 7)), ((0, 1), (1, 0))],
    ids=["next position", "next seed", "negative seed", "high half of the seed", "swapped", "swapped zeros"],
)
def test_independence(first: tuple[int, int], second: tuple[int, int]) -> None:
    """Neighbouring seeds and positions: no correlation, and the pair of quartiles is uniform."""
    size = 40_000
    a, b = (random_bits(torch.tensor([seed]), torch.tensor([position]), size)[0].numpy() for seed, position in (first, second))
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(size)
    joint = np.bincount((a >> 30) * 4 + (b >> 30), minlength=16)
    assert stats.chisquare(joint).pvalue > 1e-3


def test_a_row_depends_on_nothing_but_its_own_seed_and_position() -> None:
    seeds, positions = torch.tensor([11, -4, 11, 2**40]), torch.tensor([2, 9, 3, 2])
    together = gumbel_noise(seeds, positions, 501)
    for i in range(4):
        assert torch.equal(together[i], gumbel_noise(seeds[i : i + 1], positions[i : i + 1], 501)[0])
    assert torch.equal(gumbel_noise(seeds, positions, 300), together[:, :300])
