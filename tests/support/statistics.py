"""Whether two samples differ."""

import math
from collections.abc import Sequence
from itertools import groupby
from statistics import NormalDist

__all__ = ["mann_whitney"]


def mann_whitney(first: Sequence[float], second: Sequence[float]) -> float:
    """The p-value, two-sided, that both samples come from one distribution: the rank sum test, for large samples."""
    ranked = sorted([(value, 0) for value in first] + [(value, 1) for value in second])
    n, m = len(first), len(second)
    total = n + m
    rank_sum, tied, seen = 0.0, 0.0, 0
    for _, group in groupby(ranked, key=lambda pair: pair[0]):
        members = [sample for _, sample in group]
        size = len(members)
        # Of equal values each has the middle one of their ranks.
        rank_sum += members.count(0) * (seen + (size + 1) / 2)
        tied += size**3 - size
        seen += size
    mean = n * m / 2
    deviation = math.sqrt(n * m / 12 * (total + 1 - tied / (total * (total - 1))))
    if not deviation:
        return 1.0
    return 2 * NormalDist().cdf(-abs(rank_sum - n * (n + 1) / 2 - mean) / deviation)
