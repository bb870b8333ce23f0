"""What a measured duration usually is, so that it is noticed when it is not."""

from typing import Final

__all__ = ["Usual"]

_SETTLE_REPORTS: Final = 40
"""Reports until what is measured counts as usual: about ten seconds of work."""
# So slowly does the usual follow: what became slow is told of for minutes, then that is how it is.
_MEMORY_SECONDS: Final = 600.0
_LONGEST_STEP_SECONDS: Final = 1.0


class Usual:
    """A mean that follows slowly."""

    __slots__ = ("_count", "_observed_at", "_value")

    def __init__(self) -> None:
        self._value = 0.0
        self._count = 0
        self._observed_at = 0.0

    @property
    def seconds(self) -> float | None:
        """None while too little was observed."""
        return self._value if self._count >= _SETTLE_REPORTS else None

    def observe(self, seconds: float, now: float) -> None:
        """It is so much now; `now` is on any monotonic clock, in seconds."""
        passed = min(_LONGEST_STEP_SECONDS, max(0.0, now - self._observed_at))
        self._observed_at = now
        self._count += 1
        weight = max(passed / _MEMORY_SECONDS, 1 / self._count if self._count <= _SETTLE_REPORTS else 0.0)
        self._value += weight * (seconds - self._value)
