"""Takes workers that fail out of service for a while, and brings them back gradually."""

from typing import Final

__all__ = ["Ejection"]

_CONSECUTIVE: Final = 5
_WINDOW_WEIGHT: Final = 0.05
_FAILING_SHARE: Final = 0.5
_LEAST_JUDGED: Final = 20
_FIRST_SECONDS: Final = 5.0
_LONGEST_SECONDS: Final = 120.0
_RETURN_SECONDS: Final = 10.0
_FIRST_RATIO: Final = 0.1
# So long after its return without a failure a worker is as good as new.
_FORGIVEN_SECONDS: Final = 60.0


class Ejection:
    """How one worker's requests ended, and what follows from it. Times are seconds on one monotonic clock."""

    __slots__ = ("_consecutive", "_judged", "_share", "_times", "until")

    def __init__(self) -> None:
        self.until: float | None = None
        """When it returns, or returned, from its last ejection; None when it never was ejected."""
        self._consecutive = 0
        self._judged = 0
        self._share = 0.0
        self._times = 0

    @property
    def is_due(self) -> bool:
        """Whether it fails so much that it should be ejected: five in a row, or half of what it gets."""
        if self._consecutive >= _CONSECUTIVE:
            return True
        return self._judged >= _LEAST_JUDGED and self._share >= _FAILING_SHARE

    def note(self, *, failed: bool) -> None:
        """A request ended."""
        self._judged += 1
        self._consecutive = self._consecutive + 1 if failed else 0
        self._share += max(_WINDOW_WEIGHT, 1 / self._judged) * (float(failed) - self._share)

    def eject(self, now: float) -> None:
        """Takes it out; twice as long as last time, where that was not long ago."""
        recent = self.until is not None and now - self.until < _FORGIVEN_SECONDS
        self._times = self._times + 1 if recent else 1
        self.until = now + min(_LONGEST_SECONDS, _FIRST_SECONDS * 2 ** (self._times - 1))
        # One more failure after its return is enough, since it has shown what it is.
        self._consecutive = _CONSECUTIVE - 1
        self._judged, self._share = 0, 0.0

    def admitted_ratio(self, now: float) -> float:
        """Share of its requests that it gets: 0 while it is out, then more from second to second."""
        if self.until is None or now >= self.until + _RETURN_SECONDS:
            return 1.0
        if now < self.until:
            return 0.0
        return _FIRST_RATIO + (1 - _FIRST_RATIO) * (now - self.until) / _RETURN_SECONDS
