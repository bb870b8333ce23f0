"""How far the mesh is degraded: a level by the share of workers that are healthy, which changes only after a while."""

from enum import IntEnum
from typing import Final

from services.common.policy import DegradationPolicy

__all__ = ["Degradation", "Level"]

_NONE_SHARE: Final = 1.0


class Level(IntEnum):
    """What the mesh gives up. A higher level includes the lower ones."""

    NONE = 0
    SHORT_OUTPUTS = 1
    REFUSING = 2


class Degradation:
    """Follows the share of healthy workers. All times are seconds on the router's monotonic clock."""

    def __init__(self) -> None:
        self.level = Level.NONE
        self.healthy = 0
        self.expected = 0
        self._candidate = Level.NONE
        self._since = 0.0

    @property
    def reason(self) -> str:
        """Why it is degraded, in words; empty when it is not."""
        if self.level is Level.NONE:
            return ""
        return f"{self.healthy} of {self.expected} workers are healthy"

    def observe(self, healthy: int, expected: int, policy: DegradationPolicy, now: float) -> bool:
        """Takes in how many workers are healthy of those that should be; tells whether the level changed."""
        self.healthy, self.expected = healthy, expected
        due = self._due(healthy / expected if expected else _NONE_SHARE, policy)
        if due is self.level:
            self._candidate = due
            return False
        if due is not self._candidate and not self._is_same_way(due):
            self._since = now
        self._candidate = due
        wait = policy.worsen_after_seconds if due > self.level else policy.recover_after_seconds
        if now - self._since < wait:
            return False
        self.level = due
        return True

    def _is_same_way(self, due: Level) -> bool:
        # Ever worse, or ever better: the time that has passed counts.
        return self._candidate is not self.level and (due > self.level) == (self._candidate > self.level)

    def _due(self, share: float, policy: DegradationPolicy) -> Level:
        for level, bound in (
            (Level.REFUSING, policy.refusing_below),
            (Level.SHORT_OUTPUTS, policy.short_outputs_below),
        ):
            # To leave a level takes more than to enter it, or a share at the bound would flap. All there is, is enough.
            margin = policy.recover_margin if level <= self.level else 0.0
            if bound and share < min(bound + margin, _NONE_SHARE):
                return level
        return Level.NONE
