"""What contenders that take turns differ by: within each turn, since a busy machine slows all of it."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Final

__all__ = ["Middle", "middle", "ratios"]

_CONFIDENCE: Final = 0.95


@dataclass(frozen=True, slots=True)
class Middle:
    """A median, and between which values the median of endlessly many turns lies in 19 cases of 20."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def middle(values: Sequence[float]) -> Middle:
    """The median of what several turns gave. Nothing is assumed of how they differ, only that each is one of its own.

    With fewer than six turns the bounds are the extremes, and they are too narrow.
    """
    ordered = sorted(values)
    count = len(ordered)
    # So many on either side are left out: that the true median lies among them is like that many heads of all throws.
    outside, left_out = 0.0, 0
    while left_out < (count - 1) // 2:
        outside += 2 * comb(count, left_out) / 2**count
        if outside > 1 - _CONFIDENCE:
            break
        left_out += 1
    bound = max(0, left_out - 1)
    return Middle(statistics.median(ordered), ordered[bound], ordered[count - 1 - bound])


def ratios(own: Sequence[float], others: Sequence[float]) -> Middle:
    """How many times as much one takes as the other, by what both took in each turn."""
    return middle([mine / its for mine, its in zip(own, others, strict=True)])
