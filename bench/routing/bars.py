"""The router against its bars, over several seeds: python -m bench.routing.bars [CASE ...] [--seeds N] [--jobs J]

Prints the mean and the worst of all seeds for each figure, the bar, and whether the worst is on the right side of it.
Figures without a bar are there because they are what the others cost. Everything runs in virtual time, over the
router's own scheduler and admission; how it is done is said in bench/routing/figures.py.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Final, NamedTuple

from bench.routing import figures
from bench.routing.figures import Figure

_Case = Callable[[int, float], Iterator[Figure]]
CASES: Final[dict[str, _Case]] = {
    "unequal": figures.unequal,
    "calibration": figures.calibration,
    "shared": figures.shared,
    "shared-unequal": figures.shared_unequal,
    "noisy": figures.noisy,
    "flood": figures.flood,
    "overload": figures.overload,
    "recovery": figures.recovery,
    "retries": figures.retries,
    "lies": figures.lies,
}


class Bar(NamedTuple):
    """What a figure must not exceed; or, for `least`, not fall below."""

    value: float
    least: bool = False

    def __str__(self) -> str:
        return f"{'>=' if self.least else '<='} {self.value:g}"

    def worst(self, values: Iterable[float]) -> float:
        """The value that is furthest on the wrong side."""
        return min(values) if self.least else max(values)

    def is_met(self, value: float) -> bool:
        """Whether a value is on the right side."""
        return value >= self.value if self.least else value <= self.value


BARS: Final = {
    "70% load: p95 over least requests": Bar(0.7),
    "70% load: p99 over least requests": Bar(0.65),
    "70% load: p95 over round robin": Bar(0.2),
    "95% load: p95 over least requests": Bar(0.8),
    "95% load: p99 over least requests": Bar(0.65),
    "95% load: p95 over round robin": Bar(0.2),
    "s until prefill is known": Bar(10.0),
    "s until decoding is known": Bar(10.0),
    "hit rate over the best possible": Bar(0.95, least=True),
    "requests of the busiest worker over the mean": Bar(1.3),
    **{f"p90 over {policy}": Bar(1.0) for policy in ("random", "round robin", "least requests", "power of two")},
    "p90 over prefix only": Bar(1.0),
    **{f"{rate}/s: p90 over least requests": Bar(1.0) for rate in (8, 20)},
    "the others' p99 over theirs alone": Bar(1.25),
    "Jain's index of what the others asked for and got": Bar(0.95, least=True),
    "of the higher class refused": Bar(0),
    "longest wait of the lower class over the bound": Bar(1.01),
    "2 x: served over peak": Bar(0.95, least=True),
    "5 x: served over peak": Bar(0.95, least=True),
    "10 x: served over peak": Bar(0.9, least=True),
    **{f"{factor} x: p99 of the admitted over that at capacity": Bar(1.5) for factor in (2, 5, 10)},
    **{f"{factor} x: ms until refused, p99": Bar(50.0) for factor in (2, 5, 10)},
    "s until nobody is refused and first tokens come as before": Bar(5.0),
    "s until they come as they would have without the overload": Bar(5.0),
    "attempts over requests": Bar(1.1),
    "share of requests served": Bar(0.999, least=True),
    "its reports stand still for 30 s: busiest worker over the mean": Bar(1.3),
    "its reports stand still for 30 s: not served": Bar(0),
    "it boasts: busiest worker over the mean": Bar(1.5),
    "it boasts: not served": Bar(0),
    "it reports nonsense: busiest worker over the mean": Bar(1.5),
    "it reports nonsense: not served": Bar(0),
    "its GPU is said to throttle: busiest worker over the mean": Bar(1.5),
    "its GPU is said to throttle: not served": Bar(0),
}
_NO_BAR: Final = Bar(float("inf"))


def _measure(job: tuple[str, int, float]) -> list[Figure]:
    case, seed, seconds = job
    return list(CASES[case](seed, seconds))


def _line(name: str, values: list[float]) -> str:
    bar = BARS.get(name, _NO_BAR)
    worst, mean = bar.worst(values), sum(values) / len(values)
    verdict = "" if bar is _NO_BAR else "pass" if bar.is_met(worst) else "on average" if bar.is_met(mean) else "FAIL"
    said = "" if bar is _NO_BAR else str(bar)
    return f"  {name:<66}{mean:>9.3f}{worst:>9.3f}  {said:<9}{verdict}"


def _report(case: str, of_seeds: Iterable[list[Figure]]) -> None:
    values: dict[str, list[float]] = {}
    began = time.monotonic()
    for found in of_seeds:
        for name, value in found:
            values.setdefault(name, []).append(value)
    print(f"{case}: {CASES[case].__doc__}  ({time.monotonic() - began:.0f} s)")
    for name, several in values.items():
        print(_line(name, several), flush=True)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all when none is named")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=240.0, help="length of each trace, in virtual seconds")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time")
    options = parser.parse_args()
    unknown = set(options.cases) - set(CASES)
    if unknown:
        parser.error(f"there is no case {sorted(unknown)[0]!r}")
    print(f"{'figure':<68}{'mean':>9}{'worst':>9}  {'bar':<9}")
    with ProcessPoolExecutor(options.jobs) as pool:
        for case in options.cases or CASES:
            jobs = [(case, seed, options.seconds) for seed in range(1, options.seeds + 1)]
            _report(case, pool.map(_measure, jobs))


if __name__ == "__main__":
    main()
