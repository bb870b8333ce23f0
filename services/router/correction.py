"""How far predictions were off lately: a factor learnt from what came of them."""

from typing import Final

__all__ = ["Correction"]

# What counts as known beforehand: a second of predictions that came true.
_PRIOR_SECONDS: Final = 0.5
_KEEP: Final = 0.93
# Slower than predicted may be anything, a worker that boasts included; more than twice as fast is not to be hoped for.
_LEAST: Final = 0.5
_MOST: Final = 10_000.0


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
