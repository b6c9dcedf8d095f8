"""How much a text repeats itself."""

from collections.abc import Sequence


def repeated_8_grams(ids: Sequence[int]) -> float:
    """Share of the 8-grams of ``ids`` that occurred before in it."""
    grams = [tuple(ids[i : i + 8]) for i in range(len(ids) - 7)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
