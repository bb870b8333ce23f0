"""The rank sum test that timing tests rely on."""

import random

import pytest

from tests.support.statistics import mann_whitney


def test_known_samples_have_the_p_value_that_the_books_have() -> None:
    # As scipy.stats.mannwhitneyu says, method "asymptotic", without continuity correction.
    assert mann_whitney([1, 2, 3, 4, 5, 6, 7, 8], [5, 6, 7, 8, 9, 10, 11, 12]) == pytest.approx(0.0112, abs=5e-4)
    assert mann_whitney([1, 1, 1], [1, 1, 1]) == 1.0


def test_a_small_shift_is_found_and_none_is_not() -> None:
    rng = random.Random(1)
    first, second = ([rng.gauss(0, 1) for _ in range(2000)] for _ in range(2))
    assert mann_whitney(first, second) > 0.01
    assert mann_whitney(first, [value + 0.2 for value in second]) < 1e-4
