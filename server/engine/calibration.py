"""Drafting temperatures of a head that was never calibrated, learned while it serves."""

import math

from drafts.eagle3 import DraftTemperature

LOW, HIGH = 0.2, 1.5  # of sigma
_GAIN = 4.0  # 1 / how fast predictions fall with log sigma: 0.25 for most heads
_HEADSTART = 100  # observations that the first sigma is worth
_FORGETTING = 1e-3  # of the estimate per observation, at least: texts change


class LearnedSigma:
    """One sigma for greedy requests, one for temperature 1 and above, and a line between them.

    sigma is right when the best first guesses of the trees come true as often as their scores predict: predictions fall as it grows,
    so every observation moves it by its error. Levels share it; fitted ones of trained heads differ by some percent.
    """

    def __init__(self, start: DraftTemperature) -> None:
        self._logs = [math.log(sigmas[0]) for _, sigmas in (start[0], start[-1])]
        self._seen = [0.0, 0.0]

    @property
    def points(self) -> DraftTemperature:
        cold, warm = map(math.exp, self._logs)
        return ((0.0, (cold,)), (1.0, (warm,)))

    def observe(self, temperature: float, predicted: float, right: bool) -> None:
        """The best first guess for a request at ``temperature`` (0 to 1) survives with the probability ``predicted``; did it?"""
        for i, share in enumerate((1 - temperature, temperature)):
            self._seen[i] += share
            rate = share * max(_GAIN / (_HEADSTART + self._seen[i]), _GAIN * _FORGETTING)
            self._logs[i] = min(max(self._logs[i] + rate * (predicted - right), math.log(LOW)), math.log(HIGH))
