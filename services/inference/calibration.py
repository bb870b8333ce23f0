"""How fast an engine is, learnt from its own steps: prefill in tokens a second, decode in seconds a step by batch."""

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Final

__all__ = ["DecodeModel", "MovingMean", "PrefillMeter", "TokenRate"]

# A sample's weight after this many newer ones is 1/e: a few seconds, so that a card that throttles is soon known to.
_MEMORY_STEPS: Final = 100.0
# The same for prefill, counted in tokens since prompts differ in size by orders of magnitude.
_MEMORY_TOKENS: Final = 10_000.0
# Prompts that were all but cached measure a step's fixed cost, not the speed.
_SMALL_PREFILL_TOKENS: Final = 32
# A step this much slower than the model says was held up by something else: a prefill chunk, a busy machine.
_OUTLIER_FACTOR: Final = 3.0
_WARM_SAMPLES: Final = 20.0


class DecodeModel:
    """Seconds of a decode step as a line over the batch: `base + per_sequence * (batch - 1)`.

    Least squares with exponential forgetting. Neither coefficient is ever negative; while only one batch size was
    seen, the line is flat.
    """

    def __init__(self) -> None:
        self._weight = 0.0
        self._x = 0.0
        self._y = 0.0
        self._xx = 0.0
        self._xy = 0.0

    def observe(self, batch: int, seconds: float) -> None:
        """One decode step of `batch` sequences took `seconds`."""
        if batch < 1 or not 0 < seconds < math.inf:
            return
        x = float(batch - 1)
        seconds = self._tamed(x, seconds)
        keep = math.exp(-1 / _MEMORY_STEPS)
        self._weight = self._weight * keep + 1
        self._x = self._x * keep + x
        self._y = self._y * keep + seconds
        self._xx = self._xx * keep + x * x
        self._xy = self._xy * keep + x * seconds

    def _tamed(self, x: float, seconds: float) -> float:
        if self._weight < _WARM_SAMPLES:
            return seconds
        base, slope = self._line()
        # Bounded, not dropped: an engine that did become slower is followed.
        return min(seconds, _OUTLIER_FACTOR * (base + slope * x))

    def _line(self) -> tuple[float, float]:
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - mean_x * mean_x
        if variance < 0.05:
            return mean_y, 0.0
        slope = max(0.0, (self._xy / self._weight - mean_x * mean_y) / variance)
        base = mean_y - slope * mean_x
        if base < 0:
            # The line through the origin of the batch axis that fits best.
            return 0.0, self._xy / self._xx
        return base, slope

    @property
    def base_seconds(self) -> float | None:
        """A step with one sequence; None while nothing was measured."""
        return self._line()[0] if self._weight else None

    @property
    def seconds_per_sequence(self) -> float | None:
        """What each further sequence adds; None while nothing was measured."""
        return self._line()[1] if self._weight else None


class PrefillMeter:
    """Prompt tokens computed a second, over the time in which at least one prompt was being computed.

    Prompts that end in the same step are one group. The time between a group's first start (or the end of the group
    before, when that was later) and its end is what its tokens took, decode steps in between included.
    """

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self._last_end = -math.inf
        self._group_end = -math.inf
        self._group_start = math.inf
        self._group_tokens = 0

    def observe(self, tokens: int, started: float, ended: float) -> None:
        """A prompt of which `tokens` were computed (cached ones not counted) ran from `started` to `ended`.

        Times are seconds on one monotonic clock; prompts come in the order in which they end.
        """
        if ended != self._group_end:
            self._close_group()
            self._group_end = ended
        self._group_start = min(self._group_start, started)
        self._group_tokens += tokens

    def _close_group(self) -> None:
        seconds = self._group_end - max(self._group_start, self._last_end)
        if self._group_tokens >= _SMALL_PREFILL_TOKENS and 0 < seconds < math.inf:
            keep = math.exp(-self._group_tokens / _MEMORY_TOKENS)
            self._tokens = self._tokens * keep + self._group_tokens
            self._seconds = self._seconds * keep + seconds
        self._last_end = max(self._last_end, self._group_end)
        self._group_start, self._group_tokens = math.inf, 0

    @property
    def tokens_per_second(self) -> float | None:
        """None while nothing was measured."""
        tokens, seconds = self._tokens, self._seconds
        if not seconds:
            # Nothing but the group that is still open, or small prompts.
            open_seconds = self._group_end - max(self._group_start, self._last_end)
            if self._group_tokens < _SMALL_PREFILL_TOKENS or not 0 < open_seconds < math.inf:
                return None
            tokens, seconds = float(self._group_tokens), open_seconds
        return tokens / seconds


class MovingMean:
    """A mean that forgets: each new value moves it by a fixed share of the difference."""

    def __init__(self, share: float = 0.1) -> None:
        self._share = share
        self.value: float | None = None
        """None while nothing was observed."""

    def observe(self, value: float) -> None:
        """One more value."""
        self.value = value if self.value is None else self.value + self._share * (value - self.value)


class TokenRate:
    """Tokens a second, over the last five seconds."""

    _SLOT_SECONDS: Final = 0.25
    _SLOTS: Final = 20

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds."""
        self._clock = clock
        self._slots: deque[list[int]] = deque(maxlen=self._SLOTS + 1)
        """Which slot, and its tokens."""

    def observe(self, tokens: int) -> None:
        """So many were produced now."""
        slot = int(self._clock() / self._SLOT_SECONDS)
        if self._slots and self._slots[-1][0] == slot:
            self._slots[-1][1] += tokens
        else:
            self._slots.append([slot, tokens])

    @property
    def per_second(self) -> float:
        """0 when there were none."""
        now = self._clock() / self._SLOT_SECONDS
        recent = [(slot, tokens) for slot, tokens in self._slots if slot > now - self._SLOTS]
        if not recent:
            return 0.0
        # A stream that has just begun is not slow for the time before it.
        slots = min(float(self._SLOTS), max(1.0, now - recent[0][0]))
        return sum(tokens for _, tokens in recent) / (slots * self._SLOT_SECONDS)
