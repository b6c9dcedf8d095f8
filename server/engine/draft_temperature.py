"""Drafting temperatures of one request, from the points that calibration measured."""

from functools import lru_cache
from itertools import pairwise

from drafts.eagle3 import DraftTemperature


@lru_cache(maxsize=256)
def level_sigmas(points: DraftTemperature, temperature: float, levels: int) -> tuple[float, ...]:
    """sigma of levels 1 to ``levels`` at a request's temperature: linear between the points, beyond them the nearest."""
    if temperature <= points[0][0]:
        return _levels(points[0][1], levels)
    for (below, low), (above, high) in pairwise(points):
        if temperature <= above:
            share = (temperature - below) / (above - below)
            return tuple(a + (b - a) * share for a, b in zip(_levels(low, levels), _levels(high, levels), strict=True))
    return _levels(points[-1][1], levels)


def _levels(sigmas: tuple[float, ...], levels: int) -> tuple[float, ...]:
    return (sigmas + sigmas[-1:] * levels)[:levels]
