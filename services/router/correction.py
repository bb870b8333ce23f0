"""How far predictions were off lately, learnt from what came of them."""

import math
from typing import Final

__all__ = ["Correction", "Delay"]

# What counts as known beforehand: a second of predictions that came true.
_PRIOR_SECONDS: Final = 0.5
_KEEP: Final = 0.93
# Slower than predicted may be anything, a worker that boasts included; more than twice as fast is not to be hoped for.
_LEAST: Final = 0.5
_MOST: Final = 10_000.0
# Whoever is avoided for what it took gives nothing to learn from: it is tried again some time later.
_HALF_LIFE_SECONDS: Final = 10.0


class Correction:
    """Observed over predicted time, the latest dozen or so of requests counting most, and long ones more than short."""

    __slots__ = ("_observed", "_predicted", "factor")

    def __init__(self) -> None:
        self._observed = self._predicted = _PRIOR_SECONDS
        self.factor = 1.0
        """What predictions are multiplied with."""

    def learn(self, *, predicted: float, observed: float) -> None:
        """Something took `observed` seconds, of which `predicted` had been predicted, without the factor."""
        if predicted <= 0 or observed < 0:
            return
        self._observed = self._observed * _KEEP + observed
        self._predicted = self._predicted * _KEEP + predicted
        self.factor = min(_MOST, max(_LEAST, self._observed / self._predicted))


class Delay:
    """Seconds that requests take beyond what is predicted, however much they ask for, on average lately.

    What holds up a machine delays small prompts by the same time as long ones. A factor learnt from small ones would
    take a few long ones for a backlog of minutes.
    """

    __slots__ = ("_at", "_sum", "_weight")

    def __init__(self) -> None:
        self._sum = 0.0
        self._weight = 1.0
        self._at = 0.0

    def learn(self, seconds: float, now: float) -> None:
        """Something took so much longer than predicted; less than nothing where it was quicker."""
        self._sum = self._sum * self._faded(now) * _KEEP + seconds
        self._weight = self._weight * _KEEP + 1.0
        self._at = now

    def seconds(self, now: float) -> float:
        """What is to be expected beyond the prediction, at least 0; `now` is on the clock of `learn`."""
        if self._sum <= 0.0:
            return 0.0
        return self._sum / self._weight * self._faded(now)

    def _faded(self, now: float) -> float:
        return math.exp2((self._at - now) / _HALF_LIFE_SECONDS)
