"""Drafting temperatures between the points that were calibrated."""

import pytest

from server.engine.draft_temperature import level_sigmas

POINTS = ((0.0, (0.4, 0.5)), (1.0, (0.8, 1.0, 1.2)))


@pytest.mark.parametrize(("temperature", "levels", "expected"), [
    (0.0, 4, (0.4, 0.5, 0.5, 0.5)),
    (0.5, 4, (0.6, 0.75, 0.85, 0.85)),
    (1.0, 3, (0.8, 1.0, 1.2)),
    (1.7, 1, (0.8,)),
])  # fmt: skip
def test_linear_in_temperature_and_the_last_level_goes_on(temperature: float, levels: int, expected: tuple[float, ...]) -> None:
    assert level_sigmas(POINTS, temperature, levels) == pytest.approx(expected)


def test_one_number_holds_everywhere() -> None:
    assert level_sigmas(((0.0, (0.7,)),), 0.3, 3) == (0.7, 0.7, 0.7)
